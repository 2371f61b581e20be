"""8-bit AdamW in plain PyTorch: decode the averages, step, encode them again."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxopt.kernels.adamw.reference import adamw
from fxopt.kernels.adamw_8bit.codes import BLOCK, dynamic_maps


def adamw_8bit(
    param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, maps, grad_factor, lr, beta1, beta2, eps, weight_decay,
    step, seed,
):  # fmt: skip
    """Same arguments as `fxopt::adamw_8bit_`; returns the new param and what the new averages decode to. Maxima in fp64 ask
    for the exact averages, not encoded: coding is the largest part of the error."""
    signed, unsigned = dynamic_maps(param.device).to(exp_avg_absmax.dtype)
    new, m, v = adamw(
        param.flatten(), grad.flatten(), _decoded(exp_avg, exp_avg_absmax, signed), _decoded(exp_avg_sq, exp_avg_sq_absmax, unsigned),
        grad_factor, lr, beta1, beta2, eps, weight_decay, step, seed,
    )  # fmt: skip
    if exp_avg_absmax.dtype != torch.float64:
        m, v = _coded(m, signed), _coded(v, unsigned)
    return new.view(param.shape), m, v


def _decoded(codes, absmax, values):
    return values[codes.flatten().long()] * absmax.repeat_interleave(BLOCK)[: codes.numel()]


def _coded(x, values):
    """Each element as the nearest value times the maximum of its block; what is not zero stays above an unsigned zero."""
    blocks = F.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = blocks / absmax.clamp_min(torch.finfo(x.dtype).tiny).unsqueeze(1)
    codes = torch.bucketize(scaled, (values[1:] + values[:-1]) / 2)
    if values[0] == 0:
        codes = torch.where((blocks > 0) & (codes == 0), 1, codes)
    return (values[codes] * absmax.unsqueeze(1)).flatten()[: x.numel()]
