"""RMSNorm in plain PyTorch, and the ways in which programs write it.

Root mean square layer normalization: Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxopt.kernels.dtypes import wide
from fxopt.kernels.op import Bind, Pattern


def rms_norm(x, weight, eps, offset, casting):
    """Same arguments as `fxopt::rms_norm`; returns (y,)."""
    if casting == "none":
        xhat = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return (xhat if weight is None else xhat * _scale(weight, offset),)
    x_wide = x.to(wide(x.dtype))
    xhat = x_wide * torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return (xhat.to(x.dtype),)
    if casting == "cast_then_scale":
        return (_scale(weight, offset) * xhat.to(x.dtype),)
    return ((xhat * _scale(weight.to(xhat.dtype), offset)).to(x.dtype),)


def _scale(weight, offset):
    return weight + offset if offset else weight


def _rsqrt_cast_scale(x, weight, *, eps):
    x_wide = x.to(torch.float32)
    variance = x_wide.pow(2).mean(-1, keepdim=True)
    return weight * (x_wide * torch.rsqrt(variance + eps)).to(x.dtype)


def _rsqrt_scale_cast(x, weight, *, eps):
    x_wide = x.to(torch.float32)
    variance = x_wide.pow(2).mean(-1, keepdim=True)
    return (weight * (x_wide * torch.rsqrt(variance + eps))).to(x.dtype)


def _rsqrt_wide_scale_cast(x, weight, *, eps):
    x_wide = x.float()
    xhat = x_wide * torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    return (xhat * weight.float()).type_as(x)


def _rsqrt_offset_scale_cast(x, weight, *, eps):
    x_wide = x.float()
    xhat = x_wide * torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    return (xhat * (1.0 + weight.float())).type_as(x)


def _rsqrt_mixed_cast_scale(x, weight, *, eps):
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return weight * (x * torch.rsqrt(variance + eps)).to(weight.dtype)


def _rsqrt_no_weight(x, *, eps):
    x_wide = x.to(torch.float32)
    variance = x_wide.pow(2).mean(-1, keepdim=True)
    return (x_wide * torch.rsqrt(variance + eps)).to(x.dtype)


def _power_scale_cast(x, weight, *, eps):
    x_wide = x.float()
    mean_squared = x_wide.pow(2).mean(-1, keepdim=True) + eps
    return (x_wide * torch.pow(mean_squared, -0.5) * weight.float()).type_as(x)


def _power_no_weight(x, *, eps):
    x_wide = x.float()
    mean_squared = x_wide.pow(2).mean(-1, keepdim=True) + eps
    return (x_wide * torch.pow(mean_squared, -0.5)).type_as(x)


def _divide_cast_scale(x, weight, *, eps):
    x_wide = x.to(torch.float32)
    variance = x_wide.pow(2).mean(-1, keepdim=True)
    return weight * (x_wide / torch.sqrt(variance + eps)).to(x.dtype)


def _divide_scale_cast(x, weight, *, eps):
    x_wide = x.to(torch.float32)
    variance = x_wide.pow(2).mean(-1, keepdim=True)
    return (weight * (x_wide / torch.sqrt(variance + eps))).to(x.dtype)


def _square_cast_scale(x, weight, *, eps):
    x_wide = x.float()
    xhat = x_wide * torch.rsqrt((x_wide * x_wide).mean(-1, keepdim=True) + eps)
    return weight * xhat.type_as(x)


def _rounded_rsqrt(x, weight, *, eps):
    return weight * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps).to(x.dtype))


def _rounded_rsqrt_no_weight(x, *, eps):
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps).to(x.dtype)


def _plain_rsqrt(x, weight, *, eps):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def _plain_rsqrt_no_weight(x, *, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _plain_divide(x, weight, *, eps):
    return weight * (x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def _native(x, weight, *, eps, width):
    return F.rms_norm(x, (width,), weight, eps)


def _native_no_weight(x, *, eps, width):
    return F.rms_norm(x, (width,), None, eps)


def _native_default_eps(x, weight, *, width):
    return F.rms_norm(x, (width,), weight)


def _native_default_eps_no_weight(x, *, width):
    return F.rms_norm(x, (width,))


def _check(bound):
    x, weight = bound["x"], bound.get("weight")
    if not x.dtype.is_floating_point:
        return f"x is {x.dtype}, not floating point"
    if weight is not None and (weight.dim() != 1 or weight.shape[0] != x.shape[-1]):
        return f"weight is {tuple(weight.shape)}, not one value per column of x {tuple(x.shape)}"
    if "width" in bound and bound["width"] != x.shape[-1]:
        return "normalizes over more than the last dimension"
    return None


def _check_default_eps(bound):
    # The default is the epsilon of the dtype that is computed in: of fp32, the constant below, but for fp64.
    return _check(bound) or (f"x is {bound['x'].dtype}" if bound["x"].dtype == torch.float64 else None)


def _pattern(fn, casting, dtype, offset=0.0, weight=True, eps=None):
    name = fn.__name__.lstrip("_") + ("" if dtype == torch.float32 else "_low")
    scalars = ({} if eps else {"eps": 0.0123}) | ({"width": 22} if fn.__name__.startswith("_native") else {})
    return Pattern(
        name=name,
        fn=fn,
        inputs={"x": ((3, 5, 22), dtype)} | ({"weight": ((22,), dtype)} if weight else {}),
        scalars=scalars,
        arguments={
            "x": Bind("x"),
            "weight": Bind("weight") if weight else None,
            "eps": eps or Bind("eps"),
            "offset": offset,
            "casting": casting,
        },
        check=_check_default_eps if eps else _check,
    )


def _both(fn, casting, **more):
    # Canonicalisation drops the casts of an fp32 program, so the two traces differ.
    return tuple(_pattern(fn, casting, dtype, **more) for dtype in (torch.float32, torch.bfloat16))


PATTERNS = (
    *_both(_rsqrt_cast_scale, "cast_then_scale"),
    *_both(_rsqrt_scale_cast, "scale_then_cast"),
    *_both(_rsqrt_wide_scale_cast, "scale_then_cast"),
    *_both(_rsqrt_offset_scale_cast, "scale_then_cast", offset=1.0),
    *_both(_rsqrt_mixed_cast_scale, "cast_then_scale"),
    *_both(_power_scale_cast, "scale_then_cast"),
    *_both(_divide_cast_scale, "cast_then_scale"),
    *_both(_divide_scale_cast, "scale_then_cast"),
    *_both(_square_cast_scale, "cast_then_scale"),
    *_both(_rsqrt_no_weight, "scale_then_cast", weight=False),
    *_both(_power_no_weight, "scale_then_cast", weight=False),
    _pattern(_rounded_rsqrt, "none", torch.bfloat16),
    _pattern(_rounded_rsqrt_no_weight, "none", torch.bfloat16, weight=False),
    # All in the dtype of x: the op computes in fp32, and rounds once.
    *_both(_plain_rsqrt, "none"),
    *_both(_plain_rsqrt_no_weight, "none", weight=False),
    *_both(_plain_divide, "none"),
    *_both(_native, "scale_then_cast"),
    *_both(_native_no_weight, "scale_then_cast", weight=False),
    *_both(_native_default_eps, "scale_then_cast", eps=torch.finfo(torch.float32).eps),
    *_both(_native_default_eps_no_weight, "scale_then_cast", weight=False, eps=torch.finfo(torch.float32).eps),
)
