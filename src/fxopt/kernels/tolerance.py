"""Every number that decides whether two results are close. Nothing here is chosen per op.

The oracle compares with the truth, the fp64 reference, not with another rounded result:

    error of candidate <= EAGER * error of eager + ULPS * ulp of the result

"Eager" is the reference in the candidate's own dtype or in fp32, whichever errs more, as in Wijmans
et al., 2024, https://arxiv.org/abs/2411.09009. Its error is the maximum over the tensor (rounding errors are not
paired element by element) and over the case and `NEARBY` others whose inputs differ by up to
`STEP`: on one row or one column eager is now and then exact by luck, and cancellation hides it.
An fp64 candidate is as exact as the truth; there the error of eager is taken in fp32 and scaled, and `ULPS_OF_BOTH` counts, for
the truth is rounded after each of its operations too, in its own order.
"""

from __future__ import annotations

import torch

# Another order of the same sums: twice is common on the small tensors of the cases.
EAGER = 2.0
ULPS = 2.0
ULPS_OF_BOTH = 8.0
# Two fp64 runs are compared with each other: both are rounded, each in its own order, and what fp64's roundings do is scaled from fp32's.
# The largest seen among random programs that are right: 1.04 times EAGER. A dropped epsilon of 1e-6 is 1e8 times that.
BOTH = 4.0
NEARBY = 10
STEP = 2.0**-6


def nearby(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A tensor whose elements differ from the given one's by at most `STEP`, relatively."""
    change = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
    return (tensor.double() * (1 + STEP * change)).to(tensor.dtype)


def eager_error(eager: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest finite error of eager, scaled to dtype if it was measured in another one."""
    scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps if dtype == torch.float64 else 1.0
    error = (eager.double() - truth.double()).abs()
    error = error[error.isfinite()]
    return scale * float(error.max()) if error.numel() else 0.0


def excess(candidate: torch.Tensor, truth: torch.Tensor, error: float) -> float:
    """By how much the candidate's error exceeds what is allowed: at most 0 when it passes.

    Args:
        candidate: the result under test. truth: fp64, same shape. error: see `eager_error`.

    Returns:
        the largest excess, in the unit of the values; inf where the shapes differ, or one is not
        finite and the other is, or infinities differ.
    """
    if candidate.shape != truth.shape:
        return float("inf")
    unit, ulps = torch.finfo(candidate.dtype).eps, ULPS_OF_BOTH if candidate.dtype == torch.float64 else ULPS
    candidate, truth = candidate.double(), truth.double()
    finite = truth.isfinite()
    if not torch.allclose(candidate[~finite], truth[~finite], rtol=0.0, atol=0.0, equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    candidate, truth = candidate[finite], truth[finite]
    worst = ((candidate - truth).abs() - ulps * unit * truth.abs()).max() - EAGER * error
    return float("inf") if worst.isnan() else float(worst)


# A captured step against the original one, relative error of each tensor in the Frobenius norm.
# Other orders of the same sums are around 1e-6 in fp32 (measured over 268 models: 233 bitwise, the
# rest <= 1.0e-5); a lost term is around 1.
SELF_CHECK = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
    torch.bfloat16: 1e-1,
    torch.float16: 2e-2,
}
# A gradient that is smaller than this part of the largest one is rounding (a bias in front of a
# batch norm: zero in exact arithmetic), and is measured against this part.
SELF_CHECK_FLOOR = 1e-3
# An ill-conditioned model answers one rounding of its parameters with more than that: what it answers, times this, is allowed.
SELF_CHECK_RESPONSE = 8.0
# In 16-bit formats the rounding of large values leaks into small gradients: so many roundings of the largest one are noise.
SELF_CHECK_ROUNDINGS = 8

# Logits of one function in two libraries, with an adapter: fp32, logits of around 1.
LOGITS = 1e-5

# The weight that a stored one was quantized from: the coarsest format (4 bits) is off by 10% (relative, Frobenius), another
# weight, or the same one with rows in another order, by about 140%.
SAME_WEIGHT = 0.5

# Gradients of a step whose saved values are kept in 8 bits, against the exact ones (relative, Frobenius, each tensor; one far below the largest
# is measured against that, see SELF_CHECK_FLOOR). A code is off by half a step of 1/127 of its group's largest value: measured 0.1% to 2%.
COMPRESSED = 0.1

# The part of an adapter's change (in norm) that rounding the merged weight may take: more is a merge of nothing. An element
# whose change is below half a spacing loses all of it, so in 16 bits a lightly trained adapter loses much: said from a tenth on.
MERGE_LOST, MERGE_LOSES = 0.9, 0.1


def merged(response: float, eps: float) -> float:
    """The relative error that a merged model's outputs may have against the adapted one's.

    Both compute one function with roundings at other places, so the error is of the size of `response`: what moving every weight by
    one rounding (`eps`, of the coarsest dtype) does to the outputs. Measured: 0.4 to 0.7 of it.
    """
    return max(SELF_CHECK_RESPONSE * response, ULPS * eps)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results of one computation agree up to the order of its sums: relative error in the Frobenius norm."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    allowed = SELF_CHECK[a.dtype] * max(float(b.detach().double().norm()), torch.finfo(a.dtype).eps)
    return float((a.detach().double() - b.detach().double()).norm()) <= allowed
