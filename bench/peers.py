"""Other libraries' kernels for the calls of the catalog, where they are installed: what a row is measured against beside eager
PyTorch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import importlib.util
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.op import Case

Call = Callable[..., tuple[Tensor, ...]]


def bitsandbytes(op: str, case: Case, args: Sequence[Any]) -> Call | None:
    """Its C++ (CPU) or CUDA dequantization of NF4."""
    if op != "dequantize" or args[1] != "nf4" or importlib.util.find_spec("bitsandbytes") is None:
        return None
    bnb = importlib.import_module("bitsandbytes.functional")
    (codes, absmax, levels), _, shape, dtype = args[:4]
    state = bnb.QuantState(absmax, shape=torch.Size(shape), code=levels, blocksize=64, quant_type="nf4", dtype=dtype)
    return lambda *_: (bnb.dequantize_4bit(codes, state),)


def fused_adamw(op: str, case: Case, args: Sequence[Any]) -> Call | None:
    """torch.optim.AdamW(fused=True)'s operator on the same flat tensors."""
    if op != "adamw_" or args[4] is not None or args[-1] is not None:
        return None
    _, _, _, _, _, lr, beta1, beta2, eps, weight_decay, step, _ = args
    steps = torch.tensor(float(step - 1), device=args[0].device)

    def call(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *_: Any) -> tuple[Tensor, ...]:
        torch._fused_adamw_([param], [grad], [exp_avg], [exp_avg_sq], [], [steps.clone().add_(1)], lr=lr, beta1=beta1, beta2=beta2,
                            weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False)
        return param, exp_avg, exp_avg_sq

    return call


def liger(op: str, case: Case, args: Sequence[Any]) -> Call | None:
    """Liger-Kernel's functions, for the calls that they can do as given: no statistics."""
    if not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None:
        return None
    ops = importlib.import_module("liger_kernel.ops")
    if op == "rms_norm":
        _, _, eps, offset, cast = args
        mode = {"none": "none", "cast_then_scale": "llama"}.get(cast, "gemma")
        return lambda x, weight, *_: (ops.LigerRMSNormFunction.apply(x, weight, eps, offset, mode, False),)
    if op == "layer_norm" and args[1] is not None and args[2] is not None:
        return lambda x, weight, bias, eps: (ops.LigerLayerNormFunction.apply(x, weight, bias, eps),)
    if op == "swiglu":
        return lambda gate, up: (ops.LigerSiLUMulFunction.apply(gate, up),)
    if op == "geglu" and args[2] == "tanh":
        return lambda gate, up, _: (ops.LigerGELUMulFunction.apply(gate, up),)
    if op == "linear_cross_entropy" and case.grads:
        ignore, reduction, smoothing, cap, scale, z_loss = args[4:10]
        if scale == 1.0:
            return lambda hidden, weight, bias, target, *_: (ops.LigerFusedLinearCrossEntropyFunction.apply(
                hidden, weight, target, bias, None, ignore, z_loss, smoothing, reduction, cap or None)[0],)
    return None


PEERS: dict[str, Callable[[str, Case, Sequence[Any]], Call | None]] = {"bitsandbytes": bitsandbytes, "torch fused": fused_adamw, "liger": liger}
