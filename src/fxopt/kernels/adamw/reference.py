"""AdamW in plain PyTorch: a step as a function of the old values."""

from __future__ import annotations

import math


def adamw(param, grad, exp_avg, exp_avg_sq, grad_factor, lr, beta1, beta2, eps, weight_decay, step, seed):
    """Same arguments as `fxopt::adamw_`; returns the new (param, exp_avg, exp_avg_sq). Rounds to nearest."""
    acc = exp_avg.dtype
    grad = grad.to(acc) if grad_factor is None else grad.to(acc) * grad_factor.to(acc)
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    denominator = exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step) + eps
    new = param.to(acc) * (1 - lr * weight_decay) - lr / (1 - beta1**step) * exp_avg / denominator
    return new.to(param.dtype), exp_avg, exp_avg_sq
