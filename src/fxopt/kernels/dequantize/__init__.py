"""`fxopt::dequantize`: reference.py (plain form), body.py (ATen), cases.py (test inputs)."""

from fxopt.kernels.dequantize import body, reference
from fxopt.kernels.op import FusedOp, Kernel, register

OP = register(
    FusedOp(
        forward=Kernel(
            "dequantize(Tensor[] base, str format, SymInt[] shape, ScalarType dtype) -> Tensor",
            body=body.forward,
            fake=body.forward_fake,
        ),
        reference=reference.dequantize,
    )
)
