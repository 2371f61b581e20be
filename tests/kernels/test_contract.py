"""The contract of every op in the catalog: values, gradients, purity, and every way of tracing it."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import HealthCheck, Phase, given, settings
from implementations import differentiable, every_implementation
from oracle import failures, run, same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxopt.errors import CheckError
from fxopt.kernels.catalog import CATALOG
from fxopt.kernels.in_place import InPlaceOp

CASES = {op.name: importlib.import_module(f"{op.folder}.cases").cases for op in CATALOG}
DIFFERENTIABLE = tuple(op for op in CATALOG if op.backward is not None)

every_op = pytest.mark.parametrize("op", CATALOG, ids=lambda op: op.name)
functional_op = pytest.mark.parametrize("op", [op for op in CATALOG if not isinstance(op, InPlaceOp)], ids=lambda op: op.name)
differentiable_op = pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)


def on_cases(op, check, examples, accept=lambda case: True, phases=(Phase.generate, Phase.shrink)):
    """Run check on drawn cases; the same ones in every run."""
    options = settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=tuple(HealthCheck),
    )
    options(given(CASES[op.name]().filter(accept))(check))()


def where_it_runs(where, check, examples, accept=lambda case: True):
    """Run check on drawn cases of an implementation, on its device."""
    examples = max(10, round(where.share * examples))
    with where.running("operators" if examples >= 200 else "ops"):
        on_cases(where.op, lambda case: check(where.on_device(case)), examples, accept)


def drawn_cases(op, accept=lambda case: True):
    """Drawn cases that are usable and accepted."""
    found = []
    on_cases(op, lambda case: found.append(case), 60, lambda case: _usable(op, case) and accept(case))
    return found


def _has_rows(case):
    return all(arg.numel() > 1 for arg in case.args if isinstance(arg, torch.Tensor))


def leaves(case):
    return tuple(
        arg.detach().clone().requires_grad_(place in case.grads) if isinstance(arg, torch.Tensor) else arg
        for place, arg in enumerate(case.args)
    )


@every_implementation
def test_values_and_gradients_against_the_fp64_truth(where):
    where_it_runs(where, lambda case: check_case(where.op, case), 200)


def check_case(op, case):
    assert failures(op, case) == []


@every_implementation
def test_fake_agrees_with_real(where):
    op = where.op

    def check(case):
        with FakeTensorMode() as mode:
            fakes = op.overload(*case.packed([mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in case.args]))
        reals = op.overload(*case.packed())
        assert described(fakes) == described(reals)

    where_it_runs(where, check, 60)


def described(results):
    results = results if isinstance(results, (tuple, list)) else (results,)
    return [None if part is None else (part.shape, part.dtype, _stride(part), part.device.type) for part in results]


def _stride(part):
    # torch.empty_like itself gives fake and real tensors different strides where they do not matter.
    return [stride for size, stride in zip(part.shape, part.stride(), strict=True) if size > 1 and part.numel()]


# Arguments with the gradient of another one, which is computed once: the operands of a sum.
SHARED = {"add_rms_norm": {1: 0}, "add_layer_norm": {1: 0}}


@differentiable
def test_the_backward_op_gets_the_mask_and_its_fake_agrees(where):
    op = where.op

    def check(case):
        with recorded(op.backward.overload) as calls:
            run(op, case, case.args)
        for args, results in calls:
            reals = results if isinstance(results, (tuple, list)) else (results,)
            asked = len({SHARED.get(op.name, {}).get(place, place) for place in case.grads})
            if isinstance(args[-1], (tuple, list)):  # The mask. Without one, an unused gradient is not passed.
                assert sum(args[-1]) == asked
            with FakeTensorMode() as mode:
                fakes = op.backward.overload(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, args))
            assert described(fakes) == described(reals)
            assert sum(part is not None for part in reals) == asked

    where_it_runs(where, check, 60)


class recorded(torch.utils._python_dispatch.TorchDispatchMode):
    """Keep (args, results) of every call of one operator."""

    def __init__(self, overload):
        super().__init__()
        self.overload, self.calls = overload, []

    def __enter__(self):
        super().__enter__()
        return self.calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func is self.overload:
            self.calls.append((args, results))
        return results


@differentiable
def test_grad_output_is_not_written_to(where):
    op = where.op

    def check(case):
        args = leaves(case)
        outputs = [out for out in op(*case.packed(args)) if out.requires_grad]
        pulls = [torch.randn(out.shape, dtype=torch.float64).to(out) for out in outputs]
        before = [pull.clone() for pull in pulls]
        torch.autograd.backward(outputs, pulls)
        assert all(map(same_bits, before, pulls))

    where_it_runs(where, check, 40)


@differentiable
def test_gradcheck(where):
    op = where.op

    def check(case):
        args = leaves(case)
        places = [place for place in case.grads]

        def of_leaves(*parts):
            full = list(args)
            for place, part in zip(places, parts, strict=True):
                full[place] = part
            return [out for out in op(*case.packed(full)) if out.requires_grad]

        assert torch.autograd.gradcheck(of_leaves, [args[place] for place in places], fast_mode=True)

    where_it_runs(where, check, 12, lambda case: _fp64(case) and _usable(op, case) and _derivative(op, case))


def _fp64(case):
    return case.args[0].dtype == torch.float64


def _derivative(op, case):
    """Whether the op's gradient is the derivative: padding takes none, whatever the result."""
    return op.name != "lora_embedding" or case.args[5] < 0


def _usable(op, case):
    """Has rows and a finite result: the tools of torch do not take NaN for equal to NaN."""
    return _has_rows(case) and all(out.isfinite().all() for out in op(*case.packed()))


@every_implementation
def test_opcheck(where):
    op, seen = where.op, []

    def check(case):
        if len(seen) < 6:
            seen.append(case)
            torch.library.opcheck(op.overload, tuple(case.packed(leaves(case))))

    where_it_runs(where, check, 6, lambda case: _usable(op, case))
    assert seen


@differentiable
def test_opcheck_of_the_backward(where):
    op = where.op

    def check(case):
        with recorded(op.backward.overload) as calls:
            run(op, case, case.args)
        for args, _ in calls:
            torch.library.opcheck(op.backward.overload, pytree.tree_map(detached, args))

    where_it_runs(where, check, 4, lambda case: _usable(op, case))


def detached(arg):
    return arg.detach() if isinstance(arg, torch.Tensor) else arg


@differentiable_op
def test_a_second_derivative_is_refused(op):
    case = drawn_cases(op, lambda case: 0 in case.grads)[0]
    args = leaves(case)
    loss = sum(out.square().sum() for out in op(*case.packed(args)))
    (grad,) = torch.autograd.grad(loss, args[0], create_graph=True)
    with pytest.raises(CheckError, match="second derivatives"):
        grad.sum().backward()


class Calls(torch.nn.Module):
    """One call of the op; the tensors of a case are inputs, the rest is constant."""

    def __init__(self, op, case):
        super().__init__()
        self.op, self.case = op, case

    def forward(self, *tensors):
        given = iter(tensors)
        args = [next(given) if isinstance(arg, torch.Tensor) else arg for arg in self.case.args]
        return self.op(*self.case.packed(args))


def tensors_of(args):
    return tuple(part for arg in args for part in (arg if isinstance(arg, list) else [arg]) if isinstance(part, torch.Tensor))


@functional_op
def test_export_keeps_one_node(op):
    for case in drawn_cases(op)[:3]:
        tensors = tensors_of(case.args)
        program = torch.export.export(Calls(op, case), tensors)
        targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert targets.count(op.overload) == 1
        assert all(target is op.overload or "getitem" in str(target) for target in targets)
        for mine, theirs in zip(op(*case.packed()), program.module()(*tensors), strict=True):
            assert same_bits(mine, theirs)
        inference = program.run_decompositions()
        assert op.overload in [node.target for node in inference.graph.nodes]


@differentiable_op
@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_the_joint_graph_holds_forward_and_backward_as_one_node_each(op, mode):
    drawn = drawn_cases(op)
    case = next((case for case in drawn if len(case.grads) == 2), drawn[0])
    args = leaves(case)
    tensors = tensors_of(args)
    module = Calls(op, case)

    def joint(*parts):
        outputs = [out for out in module(*parts) if out.requires_grad]
        wanted = [part for part in parts if part.requires_grad]
        return torch.autograd.grad([out.square().sum() for out in outputs], wanted)

    graph = make_fx(joint, tracing_mode=mode)(*tensors).graph
    targets = [node.target for node in graph.nodes]
    assert targets.count(op.overload) == 1
    assert targets.count(op.backward.overload) == 1


@differentiable_op
def test_aot_joint_with_dynamic_shapes_gives_the_same_gradients(op):
    for case in drawn_cases(op)[:2]:
        eager = run(op, case, case.args)
        torch._dynamo.reset()
        module = torch.compile(Calls(op, case), backend="aot_eager", dynamic=True, fullgraph=True)

        def traced(*args, module=module):
            return module(*tensors_of(args))

        compiled = run(traced, case, case.args)
        assert_same(eager, compiled)


def assert_same(one, other):
    for kind in ("outputs", "grads"):
        for mine, theirs in zip(getattr(one, kind), getattr(other, kind), strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or same_bits(mine, theirs)


@functional_op
def test_symbolic_shapes_do_not_specialize(op):
    """A fake with SymInts gives an output whose size is still a symbol."""
    case = drawn_cases(op, lambda case: case.args[0].dim() > 1 and case.args[0].shape[0] > 1)[0]
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        fakes = [
            mode.from_tensor(arg, static_shapes=False) if isinstance(arg, torch.Tensor) else arg for arg in case.args
        ]
        out = op.overload(*case.packed(fakes))
    out = out[0] if isinstance(out, (tuple, list)) else out
    if op.name not in ("dequantize", "dora_norm") and out.dim():  # Dequantized shapes are arguments.
        assert any(isinstance(size, torch.SymInt) for size in out.shape)


@pytest.mark.slow
@differentiable_op
def test_inductor_gives_the_same_gradients(op):
    case = drawn_cases(op)[0]
    eager = run(op, case, case.args)
    torch._dynamo.reset()
    module = torch.compile(Calls(op, case), dynamic=True, fullgraph=True)
    assert_same(eager, run(lambda *args: module(*tensors_of(args)), case, case.args))


@every_op
def test_the_contract_is_written_down(op):
    assert len(op.doc.splitlines()) > 5, "the body's docstring is the contract: shapes, dtypes, errors, source"
    assert "Returns" in op.doc and "Source" in op.doc


@every_op
def test_rows_are_calls_of_the_op(op):
    rows = list(importlib.import_module(f"{op.folder}.cases").rows())
    labels = [label for label, _ in rows]
    assert rows and len(set(labels)) == len(labels)
    for _, case in rows:
        with FakeTensorMode() as mode:
            args = [mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in case.args]
            assert op(*case.packed(args))
        floating = {arg.dtype for arg in case.args if isinstance(arg, torch.Tensor) and arg.is_floating_point()}
        assert floating <= {torch.float32}
    assert any(case.grads for _, case in rows) == (op.backward is not None)
