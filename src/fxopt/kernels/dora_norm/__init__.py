"""`fxopt::dora_norm`: reference.py (plain form), body.py (ATen), triton.py, cases.py (test inputs)."""

from fxopt.kernels.dora_norm import body, reference
from fxopt.kernels.op import FusedOp, Kernel, register

OP = register(
    FusedOp(
        forward=Kernel(
            "dora_norm(Tensor[] base, str format, SymInt[] shape, Tensor lora_a, Tensor lora_b, float scale, bool transposed) -> Tensor",
            body=body.forward,
            fake=body.forward_fake,
            cuda="fxopt.kernels.dora_norm.triton:forward",
        ),
        reference=reference.dora_norm,
    )
)
