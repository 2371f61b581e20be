"""A script of few lines that shows one wrong rewrite: the operations before and after it, on the values that met there."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir.program import Program, Sample
from fxopt.passes.base import Pass
from fxopt.passes.cases import Case
from fxopt.passes.interpreted import SEED
from fxopt.torch_private import OpOverload, pytree

LINES = 60
_SMALL = 24  # elements of a tensor that is written out; larger ones are drawn
_INFIX = {operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//", operator.truediv: "/", operator.mod: "%"}


@dataclass(frozen=True)
class Repro:
    """A script that fails, and how large what it shows is."""

    text: str
    before: int
    after: int

    @property
    def summary(self) -> str:
        """In words."""
        return f"a script of {len(self.text.splitlines())} lines shows {self.before} operations that became {self.after}"


@dataclass(frozen=True)
class Region:
    """What one rewrite replaced, and by what.

    Attributes:
        old, new: nodes of the program without and with it, in order.
        outputs: pairs of values that the rest reads.
        inputs: names of the values that both read from outside.
    """

    old: tuple[fx.Node, ...]
    new: tuple[fx.Node, ...]
    outputs: tuple[tuple[fx.Node, fx.Node], ...]
    inputs: tuple[str, ...]


def region(good: Program, wrong: Program) -> Region:
    """The difference of two programs that differ by one rewrite."""
    olds, news = ({node.name: node for node in program.graph.nodes if node.op != "output"} for program in (good, wrong))
    changed = {name for name, node in olds.items() if name in news and not _alike(node, news[name])}
    old = [node for name, node in olds.items() if name not in news or name in changed]
    new = [node for name, node in news.items() if name not in olds or name in changed]
    pairs: dict[tuple[str, str], tuple[fx.Node, fx.Node]] = {}
    readers = [(node, news[name]) for name, node in olds.items() if name in news and name not in changed]
    readers.append((good.graph.output_node(), wrong.graph.output_node()))
    outside = {node.name for node in (*old, *new)}
    for a, b in readers:
        for x, y in zip(_leaves(a), _leaves(b)):
            if isinstance(x, fx.Node) and isinstance(y, fx.Node) and (x.name in outside or y.name in outside or x.name != y.name):
                pairs[x.name, y.name] = (x, y)
    old, new = _needed(old, [x for x, _ in pairs.values()]), _needed(new, [y for _, y in pairs.values()])
    inside = {node.name for node in old} | {node.name for node in new}
    inputs = dict.fromkeys(each.name for node in (*old, *new) for each in node.all_input_nodes if each.name not in inside or each.op == "get_attr")
    inputs |= dict.fromkeys(node.name for pair in pairs.values() for node in pair if node.name not in inside)
    reads = [node.name for node in (*old, *new) if node.op in ("get_attr", "placeholder")]
    return Region(tuple(n for n in old if n.op == "call_function"), tuple(n for n in new if n.op == "call_function"), tuple(pairs.values()),
                  tuple(dict.fromkeys((*inputs, *reads))))


def _needed(nodes: Sequence[fx.Node], wanted: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes that what is wanted depends on."""
    needed = set(wanted)
    for node in reversed(nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [node for node in nodes if node in needed]


def _leaves(node: fx.Node) -> list[Any]:
    return pytree.tree_leaves((node.args, dict(node.kwargs)))


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes call the same with the same numbers; what they read may differ."""
    x, y = _leaves(a), _leaves(b)
    return (a.op, a.target) == (b.op, b.target) and len(x) == len(y) and all(
        isinstance(p, fx.Node) == isinstance(q, fx.Node) and (isinstance(p, fx.Node) or type(p) is type(q) and str(p) == str(q)) for p, q in zip(x, y))


def repro(pass_: Pass, good: Program, wrong: Program, case: Case, state: Mapping[str, torch.Tensor], says: str) -> tuple[Repro | None, str]:
    """A script for one wrong rewrite, which was run and fails; or None, and why there is none."""
    if pass_.promise.values == "bounded" or pass_.promise.gradients == "declared":
        return None, "the pass changes what is computed by design: what it rewrote is compared with a formula, not with what was there"
    found = region(good, wrong)
    if not found.outputs:
        return None, "the rewrite changes no value that another reads"
    try:
        code = [*_function("before", found.old, found.inputs, [x for x, _ in found.outputs]), "", "", *_function("after", found.new, found.inputs, [y for _, y in found.outputs])]
        met = _met(good, wrong, case, state, found.inputs)
        given, lines = _values(met)
        exact = [_written(name, value) for name, value in met.items()]
    except _Unsaid as unsaid:
        return None, f"{unsaid} cannot be written in a script"
    if not _fails(found, given):
        given, lines = met, exact
        if not _fails(found, given):
            return None, "the operations before and after are equal on the values that met there: it takes more than this site"
    text = "\n".join([f'"""{str(pass_)[:120]}: the operations before and after one rewrite are not equal.', "", f"{says[:200]}", '"""', "import torch",
                      "import fxopt.kernels.catalog  # noqa: F401  (it registers the fused operators)", *_imports(found), "", "", *code, "", "", "g = torch.Generator().manual_seed(0)", *lines,
                      f"names = [{', '.join(found.inputs)}]", *_FOOT])
    if text.count("\n") + 1 >= LINES:
        return None, f"it would take {text.count(chr(10)) + 1} lines: {len(found.old)} operations became {len(found.new)}"
    return Repro(text + "\n", len(found.old), len(found.new)), ""


def _imports(found: Region) -> list[str]:
    """Of the modules whose functions are called."""
    modules = {node.target.__module__ for node in (*found.old, *found.new) if not isinstance(node.target, OpOverload) and node.target is not operator.getitem
               and node.target not in _INFIX}
    return [f"import {module}" for module in sorted(modules)]


_FOOT = '''

def shown(function):
    leaves = [t.detach().clone().double().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in names]
    torch.manual_seed(0)
    outputs = [t for t in function(*leaves) if isinstance(t, torch.Tensor)]
    wanted = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
    sums = [(t * torch.linspace(1, 2, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in outputs if t.requires_grad]
    return outputs + (list(torch.autograd.grad(sum(sums), wanted, allow_unused=True)) if sums else [])


for a, b in zip(shown(before), shown(after)):
    assert (a is None) == (b is None), "a gradient is gone, or is new"
    if a is not None:
        torch.testing.assert_close(b, a, equal_nan=True)'''.split("\n")


class _Unsaid(Exception):
    """A node that has no text."""


def _function(name: str, nodes: Sequence[fx.Node], inputs: Sequence[str], outputs: Sequence[fx.Node]) -> list[str]:
    return [f"def {name}({', '.join(inputs)}):", *(f"    {node.name} = {_call(node)}" for node in nodes), f"    return [{', '.join(node.name for node in outputs)}]"]


def _call(node: fx.Node) -> str:
    args = [_text(arg) for arg in node.args]
    if node.target is operator.getitem:
        return f"{args[0]}[{args[1]}]"
    if node.target in _INFIX:
        return f"{args[0]} {_INFIX[node.target]} {args[1]}"
    if not isinstance(node.target, OpOverload) and not _importable(node.target):
        raise _Unsaid(f"a call of {getattr(node.target, '__name__', node.target)}")
    name = f"torch.ops.{node.target}" if isinstance(node.target, OpOverload) else f"{node.target.__module__}.{node.target.__name__}"
    return f"{name}({', '.join([*args, *(f'{key}={_text(value)}' for key, value in node.kwargs.items())])})"


def _importable(target: Any) -> bool:
    """Whether a script gets a function by the name of its module and its own."""
    module = sys.modules.get(getattr(target, "__module__", None) or "")
    return module is not None and module.__name__ != "__main__" and getattr(module, getattr(target, "__name__", ""), None) is target


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, torch.device):
        return f'"{value}"'
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    raise _Unsaid(f"a {type(value).__name__}")


def _met(good: Program, wrong: Program, case: Case, state: Mapping[str, torch.Tensor], names: Sequence[str]) -> dict[str, Any]:
    """The values that the region reads, on the case that failed."""
    found: dict[str, Any] = {}
    for program in (good, wrong):
        if set(names) - found.keys():
            wanted = set(names) - found.keys()

            def see(node: fx.Node, value: Any, _: Any, wanted: set[str] = wanted) -> None:
                if node.name in wanted:
                    found[node.name] = value.detach().clone() if isinstance(value, torch.Tensor) else value

            program.watch(Sample(tuple(t.detach().clone() for t in case.inputs), {name: t.detach().clone() for name, t in state.items()}), see)
    return {name: found[name] for name in names}


def _values(met: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Values like those, small or drawn, and the lines that make them."""
    generator = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {}
    lines = []
    for name, value in met.items():
        if isinstance(value, torch.Tensor) and value.numel() > _SMALL and value.is_floating_point() and bool(value.isfinite().all()):
            shape, spread, mean = list(value.shape), round(float(value.double().std()), 4), round(float(value.double().mean()), 4)
            given[name] = (torch.randn(shape, generator=generator) * spread + mean).to(value.dtype)
            lines.append(f"{name} = (torch.randn({shape}, generator=g) * {spread} + {mean}).to({value.dtype})")
        else:
            given[name] = value
            lines.append(_written(name, value))
    return given, lines


def _written(name: str, value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{name} = torch.tensor({value.tolist()}, dtype={value.dtype}).view({list(value.shape)})".replace("inf", 'float("inf")').replace("nan", 'float("nan")')
    return f"{name} = {_text(value)}"


def _fails(found: Region, given: Mapping[str, Any]) -> bool:
    """What the script does, here."""
    try:
        before, after = (list(_shown(nodes, found.inputs, outputs, given)) for nodes, outputs in
                         ((found.old, [x for x, _ in found.outputs]), (found.new, [y for _, y in found.outputs])))
    except Exception as error:  # whatever an operator raises: the rewrite cannot be run, which is wrong enough only if the old one can
        return "after" in str(error)
    for a, b in zip(before, after):
        if (a is None) != (b is None):
            return True
        if a is not None:
            try:
                torch.testing.assert_close(b, a, equal_nan=True)
            except AssertionError:
                return True
    return False


def _shown(nodes: Sequence[fx.Node], names: Sequence[str], outputs: Sequence[fx.Node], given: Mapping[str, Any]) -> Iterator[torch.Tensor | None]:
    leaves = {name: value.detach().clone().double().requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
              for name, value in given.items()}
    env = dict(leaves)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(SEED)
        for node in nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n.name])
            env[node.name] = node.target(*args, **kwargs)
    found = [env[node.name] for node in outputs if isinstance(env[node.name], torch.Tensor)]
    wanted = [leaves[name] for name in names if isinstance(leaves[name], torch.Tensor) and leaves[name].requires_grad]
    sums = [(t * torch.linspace(1, 2, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in found if t.requires_grad]
    yield from found
    if sums and wanted:
        yield from torch.autograd.grad(torch.stack([s.double() for s in sums]).sum(), wanted, allow_unused=True)


