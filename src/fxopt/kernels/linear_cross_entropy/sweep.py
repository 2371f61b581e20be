"""One sweep over the rows: losses, statistics, and gradients of the (weighted) sum of the losses.

Only a chunk of logits exists at any time, in memory that no one else sees: the gradient of the logits is written over them.
What differs between devices is in a `Device`; `Aten` is the one that runs anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fxopt.errors import CheckError
from fxopt.kernels.cross_entropy.body import supervised
from fxopt.kernels.cross_entropy.rows import Terms, row_blocks, take_apart
from fxopt.kernels.dtypes import wide
from fxopt.kernels.launch import cdiv


@dataclass(frozen=True)
class Head:
    """The head and the loss, without the data: see `body.forward` for the meaning of each field."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    ignore_index: int
    terms: Terms
    chunk: int
    rows: int


@dataclass
class Results:
    """Of each row: the loss, and the statistics that were asked for, else None. Slices of rows share memory with the whole."""

    losses: torch.Tensor
    log_prob: torch.Tensor | None
    entropy: torch.Tensor | None
    correct: torch.Tensor | None

    @classmethod
    def empty(cls, rows: int, statistics: Sequence[bool], like: torch.Tensor) -> Results:
        """Room for `rows` rows; fp32 (fp64 for fp64), correct is bool."""
        dtypes = (wide(like.dtype), wide(like.dtype), torch.bool)
        found = (like.new_empty(rows, dtype=dtype) if on else None for on, dtype in zip(statistics, dtypes, strict=True))
        return cls(like.new_empty(rows, dtype=wide(like.dtype)), *found)

    @property
    def parts(self) -> tuple[torch.Tensor | None, ...]:
        """In the order of the op's results."""
        return self.losses, self.log_prob, self.entropy, self.correct

    def __getitem__(self, part: slice) -> Results:
        return Results(*(None if each is None else each[part] for each in self.parts))

    def spread(self, places: torch.Tensor, rows: int) -> Results:
        """To rows of the whole batch; zero (False) where a row was dropped."""
        return Results(*(None if each is None else each.new_zeros(rows).index_copy_(0, places, each) for each in self.parts))


class Device(Protocol):
    """How the products and the work on each row are done."""

    def supervised(self, head: Head, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
        """Indices of the rows to compute, all that are not ignored among them; None for every row."""

    def rows_per_chunk(self, head: Head, rows: int) -> int:
        """Rows whose logits exist at once."""

    def scratch(self, head: Head, rows: int, mask: Sequence[bool]) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for a chunk: logits [rows, V], and their gradient [rows, V], which may be the same."""

    def without_logits(self, head: Head, rows: torch.Tensor, labels: torch.Tensor, results: Results) -> bool:
        """Fill the results of all rows by a kernel that holds no logits; False if there is none for this call."""

    def logits(self, head: Head, rows: torch.Tensor, out: torch.Tensor) -> None:
        """rows W^T, and the bias where `losses` does not add it."""

    def losses(self, head: Head, logits: torch.Tensor, labels: torch.Tensor, row_weight: torch.Tensor | None,
               results: Results, grad: torch.Tensor | None) -> None:
        """Fill the results of a chunk, and the gradient of its logits."""

    def d_hidden(self, head: Head, grad: torch.Tensor, out: torch.Tensor) -> None:
        """grad W."""

    def add_d_weight(self, total: torch.Tensor, grad: torch.Tensor, rows: torch.Tensor) -> None:
        """total += grad^T rows, accumulated in total's dtype."""


def sweep(device: Device, head: Head, hidden: torch.Tensor, target: torch.Tensor, row_weight: torch.Tensor | None,
          mask: Sequence[bool], statistics: Sequence[bool]):
    """Losses and gradients of sum_i row_weight_i loss_i (all weights 1 if row_weight is None).

    Args:
        hidden: [N, d]. target: [N] int64. row_weight: [N] or None.
        mask: which of (d_hidden, d_weight, d_bias) to compute. statistics: which of (log_prob, entropy, correct).

    Returns:
        results: `Results` of N rows, zero where ignored. count: [] int64, the rows not ignored.
        d_hidden [N, d], d_weight [V, d], d_bias [V] in their inputs' dtypes, or None.
    """
    acc, (many, width), classes = wide(hidden.dtype), hidden.shape, head.weight.shape[0]
    places = device.supervised(head, hidden, target)
    rows, labels = hidden, target
    if places is not None:
        rows, labels = hidden.index_select(0, places), target.index_select(0, places)
        row_weight = None if row_weight is None else row_weight.index_select(0, places)
    rows = rows if rows.is_contiguous() else rows.contiguous()
    number = rows.shape[0]
    results = Results.empty(number, statistics, hidden)
    d_rows = torch.empty_like(rows) if mask[0] else None
    # One accumulator in fp32: a sum over chunks in bf16 loses a bit with every doubling of their number.
    d_weight = head.weight.new_zeros(head.weight.shape, dtype=acc) if mask[1] else None
    d_bias = head.weight.new_zeros(classes, dtype=acc) if mask[2] else None
    if any(mask) or not device.without_logits(head, rows, labels, results):
        step = _even(number, head.chunk or device.rows_per_chunk(head, number))
        logits, grads = device.scratch(head, min(step, number), mask)
        for start in range(0, number, step):
            part = slice(start, min(start + step, number))
            size = part.stop - start
            grad = grads[:size] if any(mask) else None
            device.logits(head, rows[part], logits[:size])
            weights = None if row_weight is None else row_weight[part]
            device.losses(head, logits[:size], labels[part], weights, results[part], grad)
            if d_bias is not None:
                d_bias.add_(grad.sum(0, dtype=acc))
            if d_weight is not None:
                device.add_d_weight(d_weight, grad, rows[part])
            if d_rows is not None:
                device.d_hidden(head, grad, d_rows[part])
    count = (target != head.ignore_index).sum()
    if places is not None:
        results = results.spread(places, many)
        d_rows = None if d_rows is None else d_rows.new_zeros(many, width).index_copy_(0, places, d_rows)
    if head.rows > 0:  # Rows beyond the bound were dropped: a wrong loss must not pass for a right one.
        results.losses.add_(torch.where(count > head.rows, torch.nan, 0.0))
    return (
        results,
        count,
        d_rows,
        None if d_weight is None else d_weight.to(head.weight.dtype),
        None if d_bias is None else d_bias.to(head.bias.dtype),
    )


def _even(rows: int, most: int) -> int:
    """Rows of each of the fewest chunks of at most `most` rows: a small last chunk costs a whole read of the head."""
    return max(1, cdiv(rows, max(1, cdiv(rows, most))))


class Aten:
    """Any device, by ATen calls. In 16 bits the gradient has a wide chunk of its own where a trained head reads it."""

    # Logits in a chunk when the caller does not choose, and the fewest rows. Measured on [1024, 576] x
    # 32,000 fp32, one thread, frozen head, in ms by rows: 16 1427, 32 1074, 64 922, 128 946, 256 768,
    # 512 834, 1024 815; plain PyTorch 913. Few rows starve the two matrix products.
    LOGITS = 1 << 23
    FEWEST_ROWS = 128

    def supervised(self, head, hidden, target):
        places = supervised(target, head.ignore_index)
        number = target.numel() if places is None else places.numel()
        if 0 < head.rows < number:
            raise CheckError(f"{number} rows have a label, and at most {head.rows} were announced", do="give a larger `rows`, or 0")
        return places

    def rows_per_chunk(self, head, rows):
        return max(self.FEWEST_ROWS, self.LOGITS // max(1, head.weight.shape[0]))

    def scratch(self, head, rows, mask):
        weight, acc = head.weight, wide(head.weight.dtype)
        logits = weight.new_empty(rows, weight.shape[0])
        apart = (mask[1] or mask[2]) and acc != weight.dtype
        return logits, weight.new_empty(logits.shape, dtype=acc) if apart else logits

    def without_logits(self, head, rows, labels, results):
        return False

    def logits(self, head, rows, out):
        if head.bias is None:
            torch.mm(rows, head.weight.t(), out=out)
        else:
            torch.addmm(head.bias, rows, head.weight.t(), out=out)

    def losses(self, head, logits, labels, row_weight, results, grad):
        acc = wide(logits.dtype)
        wanted = [part is not None for part in results.parts[1:]]
        for part, room in row_blocks(*logits.shape, logits, acc):
            block, out = logits[part], results[part]
            found = take_apart(block, labels[part].unsqueeze(1), head.terms, acc, wanted, out=room)
            values = (found.losses(head.terms).squeeze(1), found.log_prob.squeeze(1), found.entropy, found.correct)
            for place, value in zip(out.parts, values, strict=True):
                if place is not None:
                    place.copy_(value)
            if grad is not None:
                weights = None if row_weight is None else row_weight[part].unsqueeze(1)
                out = grad[part] if grad.dtype == acc else None
                slopes = found.gradient(head.terms, weights, out)
                if out is None:
                    grad[part].copy_(slopes)

    def d_hidden(self, head, grad, out):
        torch.mm(grad.to(head.weight.dtype), head.weight, out=out)

    def add_d_weight(self, total, grad, rows):
        torch.addmm(total, grad.t(), rows.to(total.dtype), out=total)


ATEN = Aten()
