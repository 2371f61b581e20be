"""Weights that are computed again for the backward: same gradients, no dense copy, no other random numbers, in nested blocks too."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from fxopt.kernels.tolerance import same
from fxopt.runtime import recompute
from fxopt.runtime.recompute import noted, recomputed


class Weight:
    """W = base + b a, and how often it was computed."""

    def __init__(self, rows: int = 6, columns: int = 6) -> None:
        generator = torch.Generator().manual_seed(0)
        self.base = torch.randn(rows, columns, generator=generator)
        self.a, self.b = (torch.randn(size, generator=generator).requires_grad_() for size in ((2, columns), (rows, 2)))
        self.made = 0
        self.alive: list[weakref.ref[torch.UntypedStorage]] = []

    def value(self) -> torch.Tensor:
        self.made += 1
        value = self.base + self.b @ self.a
        self.alive.append(weakref.ref(value.untyped_storage()))
        return value

    def __call__(self) -> torch.Tensor:
        return noted(self.value(), self.value)

    def held(self) -> int:
        """How many of the computed values are still in memory."""
        return sum(reference() is not None for reference in self.alive)


def gradients(loss: torch.Tensor, *of: Weight) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for weight in of for p in (weight.a, weight.b)]))


Use = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
USES: dict[str, Use] = {
    "linear": F.linear,
    "transposed": lambda x, w: x @ w,
    "a slice": lambda x, w: x[:, :4] @ w.t()[1:5, ::2],
    "read twice": lambda x, w: torch.tanh(x @ w) @ w.t(),
    "pointwise": lambda x, w: x * w.exp() * w,
}


@pytest.mark.parametrize("use", USES)
def test_gradients_are_the_same_to_the_bit_and_nothing_dense_is_kept(use: str) -> None:
    weight, x = Weight(), torch.randn(6, 6, requires_grad=True)
    loss = USES[use](x, weight()).square().sum()
    wanted, made = [*gradients(loss, weight), *torch.autograd.grad(USES[use](x, weight()).square().sum(), x)], weight.made
    assert made == 2  # outside of a block nothing is computed again
    weight.alive.clear()
    with recomputed():
        loss, other = (USES[use](x, weight()).square().sum() for _ in range(2))
        assert weight.held() == 0
    found = [*gradients(loss, weight), *torch.autograd.grad(other, x)]  # after the block
    assert weight.made > made + 2 and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    del loss, other
    assert weight.held() == 0


def test_dropout_draws_once() -> None:
    """The mask is saved, not drawn again; computing the weight again draws nothing."""
    def step(weight: Weight) -> tuple[list[torch.Tensor], torch.Tensor]:
        torch.manual_seed(3)
        x = torch.ones(5, 6)
        loss = F.dropout(torch.tanh(F.linear(F.dropout(x, 0.5), weight())), 0.5).square().sum()
        return gradients(loss, weight), torch.get_rng_state()

    wanted, state = step(Weight())
    with recomputed():
        found, after = step(Weight())
    assert torch.equal(after, state) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert float(wanted[0].abs().sum()) > 0


def test_a_weight_drawn_at_random_needs_its_seed() -> None:
    """What `again` returns is what the backward reads: `noted` saves no random state, and its caller gives one that draws the same."""
    weight = Weight()

    def seeded() -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return F.dropout(weight.value(), 0.5)

    x = torch.ones(2, 6, requires_grad=True)
    (wanted,) = torch.autograd.grad(F.linear(x, seeded()).square().sum(), x)
    state = torch.get_rng_state()
    with recomputed():
        (found,) = torch.autograd.grad(F.linear(x, noted(seeded(), seeded)).square().sum(), x)
    assert torch.equal(found, wanted) and torch.equal(torch.get_rng_state(), state)


def nested(outer: Weight, inner: Weight, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """A loss of an inner block that reads a weight of the outer one, and the other way round."""
    with recomputed():
        first = outer()
        with recomputed():
            second = inner()
            loss = (x @ first @ second).square().sum()
        loss = loss + (x @ second @ outer()).square().sum()
        del first, second
        yield loss
    yield loss


def test_nested_blocks_know_each_others_values() -> None:
    outer, inner, x = Weight(), Weight(), torch.randn(3, 6, requires_grad=True)
    inner.base.mul_(0.5)
    a, b = outer(), inner()
    wanted = gradients((x @ a @ b).square().sum() + (x @ b @ outer()).square().sum(), outer, inner)
    del a, b
    outer.alive.clear(), inner.alive.clear()
    for inside, loss in zip((True, False), nested(outer, inner, x), strict=True):
        assert outer.held() == inner.held() == 0, inside
    assert recompute._made is None
    found = gradients(loss, outer, inner)
    assert all(same(p, q) for p, q in zip(found, wanted, strict=True))


def test_a_block_inside_a_backward() -> None:
    """Computing a weight again may itself run in a block (an adapted weight of an adapted weight)."""
    weight, x = Weight(), torch.randn(3, 6, requires_grad=True)

    def again() -> torch.Tensor:
        with recomputed():
            return noted(weight.value(), weight.value).clone()

    (wanted,) = torch.autograd.grad((x @ weight.value()).square().sum(), x)
    with recomputed():
        (found,) = torch.autograd.grad((x @ noted(again(), again)).square().sum(), x)
    assert torch.equal(found, wanted) and recompute._made is None


def test_second_derivatives() -> None:
    def second(weight: Weight) -> list[torch.Tensor]:
        x = torch.linspace(-1, 1, 18).view(3, 6).requires_grad_()
        (first,) = torch.autograd.grad(torch.tanh(x @ weight()).sum(), x, create_graph=True)
        return gradients(first.square().sum(), weight)

    wanted = second(Weight())
    with recomputed():
        found = second(Weight())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_an_error_leaves_nothing_behind() -> None:
    weight = Weight()
    with pytest.raises(ZeroDivisionError), recomputed():
        weight()
        1 / 0
    assert recompute._made is None
    loss = F.linear(torch.ones(1, 6), weight()).square().sum()
    made = weight.made
    gradients(loss, weight)
    assert weight.made == made


def test_memory_used_again_is_another_tensor() -> None:
    """The allocator gives freed memory to the next tensor: it must not be taken for the weight that lay there."""
    weight, x = Weight(), torch.randn(4, 6)
    with recomputed():
        for _ in range(50):
            weight()  # freed at once
        other = torch.randn(6, 6, requires_grad=True)
        copies = [other * (i + 1) for i in range(50)]
        loss = sum(((x @ copy) ** 2).sum() for copy in copies)
        made = weight.made
        (found,) = torch.autograd.grad(loss, other)
    assert weight.made == made
    wanted = sum(2 * (i + 1) ** 2 * x.t() @ (x @ other.detach()) for i in range(50))
    assert same(found, wanted)
