"""The one list of fused ops. Importing it registers them all; tests and bench rows come from it."""

from __future__ import annotations

from fxopt.kernels.add_layer_norm import OP as add_layer_norm
from fxopt.kernels.add_rms_norm import OP as add_rms_norm
from fxopt.kernels.adamw import OP as adamw
from fxopt.kernels.adamw_8bit import OP as adamw_8bit
from fxopt.kernels.cross_entropy import OP as cross_entropy
from fxopt.kernels.dequantize import OP as dequantize
from fxopt.kernels.dora_norm import OP as dora_norm
from fxopt.kernels.geglu import OP as geglu
from fxopt.kernels.layer_norm import OP as layer_norm
from fxopt.kernels.linear_cross_entropy import OP as linear_cross_entropy
from fxopt.kernels.lora_embedding import OP as lora_embedding
from fxopt.kernels.lora_linear import OP as lora_linear
from fxopt.kernels.op import FusedOp
from fxopt.kernels.packed_attention import OP as packed_attention
from fxopt.kernels.quantized_linear import OP as quantized_linear
from fxopt.kernels.rms_norm import OP as rms_norm
from fxopt.kernels.rope import OP as rope
from fxopt.kernels.swiglu import OP as swiglu

CATALOG: tuple[FusedOp, ...] = (
    rms_norm,
    layer_norm,
    add_rms_norm,
    add_layer_norm,
    swiglu,
    geglu,
    rope,
    packed_attention,
    dequantize,
    quantized_linear,
    lora_linear,
    lora_embedding,
    dora_norm,
    cross_entropy,
    linear_cross_entropy,
    adamw,
    adamw_8bit,
)
