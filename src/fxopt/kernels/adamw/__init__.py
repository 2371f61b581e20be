"""`fxopt::adamw_`: reference.py (plain form), body.py (ATen), triton.py (CUDA), cases.py (test inputs)."""

from fxopt.kernels.adamw import body, reference
from fxopt.kernels.in_place import InPlaceOp, register_in_place
from fxopt.kernels.op import Kernel

OP = register_in_place(
    InPlaceOp(
        forward=Kernel(
            "adamw_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor? grad_factor, "
            "float lr, float beta1, float beta2, float eps, float weight_decay, int step, int? seed) -> ()",
            body=body.update,
            fake=body.update_fake,
            cuda="fxopt.kernels.adamw.triton:update",
        ),
        reference=reference.adamw,
        outputs=3,
        results=lambda args: (args[0], args[2], args[3]),
    )
)
