"""The JSON of bitsandbytes files: `kernels/formats/nf4_state.py`."""

from fxopt.kernels.formats.nf4_state import KEY, QuantState, parse_quant_state, quant_state_json

__all__ = ["KEY", "QuantState", "parse_quant_state", "quant_state_json"]
