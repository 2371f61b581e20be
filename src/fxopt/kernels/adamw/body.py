"""AdamW from ATen's fused step, which reads and writes each element once."""

from __future__ import annotations

import torch

from fxopt.kernels.blocks import blocks
from fxopt.kernels.dtypes import wide
from fxopt.kernels.in_place import writes
from fxopt.kernels.stochastic import round_stochastically
from fxopt.torch_private import fused_adamw_


def check(param, grad, exp_avg, exp_avg_sq, grad_factor, step):
    """Refuse what the kernels would compute wrongly."""
    acc = wide(param.dtype)
    for name, tensor in (("param", param), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        torch._check(tensor.is_contiguous(), lambda: f"{name} is not contiguous")
        torch._check(tensor.numel() == param.numel(), lambda: f"{name} has {tensor.numel()} elements, not {param.numel()}")
    torch._check(exp_avg.dtype == exp_avg_sq.dtype == acc, lambda: f"the averages of a {param.dtype} parameter are {acc}")
    check_step(param, grad, grad_factor, step)


def check_step(param, grad, grad_factor, step):
    """What both forms of AdamW need."""
    torch._check(grad.shape == param.shape, lambda: f"grad is {tuple(grad.shape)} and param is {tuple(param.shape)}")
    torch._check(step > 0, lambda: f"the first step is 1, not {step}")
    fits = grad_factor is None or (grad_factor.dim() == 0 and grad_factor.device == param.device)
    torch._check(fits, lambda: f"grad_factor is no 0-dim tensor on {param.device}")


def fused_step(params, grads, exp_avgs, exp_avg_sqs, lr, beta1, beta2, eps, weight_decay, step):
    """ATen's fused AdamW over lists of tensors of one device, dtype and layout, all in their `step`-th step. In place."""
    if not params:
        return
    count = torch.full((), float(step), device=params[0].device)
    fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [count] * len(params),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=False,
        maximize=False,
    )


def round_into(param, values, start, seed):
    """Put values, [n] in fp32 or wider, into param, [n]; `start` is the place of the first one in the whole buffer."""
    param.copy_(values if seed is None else round_stochastically(values, param.dtype, start, seed))


@writes(0, 2, 3)
def update(param, grad, exp_avg, exp_avg_sq, grad_factor, lr, beta1, beta2, eps, weight_decay, step, seed):
    """One step of AdamW over one flat buffer, in place: decoupled weight decay, bias-corrected averages.

    With g = grad * grad_factor: exp_avg = beta1 exp_avg + (1 - beta1) g, exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) g^2,
    param = param (1 - lr weight_decay) - lr / (1 - beta1^step) exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps).

    Args:
        param: contiguous, of any shape, fp16, bf16, fp32 or fp64. Written.
        grad: of param's shape, any floating dtype, any strides. Not written.
        exp_avg, exp_avg_sq: contiguous, as many elements as param, fp32 (fp64 for an fp64 parameter). Written.
        grad_factor: 0-dim tensor that multiplies the gradient (a clip or unscale factor, which need not leave the device),
            or None.
        lr, beta1, beta2, eps, weight_decay: numbers. A kernel takes them as they come: a schedule compiles nothing.
        step: number of this step, from 1.
        seed: a bf16 or fp16 param is rounded stochastically (`fxopt.kernels.stochastic`), differently for each seed; None: to
            nearest. Other params are not rounded.

    Returns:
        nothing.

    Raises:
        RuntimeError: shapes, dtypes or layouts that do not fit. CheckError: an argument requires a gradient, while gradients
        are recorded.

    Source: Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101, algorithm 2.
    """
    check(param, grad, exp_avg, exp_avg_sq, grad_factor, step)
    settings = (lr, beta1, beta2, eps, weight_decay, step)
    param, grad, exp_avg, exp_avg_sq = (tensor.reshape(-1) for tensor in (param, grad, exp_avg, exp_avg_sq))
    acc = exp_avg.dtype
    if param.dtype == grad.dtype == acc and grad_factor is None:
        fused_step([param], [grad.contiguous()], [exp_avg], [exp_avg_sq], *settings)
        return
    factor = None if grad_factor is None else grad_factor.to(acc)
    for block in blocks(param.numel(), 1):
        values, pull = param[block].to(acc), grad[block].to(acc).contiguous()
        if factor is not None:
            pull = pull * factor
        fused_step([values], [pull], [exp_avg[block]], [exp_avg_sq[block]], *settings)
        if param.dtype != acc:
            round_into(param[block], values, block.start, seed)


def update_fake(param, grad, exp_avg, exp_avg_sq, grad_factor, lr, beta1, beta2, eps, weight_decay, step, seed):
    check(param, grad, exp_avg, exp_avg_sq, grad_factor, step)
