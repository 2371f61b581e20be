"""One sweep over the supervised rows: losses, and gradients of their (weighted) sum.

Only a chunk of logits exists at any time. Ignored rows are dropped before the first product. The
gradient of a logit, softmax - one_hot, is formed in fp32 (fp64 for fp64) on the logits' own buffer:
read back from a bf16 buffer, the true class of a confident row would be 1 - 1 = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxopt.kernels.dtypes import wide

# Logits in a chunk when the caller does not choose, and the fewest rows. Measured on [1024, 576] x
# 32,000 fp32, one thread, frozen head, in ms by rows: 16 1427, 32 1074, 64 922, 128 946, 256 768,
# 512 834, 1024 815; plain PyTorch 913. Few rows starve the two matrix products.
LOGITS = 1 << 23
FEWEST_ROWS = 128


@dataclass(frozen=True)
class Head:
    """The head and the loss, without the data: see `body.forward` for the meaning of each field."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    ignore_index: int
    label_smoothing: float
    softcap: float
    logit_scale: float
    chunk: int

    def rows_per_chunk(self) -> int:
        return self.chunk if self.chunk > 0 else max(FEWEST_ROWS, LOGITS // max(1, self.weight.shape[0]))


def sweep(head, hidden, target, row_weight, mask):
    """Losses and gradients of sum_i row_weight_i loss_i (all weights 1 if row_weight is None).

    Args:
        head: Head. hidden: [N, d]. target: [N] int64. row_weight: [N] or None.
        mask: which of (d_hidden, d_weight, d_bias) to compute.

    Returns:
        losses: [N] fp32 (fp64), zero where ignored. count: [] int64, the rows not ignored.
        d_hidden [N, d], d_weight [V, d], d_bias [V] in their inputs' dtypes, or None.
    """
    acc, (many, width) = wide(hidden.dtype), hidden.shape
    kept = (target != head.ignore_index).nonzero().squeeze(1)
    count, everything = kept.numel(), kept.numel() == many
    rows, labels = (hidden, target) if everything else (hidden.index_select(0, kept), target.index_select(0, kept))
    if row_weight is not None and not everything:
        row_weight = row_weight.index_select(0, kept)
    weight, bias = head.weight, head.bias
    losses = torch.empty(count, dtype=acc, device=hidden.device)
    d_rows = torch.empty(count, width, dtype=hidden.dtype, device=hidden.device) if mask[0] else None
    # One accumulator in fp32: a sum over chunks in bf16 loses a bit with every doubling of their number.
    d_weight = torch.zeros(weight.shape, dtype=acc, device=weight.device) if mask[1] else None
    d_bias = torch.zeros(weight.shape[0], dtype=acc, device=weight.device) if mask[2] else None
    step = head.rows_per_chunk()
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        label = labels[part].unsqueeze(1)
        logits = _logits(head, rows[part], weight, bias, acc)
        log_p = torch.log_softmax(logits, dim=1)
        losses[part] = _losses(head, log_p, label)
        if not any(mask):
            continue
        if not head.softcap:
            del logits  # The cap's derivative reads it; otherwise its memory serves the next chunk.
        grad = log_p.exp_()
        if head.label_smoothing:
            grad.sub_(head.label_smoothing / weight.shape[0])
        grad.scatter_add_(1, label, grad.new_full(label.shape, head.label_smoothing - 1.0))
        if head.softcap:
            grad.mul_(logits.div_(head.softcap).square_().neg_().add_(1.0))
        if head.logit_scale != 1.0:
            grad.mul_(head.logit_scale)
        if row_weight is not None:
            grad.mul_(row_weight[part].unsqueeze(1))
        if d_bias is not None:
            d_bias.add_(grad.sum(0))
        if d_weight is not None:
            d_weight.addmm_(grad.t(), rows[part].to(acc))
        if d_rows is not None:
            torch.mm(grad.to(weight.dtype), weight, out=d_rows[part])
    if not everything:
        losses = losses.new_zeros(many).index_copy_(0, kept, losses)
        d_rows = None if d_rows is None else d_rows.new_zeros(many, width).index_copy_(0, kept, d_rows)
    return (
        losses,
        torch.tensor(count, device=hidden.device),
        d_rows,
        None if d_weight is None else d_weight.to(weight.dtype),
        None if d_bias is None else d_bias.to(bias.dtype),
    )


def _logits(head, rows, weight, bias, acc):
    logits = rows.mm(weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    logits = logits.to(acc)
    if head.logit_scale != 1.0:
        logits.mul_(head.logit_scale)
    if head.softcap:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def _losses(head, log_p, label):
    loss = log_p.gather(1, label).squeeze(1).neg_()
    if head.label_smoothing:
        loss.mul_(1.0 - head.label_smoothing).sub_(log_p.mean(1), alpha=head.label_smoothing)
    return loss
