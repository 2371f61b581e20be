"""Bugs that other fused kernels shipped, each with the tests that would have caught it, over every op that could have it.

Reported against Liger-Kernel, Unsloth, Cut Cross-Entropy, flash-linear-attention and Transformer Engine. `BUGS` names the
tests; those here run on the ATen bodies, on the Triton kernels in the interpreter and, with `pytest -m gpu`, on a GPU.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from implementations import Implementation, differentiable, implementations
from oracle import eager_errors, in_fp64, run, same_bits
from test_contract import leaves, where_it_runs
from torch.utils import _pytree as pytree

from fxopt.kernels.catalog import CATALOG
from fxopt.kernels.op import Case
from fxopt.kernels.tolerance import eager_error, excess, same

BUGS = {
    "1 offsets in int32 (crash, or silent)": ["test_offsets::test_no_offset_wraps_around", "test_interpreter::test_an_offset_that_wraps_around_is_seen"],
    "2 backward in place clobbers grad_output, a residual, a second backward": [
        "test_known_bugs::test_a_second_backward_sees_unchanged_tensors", "test_contract::test_grad_output_is_not_written_to",
        "test_gate::test_what_a_kernel_writes_is_known"],
    "3 every row times the first element of grad_output": ["test_known_bugs::test_rows_have_their_own_grad_output", "test_faults::test_a_planted_fault_is_caught"],
    "4 the gradient of a confident true class from a bf16 buffer": ["test_known_bugs::test_the_true_class_of_a_confident_row_has_a_gradient"],
    "5 weight gradients accumulated in bf16": [
        "test_known_bugs::test_the_error_of_a_sum_over_rows_does_not_grow_with_the_rows", "test_regressions::test_the_error_of_the_weight_gradient_does_not_grow_with_the_chunks"],
    "6 logits rounded before the loss": ["test_known_bugs::test_logits_are_not_rounded_before_the_loss"],
    "7 one head did nothing; batched tables; a grad_output of stride 0": [
        "test_known_bugs::test_one_head_and_batched_tables_rotate", "test_known_bugs::test_a_grad_output_of_any_strides_is_read_right"],
    "8 a gradient is None or zero: norm weights, mostly ignored labels": [
        "test_known_bugs::test_every_input_that_can_be_trained_gets_a_gradient", "test_known_bugs::test_label_masks"],
    "9 4-bit weights that differ from bitsandbytes'; buffers that streams share": [
        "test_nf4::test_dequantize_is_bit_exact", "test_formats::test_nested_scales_are_read_bit_exactly", "test_nf4::test_no_result_shares_memory_with_another",
        "test_regressions::test_threads_do_not_share_buffers", "test_gpu::test_launches_are_on_the_stream_of_the_caller"],
    "10 the bias path of a fused loss": ["test_known_bugs::test_a_bias_counts"],
    "11 fp64 scalars; two products into one accumulator; alignment hints that lie": [
        "test_interpreter::test_scalars_arrive_as_a_launch_passes_them", "test_house::test_rule_holds"],
}  # fmt: skip

OPS = {op.name: op for op in CATALOG}
LOSSES = [name for name in ("cross_entropy", "linear_cross_entropy") if name in OPS]


def test_every_bug_has_tests():
    root = Path(__file__).parent
    for bug, tests in BUGS.items():
        for test in tests:
            file, _, name = test.partition("::")
            path = next(place for place in (root / f"{file}.py", root.parent / f"{file}.py") if place.is_file())
            assert name in {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}, f"{bug}: {test}"


def of(*names, bodies=True):
    """Every implementation of these ops; without the ATen bodies, their kernels."""
    found = implementations(OPS[name] for name in names if name in OPS)
    return pytest.mark.parametrize("where", [part for part in found if bodies or part.values[0].kind != "aten"])


def normal(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def wrong(where: Implementation, case: Case, pull: torch.Tensor | None = None) -> list[str]:
    """Gradients that are further from the truth than the plain program's; with a grad_output of its own for output 0."""
    case = where.on_device(case)
    with where.running():
        mine = gradients(where.op, case, case.args, pull)
    plain = gradients(where.op.reference, case, case.args, pull)
    true = gradients(where.op.reference, case, tuple(map(in_fp64, case.args)), pull)
    return [f"gradient of {place}" for place, m, p, t in zip(case.grads, mine, plain, true, strict=True) if excess(m, t, eager_error(p, t, m.dtype)) > 0]


def gradients(function, case, args, pull=None):
    parts = [arg.detach().clone().requires_grad_(place in case.grads) if isinstance(arg, torch.Tensor) else arg for place, arg in enumerate(args)]
    out = function(*case.packed(parts))[0]
    return torch.autograd.grad(out, [parts[place] for place in case.grads], None if pull is None else pull.to(out))


# -- 2, 7, 8: any op -------------------------------------------------------------------------------------------------


@differentiable
def test_a_second_backward_sees_unchanged_tensors(where):
    def check(case):
        args = leaves(case)
        outputs = [out for out in where.op(*case.packed(args)) if out.requires_grad]
        pulls = [torch.randn(out.shape, generator=torch.Generator().manual_seed(case.seed)).to(out) for out in outputs]
        watched = [*(arg for arg in args if isinstance(arg, torch.Tensor)), *outputs, *pulls]
        before = [part.detach().clone() for part in watched]
        wanted = [args[place] for place in case.grads]
        first = torch.autograd.grad(outputs, wanted, pulls, retain_graph=True)
        second = torch.autograd.grad(outputs, wanted, pulls)
        assert all(map(same_bits, first, second))
        assert all(map(same_bits, before, watched))

    where_it_runs(where, check, 40)


@differentiable
def test_a_grad_output_of_any_strides_is_read_right(where):
    def check(case):
        args = leaves(case)
        out = next(out for out in where.op(*case.packed(args)) if out.requires_grad)
        wanted = [args[place] for place in case.grads]
        generator = torch.Generator().manual_seed(case.seed)
        for shape in {(), out.shape[:-1] + (1,) if out.dim() else (), (1,) * (out.dim() - 1) + out.shape[-1:]}:
            pull = torch.randn(shape, generator=generator).to(out).expand(out.shape)
            spread = torch.autograd.grad(out, wanted, pull, retain_graph=True, allow_unused=True)
            dense = torch.autograd.grad(out, wanted, pull.contiguous(), retain_graph=True, allow_unused=True)
            turned = torch.autograd.grad(out, wanted, pull.t().contiguous().t(), retain_graph=True, allow_unused=True) if out.dim() == 2 else dense
            for one, other, third in zip(spread, dense, turned, strict=True):
                assert (one is None) == (other is None) == (third is None)
                assert one is None or (same(one, other) and same(third, other))

    def finite(case):
        return case.args[0].numel() > 0 and all(out.isfinite().all() for out in where.op.reference(*case.packed()))

    where_it_runs(where, check, 30, finite)


@differentiable
def test_every_input_that_can_be_trained_gets_a_gradient(where):
    trained: set[int] = set()
    found: set[int] = set()

    def check(case):
        # A place in an open list means another tensor in every case: what counts is the argument of the op.
        argument = {place: i for i, places in enumerate(case.packed(range(len(case.args)))) for place in pytree.tree_leaves(places)}
        grads, plain = (run(function, case, case.args).grads for function in (where.op, where.op.reference))
        trained.update(argument[place] for place in case.grads if plain[place].isfinite().all() and plain[place].any())
        assert all((grads[place] is not None) == (place in case.grads) for place in range(len(case.args)))
        found.update(argument[place] for place in case.grads if grads[place].isfinite().all() and grads[place].any())

    where_it_runs(where, check, 60)
    assert trained and found >= trained


# -- 5, 7: norms, gated units, rotations -----------------------------------------------------------------------------


@of("rms_norm", "layer_norm")
def test_the_error_of_a_sum_over_rows_does_not_grow_with_the_rows(where):
    errors = []
    for rows in (64, 4096):
        x, weight = (normal(rows, 8) + torch.arange(8)).bfloat16(), torch.ones(8, dtype=torch.bfloat16)
        case = Case(*{"rms_norm": ((x, weight, 1e-6, 0.0, "none"), (1,)), "layer_norm": ((x, weight, None, 1e-5), (1,))}[where.op.name])
        case, pull = where.on_device(case), normal(rows, 8, dtype=torch.bfloat16, seed=1).abs()
        with where.running():
            (mine,) = gradients(where.op, case, case.args, pull)
        (true,) = gradients(where.op.reference, case, tuple(map(in_fp64, case.args)), pull)
        errors.append(float((mine.double() - true).norm() / true.norm()))
    # Summed in bf16, numbers of one sign stop growing at 256 times their size.
    assert max(errors) <= torch.finfo(torch.bfloat16).eps


@of("rope")
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_one_head_and_batched_tables_rotate(where, heads, batch):
    q, cos, sin = normal(3, heads, 5, 8), normal(batch, 1, 5, 8, seed=1), normal(batch, 1, 5, 8, seed=2)
    case = where.on_device(Case((q, None, cos, sin, False, False), (0,)))
    with where.running():
        assert not torch.equal(where.op(*case.args)[0], case.args[0])
    assert wrong(where, case, torch.ones(()).expand(q.shape)) == []


# -- 3, 4, 6, 8, 10: losses ------------------------------------------------------------------------------------------


def loss_case(name, hidden, weight, target, bias=None, reduction="mean", in_forward=True, grads=(0,)):
    """A loss of hidden weight^T + bias, by the fused op or on the logits; options that are not named are off."""
    given = {"hidden": hidden, "weight": weight, "bias": bias, "target": target, "ignore_index": -100, "reduction": reduction, "logit_scale": 1.0,
             "grad_mask": [in_forward and place in grads for place in range(3)], "statistics": [False] * 3}  # fmt: skip
    if name == "cross_entropy":
        logits = hidden.double() @ weight.double().t() + (0 if bias is None else bias.double())
        given["logits"], grads = logits.to(hidden.dtype), (0,)
    arguments = OPS[name].overload._schema.arguments
    return Case(tuple(given.get(argument.name, 0) for argument in arguments), grads)


both_moments = pytest.mark.parametrize("in_forward", [True, False], ids=["in forward", "in backward"])


@of(*LOSSES)
@both_moments
def test_rows_have_their_own_grad_output(where, in_forward):
    target = torch.tensor([3, 0, -100, 6, 6, 1, -100])
    case = loss_case(where.op.name, normal(7, 5), normal(9, 5, seed=1), target, normal(9, seed=2), "none", in_forward)
    assert wrong(where, case, normal(7, seed=3)) == []


@of(*LOSSES)
def test_the_true_class_of_a_confident_row_has_a_gradient(where):
    hidden = torch.zeros(1, 8, dtype=torch.bfloat16)
    hidden[0, 2] = 9.0  # softmax 0.9991; its gradient is -0.0009, which is nothing beside 1 in bf16.
    case = where.on_device(loss_case(where.op.name, hidden, torch.eye(8, dtype=torch.bfloat16), torch.tensor([2])))
    with where.running():
        (mine,) = gradients(where.op, case, case.args)
    (true,) = gradients(where.op.reference, case, tuple(map(in_fp64, case.args)))
    assert excess(mine[0, 2], true[0, 2], 0.0) <= 0


# The ATen body rounds where the plain program does: torch's 16-bit product on a CPU has 16-bit results.
@of("linear_cross_entropy", bodies=False)
def test_logits_are_not_rounded_before_the_loss(where):
    hidden, weight = normal(16, 64, dtype=torch.bfloat16, scale=4.0), normal(32, 64, dtype=torch.bfloat16, seed=1)
    case = where.on_device(loss_case(where.op.name, hidden, weight, torch.arange(16), reduction="none"))
    with where.running():
        mine = where.op(*case.args)[0]
    true = where.op.reference(*map(in_fp64, case.args))[0]
    rounded = torch.nn.functional.cross_entropy((case.args[0] @ case.args[1].t()).double(), case.args[3], reduction="none")
    # fp32 logits of up to 64: a hundred times closer than bf16 logits.
    assert (mine - true).abs().max() * 100 < (rounded - true).abs().max()


@of(*LOSSES)
@both_moments
@pytest.mark.parametrize("ignored", [0, 99, 100])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_label_masks(where, ignored, reduction, in_forward):
    target = torch.arange(100) % 9
    target[:ignored] = -100
    case = where.on_device(loss_case(where.op.name, normal(100, 5), normal(9, 5, seed=1), target, None, reduction, in_forward))
    assert wrong(where, case) == []
    with where.running():
        (mine,), value = gradients(where.op, case, case.args), where.op(*case.args)[0]
    assert mine.any() == (ignored < 100) and mine.isfinite().all()
    assert torch.equal(value.isnan(), where.op.reference(*case.args)[0].isnan())


@of("linear_cross_entropy")
@both_moments
def test_a_bias_counts(where, in_forward):
    bias = normal(9, seed=2, scale=8.0)
    case = loss_case(where.op.name, normal(20, 5), normal(9, 5, seed=1), torch.arange(20) % 9, bias, "mean", in_forward, (0, 1, 2))
    assert wrong(where, case) == []
    case = where.on_device(case)
    errors, true = eager_errors(where.op, case), where.op.reference(*map(in_fp64, case.args))[0]
    with where.running():
        assert excess(where.op(*case.args)[0], true, errors["outputs", 0]) <= 0
