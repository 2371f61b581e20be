"""Whether two results of the same computation are equal but for rounding. The numbers are those of `kernels.tolerance`."""

from __future__ import annotations

import torch

from fxopt.kernels import tolerance


def near(a: torch.Tensor, b: torch.Tensor, *, beside: float = 0.0) -> bool:
    """Whether a and b differ by no more than another order of the same sums explains, relative to b in the Frobenius norm.

    Args:
        beside: norm of the largest tensor of the comparison; a tensor that is tiny beside it is rounding, and is
            measured against it.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    size = max(float(b.double().norm()), tolerance.SELF_CHECK_FLOOR * beside)
    return float((a.double() - b.double()).norm()) <= tolerance.SELF_CHECK[b.dtype] * size
