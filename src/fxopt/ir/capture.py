"""Capture: an `nn.Module` and one call become a flat Program, through non-strict torch.export."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn
from torch.export.graph_signature import InputKind

from fxopt.errors import CaptureError, Untraceable
from fxopt.ir import meta, torch_patches
from fxopt.ir.autocast import Casting, Casts, State
from fxopt.ir.blocks import Blocks
from fxopt.ir.copies import copy_in
from fxopt.ir.edit import copy_graph, inputs_first, read_state
from fxopt.ir.export import traced
from fxopt.ir.program import Program, ShapeGuards, Signature, Slot
from fxopt.ir.regions import repeated_blocks
from fxopt.ir.structure import flattened, opened
from fxopt.torch_private import OpOverload, pytree, set_grad_enabled

aten = torch.ops.aten
_COMPUTED = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Call:
    """One call of a module, flattened: the pytree, the tensor leaves, and the constants among the leaves."""

    spec: pytree.TreeSpec
    leaves: tuple[tuple[Any] | None, ...]
    tensors: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Flatten a call. Dataclasses are opened; other objects that pytree does not know stay leaves (constants)."""
        flat, spec = flattened(args, kwargs)
        leaves = tuple(None if isinstance(x, torch.Tensor) else (x,) for x in flat)
        return cls(spec, leaves, tuple(x for x in flat if isinstance(x, torch.Tensor)))

    def rebuild(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` with other tensors in place of the recorded ones."""
        it = iter(tensors)
        return pytree.tree_unflatten([next(it) if leaf is None else leaf[0] for leaf in self.leaves], self.spec)


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every parameter and buffer name to the first name of the same tensor (tied weights have several)."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        names[name] = first.setdefault(id(tensor), name)
    return names


@dataclass
class Returned:
    """What the traced call returned: its structure, and None or `(constant,)` for each leaf."""

    spec: pytree.TreeSpec | None = None
    leaves: tuple[tuple[Any] | None, ...] = ()


@contextlib.contextmanager
def _as_function_of_tensors(model: nn.Module, call: Call, returned: Returned) -> Iterator[None]:
    """`model.forward` goes from the call's tensor leaves to the flat computed leaves of its return value.

    So names stay, and neither signatures nor the types of what is returned matter to the export.
    """
    original = model.forward

    def forward(*tensors: torch.Tensor) -> Any:
        args, kwargs = call.rebuild(tensors)
        flat, returned.spec = pytree.tree_flatten(opened(original(*args, **kwargs)))
        returned.leaves = tuple(None if isinstance(x, _COMPUTED) else (x,) for x in flat)
        return tuple(x for x in flat if isinstance(x, _COMPUTED))

    had = model.__dict__.get("forward")
    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if had is not None:
            model.__dict__["forward"] = had


def _copies(call: Call) -> tuple[torch.Tensor, ...]:
    """Distinct, contiguous copies of a call's tensors."""
    return tuple(t.detach().clone(memory_format=torch.contiguous_format).requires_grad_(t.requires_grad) for t in call.tensors)


def example_tensors(call: Call) -> tuple[torch.Tensor, ...]:
    """Tensors to capture with: distinct objects (export would tie aliases together), batch of at least two.

    torch.export specializes dimensions of size 1. When every tensor leaf has a leading dimension of 1, that is a batch
    of one, and the example is repeated to two.
    """
    shaped = [t for t in call.tensors if t.dim() > 0]
    double = bool(shaped) and all(t.shape[0] == 1 for t in shaped)
    found = []
    for t in call.tensors:
        new = t.detach().clone(memory_format=torch.contiguous_format)
        if double and t.dim() > 0:
            new = torch.cat([new, new])
        found.append(new.requires_grad_(t.requires_grad))
    return tuple(found)


def capture(model: nn.Module, call: Call, *, exact: bool = False, share: bool = True, note: Callable[[str], None] | None = None) -> Program:
    """The Program of one call of `model`, in its present mode (train or eval), grad mode and autocast state.

    Args:
        exact: capture with the call's own sizes, also where they are 1 (the program then covers only those).
        share: trace repeated blocks that are alike once (see `ir.blocks`); the program is the same.
        note: told why blocks were traced one by one after all, or sizes fixed, in a sentence.

    Raises:
        Untraceable: with the module path and the user's source line at which the export failed.
        CaptureError: a graph came out that cannot be a Program.
    """
    grad = torch.is_grad_enabled()
    places = torch_patches.CallTrace(model, note)
    examples = _copies(call) if exact else example_tensors(call)
    doubled = any(a.shape != b.shape for a, b in zip(examples, call.tensors))
    returned = Returned()
    if share:
        found = _shared(model, call, examples, places, note)
        if found is not None:
            return found
    try:
        exported = _export(model, call, examples, places, returned)
    except Exception as error:
        if doubled:
            try:
                return _from_export(model, call, _export(model, call, _copies(call), places, returned), returned)
            except Exception:  # noqa: BLE001  the first error is the one to report
                pass
        path, line = places.where(error)
        why, do = f"{type(error).__name__}: {_first_line(error)}", _advice(error)
        if not line and places.derivatives:  # torch fails behind the trace, with a word about constants
            line, why = places.derivatives[0], "its code asks autograd for derivatives"
            do = "take them in the loop around the model (fxopt.differentiable_twice), or here around one module that holds all the rest: that one is captured"
        raise Untraceable(f"{type(model).__name__} cannot be captured: {why}",
                           where=f"module {path or '<root>'}, {line}" if line else f"module {path or '<root>'}", do=do) from error
    finally:
        set_grad_enabled(grad)  # a raise inside a no_grad region of an export leaves it off
    return _from_export(model, call, exported, returned)


def _shared(model: nn.Module, call: Call, examples: tuple[torch.Tensor, ...], places: torch_patches.CallTrace,
            note: Callable[[str], None] | None) -> Program | None:
    """The program, with every block traced that has no twin; None if there are no twins, or nothing can be told of them."""
    paths = repeated_blocks(model)
    if not paths:
        return None
    blocks, returned, grad = Blocks(model, paths, places), Returned(), torch.is_grad_enabled()
    try:
        program = _from_export(model, call, _export(model, call, examples, places, returned, blocks), returned, blocks)
        if note is not None and blocks.objects:
            note(blocks.objects)
        return program
    except Exception as error:  # noqa: BLE001  the full capture has the last word, and the error to report
        if blocks.standing and note:
            note(f"repeated blocks are traced one by one: {_first_line(error)}")
        return None
    finally:
        set_grad_enabled(grad)


def _export(model: nn.Module, call: Call, examples: tuple[torch.Tensor, ...], places: torch_patches.CallTrace, returned: Returned,
            blocks: Blocks | None = None) -> Any:
    sharing = blocks.sharing() if blocks is not None else contextlib.nullcontext()
    with _as_function_of_tensors(model, call, returned), places.recording(), torch_patches.for_capture(), sharing:
        return traced(model, examples, places.note)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:300]


def _advice(error: BaseException) -> str:
    text = str(error)
    if "data-dependent" in text.lower() or "GuardOnDataDependent" in type(error).__name__:
        return ("the code branches on the values of a tensor, which a graph cannot hold: move the branch out of the model, "
                "write it with torch.where, or pass the condition as an argument")
    if "fake" in text.lower() and "constant" in text.lower():
        return "a tensor made during the call is kept on the module (make it in __init__, or register it as a buffer), or derivatives are taken inside (take them in the loop around the model)"
    return "give what its forward takes" if "forward() got" in text or "forward() missing" in text else "make the named line traceable by torch.export, or pass a submodule that is"


def _from_export(model: nn.Module, call: Call, exported: Any, returned: Returned, blocks: Blocks | None = None) -> Program:
    names = canonical_names(model)
    slots: dict[str, Slot] = {}
    constants: dict[str, Any] = {}
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    graph, mapping = copy_graph(exported.graph)
    parameters = dict(model.named_parameters())
    aliases: dict[str, list[str]] = {}
    for name, first in names.items():
        if name != first:
            aliases.setdefault(first, []).append(name)
    user: list[fx.Node] = []
    for old in list(exported.graph.nodes):
        node = mapping[old]
        node.meta[meta.PROVENANCE] = meta.from_capture(old)
        if old.op == "placeholder":
            spec = specs[old.name]
            if spec.kind is InputKind.USER_INPUT:
                user.append(node)
                continue
            if spec.kind is InputKind.CONSTANT_TENSOR:
                target, kind = f"constant.{spec.target}", "constant"
                constants[target] = exported.constants[spec.target]
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                target = names[spec.target]
                kind = "parameter" if target in parameters else "buffer"
            else:
                raise CaptureError(f"an input of kind {spec.kind.name} is not supported", where=spec.target or old.name,
                                   do="keep custom objects out of the traced code")
            val = node.meta["val"]
            slots.setdefault(target, Slot(target, tuple(val.shape), val.dtype, kind, kind == "parameter" and parameters[target].requires_grad,
                                           aliases=tuple(aliases.get(target, ()))))
            read_state(graph, node, target)
        elif old.op == "get_attr":
            constants[f"constant.{old.target}"] = _attribute(exported.graph_module, old.target)
            node.target = f"constant.{old.target}"
    inputs_first(graph, user)
    inline_regions(graph, constants)
    without_out(graph)
    output = graph.output_node()
    computed = iter(output.args[0])
    flat = [next(computed) if leaf is None else leaf[0] for leaf in returned.leaves]
    fake_mode = next((n.meta["val"].fake_mode for n in graph.nodes if hasattr(n.meta.get("val"), "fake_mode")), None)
    if fake_mode is None:
        raise CaptureError(f"{type(model).__name__} computes on no tensors", do="pass a module with tensor inputs or parameters")
    output.args = (tuple(flat),)
    if repeated_blocks(model):  # numbered alike, however the blocks were traced
        graph = blocks.write_out(graph, names) if blocks is not None else copy_in(graph, {}, ())
    signature = Signature(call.spec, call.leaves, returned.spec)
    return Program(graph, slots, signature, fake_mode, constants, training=model.training, grad=torch.is_grad_enabled())


_GRAD_MODE, _AUTOCAST = torch.ops.higher_order.wrap_with_set_grad_enabled, torch.ops.higher_order.wrap_with_autocast


def inline_regions(graph: fx.Graph, constants: dict[str, Any]) -> None:
    """Put the bodies of regions back into the flat graph: those without gradients, and those in which autocast differs.

    What leaves a no_grad region is detached, which is the same thing to autograd: nothing inside gets a gradient. What
    autocast casts in a region is cast by nodes. A region with an operator on which the autocast around it acts in
    another way stays as it is: passes do not see into it.
    """
    kept: set[fx.Node] = set()
    while found := [node for node in graph.nodes if node.op == "call_function" and node.target in (_GRAD_MODE, _AUTOCAST) and node not in kept]:
        for node in found:
            body, *args = (arg for arg in node.args[1 if node.target is _GRAD_MODE else 4 :])
            inner = constants[body.target]
            casts: dict[fx.Node, Casts] | None = {}
            if node.target is _AUTOCAST:
                names = {old.target: _attribute(inner, old.target) for old in inner.graph.nodes if old.op == "get_attr"}
                inline_regions(inner.graph, names)
                for name, value in names.items():
                    _attach(inner, name, value)
                casts = _casts(node, inner.graph)
            if casts is None:
                kept.add(node)
            else:
                _splice(graph, constants, node, body, args, casts, detach=node.target is _GRAD_MODE and not node.args[0])


def _detach_sources(graph: fx.Graph, node: fx.Node) -> None:
    """What an operator of a no_grad region writes somewhere (a running mean in a buffer, say) carries no gradient there."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    for i, (arg, formal) in enumerate(zip(node.args, schema.arguments)):
        if isinstance(arg, fx.Node) and meta.tensor(arg) is not None and not (formal.alias_info is not None and formal.alias_info.is_write):
            with graph.inserting_before(node):
                source = graph.call_function(aten.detach.default, (arg,))
            source.meta = dict(arg.meta)
            node.update_arg(i, source)


def without_out(graph: fx.Graph) -> None:
    """An operator that writes into a tensor it is given (`out=`) becomes one that does not, and a copy into that tensor.

    Autograd has no rule for `out=`: eager code may use it only where nothing takes a gradient, which a flat graph has no region for.
    So what is copied is detached.
    """
    for node in list(graph.nodes):
        plain = _without_out(node.target) if node.op == "call_function" and isinstance(node.kwargs.get("out"), fx.Node) else None
        if plain is None:
            continue
        with graph.inserting_before(node):
            value = graph.call_function(plain, node.args, {name: arg for name, arg in node.kwargs.items() if name != "out"})
            detached = graph.call_function(aten.detach.default, (value,))
            copied = graph.call_function(aten.copy_.default, (node.kwargs["out"], detached))
        for new in (value, detached, copied):
            new.meta = dict(node.meta)
        node.replace_all_uses_with(copied)
        graph.erase_node(node)


def _without_out(target: Any) -> Any:
    """The overload of an operator that takes the same arguments but `out`, and returns a new tensor; None if there is none."""
    if not isinstance(target, OpOverload):
        return None
    wanted = [(a.name, str(a.type)) for a in target._schema.arguments if not a.is_out]
    packet = target.overloadpacket
    for other in (getattr(packet, name) for name in packet.overloads()):
        if [(a.name, str(a.type)) for a in other._schema.arguments] == wanted and not other._schema.is_mutable:
            return other
    return None


def _casts(region: fx.Node, body: fx.Graph) -> dict[fx.Node, Casts] | None:
    """The casts of a region's operators, see `Casting`; None if one of them cannot leave it."""
    inner = State.of(region)
    mode = next((val.fake_mode for node in body.nodes for val in meta.tensors(node) if hasattr(val, "fake_mode")), None)
    casting = Casting(inner, State.now(inner.device), mode)
    found = {}
    for node in body.nodes:
        casts = casting.casts(node)
        if casts is None:
            return None
        found[node] = casts
    return found


def _splice(graph: fx.Graph, constants: dict[str, Any], node: fx.Node, body: fx.Node, args: list[Any], casts: Mapping[fx.Node, Casts], detach: bool) -> None:
    """Replace a region by its operators, each behind its casts. The cast of a weight is made once, as autocast keeps it."""
    inner = constants[body.target]
    env: dict[fx.Node, Any] = dict(zip((n for n in inner.graph.nodes if n.op == "placeholder"), args))
    weights: dict[Any, fx.Node] = {}

    def cast(source: fx.Node, dtype: torch.dtype, like: fx.Node) -> fx.Node:
        x = env[source]
        if (x, dtype) in weights:
            return weights[x, dtype]
        new = graph.call_function(aten.to.dtype, (x, dtype))
        with meta.tensor(x).fake_mode:
            new.meta = {**like.meta, "val": meta.tensor(x).to(dtype)}
        new.meta[meta.PROVENANCE] = meta.from_capture(like)
        if x.op == "get_attr":
            weights[x, dtype] = new
        return new

    with graph.inserting_before(node):
        for old in inner.graph.nodes:
            if old.op in ("placeholder", "output"):
                continue
            now = {source: cast(source, dtype, old) for source, dtype in casts.get(old, {}).items()}
            env[old] = graph.node_copy(old, lambda arg: now.get(arg, env[arg]))
            env[old].meta = dict(old.meta)
            env[old].meta[meta.PROVENANCE] = meta.from_capture(old)
            if detach and old.op == "call_function":
                _detach_sources(graph, env[old])
            if old.op == "get_attr":
                name = f"{body.target}.{old.target}"
                constants[name], env[old].target = _attribute(inner, old.target), name
        results = inner.graph.output_node().args[0]
        outs = [env[result] for result in (results if isinstance(results, (tuple, list)) else [results])]
        for i, out in enumerate(outs):
            if detach and meta.tensor(out) is not None:
                outs[i] = graph.call_function(aten.detach.default, (out,))
                outs[i].meta = dict(out.meta)
    for user in list(node.users):
        user.replace_all_uses_with(outs[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
    if not body.users:
        graph.erase_node(body)


def _attach(root: Any, path: str, value: Any) -> None:
    """Set what `_attribute` reads. A name with dots that no submodule has is kept as one attribute."""
    *parents, last = path.split(".")
    for part in parents:
        if not hasattr(root, part):
            setattr(root, part, nn.Module())
        root = getattr(root, part)
    setattr(root, last, value)


def _attribute(root: Any, path: str) -> Any:
    for part in path.split("."):
        root = getattr(root, part)
    return root


def guards(program: Program) -> ShapeGuards:
    """The sizes that a program covers."""
    return ShapeGuards([meta.value(node) for node in program.placeholders], getattr(program.fake_mode, "shape_env", None))
