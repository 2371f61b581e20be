"""Cross entropy of rows of logits from ATen calls: what a row costs, and its gradient.

With z the logits after scale and cap, m = max z, y the label: others = sum of exp(z_j - m) over j != y, own = exp(z_y - m),
total = others + own. The gradient of -log p_y is p_j, and for the label -others / total: the usual p_y - 1 cancels where
p_y is near 1 (softmax 0.999 leaves 4 digits of fp32 and none of bf16).

The exponentials come from `torch.softmax`, whose kernel takes 0.4 ns an element on one thread, maximum and sum included;
`torch.exp` alone takes 1.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fxopt.kernels.blocks import blocks

# What a row can be asked for besides its loss, in this order in every `bool[3] statistics`.
STATISTICS = ("log_prob", "entropy", "correct")
NONE = (False, False, False)


@dataclass(frozen=True)
class Terms:
    """The function of the logits: softcap * tanh(logit_scale * x / softcap), 0.0 for no cap, and the terms of the loss:
    label_smoothing in [0, 1], z_loss times the square of the log of the normalizer."""

    label_smoothing: float
    softcap: float
    logit_scale: float
    z_loss: float

    def apply(self, x, dtype):
        """Scale and cap, in dtype; x itself where there is nothing to do."""
        wide = x.to(dtype)
        if not self.softcap and self.logit_scale == 1.0:
            return wide
        factor = self.logit_scale / (self.softcap or 1.0)
        wide = wide.mul(factor) if wide is x else wide.mul_(factor)
        return wide.tanh_().mul_(self.softcap) if self.softcap else wide


@dataclass
class Rows:
    """n rows of logits, taken apart. What is not said to be otherwise is [n, 1].

    Attributes:
        label: the class of each row. p: [n, V], softmax of z, but at the label.
        z: [n, V], the capped logits. maximum: of z. own_shift: z - maximum at the label. others: see above.
        shift_mean: mean of z - maximum, or None without smoothing. entropy, correct: [n], where asked for.
    """

    label: torch.Tensor
    p: torch.Tensor
    z: torch.Tensor
    maximum: torch.Tensor
    own_shift: torch.Tensor
    others: torch.Tensor
    shift_mean: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    correct: torch.Tensor | None = None

    @property
    def log_total(self):
        """log(others + own), to the last digit where the label is the maximum."""
        return torch.where(self.own_shift == 0, self.others.log1p(), (self.others + self.own_shift.exp()).log())

    @property
    def lse(self):
        """Log of the sum of the exponentials of a row's logits."""
        return self.maximum + self.log_total

    @property
    def log_prob(self):
        """Log of the probability of the label."""
        return self.own_shift - self.log_total

    def losses(self, terms):
        """The loss of each row, [n, 1]."""
        loss, smoothing = -self.log_prob, terms.label_smoothing
        if smoothing:
            loss = (1.0 - smoothing) * loss + smoothing * (self.log_total - self.shift_mean)
        return loss + terms.z_loss * self.lse.square() if terms.z_loss else loss

    def gradient(self, terms, weight=None, out=None):
        """The gradient of sum_i weight_i loss_i (weight [n, 1], or 1) by the logits before scale and cap, [n, V], written to
        `out`, or over p."""
        own_e, smoothing, classes = self.own_shift.exp(), terms.label_smoothing, self.p.shape[1]
        total = self.others + own_e
        outer = torch.full_like(total, terms.logit_scale) if weight is None else weight * terms.logit_scale
        slope, own = 1.0, self.others / -total
        if terms.z_loss:
            rise = 2.0 * terms.z_loss * self.lse
            slope, own = 1.0 + rise, own + rise * (own_e / total)
        if smoothing:
            own = own + smoothing * (1.0 - 1.0 / classes)
        grad = torch.mul(self.p, slope * outer, out=self.p if out is None else out)
        if smoothing:
            grad.sub_(outer * (smoothing / classes))
        grad.scatter_(1, self.label, own * outer)
        if terms.softcap:
            grad.mul_((self.z / terms.softcap).square_().neg_().add_(1.0))
        return grad


def take_apart(
    block: torch.Tensor,
    label: torch.Tensor,
    terms: Terms,
    dtype: torch.dtype,
    statistics: Sequence[bool] = NONE,
    maximum: torch.Tensor | None = None,
    others: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> Rows:
    """Probabilities and sums of a block of rows.

    Args:
        block: [n, V] logits in their own dtype. label: [n, 1] int64 in [0, V).
        dtype: of the arithmetic. statistics: which of `STATISTICS` to compute.
        maximum, others: [n, 1] as an earlier call found them, or None to find them.
        out: [n, V] in dtype, for the probabilities. Memory that is used again costs half of what new pages cost.
    """
    z = terms.apply(block, dtype)
    best = None
    if statistics[2]:
        maximum, best = z.max(1, keepdim=True)
    elif maximum is None:
        maximum = z.amax(1, keepdim=True)
    p, spread = torch.softmax(z, 1, out=out), None
    if statistics[1]:  # 0 log 0 is 0, also for a class whose logit is -inf.
        spread = (z - maximum).clamp_(min=torch.finfo(dtype).min).mul_(p).sum(1, keepdim=True)
    if others is None:
        top = p.amax(1, keepdim=True)  # 1 / total
        others = p.scatter_(1, label, 0.0).sum(1, keepdim=True) / top
    rows = Rows(label, p, z, maximum, z.gather(1, label) - maximum, others)
    if terms.label_smoothing:
        rows.shift_mean = (z - maximum).mean(1, keepdim=True)
    if statistics[1]:
        rows.entropy = (rows.log_total - spread).squeeze(1)
    if statistics[2]:
        rows.correct = ((best == label) & (others == others)).squeeze(1)
    return rows


def row_blocks(rows: int, classes: int, like: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of rows that stay in cache, and memory for the probabilities of each: the same memory for all."""
    room = None
    for part in blocks(rows, classes):
        size = part.stop - part.start
        room = like.new_empty(size, classes, dtype=dtype) if room is None else room
        yield part, room[:size]
