"""Each private name of torch does what fxopt uses it for. A failure here names what a release of torch changed."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv, StatelessSymbolicContext

from fxopt import torch_private as private


def test_all_names_are_tried_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    tried = {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "private"}
    assert set(private.__all__) <= tried


def test_the_store_of_a_process_group_is_found() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        private.default_store().set("a", "1")
        assert private.default_store().get("a") == b"1"
    finally:
        torch.distributed.destroy_process_group()


def test_pytree_flattens_and_puts_back() -> None:
    value = {"a": (1, [2, None]), "b": 3}
    leaves, spec = private.pytree.tree_flatten(value)
    assert private.pytree.tree_unflatten(leaves, spec) == value and leaves == [1, 2, None, 3]
    assert private.pytree.tree_map(lambda x: x if x is None else x + 1, value) == {"a": (2, [3, None]), "b": 4}


def test_many_tensors_are_compared_in_one_call() -> None:
    made = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(4), requires_grad=False), torch.zeros(2)]
    check = private.tensor_guards(made)
    assert check(*made) and check(nn.Parameter(torch.ones(3, 4)), *made[1:])
    with torch.no_grad():
        assert check(*made)
    made[0].data = torch.zeros(4, 3).t()  # strides do not matter
    assert check(*made)
    for other in (torch.zeros(3, 4), nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(3, 4), requires_grad=False), nn.Parameter(torch.zeros(3, 4).double()),
                  nn.Parameter(torch.zeros(3, 4, device="meta"))):
        assert not check(other, *made[1:])
    assert not check(made[0], made[1], made[1]) and not check(None, *made[1:])
    assert private.tensor_guards([])()


def test_operators_tell_their_schema() -> None:
    op = torch.ops.aten.linear.default
    assert isinstance(op, private.OpOverload) and not isinstance(op, private.HigherOrderOperator)
    assert [a.name for a in op._schema.arguments] == ["input", "weight", "bias"]
    assert private.has_kernel("aten::linear", "CompositeImplicitAutograd") and not private.has_kernel("aten::mm", "CompositeImplicitAutograd")
    assert isinstance(torch.ops.higher_order.cond, private.HigherOrderOperator)


def test_fake_tensors_have_sizes_and_no_memory() -> None:
    mode = private.FakeTensorMode()
    with mode:
        a = torch.empty(2**20, 2**20)
        b = a @ a
    assert isinstance(b, private.FakeTensor) and b.shape == (2**20, 2**20)
    assert private.detect_fake_mode(a) is mode


def test_fake_tensors_refuse_what_depends_on_data() -> None:
    with private.FakeTensorMode():
        a = torch.empty(3)
        with pytest.raises(private.DynamicOutputShapeException):
            a.nonzero()
        with pytest.raises(private.DataDependentOutputException):
            a.sum().item()


def test_functions_are_traced_in_operators() -> None:
    graph = private.make_fx(lambda x: nn.functional.linear(x, x).relu(), pre_dispatch=True)(torch.ones(2, 2)).graph
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [torch.ops.aten.linear.default, torch.ops.aten.relu.default]


def test_a_size_can_be_unknown() -> None:
    mode = private.FakeTensorMode(shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv())
    env, source = mode.shape_env, private.ConstantSource("rows")
    size = env.create_symintnode(env.create_symbol(7, source=source, dynamic_dim=private.DimDynamic.DYNAMIC, constraint_dim=None), hint=7, source=source)
    with mode:
        made = torch.empty(size, 3)
    assert isinstance(made.shape[0], torch.SymInt) and made.shape[0].node.hint == 7 and not env.guards


def test_forward_and_backward_are_traced_together() -> None:
    assert {"stack", "mod", "args"} <= {*inspect.signature(private.aot_autograd.aot_export_joint_with_descriptors).parameters}


def test_dispatch_modes_see_operators() -> None:
    seen = []

    class Watch(private.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.ones(2) + 1
    assert torch.ops.aten.add.Tensor in seen


def test_subclasses_can_be_switched_off() -> None:
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise AssertionError("asked")

    with private.DisableTorchFunctionSubclass():
        assert torch.ones(2).as_subclass(Loud).size() == (2,)


def test_the_gradient_mode_is_set_at_once() -> None:
    try:
        private.set_grad_enabled(False)
        assert not torch.is_grad_enabled()
    finally:
        private.set_grad_enabled(True)


def test_a_backward_knows_itself() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: seen.append(private.in_backward()))
    x.sum().backward()
    assert seen == [True] and not private.in_backward()


def test_lists_of_tensors_are_worked_on_together() -> None:
    a = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    assert [t.tolist() for t in private.foreach_mul(a, 2.0)] == [[2.0, 4.0], [6.0]]
    assert [float(t) for t in private.foreach_norm([torch.tensor([3.0, 4.0])], 2)] == [5.0]
    private.foreach_mul_(a, 2.0)
    private.foreach_lerp_(a, [torch.tensor([4.0, 8.0]), torch.tensor([0.0])], 0.5)
    assert [t.tolist() for t in a] == [[3.0, 6.0], [3.0]]
    private.foreach_copy_(a, [torch.zeros(2), torch.ones(1)])
    assert [t.tolist() for t in a] == [[0.0, 0.0], [1.0]]


def test_adamw_is_one_call() -> None:
    weight, step = torch.ones(3), torch.tensor(0.0)
    private.fused_adamw_([weight], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], [], [step + 1], lr=0.5, beta1=0.9, beta2=0.999, weight_decay=0.0,
                         eps=0.0, amsgrad=False, maximize=False)
    assert weight.tolist() == pytest.approx([0.5] * 3)


def test_dynamo_has_the_setting_that_captures_change() -> None:
    with private.dynamo_config.patch(fake_tensor_cache_enabled=False):
        assert private.dynamo_config.fake_tensor_cache_enabled is False
    assert private.dynamo_config.fake_tensor_cache_enabled is True


def test_the_processor_tells_its_units() -> None:
    assert all(isinstance(private.cpu_has(units), bool) for units in ("avx512_bf16", "amx_tile", "amx_fp16"))


def test_a_subclass_can_have_sizes_alone() -> None:
    class Sized(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    made = private.make_wrapper_subclass(Sized, (2**20, 2**20), dtype=torch.bfloat16)
    assert type(made) is Sized and made.shape == (2**20, 2**20) and made.dtype is torch.bfloat16


def test_tags_of_operators_are_those_of_the_oldest_torch() -> None:
    """`inplace` came with torch 2.12 or later, and with it every model that writes in place was refused under 2.11."""
    used = {name for file in Path(private.__file__).parent.rglob("*.py") for name in re.findall(r"torch\.Tag\.(\w+)", file.read_text(encoding="utf-8"))}
    assert used and used <= {"nondeterministic_seeded", "pointwise", "pt2_compliant_tag", "reduction"}


def test_composite_operators_take_symbolic_sizes_in_python() -> None:
    """Without the dispatcher torch 2.11's `linear` without bias asks symbolic sizes for the number of elements."""
    mode = private.FakeTensorMode(shape_env=ShapeEnv())
    sizes = StatelessSymbolicContext(dynamic_sizes=[private.DimDynamic.DYNAMIC, private.DimDynamic.DYNAMIC, private.DimDynamic.STATIC])
    x, weight = mode.from_tensor(torch.zeros(3, 5, 8), symbolic_context=sizes), mode.from_tensor(torch.zeros(4, 8), static_shapes=True)
    with mode, torch.no_grad(), private.composites_on_symbols():
        found = torch.ops.aten.linear.default(x, weight)
    assert found.shape == (*x.shape[:2], 4)


def test_hooks_on_all_buffers_are_in_one_place() -> None:
    before = dict(private.buffer_hooks)
    handle = nn.modules.module.register_module_buffer_registration_hook(lambda module, name, buffer: None)
    assert len(private.buffer_hooks) == len(before) + 1
    handle.remove()
    assert dict(private.buffer_hooks) == before
