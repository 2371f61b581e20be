"""LayerNorm in plain PyTorch, and the ways in which programs write it.

Layer normalization: Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxopt.kernels.op import Bind, Pattern


def layer_norm(x, weight, bias, eps):
    """Same arguments as `fxopt::layer_norm`; returns (y,)."""
    return (F.layer_norm(x, (x.shape[-1],), weight, bias, eps),)


def _native(x, weight, bias, *, eps, width):
    return F.layer_norm(x, (width,), weight, bias, eps)


def _native_no_bias(x, weight, *, eps, width):
    return F.layer_norm(x, (width,), weight, None, eps)


def _native_bare(x, *, eps, width):
    return F.layer_norm(x, (width,), None, None, eps)


def _native_bare_wide(x, *, eps, width):
    return F.layer_norm(x.to(torch.float32), (width,), None, None, eps).to(x.dtype)


def _native_wide(x, weight, bias, *, eps, width):
    return F.layer_norm(x.to(torch.float32), (width,), weight.to(torch.float32), bias.to(torch.float32), eps).to(x.dtype)


def _native_wide_no_bias(x, weight, *, eps, width):
    return F.layer_norm(x.to(torch.float32), (width,), weight.to(torch.float32), None, eps).to(x.dtype)


def _moments_scale_wide(x, weight, *, eps):
    x_wide = x.to(torch.float32)
    mean = x_wide.mean(-1, keepdim=True)
    variance = (x_wide - mean).pow(2).mean(-1, keepdim=True)
    return (weight.to(torch.float32) * ((x_wide - mean) * torch.rsqrt(variance + eps))).to(x.dtype)


def _moments_affine(x, weight, bias, *, eps):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return weight * ((x - mean) / torch.sqrt(variance + eps)) + bias


def _moments_affine_rsqrt(x, weight, bias, *, eps):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return weight * ((x - mean) * torch.rsqrt(variance + eps)) + bias


def _moments_var(x, weight, bias, *, eps):
    mean = x.mean(-1, keepdim=True)
    variance = x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(variance + eps) * weight + bias


def _check(bound):
    x = bound["x"]
    if not x.dtype.is_floating_point:
        return f"x is {x.dtype}, not floating point"
    for name in ("weight", "bias"):
        part = bound.get(name)
        if part is not None and (part.dim() != 1 or part.shape[0] != x.shape[-1]):
            return f"{name} is {tuple(part.shape)}, not one value per column of x {tuple(x.shape)}"
    if "width" in bound and bound["width"] != x.shape[-1]:
        return "normalizes over more than the last dimension"
    return None


def _pattern(fn, *names, dtype=torch.float32):
    width = {"width": 22} if fn.__name__.startswith("_native") else {}
    return Pattern(
        name=fn.__name__.lstrip("_") + ("" if dtype == torch.float32 else "_low"),
        fn=fn,
        inputs={"x": ((3, 5, 22), dtype)} | {name: ((22,), dtype) for name in names},
        scalars={"eps": 0.0123} | width,
        arguments={
            "x": Bind("x"),
            "weight": Bind("weight") if "weight" in names else None,
            "bias": Bind("bias") if "bias" in names else None,
            "eps": Bind("eps"),
        },
        check=_check,
    )


PATTERNS = (
    _pattern(_native, "weight", "bias"),
    _pattern(_native_no_bias, "weight"),
    _pattern(_native_bare),
    _pattern(_native_bare_wide, dtype=torch.bfloat16),
    _pattern(_native_wide, "weight", "bias", dtype=torch.bfloat16),
    _pattern(_native_wide_no_bias, "weight", dtype=torch.bfloat16),
    _pattern(_moments_scale_wide, "weight"),
    _pattern(_moments_scale_wide, "weight", dtype=torch.bfloat16),
    _pattern(_moments_affine, "weight", "bias"),
    _pattern(_moments_affine_rsqrt, "weight", "bias"),
    _pattern(_moments_var, "weight", "bias"),
)
