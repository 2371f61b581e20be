"""What fit asks the graph: shares of the batches of a step, batches without an item, and errors where nothing can be derived."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fxopt
from fxopt.errors import DataError
from fxopt.train.callbacks import Callback, State
from fxopt.train.trainer import fit

EXACT = 2.0**-40  # of the largest gradient: 9e-13


class Masked(nn.Module):
    """A masked mean written by hand: no labels that a count could be guessed from."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (self.linear(x).square().mean(-1) * mask).sum() / mask.sum()


class Gradients(Callback):
    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_backward_end(self, state: State) -> None:
        self.steps.append(torch.cat([p.grad.flatten() for p in state.model.parameters() if p.grad is not None]))


def masked(rows: int, kept: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(rows * 5, dtype=torch.float64)
    mask[torch.randperm(rows * 5, generator=generator)[:kept]] = 1
    return {"x": torch.randn(rows, 5, 8, generator=generator, dtype=torch.float64), "mask": mask.view(rows, 5)}


def trained(model: nn.Module, data: list, **more: object) -> tuple[object, list[torch.Tensor]]:
    seen = Gradients()
    return fit(model, data, epochs=1, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), clip=None, progress=False, callbacks=[seen], **more), seen.steps


def test_accumulated_means_over_a_mask_equal_one_batch() -> None:
    """Ragged parts, one of which keeps nothing (a mean of nothing: nan), and a last group that is shorter."""
    parts = [masked(2, 3, 0), masked(4, 17, 1), masked(2, 0, 2), masked(3, 1, 3), masked(2, 9, 4)]
    opt = fxopt.optimize(Masked().double(), "canonicalize | denominator", inputs=parts[1])
    result, small = trained(opt, parts, accumulate=3)
    assert result.skipped == 1 and [step.items for step in result.steps] == [21, 9]
    groups = [[parts[0], parts[1], parts[3]], [parts[4]]]
    for group, ours, step in zip(groups, small, result.steps, strict=True):
        model = Masked().double()
        loss = model(*(torch.cat([part[key] for part in group]) for key in ("x", "mask")))
        loss.backward()
        wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert (ours - wanted).abs().max() <= EXACT * wanted.abs().max()
        assert abs(step.loss - loss.item()) <= EXACT * loss.item()
    _, without = trained(fxopt.optimize(Masked().double(), "dead_code"), parts, accumulate=3)  # derived by fit itself
    assert all(torch.equal(a, b) for a, b in zip(small, without, strict=True))


class Named(models.Handwritten):
    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": super().forward(ids, labels)[1]}


def named() -> nn.Module:
    torch.manual_seed(0)
    return Named().double()


def test_batches_of_different_lengths_equal_one_padded_batch() -> None:
    """A causal model, fused: what stands behind the last label of a row has no influence on it."""
    batches = [models.pairs(batch=rows, length=length, seed=length) for rows, length in ((2, 12), (3, 7), (2, 9), (2, 4))]
    batches[2]["labels"][:, 1:] = -100  # the first token predicts nothing: no label is left
    opt = fxopt.optimize(named(), "canonicalize | fuse | loss | remat | dead_code", inputs=batches[0])
    result, (ours,) = trained(opt, batches, accumulate=4)
    assert result.skipped == 1
    padded = {key: torch.cat([F.pad(batch[key], (0, 12 - batch[key].shape[1]), value=fill) for batch in batches]) for key, fill in (("ids", 0), ("labels", -100))}
    model = named()
    model(**padded)["loss"].backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (ours - wanted).abs().max() <= EXACT * wanted.abs().max()


def test_packed_batches_weigh_as_padded_ones() -> None:
    """The count is of the labels, whatever the passes make of the rows."""
    batches = [models.tokens(batch=3, length=length, seed=length) for length in (12, 7, 9)]
    for batch in batches:
        batch["attention_mask"][1, -2:], batch["labels"][1, -2:] = 0, -100
    opt = fxopt.optimize(models.llama(layers=1), "canonicalize | causal | fuse | loss | pack | compact | dead_code", inputs=batches[0])
    result, (ours,) = trained(opt, batches, accumulate=3)
    plain, (theirs,) = trained(models.llama(layers=1), batches, accumulate=3)
    assert result.steps[0].items == plain.steps[0].items
    torch.testing.assert_close(result.losses, plain.losses)
    torch.testing.assert_close(ours, theirs)


def test_a_loss_over_whole_labels_is_counted_as_the_graph_counts_it() -> None:
    """A masked language model is supervised at its first token too."""
    opt = fxopt.optimize(models.bert(dropout=0.0), "canonicalize")
    batches = [models.tokens(seed=seed, ignored=0.8) for seed in range(2)]
    result, _ = trained(opt, batches, accumulate=2)
    assert result.steps[0].items == sum(int((batch["labels"] != -100).sum()) for batch in batches)


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.normalize(self.linear(x), dim=-1)
        return -(y @ y.T).log_softmax(-1).diagonal().mean()


def test_what_has_no_denominator_asks_for_a_count() -> None:
    data = [torch.randn(4, 8), torch.randn(3, 8)]
    opt = fxopt.optimize(Pairs(), "canonicalize", inputs=(data[0],))
    with pytest.raises(DataError, match="multiplies different samples") as caught:
        trained(opt, data, accumulate=2)
    assert "matmul" in caught.value.where and "`count`" in caught.value.do
    assert len(trained(opt, data)[0].steps) == 2  # one batch a step needs no count
    assert trained(opt, data, accumulate=2, count=len)[0].steps[0].items == 7
    with pytest.raises(DataError, match="outside of the graph"):
        trained(opt, data, accumulate=2, loss=lambda model, batch: model(batch).square())


class ByTwo(Masked):
    """A sum that is divided by a product of two counts."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (self.linear(x).square().mean(-1) * mask).sum() / (mask.sum() * other.sum())


def test_a_batch_that_counts_and_whose_loss_is_divided_by_zero_is_not_left_out_in_silence() -> None:
    parts = [{**masked(2, kept, seed), "other": masked(2, others, seed + 9)["mask"]} for seed, (kept, others) in enumerate(((3, 4), (5, 2), (0, 0), (4, 0)))]
    opt = fxopt.optimize(ByTwo().double(), "canonicalize | denominator", inputs=parts[0])
    result, (ours,) = trained(opt, parts[:3], accumulate=2)
    assert result.skipped == 1 and result.steps[0].items == 8 * 6
    model = ByTwo().double()
    model(*(torch.cat([part[key] for part in parts[:2]]) for key in ("x", "mask", "other"))).backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert float((ours - whole).abs().max()) <= EXACT * float(whole.abs().max())
    with pytest.raises(DataError, match="which is 0 for a batch whose counts are not all 0"):
        trained(opt, [parts[1], parts[3]], accumulate=2)


def test_losses_that_count_in_different_ways_are_not_added() -> None:
    class Either(Masked):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x, mask) if mask is not None else self.linear(x).square().mean()

    part = masked(2, 3, 0)
    with pytest.raises(DataError, match="different ways"):
        trained(fxopt.optimize(Either().double(), "canonicalize"), [part, {"x": part["x"]}], accumulate=2)
