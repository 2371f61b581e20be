"""8-bit AdamW from ATen calls: blocks are decoded, stepped by ATen's fused AdamW and encoded while they are in cache."""

from __future__ import annotations

import torch

from fxopt.kernels.adamw.body import check_step, fused_step, round_into
from fxopt.kernels.adamw_8bit.codes import BLOCK, count, decode, dynamic_maps, encode
from fxopt.kernels.in_place import writes

# Elements at a time. Measured on 4.9 million, one thread, in ms: 2^14 81, 2^15 67, 2^16 60, 2^17 57, 2^18 58.
PART = 1 << 17


def check(param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, maps, grad_factor, step):
    """Refuse what the kernels would compute wrongly."""
    torch._check(param.dtype != torch.float64, lambda: "8-bit averages are computed in fp32: an fp64 parameter needs adamw_")
    torch._check(param.is_contiguous(), lambda: "param is not contiguous")
    blocks = count(param.numel())
    for name, codes, absmax in (("exp_avg", exp_avg, exp_avg_absmax), ("exp_avg_sq", exp_avg_sq, exp_avg_sq_absmax)):
        fits = codes.dtype == torch.uint8 and codes.is_contiguous() and codes.numel() == param.numel()
        torch._check(fits, lambda: f"{name} is not {param.numel()} contiguous codes in uint8")
        fits = absmax.dtype == torch.float32 and absmax.is_contiguous() and absmax.numel() == blocks
        torch._check(fits, lambda: f"{name}_absmax is not {blocks} contiguous numbers in fp32, one for {BLOCK} elements")
    torch._check(maps.shape == (2, 256) and maps.is_contiguous(), lambda: "maps are not what dynamic_maps() gives")
    check_step(param, grad, grad_factor, step)


@writes(0, 2, 3, 4, 5)
def update(
    param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, maps, grad_factor, lr, beta1, beta2, eps, weight_decay,
    step, seed,
):  # fmt: skip
    """One step of AdamW over one flat buffer, in place, with averages of 8 bits in blocks of 256 elements.

    The averages are decoded to fp32, stepped as `adamw_` does, used for the update, and encoded again: signed and unsigned
    dynamic map, fp32 maximum for each block. A second moment above zero never gets the code of zero (`codes.encode`).

    Args:
        param: contiguous, of any shape, fp16, bf16 or fp32. Written. Blocks count from its first element; the last may be
            shorter.
        grad: of param's shape, any floating dtype, any strides. Not written. An element that is not finite spoils the
            averages of its block: they become NaN.
        exp_avg, exp_avg_sq: codes, as many as elements, uint8. Written. At the start: anything, with maxima of zero.
        exp_avg_absmax, exp_avg_sq_absmax: fp32, one for each block. Written.
        maps: `dynamic_maps()` on param's device, fp32 [2, 256]: an argument, so that no call copies it to the device.
        grad_factor, lr, beta1, beta2, eps, weight_decay, step, seed: see `adamw_`.

    Returns:
        nothing.

    Raises:
        RuntimeError: shapes, dtypes or layouts that do not fit, an fp64 param, other maps. CheckError: as for `adamw_`.

    Source: Dettmers et al., 2022, https://arxiv.org/abs/2110.02861.
    """
    check(param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, maps, grad_factor, step)
    torch._check(torch.equal(maps, dynamic_maps(maps.device)), lambda: "maps are not what dynamic_maps() gives")
    param, grad, exp_avg, exp_avg_sq = (tensor.reshape(-1) for tensor in (param, grad, exp_avg, exp_avg_sq))
    factor = None if grad_factor is None else grad_factor.float()
    for start in range(0, param.numel(), PART):
        part, tops = slice(start, start + PART), slice(start // BLOCK, (start + PART) // BLOCK)
        values, pull = param[part].float(), grad[part].float().contiguous()
        if factor is not None:
            pull = pull * factor
        m = decode(exp_avg[part], exp_avg_absmax[tops], maps[0])
        v = decode(exp_avg_sq[part], exp_avg_sq_absmax[tops], maps[1])
        fused_step([values], [pull], [m], [v], lr, beta1, beta2, eps, weight_decay, step)
        if param.dtype != torch.float32:
            round_into(param[part], values, start, seed)
        encode(m, exp_avg[part], exp_avg_absmax[tops], signed=True)
        encode(v, exp_avg_sq[part], exp_avg_sq_absmax[tops], signed=False)


def update_fake(
    param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, maps, grad_factor, lr, beta1, beta2, eps, weight_decay,
    step, seed,
):  # fmt: skip
    check(param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, maps, grad_factor, step)


def results(args):
    """The new param, and what the new averages decode to."""
    maps = args[6]
    return args[0], decode(args[2], args[3], maps[0]), decode(args[4], args[5], maps[1])
