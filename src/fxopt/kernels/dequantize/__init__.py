"""`fxopt::dequantize`: reference.py (plain form), body.py (ATen), triton.py (GPU), cases.py (test inputs)."""

from fxopt.kernels.dequantize import body, reference
from fxopt.kernels.op import FusedOp, Kernel, register

OP = register(
    FusedOp(
        forward=Kernel(
            "dequantize(Tensor[] base, str format, SymInt[] shape, ScalarType dtype) -> Tensor",
            body=body.forward,
            fake=body.forward_fake,
            cuda="fxopt.kernels.dequantize.triton:forward",
        ),
        reference=reference.dequantize,
    )
)
