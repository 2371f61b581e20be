"""A Program as text that reads like Python, the difference of two Programs, and the report of what passes did.

The same model and passes give the same text in every run: names are those of the graph, symbolic sizes are numbered in
order of appearance. `fold=True` prints repeated blocks once.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.torch_private import HigherOrderOperator, OpOverload, pytree

if TYPE_CHECKING:  # a Program prints itself with this module
    from fxopt.ir.program import Program

COLUMN = 76  # comments start here, so that a changed comment does not move its neighbours
_SYMBOL = re.compile(r"\b([su])(\d+)\b")
_BLOCK = re.compile(r"^(.*?\b\d+(?:@\d+)?)(?=\.|$)")


class Symbols:
    """Names of symbolic sizes, in order of appearance: s0, s1, ... for sizes of inputs, u0, u1, ... for sizes that depend on values."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def rename(self, text: str) -> str:
        """`text` with every symbol under its own name here."""
        return _SYMBOL.sub(lambda found: self._name(found[0], found[1]), text)

    def _name(self, symbol: str, kind: str) -> str:
        if symbol not in self.names:
            self.names[symbol] = f"{kind}{sum(name[0] == kind for name in self.names.values())}"
        return self.names[symbol]


def block_of(path: str) -> str:
    """The repeated block a module path lies in (`model.layers.0`), or the path itself if it lies in none."""
    found = _BLOCK.match(path)
    return found[1] if found else path


def text(program: Program, *, fold: bool = False) -> str:
    """The program as text.

    Args:
        fold: print a block that repeats (same operations, shapes, source lines and wiring) once, and say how often.
    """
    return _Writer(program, Symbols(), fold).text()


def diff(a: Program, b: Program, *, fold: bool = False, context: int = 2) -> str:
    """A unified diff of the texts of two programs; empty if they are equal."""
    symbols = Symbols()
    # programs of one capture share their symbols, so one numbering keeps equal sizes equal in both texts
    texts = [_Writer(a, symbols, fold).text(), _Writer(b, symbols if a.fake_mode is b.fake_mode else Symbols(), fold).text()]
    names = [" | ".join(record.text for record in program.log) or "as captured" for program in (a, b)]
    return "\n".join(difflib.unified_diff(texts[0].splitlines(), texts[1].splitlines(), *names, n=context, lineterm=""))


@dataclass(frozen=True)
class _Group:
    """Consecutive nodes of one block."""

    block: str
    kind: str
    nodes: tuple[fx.Node, ...]


class _Writer:
    def __init__(self, program: Program, symbols: Symbols, fold: bool) -> None:
        self.program, self.symbols, self.fold = program, symbols, fold

    def text(self) -> str:
        program = self.program
        named = dict(zip([node.name for node in program.placeholders], program.signature.names()))
        lines = [f"# {len(program.nodes)} nodes, captured in {'training' if program.training else 'evaluation'} mode",
                 f"# passes: {' | '.join(record.text for record in program.log) or 'none'}"]
        if program.facts:
            lines.append(f"# facts: {', '.join(sorted(map(str, program.facts)))}")
        lines += [f"# assumes: {a.said(named.get(a.leaf, '?'))}" for a in program.assumptions]
        lines += ["", "def program("]
        lines += [line(f"{node.name},", [self.type(node), named[node.name]]) for node in program.placeholders]
        lines.append("):")
        body = [node for node in program.nodes if node.op == "call_function"]
        groups = _groups(body)
        spans = self.spans(groups) if self.fold else [(i, 1, 1) for i in range(len(groups))]
        hidden = {block_of(group.block) for start, period, count in spans for group in groups[start + period : start + period * count] if _index(group.block)}
        lines += self.state(hidden)
        for start, period, count in spans:
            for group in groups[start : start + period]:
                lines += ["", f"    # {group.block or '<root>'}" + (f": {group.kind}" if group.kind else "")]
                lines += [self.node(node) for node in group.nodes]
            if count > 1:
                lines += ["", self.folded([groups[start + period * k : start + period * (k + 1)] for k in range(count)])]
        lines += ["", f"    return {self.outputs()}"]
        return "\n".join(lines) + "\n"

    def type(self, node: fx.Node) -> str:
        return self.symbols.rename(meta.describe(meta.value(node)))

    def state(self, hidden: set[str]) -> list[str]:
        """One line per slot the graph reads; `hidden` blocks are folded away."""
        lines = []
        skipped: set[str] = set()
        for node in self.program.nodes:
            if node.op != "get_attr":
                continue
            target = str(node.target)
            block = block_of(target)
            if block in hidden:
                skipped.add(block)
                continue
            slot = self.program.slots.get(target)
            if slot is None:
                value = self.program.constants.get(target)
                lines.append(line(f'{node.name} = constants["{target}"]', [self.type(node) if isinstance(value, torch.Tensor) else type(value).__name__]))
                continue
            says = slot.kind
            if slot.kind == "parameter":
                says += ", trainable" if self.program.trainable(target) else ", frozen"
            if slot.made is not None:
                says += f", made by {slot.made.by}" + (f" from {slot.made.source}" if slot.made.source else "")
            lines.append(line(f'{node.name} = state["{target}"]', [self.type(node), says]))
        if skipped:
            lines.append(f"    # {_ranges(skipped)}: state as in the first block")
        return ["    # state", *lines] if lines else []

    def node(self, node: fx.Node) -> str:
        where = meta.provenance(node)
        says = [self.type(node), where.path, where.source]
        if where.passes:
            says.append("by " + ", ".join(where.passes))
        return line(f"{node.name} = {self.call(node)}", says)

    def call(self, node: fx.Node, names: dict[fx.Node, str] | None = None) -> str:
        """The call as Python; `names` are used instead of the nodes' own."""
        return called_as(node, self.symbols, names)

    def outputs(self) -> str:
        """The return value: a dict where the model returns named values, else a value or a tuple."""
        said = [_say(out, {}, self.symbols) for out in self.program.outputs]
        names = output_names(self.program)
        if len(said) == 1 and names == [""]:
            return said[0]
        if all(name and not name.isdigit() for name in names):
            return "{" + ", ".join(f'"{name}": {value}' for name, value in zip(names, said)) + "}"
        return "(" + ", ".join(said) + ("," if len(said) == 1 else "") + ")"

    # -- folding -----------------------------------------------------------------------------------------------------

    def spans(self, groups: list[_Group]) -> list[tuple[int, int, int]]:
        """Cover `groups` with (start, period, count): `count` equal units of `period` groups each."""
        spans, at = [], 0
        while at < len(groups):
            found = [(at, period, self.count(groups, at, period)) for period in (1, 2, 3, 4)]
            best = max(found, key=lambda span: span[1] * span[2] if span[2] > 1 else 0)
            spans.append(best if best[2] > 1 else (at, 1, 1))
            at += spans[-1][1] * spans[-1][2]
        return spans

    def count(self, groups: list[_Group], at: int, period: int) -> int:
        """How often the unit of `period` groups at `at` comes in a row.

        Units are equal if their calls are, and if each reads the same outside values, or those of the unit before it at
        the same place.
        """
        unit = groups[at : at + period]
        if not any(_index(group.block) for group in unit):
            return 1
        key, outside = self.key(unit)
        wiring: list[Any] | None = None
        for count in range(1, len(groups)):
            before, unit = unit, groups[at + period * count : at + period * (count + 1)]
            if [len(group.nodes) for group in before] != [len(group.nodes) for group in unit]:
                return count
            other, reads = self.key(unit)
            places = {node: i for i, node in enumerate(node for group in before for node in group.nodes)}
            now = [places.get(node, node) for node in reads]
            fits = all(a is b or b in places for a, b in zip(outside, reads)) if wiring is None else now == wiring
            if key != other or not fits:
                return count
            wiring = now
        return 1

    def key(self, unit: list[_Group]) -> tuple[str, list[fx.Node]]:
        """The unit with its own names and its block's index taken out, and the outside nodes it reads in order."""
        own = next((group.block for group in unit if _index(group.block)), "\0")
        names: dict[fx.Node, str] = {node: f"v{i}" for i, node in enumerate(node for group in unit for node in group.nodes)}
        outside: list[fx.Node] = []
        lines = []
        for group in unit:
            lines.append(f"{_without(group.block, own)}: {group.kind}")
            for node in group.nodes:
                for source in node.all_input_nodes:
                    if source in names:
                        continue
                    if source.op == "get_attr":
                        slot = self.program.slots.get(str(source.target))
                        trainable = slot is not None and self.program.trainable(slot.name)
                        names[source] = f"state[{_without(str(source.target), own)}: {meta.describe(meta.value(source))}, {trainable}]"
                    else:
                        names[source] = f"outside{len(outside)}"
                        outside.append(source)
                where = meta.provenance(node)
                lines.append(f"{self.call(node, names)} {self.type(node)} {_without(where.path, own)} {where.source} {where.passes}")
        return "\n".join(lines), outside

    def folded(self, units: list[list[_Group]]) -> str:
        nodes = {node for unit in units[1:] for group in unit for node in group.nodes}
        given = [node.name for unit in units[1:] for group in unit for node in group.nodes if any(user not in nodes for user in node.users)]
        blocks = [next(group.block for group in unit if _index(group.block)) for unit in units]
        gives = f"; gives {', '.join(given)}" if len(given) <= 6 else f"; gives {', '.join(given[:6])}, and {len(given) - 6} more"
        return f"    # {_ranges(blocks[1:])}: same as {blocks[0]}, each on the one before" + (gives if given else "")


def _groups(nodes: Iterable[fx.Node]) -> list[_Group]:
    """Consecutive nodes of one block together."""
    groups: list[tuple[str, str, list[fx.Node]]] = []
    for node in nodes:
        where = meta.provenance(node)
        block = block_of(where.path)
        if not groups or groups[-1][0] != block:
            groups.append((block, dict(where.stack).get(block, ""), []))
        groups[-1][2].append(node)
    return [_Group(block, kind, tuple(found)) for block, kind, found in groups]


def _index(block: str) -> bool:
    """Whether the path ends in an index: `model.layers.3`, or `model.layers.3@1` in its second call."""
    return block.rsplit(".", 1)[-1].split("@")[0].isdigit()


def _without(path: str, block: str) -> str:
    return "*" + path[len(block) :] if path == block or path.startswith(block + ".") else path


def _ranges(blocks: Iterable[str]) -> str:
    """`model.layers.1 … 29` for consecutive indices."""
    families: dict[str, list[int]] = {}
    for block in blocks:
        family, _, index = block.rpartition(".")
        families.setdefault(family, []).append(int(index.split("@")[0]))
    said = []
    for family, found in families.items():
        low, high = min(found), max(found)
        prefix = f"{family}." if family else ""
        said.append(f"{prefix}{low}" if low == high else f"{prefix}{low} … {high}")
    return ", ".join(said)


def called_as(node: fx.Node, symbols: Symbols, names: dict[fx.Node, str] | None = None) -> str:
    """A node's call as Python; `names` are used instead of the nodes' own."""
    names = names or {}
    if getattr(node.target, "__name__", "") == "getitem" and len(node.args) == 2:
        return f"{_say(node.args[0], names, symbols)}[{_say(node.args[1], names, symbols)}]"
    arguments = [_say(arg, names, symbols) for arg in node.args] + [f"{key}={_say(value, names, symbols)}" for key, value in node.kwargs.items()]
    return f"{_target(node.target)}({', '.join(arguments)})"


def line(code: str, says: Iterable[str]) -> str:
    """A line of code and, in a column of its own, what is to be said of it."""
    comment = "  ".join(part for part in says if part)
    return f"{'    ' + code:<{COLUMN}}  # {comment}"


def _target(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target)
    if isinstance(target, HigherOrderOperator):
        return f"higher_order.{target.name()}"
    module = getattr(target, "__module__", "") or ""
    name = getattr(target, "__name__", str(target))
    return f"{module.removeprefix('_')}.{name}" if module not in ("", "builtins") else name


def _say(value: Any, names: dict[fx.Node, str], symbols: Symbols) -> str:
    """An argument as Python."""
    if isinstance(value, fx.Node):
        return names.get(value, value.name)
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_say(item, names, symbols) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_say(item, names, symbols)}" for key, item in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({', '.join(_say(part, names, symbols) for part in (value.start, value.stop, value.step))})"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, OpOverload):
        return str(value)
    if isinstance(value, torch.SymInt):
        return symbols.rename(str(value))
    return repr(value) if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def output_names(program: Program) -> list[str]:
    """A name for each flat output: `loss`, `logits`, `0.hidden`; "" if the model returns one bare value."""
    names: list[str] = []

    def walk(spec: pytree.TreeSpec, path: tuple[str, ...]) -> None:
        if spec.is_leaf():
            names.append(".".join(path))
            return
        keys = spec.context if isinstance(spec.context, (list, tuple)) else getattr(spec.context, "_fields", None)
        children = spec.children()
        if keys is None or len(keys) != len(children) or not all(isinstance(key, str) for key in keys):
            keys = range(len(children))
        for key, child in zip(keys, children):
            walk(child, (*path, str(key)))

    walk(program.signature.out_spec, ())
    return names


# -- what passes did -------------------------------------------------------------------------------------------------


def summary(program: Program) -> list[dict[str, Any]]:
    """One JSON-able record per pass: `text`, `rewrites`, `misses`, `notes`, `before`, `after` (node counts) and `ms`."""
    return [{
        "text": record.text,
        "rewrites": [{"rule": r.rule, "node": r.node, "path": r.path, "source": r.source} for r in record.rewrites],
        "misses": [{"rule": m.rule, "node": m.node, "reason": m.reason, "path": m.path, "source": m.source} for m in record.misses],
        "notes": list(record.notes), "before": record.before, "after": record.after, "ms": round(record.ms, 3),
    } for record in program.log]


def report(program: Program) -> str:
    """What each pass did: rewrites by rule, near-misses by reason with a place for each, notes, node counts, time."""
    if not program.log:
        return "no passes were applied\n"
    lines = []
    for record in program.log:
        lines.append(f"{record.text}: {record.before} -> {record.after} nodes, {len(record.rewrites)} rewrites, {record.ms:.1f} ms")
        fired: dict[str, list[str]] = {}
        for rewrite in record.rewrites:
            fired.setdefault(rewrite.rule, []).append(f"{rewrite.path or '<root>'} ({rewrite.source})" if rewrite.source else rewrite.path or "<root>")
        lines += [f"  fired  {rule}: {len(places)} times, first at {places[0]}" for rule, places in fired.items()]
        missed: dict[tuple[str, str], list[str]] = {}
        for miss in record.misses:
            missed.setdefault((miss.rule, miss.reason), []).append(f"{miss.node} in {miss.path or '<root>'}" + (f" ({miss.source})" if miss.source else ""))
        lines += [f"  missed {rule}: {reason}: {len(places)} times, first at {places[0]}" for (rule, reason), places in missed.items()]
        lines += [f"  note   {note}" for note in record.notes]
    return "\n".join(lines) + "\n"
