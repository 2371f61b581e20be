"""The one list of fused ops. Importing it registers them all; tests and bench rows come from it."""

from __future__ import annotations

from fxopt.kernels.dequantize import OP as dequantize
from fxopt.kernels.geglu import OP as geglu
from fxopt.kernels.layer_norm import OP as layer_norm
from fxopt.kernels.linear_cross_entropy import OP as linear_cross_entropy
from fxopt.kernels.linear_nf4 import OP as linear_nf4
from fxopt.kernels.lora_linear import OP as lora_linear
from fxopt.kernels.nf4 import OP as nf4_dequantize
from fxopt.kernels.op import FusedOp
from fxopt.kernels.quantized_linear import OP as quantized_linear
from fxopt.kernels.rms_norm import OP as rms_norm
from fxopt.kernels.rope import OP as rope
from fxopt.kernels.swiglu import OP as swiglu

CATALOG: tuple[FusedOp, ...] = (
    rms_norm,
    layer_norm,
    swiglu,
    geglu,
    rope,
    dequantize,
    quantized_linear,
    nf4_dequantize,
    linear_nf4,
    lora_linear,
    linear_cross_entropy,
)
