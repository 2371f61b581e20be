"""Bugs that other libraries' fused kernels shipped, each as the test that would have caught it; see test_known_bugs.py."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from implementations import RACY
from interpreter.runner import interpreted
from oracle import in_fp64, same_bits
from torch.utils.flop_counter import FlopCounterMode

from fxopt.errors import CheckError
from fxopt.kernels.catalog import CATALOG
from fxopt.kernels.linear_cross_entropy.body import backward as loss_backward
from fxopt.kernels.linear_cross_entropy.body import forward as loss_forward
from fxopt.kernels.lora_linear import body as lora_body
from fxopt.kernels.formats import FORMATS
from fxopt.kernels.tolerance import eager_error, excess

OPS = {op.name: op for op in CATALOG}


@pytest.fixture(params=["aten", "interpreter"])
def implementation(request):
    """The ops run their ATen bodies, or their Triton kernels in the interpreter."""
    if request.param == "aten":
        yield
    else:
        with interpreted(racy=RACY, must_start="nothing"):  # Some labels are all ignored.
            yield


everywhere = pytest.mark.usefixtures("implementation")


def normal(*shape, dtype=torch.float32, seed=0, grad=False):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return tensor.requires_grad_(grad)


def loss_args(hidden, weight, target, bias=None, reduction="mean", chunk=0, mask=(True, True, False), **more):
    ignore_index, *terms = _terms(more)
    return (hidden, weight, bias, target, ignore_index, reduction, *terms, chunk, -1, list(mask), [False] * 3)


def logits_args(logits, target, reduction="mean", **more):
    ignore_index, *terms = _terms(more)
    return (logits, target, ignore_index, reduction, *terms)


def _terms(given):
    """ignore_index, label_smoothing, softcap, logit_scale, z_loss."""
    return ({"ignore_index": -100, "label_smoothing": 0.0, "softcap": 0.0, "logit_scale": 1.0, "z_loss": 0.0} | given).values()


def gradients(function, args, places, pull=None):
    leaves = [arg.detach().clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    for place in places:
        leaves[place].requires_grad_()
    out = function(*leaves)[0]
    return torch.autograd.grad(out, [leaves[place] for place in places], None if pull is None else pull.to(out.dtype))


def close_to_the_truth(op, args, places, pull=None):
    mine = gradients(op, args, places, pull)
    plain = gradients(op.reference, args, places, pull)
    true = gradients(op.reference, tuple(map(in_fp64, args)), places, pull)
    return all(excess(m, t, eager_error(p, t, m.dtype)) <= 0 for m, p, t in zip(mine, plain, true, strict=True))


# 2. Backward in place clobbers grad_output, or an input that a residual also holds.


@everywhere
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "swiglu", "geglu", "rope"])
def test_a_residual_and_a_second_backward_see_unchanged_tensors(name):
    x, other = normal(4, 3, 5, 8, grad=True), normal(4, 3, 5, 8, seed=1)
    rest = {
        "rms_norm": (None, 1e-6, 0.0, "none"),
        "layer_norm": (None, None, 1e-5),
        "swiglu": (other,),
        "geglu": (other, "none"),
        "rope": (None, normal(1, 1, 5, 8), normal(1, 1, 5, 8), False, False),
    }[name]
    op = OPS[name]
    y = op(x, *rest)[0]
    loss = ((x + y) * y).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert same_bits(first, second)
    plain = op.reference(x, *rest)[0]
    (expected,) = torch.autograd.grad(((x + plain) * plain).sum(), x)
    wide = tuple(map(in_fp64, (x.detach(), *rest)))
    wide[0].requires_grad_()
    truth = op.reference(*wide)[0]
    (true,) = torch.autograd.grad(((wide[0] + truth) * truth).sum(), wide[0])
    assert excess(first, true, eager_error(expected, true, torch.float32)) <= 0


# 3. reduction="none" multiplied every row by the first element of grad_output.


@everywhere
@pytest.mark.parametrize("mask", [(True, True, True), (False, False, False)], ids=["in forward", "in backward"])
def test_rows_have_their_own_grad_output(mask):
    target = torch.tensor([3, 0, -100, 6, 6, 1, -100])
    args = loss_args(normal(7, 5), normal(9, 5, seed=1), target, normal(9, seed=2), "none", chunk=2, mask=mask)
    assert close_to_the_truth(OPS["linear_cross_entropy"], args, (0, 1, 2), normal(7, seed=3))


@everywhere
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 3.0, "z_loss": 1e-3}], ids=str)
def test_rows_of_logits_have_their_own_grad_output(options):
    target = torch.tensor([3, 0, -100, 6, 6, 1, -100])
    args = logits_args(normal(7, 9), target, "none", **options)
    for pull in (normal(7, seed=3), torch.ones(()).expand(7), normal(14, seed=3)[::2]):
        assert close_to_the_truth(OPS["cross_entropy"], args, (0,), pull)


# 4. The gradient of the true class read back from a bf16 buffer: 100% off where softmax is 0.999. As p - 1 it has lost four
# digits even in fp32.

LOW = (torch.bfloat16, torch.float16, torch.float32)


@everywhere
@pytest.mark.parametrize(("dtype", "top"), [(dtype, top) for dtype in LOW for top in (2.0, 9.0, 12.0, 30.0) if dtype != torch.float16 or top < 30])
def test_the_true_class_of_a_confident_row_has_a_gradient(dtype, top):
    logits = torch.zeros(3, 8, dtype=dtype)
    logits[1, 2], logits[2, 5], target = top, top, torch.tensor([0, 2, 4])  # Unsure, right, and wrong.
    for args in (logits_args(logits, target, "sum"), loss_args(logits, torch.eye(8, dtype=dtype), target, reduction="sum")):
        op = OPS["cross_entropy" if len(args) == 8 else "linear_cross_entropy"]
        (mine,) = gradients(op, args, (0,))
        others = logits.double().softmax(1).scatter(1, target.unsqueeze(1), 0.0)  # p - 1 cancels in fp64 too.
        assert excess(mine.gather(1, target.unsqueeze(1)), -others.sum(1, keepdim=True), 0.0) <= 0


# 5. The weight gradient accumulated over chunks in bf16.


@everywhere
@pytest.mark.parametrize("chunks", [2, 4, 8, 16, 32, 64, 256])
def test_the_error_of_the_weight_gradient_does_not_grow_with_the_chunks(chunks):
    rows = 256
    hidden, weight = normal(rows, 16, dtype=torch.bfloat16).abs(), normal(12, 16, dtype=torch.bfloat16, seed=1)
    target = torch.arange(rows) % 12
    op = OPS["linear_cross_entropy"]
    (true,) = gradients(op.reference, tuple(map(in_fp64, loss_args(hidden, weight, target))), (1,))
    (whole,) = gradients(op, loss_args(hidden, weight, target, chunk=rows), (1,))
    (pieces,) = gradients(op, loss_args(hidden, weight, target, chunk=rows // chunks), (1,))
    assert excess(pieces, true, eager_error(whole, true, torch.bfloat16)) <= 0


# 7. One head did nothing; batched tables; a grad_output of stride 0.


@everywhere
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_one_head_and_batched_tables_rotate(heads, batch):
    q, cos, sin = normal(3, heads, 5, 8), normal(batch, 1, 5, 8, seed=1), normal(batch, 1, 5, 8, seed=2)
    args = (q, None, cos, sin, False, False)
    assert not torch.equal(OPS["rope"](*args)[0], q)
    assert close_to_the_truth(OPS["rope"], args, (0,), torch.ones(()).expand(q.shape))


def test_the_tables_of_a_rotation_are_not_trained_silently():
    q, cos, sin = normal(1, 2, 5, 8), normal(1, 1, 5, 8, grad=True), normal(1, 1, 5, 8)
    with pytest.raises(CheckError, match="requires grad"):
        OPS["rope"](q, None, cos, sin, False, False)


@everywhere
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "swiglu"])
def test_a_stride_0_grad_output_is_read_right(name):
    rest = {"rms_norm": (normal(8, seed=1), 1e-6, 0.0, "none"), "layer_norm": (normal(8, seed=1), None, 1e-5)}
    args = (normal(6, 8), *rest.get(name, (normal(6, 8, seed=1),)))
    for pull in (torch.ones(()).expand(6, 8), normal(6, 1).expand(6, 8), normal(1, 8).expand(6, 8), normal(8, 6).t()):
        assert close_to_the_truth(OPS[name], args, (0, 1), pull)


# 8. The weight's gradient was None in full fine-tuning; no gradient at all where most labels are ignored.


@everywhere
@pytest.mark.parametrize("ignored", [0, 99, 100])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("mask", [(True, True, False), (False, False, False)], ids=["in forward", "in backward"])
def test_label_masks(ignored, reduction, mask):
    target = torch.arange(100) % 9
    target[:ignored] = -100
    args = loss_args(normal(100, 5), normal(9, 5, seed=1), target, reduction=reduction, mask=mask)
    op = OPS["linear_cross_entropy"]
    assert close_to_the_truth(op, args, (0, 1))
    for mine, theirs in zip(gradients(op, args, (0, 1)), gradients(op.reference, args, (0, 1)), strict=True):
        assert mine.any() == theirs.any() == (ignored < 100)
    assert torch.equal(op(*args)[0].isnan(), op.reference(*args)[0].isnan())


@everywhere
@pytest.mark.parametrize("ignored", [0, 99, 100])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_label_masks_of_logits(ignored, reduction):
    target = torch.arange(100) % 9
    target[:ignored] = -100
    args, op = logits_args(normal(100, 9), target, reduction), OPS["cross_entropy"]
    assert close_to_the_truth(op, args, (0,), None if reduction != "none" else normal(100))
    assert torch.equal(op(*args)[0].isnan(), op.reference(*args)[0].isnan())


def test_ignored_rows_never_reach_the_head():
    hidden, weight, target = normal(100, 5), normal(9, 5, seed=1), torch.full((100,), -100)
    target[3] = 1
    with FlopCounterMode(display=False) as counter:
        loss_forward(*loss_args(hidden, weight, target, mask=(True, False, False)))
    assert counter.get_total_flops() == 2 * (2 * 1 * 5 * 9)  # Logits and d_hidden of one row.


# 9. Dequantization through shared scratch buffers.


def test_threads_do_not_share_buffers():
    parts = [list(FORMATS["nf4"].quantize(normal(96, 64, seed=seed))) for seed in range(4)]
    expected = [torch.ops.fxopt.dequantize(part, "nf4", [96, 64], torch.bfloat16) for part in parts]
    wrong = []

    def work(part, right):
        for _ in range(20):
            if not same_bits(torch.ops.fxopt.dequantize(part, "nf4", [96, 64], torch.bfloat16), right):
                wrong.append(part)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(parts, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# 10. The bias of the head was wrong, and the tests' biases were of size 0.01.


@everywhere
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}, {"logit_scale": 0.5, "label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("mask", [(True, True, True), (False, False, False)], ids=["in forward", "in backward"])
def test_a_large_bias_of_the_head(dtype, options, mask):
    hidden, weight, target = normal(40, 16, dtype=dtype), normal(24, 16, dtype=dtype, seed=1), torch.arange(40) % 24
    bias = normal(24, seed=2).mul(20).to(dtype)
    assert close_to_the_truth(OPS["linear_cross_entropy"], loss_args(hidden, weight, target, bias, mask=mask, chunk=7, **options), (0, 1, 2))


# A frozen weight's gradient is not merely dropped: its product is never formed.


def test_a_frozen_weight_costs_no_product():
    rows, features, outputs, rank = 32, 24, 20, 2
    x, weight, dy = normal(rows, features), normal(outputs, features, seed=1), normal(rows, outputs, seed=2)
    lora_a, lora_b, low = normal(rank, features), normal(outputs, rank), normal(rows, rank)

    def flops(*mask):
        with FlopCounterMode(display=False) as counter:
            args = ([dy], x, [weight], ["dense"], [outputs, features], [], [lora_a], [lora_b], low, [0.5], False, 0.0, None, list(mask))
            lora_body.backward(*args)
        return counter.get_total_flops()

    dense, adapter = 2 * rows * features * outputs, 2 * rows * rank * (features + outputs)
    assert flops(True, False, True, True) <= dense + 2 * adapter
    assert flops(True, True, True, True) - flops(True, False, True, True) == dense
    assert flops(False, False, True, True) <= 2 * adapter


def test_a_frozen_head_costs_no_weight_gradient():
    args = loss_args(normal(32, 24), normal(20, 24, seed=1), torch.arange(32) % 20, mask=(True, False, False))
    with FlopCounterMode(display=False) as counter:
        _, count, _, _, _, d_hidden, _, _ = loss_forward(*args)
    assert counter.get_total_flops() == 2 * (2 * 32 * 24 * 20)
    with FlopCounterMode(display=False) as counter:
        loss_backward(torch.ones(()), count, d_hidden, *(None,) * 5, args[3], *args[4:12], [True, False, False])
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_no_bit(transposed, biased, dtype, adapter):
    x, weight = normal(2, 7, 40, dtype=dtype), normal(24, 40, dtype=dtype, seed=1)
    bias = normal(24, dtype=dtype, seed=2) if biased else None
    lora_a, lora_b = normal(4, 40, dtype=adapter, seed=3), torch.zeros(24, 4, dtype=adapter)
    stored = weight.t().contiguous() if transposed else weight
    mine = OPS["lora_linear"](x, [stored], ["dense"], list(stored.shape), [] if bias is None else [bias], [lora_a], [lora_b], [2.0], transposed, 0.0, None)[0]
    if transposed:
        rows = x.view(-1, 40)
        plain = (rows.mm(stored) if bias is None else torch.addmm(bias, rows, stored)).view(mine.shape)
    else:
        plain = F.linear(x, weight, bias)
    assert torch.equal(mine, plain)
