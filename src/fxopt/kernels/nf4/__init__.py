"""`fxopt::nf4_dequantize`: reference.py (the format, `quantize`), body.py (ATen), state.py (the JSON
of bitsandbytes files), cases.py (test inputs)."""

from fxopt.kernels.nf4 import body, reference
from fxopt.kernels.nf4.reference import BLOCK, LEVELS, quantize
from fxopt.kernels.nf4.state import KEY, QuantState, parse_quant_state, quant_state_json
from fxopt.kernels.op import FusedOp, Kernel, register

OP = register(
    FusedOp(
        forward=Kernel(
            "nf4_dequantize(Tensor packed, Tensor absmax, SymInt[] shape, ScalarType dtype) -> Tensor",
            body=body.dequantize,
            fake=body.dequantize_fake,
        ),
        reference=reference.dequantize,
    )
)

__all__ = ["BLOCK", "KEY", "LEVELS", "OP", "QuantState", "parse_quant_state", "quant_state_json", "quantize"]
