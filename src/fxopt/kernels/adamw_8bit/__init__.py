"""`fxopt::adamw_8bit_`: codes.py (block-wise 8-bit numbers), reference.py (plain form), body.py (ATen), triton.py (CUDA),
cases.py (test inputs)."""

from fxopt.kernels.adamw_8bit import body, reference
from fxopt.kernels.in_place import InPlaceOp, register_in_place
from fxopt.kernels.op import Kernel

OP = register_in_place(
    InPlaceOp(
        forward=Kernel(
            "adamw_8bit_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_absmax, Tensor(d!) exp_avg_sq, "
            "Tensor(e!) exp_avg_sq_absmax, Tensor maps, Tensor? grad_factor, float lr, float beta1, float beta2, float eps, "
            "float weight_decay, int step, int? seed) -> ()",
            body=body.update,
            fake=body.update_fake,
            cuda="fxopt.kernels.adamw_8bit.triton:update",
        ),
        reference=reference.adamw_8bit,
        outputs=3,
        results=body.results,
    )
)
