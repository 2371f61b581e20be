"""The losses beyond their gradients: statistics of rows, dropped rows, labels that are no class, and what is kept in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from interpreter.runner import SMALL, Interpreter, interpreted
from oracle import same_bits
from torch.utils.flop_counter import FlopCounterMode

from fxopt.errors import CheckError
from fxopt.kernels.catalog import CATALOG
from fxopt.kernels.launch import running
from fxopt.kernels.linear_cross_entropy import body, sweep
from fxopt.kernels.linear_cross_entropy import triton as kernels
from fxopt.kernels.tolerance import eager_error, excess, same

OPS = {op.name: op for op in CATALOG}
HEAD, LOGITS = OPS["linear_cross_entropy"], OPS["cross_entropy"]
LOW = (torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")


def head(hidden, weight, target, bias=None, reduction="none", smoothing=0.0, cap=0.0, z_loss=0.0, rows=0, mask=(False,) * 3, statistics=(True,) * 3):
    """The results of the op: loss, count, log_prob, entropy, correct, d_hidden, d_weight, d_bias."""
    options = (-100, reduction, smoothing, cap, 1.0, z_loss, 0, rows, list(mask), list(statistics))
    return HEAD.overload(hidden, weight, bias, target, *options)


def data(rows, width, classes, dtype=torch.float32):
    """hidden, weight and target of whole numbers: logits are exact in every dtype, and many are equal."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randint(-2, 3, size, generator=generator).to(dtype) for size in ((rows, width), (classes, width)))
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[1::4] = (hidden.double() @ weight.double().t()).argmax(1)[1::4]
    target[::4] = -100
    return hidden, weight, target


def expected(hidden, weight, target, bias=None, cap=0.0):
    """log_prob, entropy and correct in plain PyTorch, zero where ignored."""
    logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    logits = cap * torch.tanh(logits / cap) if cap else logits
    kept, spread = target != -100, torch.distributions.Categorical(logits=logits)
    log_prob = torch.where(kept, logits.log_softmax(1).gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1), 0.0)
    return log_prob, torch.where(kept, spread.entropy(), 0.0), kept & (logits.argmax(1) == target)


def on(where):
    return interpreted([HEAD, LOGITS]) if where == "kernels" else torch.no_grad()


everywhere = pytest.mark.parametrize("where", ["aten", "kernels"])


@everywhere
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("mask", [(True, False, False), (False, False, False)], ids=["gradient", "none"])
@pytest.mark.parametrize(("classes", "cap", "biased"), [(40, 0.0, True), (129, 3.0, False), (1, 0.0, False), (1050, 0.0, False)])
def test_statistics_of_rows(where, dtype, mask, classes, cap, biased):
    hidden, weight, target = data(21, 8, classes, dtype)
    bias = torch.arange(classes).remainder(5).to(dtype) if biased else None
    wide = tuple(None if part is None else part.double() for part in (hidden, weight, bias))
    log_prob, entropy, correct = expected(wide[0], wide[1], target, wide[2], cap)
    plain = expected(*(part.float() for part in wide[:2]), target, None if bias is None else bias.float(), cap)
    for chosen in ((True, True, True), (True, False, True), (False, True, False)):
        with on(where):
            found = head(hidden, weight, target, bias, cap=cap, mask=mask, statistics=chosen)[2:5]
        assert [part is not None for part in found] == list(chosen)
        for mine, eager, true in zip(found[:2], plain, (log_prob, entropy), strict=False):
            assert mine is None or excess(mine, true, eager_error(eager, true, mine.dtype)) <= 0
        assert found[2] is None or torch.equal(found[2], correct)
    assert correct.any() and (classes == 1 or not correct[target != -100].all())


@everywhere
def test_a_class_of_probability_zero_adds_no_entropy_and_nan_is_not_correct(where):
    hidden, weight, target = data(8, 8, 12)
    bias = torch.zeros(12)
    bias[3] = -torch.inf
    with on(where):
        entropy = head(hidden, weight, target, bias)[3]
    others = torch.arange(12) != 3
    plain, true = (expected(hidden.to(dtype), weight[others].to(dtype), target.clamp(max=0))[1] for dtype in (torch.float32, torch.float64))
    assert excess(entropy, true, eager_error(plain, true, torch.float32)) <= 0
    hidden[1], target[1] = NAN, 0
    for dtype in LOW:
        with on(where):
            loss, *_, correct = head(hidden.to(dtype), weight.to(dtype), target, statistics=(False, False, True))[:5]
        assert loss[1].isnan() and not correct[1] and torch.equal(loss.isnan().nonzero(), torch.tensor([[1]]))


@everywhere
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_of_equal_logits_the_first_counts(where, dtype):
    hidden, weight, _ = data(24, 8, 7, dtype)
    weight = weight.repeat(150, 1)  # Every logit 150 times, in every tile of classes; a program has more than one tile.
    first = (hidden.double() @ weight.double().t()).argmax(1)
    target = first + 7 * (torch.arange(24) % 4) * 41
    with on(where):
        correct = head(hidden, weight, target, statistics=(False, False, True))[4]
    assert torch.equal(correct, target == first)


def test_the_loss_is_the_log_probability_that_has_a_derivative():
    hidden, weight, target = data(21, 8, 40)
    loss, _, log_prob, entropy, correct, *_ = head(hidden.requires_grad_(), weight, target, mask=(True, False, False))
    assert torch.equal(loss, -log_prob) and loss.requires_grad
    assert not any(part.requires_grad for part in (log_prob, entropy, correct))


# -- which kernels run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "change", "started"),
    [
        (torch.bfloat16, {}, {"head_kernel": 1, "join_kernel": 1}),
        (torch.float16, {"cap": 3.0, "z_loss": 1e-3}, {"head_kernel": 1, "join_kernel": 1}),
        (torch.float32, {}, {"row_kernel": 1}),
        (torch.bfloat16, {"smoothing": 0.1}, {"row_kernel": 1}),
        (torch.bfloat16, {"statistics": (False, True, False)}, {"row_kernel": 1}),
        (torch.bfloat16, {"mask": (True, False, False)}, {"row_kernel": 1}),
    ],
)
def test_logits_are_not_written_where_nothing_needs_them(dtype, change, started):
    hidden, weight, target = data(21, 8, 300, dtype)
    with interpreted([HEAD]) as calls:
        head(hidden, weight, target, **{"statistics": (True, False, True)} | change)
    assert dict(calls.runner.launches) == started


def test_a_wide_hidden_state_goes_through_the_vendors_product(monkeypatch):
    monkeypatch.setattr(kernels, "WIDEST", 4)
    with interpreted([HEAD]) as calls:
        head(*data(21, 8, 300, torch.bfloat16), statistics=(True, False, True))
    assert dict(calls.runner.launches) == {"row_kernel": 1}


def test_chunks_are_even():
    assert [sweep._even(rows, 128) for rows in (0, 1, 128, 129, 1000)] == [1, 1, 128, 65, 125]


# -- dropped rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "computed"), [(-1, 15), (15, 15), (18, 18), (0, 21), (21, 21), (99, 21)])
def test_a_bound_on_the_rows_saves_the_rest(rows, computed):
    hidden, weight, target = data(21, 8, 40)
    options = (-100, "mean", 0.0, 0.0, 1.0, 0.0, 0, rows, [True, True, False], [True, True, True])
    with running(Interpreter(), SMALL), FlopCounterMode(display=False) as counter:
        found = kernels.forward(hidden, weight, None, target, *options)
    assert counter.get_total_flops() == 3 * 2 * computed * 8 * 40  # Logits, d_hidden, d_weight.
    for mine, theirs in zip(found, body.forward(hidden, weight, None, target, *options), strict=True):
        assert mine is theirs or (same(mine, theirs) and mine.dtype == theirs.dtype)


def test_a_bound_that_does_not_hold_is_no_wrong_loss():
    hidden, weight, target = data(21, 8, 40)
    for reduction in body.REDUCTIONS:
        with pytest.raises(CheckError, match="15 rows have a label"):
            head(hidden, weight, target, reduction=reduction, rows=14)
        with interpreted([HEAD]):
            assert head(hidden, weight, target, reduction=reduction, rows=14)[0].isnan().all()


# -- labels and logits that are out of the ordinary ------------------------------------------------------------------


def logits_loss(logits, target, reduction="none", softcap=0.0):
    return LOGITS(logits, target, -100, reduction, 0.0, softcap, 1.0, 0.0)[0]


@pytest.mark.parametrize("label", [-1, 40, 2**40])
def test_a_label_that_is_no_class(label):
    hidden, weight, target = data(21, 8, 40)
    target[5] = label
    with pytest.raises(RuntimeError, match="out of bounds"):
        head(hidden, weight, target)
    with pytest.raises(RuntimeError, match="out of bounds"):
        logits_loss(hidden, target.remainder(8).index_fill(0, torch.tensor(5), label))
    only = torch.arange(21) == 5
    for dtype in LOW:
        with interpreted([HEAD, LOGITS]):
            for statistics in ((True, False, True), (True, True, True)):
                loss, _, log_prob, _, correct, d_hidden, *_ = head(hidden.to(dtype), weight.to(dtype), target, mask=(True, False, False), statistics=statistics)
                assert torch.equal(loss.isnan(), only) and torch.equal(log_prob.isnan(), only) and not correct[5]
                assert torch.equal(d_hidden.isnan(), only.unsqueeze(1).expand(21, 8))
                assert torch.equal(head(hidden.to(dtype), weight.to(dtype), target, statistics=statistics)[0].isnan(), only)
            logits = (hidden @ weight.t()).to(dtype).requires_grad_()
            loss = logits_loss(logits, target)
            (grad,) = torch.autograd.grad(loss.sum(), logits)
            assert torch.equal(loss.isnan(), only) and torch.equal(grad.isnan(), only.unsqueeze(1).expand(21, 40))


@everywhere
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("top", [3.0, 9.0, 12.0])
def test_a_confident_row_is_exact_to_the_last_digit(where, dtype, top):
    """Loss and gradient of a label of probability 0.99996: nothing of them is left in 1 - p."""
    logits, label = torch.zeros(1, 8), torch.tensor([2])
    logits[0, 2] = top
    others = logits.double().softmax(1).index_fill(1, label, 0.0).sum(1)
    for weight in (None, torch.eye(8).to(dtype)):
        leaf = logits.to(dtype).requires_grad_()
        with on(where), torch.enable_grad():
            loss = logits_loss(leaf, label) if weight is None else head(leaf, weight, label, mask=(True, False, False))[0]
            inference = loss if weight is None else head(leaf.detach(), weight, label, statistics=(False,) * 3)[0]
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
        assert excess(grad[0, 2], -others[0], 0.0) <= 0
        for found in (loss, inference):
            assert excess(found.detach(), -(-others).log1p(), 0.0) <= 0


@everywhere
def test_a_saturated_cap_has_the_slope_of_tanh(where):
    """1 - tanh^2 is 0.003 at 3.6: from tanh itself it is off by 140 ulp, and by more if tanh is."""
    logits, label = torch.linspace(-2.0, 2.0, 129).unsqueeze(0), torch.tensor([120])
    logits[0, label] = 7.2
    plain, true = logits.clone().requires_grad_(), logits.double().requires_grad_()
    grads = [torch.autograd.grad(torch.nn.functional.cross_entropy(2.0 * torch.tanh(x / 2.0), label), x)[0][0, label] for x in (plain, true)]
    leaf = logits.clone().requires_grad_()
    with on(where), torch.enable_grad():
        (grad,) = torch.autograd.grad(logits_loss(leaf, label, softcap=2.0).sum(), leaf)
    assert excess(grad[0, label], grads[1], 0.0 if where == "kernels" else eager_error(grads[0], grads[1], torch.float32)) <= 0


@everywhere
def test_what_is_ignored_may_hold_anything(where):
    logits, target = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), torch.tensor([1, -100, 3, -100, 5, 0])
    logits[1], logits[3] = NAN, torch.inf
    with on(where), torch.enable_grad():
        leaf = logits.clone().requires_grad_()
        loss = logits_loss(leaf, target, "mean")
        (grad,) = torch.autograd.grad(loss, leaf)
    assert loss.isfinite() and not grad[[1, 3]].any() and grad[[0, 2, 4, 5]].isfinite().all()


@everywhere
@pytest.mark.parametrize("pull", [NAN, torch.inf])
@pytest.mark.parametrize("kept", [0, 3], ids=["no label", "some labels"])
@pytest.mark.parametrize("reduction", body.REDUCTIONS)
def test_what_is_ignored_takes_no_gradient_even_of_nan(where, reduction, kept, pull):
    """A sum divided by no labels has the gradient inf: in plain PyTorch rows without a label stay at zero."""
    hidden, weight, target = data(8, 5, 12)
    target[kept:], bias = -100, torch.arange(12.0)
    ignored = target == -100
    leaves = [part.requires_grad_() for part in (hidden, weight, bias, (hidden.detach() @ weight.detach().t()))]

    def backward(loss, inputs):
        return torch.autograd.grad(loss, inputs, torch.full_like(loss, pull))

    cross = {"reduction": reduction, "ignore_index": -100}
    plain = backward(F.cross_entropy(F.linear(hidden, weight, bias), target, **cross), leaves[:3])
    plain += backward(F.cross_entropy(leaves[3], target, **cross), leaves[3:])
    for saved in (True, False):
        with on(where), torch.enable_grad():
            loss = head(hidden, weight, target, bias, reduction, mask=(saved,) * 3, statistics=(False,) * 3)[0]
            mine = backward(loss, leaves[:3]) + backward(logits_loss(leaves[3], target, reduction), leaves[3:])
        assert not mine[0][ignored].any() and not mine[3][ignored].any()
        for found, theirs in zip(mine, plain, strict=True):
            assert not (found.isnan() & ~theirs.isnan()).any() and bool(found.any()) == bool(kept)
            assert pull == torch.inf or torch.equal(found.isnan(), theirs.isnan())


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_logits_are_kept_as_they_are_and_little_else(dtype):
    logits, target = torch.randn(64, 1000).to(dtype).requires_grad_(), torch.arange(64)
    before, saved = logits.detach().clone(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda tensor: tensor):
        loss = logits_loss(logits, target, "mean")
    apart = [tensor for tensor in saved if tensor.data_ptr() not in (logits.data_ptr(), target.data_ptr())]
    assert sum(tensor.numel() * tensor.element_size() for tensor in apart) <= 64 * 2 * 4 + 8
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert same_bits(first, second) and same_bits(before, logits.detach())
