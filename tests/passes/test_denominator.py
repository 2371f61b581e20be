"""The denominator of a loss: any split of a batch gives its gradient, and what has none is refused where it mixes samples."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools

from hypothesis import HealthCheck, Phase, given, settings, strategies as st
import models
import pytest
from strategies import Spec, build, inputs, specs
import torch
import torch.nn as nn
import torch.nn.functional as F

from fxopt.ir.capture import Call, capture
from fxopt.ir.denominator import Denominator, Underivable, derive, find_loss
from fxopt.ir.edit import Edit, random
from fxopt.ir.program import Program
from fxopt.passes.pipeline import run
from fxopt.runtime.counting import Items, shares

BATCH, LENGTH, WIDTH, CLASSES = 6, 5, 8, 7
EXACT = 2.0**-40  # of the largest gradient: 9e-13
QUICK = settings(max_examples=8, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])


class Net(nn.Module):
    """Two linears and a loss given as a function of (logits, labels, mask)."""

    def __init__(self, loss: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.loss = nn.Linear(WIDTH, 12), nn.Linear(12, CLASSES), loss
        self.register_buffer("weights", torch.rand(CLASSES) + 0.5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.down(F.silu(self.up(x)))
        return {"loss": self.loss(self, logits, labels, mask), "logits": logits}


def rows(net: Net, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0), reduction="none")


def token_mean(net, logits, labels, mask):
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))


def weighted_classes(net, logits, labels, mask):
    return F.cross_entropy(logits.transpose(1, 2), labels, weight=net.weights)


def smoothed_with_z(net, logits, labels, mask):
    kept = labels != -100
    z = (logits.logsumexp(-1).square() * kept).sum() / kept.sum()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1) + 1e-2 * z


def masked_mean(net, logits, labels, mask):
    return (rows(net, logits, labels) * mask).sum() / mask.sum()


def clamped_mean(net, logits, labels, mask):
    return (rows(net, logits, labels) * mask).sum() / mask.sum().clamp(min=1) * 0.5


def epsilon_inside(net, logits, labels, mask):
    return (rows(net, logits, labels) * (mask / (mask.sum() + 1e-3))).sum()


def regression(net, logits, labels, mask):
    return F.mse_loss(logits, labels[..., None].expand(-1, -1, CLASSES).to(logits.dtype))


def mean_of_means(net, logits, labels, mask):
    return rows(net, logits, labels).mean(1).mean()


def last_token(net, logits, labels, mask):
    return F.nll_loss(logits[:, -1].log_softmax(-1), labels[:, -1].clamp(min=0))


def by_batch_size(net, logits, labels, mask):
    return rows(net, logits, labels).sum() / logits.shape[0]


def plain_sum(net, logits, labels, mask):
    return rows(net, logits, labels).sum() * 0.25


def with_decay(net, logits, labels, mask):
    return token_mean(net, logits, labels, mask) + 1e-2 * net.up.weight.square().sum()


def probabilities(net, logits, labels, mask):
    return F.cross_entropy(logits.flatten(0, 1), F.one_hot(labels.clamp(min=0), CLASSES).to(logits.dtype).flatten(0, 1))


DERIVED = [token_mean, weighted_classes, smoothed_with_z, masked_mean, clamped_mean, epsilon_inside, regression, mean_of_means, last_token, by_batch_size, plain_sum,
           with_decay, probabilities]


def batch(seed: int = 0, ignored: float = 0.4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (BATCH, LENGTH), generator=generator)
    labels[torch.rand(BATCH, LENGTH, generator=generator) < ignored] = -100
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    return {"x": x, "labels": labels, "mask": (labels != -100).double()}


@functools.cache
def captured(loss: Callable[..., torch.Tensor]) -> tuple[Net, Program]:
    net = Net(loss).double()
    return net, run("canonicalize | denominator", capture(net, Call.of((), batch())))


def fact(program: Program) -> Denominator:
    return next(each for each in program.facts if isinstance(each, Denominator))


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def gradients(loss: torch.Tensor, model: nn.Module) -> torch.Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found)])


def split(whole: dict[str, torch.Tensor], sizes: list[int]) -> list[dict[str, torch.Tensor]]:
    assert sum(sizes) == len(next(iter(whole.values())))
    pieces = {key: value.split(sizes) for key, value in whole.items()}
    return [{key: value[i] for key, value in pieces.items()} for i in range(len(sizes))]


def assert_split_is_whole(model: nn.Module, by: Denominator, loss: Callable[[dict], torch.Tensor], whole: dict, sizes: list[int]) -> None:
    """The gradient of `whole` against the weighted gradients of its parts; parts that count nothing are not run, as in `fit`."""
    state = state_of(model)
    parts = []
    for part in split(whole, sizes):
        counts = tuple(by.measure(list(part.values()), state))
        parts.append((part, Items(by.divisor(counts, state), counts, by, state)))
    parts = [(part, items) for part, items in parts if items.number]
    expected_loss = loss(whole)
    weights, total = shares([items for _, items in parts])
    assert total == by.divisor(by.measure(list(whole.values()), state), state)
    losses = [loss(part) * weight for (part, _), weight in zip(parts, weights)]
    expected, found = gradients(expected_loss, model), sum(gradients(each, model) for each in losses)
    assert (found - expected).abs().max() <= EXACT * expected.abs().max()
    assert (sum(losses) - expected_loss).abs() <= EXACT * expected_loss.abs()


def ragged(draw: st.DrawFn, total: int) -> list[int]:
    """Sizes of one or more that add up to `total`."""
    cuts = draw(st.sets(st.integers(1, total - 1), min_size=1))
    ends = [0, *sorted(cuts), total]
    return [b - a for a, b in zip(ends, ends[1:])]


@st.composite
def splits(draw: st.DrawFn) -> tuple[list[int], int, float, int]:
    """Sizes of the parts, a seed and a share of ignored labels, and how many leading samples have no label at all."""
    return ragged(draw, BATCH), draw(st.integers(0, 99)), draw(st.sampled_from((0.0, 0.4, 0.9))), draw(st.integers(0, BATCH - 1))


@pytest.mark.parametrize("loss", DERIVED, ids=lambda loss: loss.__name__)
def test_any_split_has_the_gradient_of_the_whole(loss: Callable) -> None:
    net, program = captured(loss)
    by = fact(program)

    @QUICK
    @given(splits())
    def check(drawn: tuple[list[int], int, float, int]) -> None:
        sizes, seed, ignored, empty = drawn
        whole = batch(seed, ignored)
        whole["labels"][:empty] = -100
        whole["labels"][-1, -1] = 0
        whole["mask"] = (whole["labels"] != -100).double()
        assert_split_is_whole(net, by, lambda part: net(**part)["loss"], whole, sizes)

    check()


def test_equal_weights_would_not_do() -> None:
    """The check can fail: with weights of 1/n the split is off."""
    net, program = captured(token_mean)
    whole = batch()
    whole["labels"][0, :-1] = -100
    by = fact(program)
    measured = by.measure(list(whole.values()), {})
    assert measured == [int((whole["labels"] != -100).sum())]
    parts = split(whole, [1, 5])
    wrong = sum(gradients(net(**part)["loss"] / 2, net) for part in parts)
    expected = gradients(net(**whole)["loss"], net)
    assert (wrong - expected).abs().max() > EXACT * expected.abs().max()


# -- what is refused -----------------------------------------------------------------------------------------------------


class Contrastive(nn.Module):
    """The symmetric loss of pairs: every sample against all others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = F.normalize(self.a(x), dim=-1), F.normalize(self.b(y), dim=-1)
        return F.cross_entropy(a @ b.T, torch.arange(x.shape[0]))


def reason(model: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> Underivable:
    program = run("canonicalize | denominator", capture(model, Call.of(args, kwargs)))
    found = derive(program)
    assert isinstance(found, Underivable)
    assert not any(isinstance(each, Denominator) for each in program.facts)
    assert found.reason in program.log[-1].notes[0] and found.where in program.log[-1].notes[0]
    return found


def test_contrastive_and_batch_norm_are_refused_by_place() -> None:
    found = reason(Contrastive(), torch.randn(4, WIDTH), torch.randn(4, WIDTH))
    assert "multiplies different samples" in found.reason and found.where.startswith("matmul") and "test_denominator.py" in found.where
    found = reason(models.convnet(), **models.images())
    assert "batch norm in training mode" in found.reason and "stem.1" in found.where


class Function(nn.Module):
    """A loss written as a function of features [batch, length, classes] and a mask [batch, length]."""

    def __init__(self, loss: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.loss = nn.Linear(WIDTH, CLASSES), loss

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.loss(self.linear(x), mask)


@pytest.mark.parametrize(("loss", "message", "node"), [
    (lambda y, m: (y - y.mean(0)).square().mean(), "each sample reads", "sub"),
    (lambda y, m: y.softmax(0).mean(), "taken over the samples", "softmax"),
    (lambda y, m: y.mean((0, 1)).square().sum(), "no longer a sum", "square"),
    (lambda y, m: y.mean() * y.square().mean(), "no longer a sum", "mul"),
    (lambda y, m: y.square().mean().sqrt(), "no longer a sum", "sqrt"),
    (lambda y, m: y.std(0).mean(), "taken over the samples", "std"),
    (lambda y, m: y[0].square().mean(), "single samples", "select"),
    (lambda y, m: y[1:].square().mean(), "some of the samples", "slice"),
    (lambda y, m: (y.flip(0) * y).mean(), "taken over the samples", "flip"),
    (lambda y, m: y.transpose(0, 1).reshape(y.shape).square().mean() + (y * y.transpose(0, 1).reshape(y.shape)).mean(), "several samples", "reshape"),
    (lambda y, m: (y.square().mean(-1) * m).sum() / m.sum() + y.mean(), "different counts", ""),
    (lambda y, m: ((y.square().mean(-1) * m).sum(0) / m.sum(0)).mean(), "no longer a sum", "div"),
    (lambda y, m: (y.square().mean(-1) * m).sum() / (m.sum() + y.sum()), "no longer a sum", "div"),
    (lambda y, m: y.square().mean(-1).amax(), "taken over the samples", "amax"),
    (lambda y, m: torch.cdist(y.mean(1), y.mean(1)).mean(), "not known", "cdist"),
    (lambda y, m: (y * torch.arange(y.shape[0])[:, None, None]).mean(), "place of a sample", "mul"),
    (lambda y, m: (y.mean(1).T @ y.mean(1)).mean(), "multiplies different samples", "matmul"),
    (lambda y, m: torch.einsum("bsc,bsd->cd", y, y).mean(), "multiplies different samples", "einsum"),
], ids=range(18))
def test_what_mixes_samples_is_named(loss: Callable, message: str, node: str) -> None:
    found = reason(Function(loss), torch.randn(BATCH, LENGTH, WIDTH), torch.rand(BATCH, LENGTH))
    assert message in found.reason and found.where.startswith(node), found


# -- whole models --------------------------------------------------------------------------------------------------------


class Router(nn.Module):
    """A mixture of experts, all of them computed, with a penalty on the router's logits of each token."""

    def __init__(self, per_token: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.per_token = per_token
        self.router, self.head = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, CLASSES)
        self.experts = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.router(x)
        weights, chosen = logits.softmax(-1).topk(2, dim=-1)
        gates = torch.zeros_like(logits).scatter(-1, chosen, weights)
        y = torch.einsum("bse,bsw,ewv->bsv", gates, x, self.experts)
        loss = F.cross_entropy(self.head(y).flatten(0, 1), labels.flatten())
        if self.per_token:
            kept = labels.ne(-100)
            auxiliary = (logits.logsumexp(-1).square() * kept).sum() / kept.sum()
        else:
            auxiliary = (gates.mean((0, 1)) * logits.softmax(-1).mean((0, 1))).sum()
        return {"loss": loss + 1e-2 * auxiliary, "auxiliary": auxiliary}


def test_experts_with_an_auxiliary_loss() -> None:
    whole = batch(3)
    model = Router(per_token=True).double()
    program = run("canonicalize | denominator", capture(model, Call.of((), whole)))
    assert_split_is_whole(model, fact(program), lambda part: model(**part)["loss"], whole, [1, 3, 2])
    found = reason(Router(per_token=False).double(), **whole)
    assert "no longer a sum" in found.reason and found.where.startswith("mul"), found


def in_fp64(program: Program) -> Program:
    """The program without its casts to fp32: some models compute norms and the loss in fp32 whatever they are given."""
    edit = Edit(program, by="test")
    for node in edit.nodes:
        if torch.float32 in node.args:
            edit.set_args(node, tuple(torch.float64 if arg is torch.float32 else arg for arg in node.args))
    return edit.finish("casts to fp64")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "handwritten"])
def test_language_models(name: str) -> None:
    """Fused and not, the program's own gradients; padding and labels differ between the samples."""
    make, inputs = models.MODELS[name]
    model = (make(dropout=0.0) if name in ("gpt2", "bert") else make()).double()
    whole = inputs(batch=4)
    program = run("canonicalize", capture(model, Call.of((), whole)))
    if "attention_mask" in whole:
        whole["attention_mask"][1, -3:] = 0
        whole["labels"][1, -3:] = -100
    whole["labels"][2] = -100
    state = state_of(model)
    for passes in ("denominator", "fuse | loss | denominator | dead_code"):
        made = run(passes, program)
        at = next(i for i, out in enumerate(made.outputs) if isinstance(out, torch.fx.Node) and out.meta["val"].dim() == 0)
        by, made = fact(made), in_fp64(made)
        assert by.measure(list(whole.values()), state) == [int((whole["labels"][:, 0 if name == "bert" else 1:] != -100).sum())]
        assert_split_is_whole(model, by, lambda part, made=made, at=at: made.run(list(part.values()), state)[at], whole, [1, 2, 1])


# -- random programs -----------------------------------------------------------------------------------------------------


def check_random(spec: Spec, sizes: list[int]) -> None:
    """Where a random program is said to keep its samples apart, it does."""
    spec = dataclasses.replace(spec, dtype=torch.float64, static=False, head="plain" if spec.head == "none" else spec.head)
    model = build(spec)
    whole = {name: value.detach() for name, value in inputs(spec, 4, 6).items()}
    program = run("canonicalize", capture(model, Call.of((), whole)))
    by = derive(program)
    if isinstance(by, Underivable) or any(random(node) for node in program.nodes if node.op == "call_function"):
        return
    loss = find_loss(program, Edit(program, by="test"))
    at = next(i for i, out in enumerate(program.outputs) if isinstance(out, torch.fx.Node) and out.name == loss.name)
    exact, state = in_fp64(program), state_of(model)

    def value(part: dict[str, torch.Tensor]) -> torch.Tensor:  # buffers that the program writes are as they were
        return exact.run(list(part.values()), {name: x if x.requires_grad else x.clone() for name, x in state.items()})[at]

    assert_split_is_whole(model, by, value, whole, sizes)


SPLITS = st.sampled_from([[1, 3], [2, 2], [1, 1, 2]])


@settings(QUICK, max_examples=5)
@given(specs(), SPLITS)
def test_random_programs(spec: Spec, sizes: list[int]) -> None:
    check_random(spec, sizes)


@pytest.mark.slow
@settings(QUICK, max_examples=400)
@given(specs(max_steps=25), SPLITS)
def test_random_programs_on_many(spec: Spec, sizes: list[int]) -> None:
    check_random(spec, sizes)
