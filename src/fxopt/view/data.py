"""What the page shows of a program's history, as JSON: nodes once, however many stages they are in.

Keys of the result (docs/view.md says more): `strings`, the table that the numbers below point into; `rows`, one per different node;
`stages`, from the captured program to the last, each with its nodes (runs of rows), and what was said of the pass.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn

from fxopt.errors import FxoptError
from fxopt.explain import Explained, Explanation, Predicted, explain, predicted
from fxopt.ir import meta
from fxopt.ir.capture import Call, guards
from fxopt.ir.program import Program, Sample
from fxopt.ir.regions import repeated_blocks
from fxopt.ir.text import Symbols, block_of, called_as
from fxopt.passes.interpreted import materialize
from fxopt.runtime import dry_run
from fxopt.runtime.forecast import Forecast, forecast, forward_work, numbers
from fxopt.runtime.machine import Machine, present

FORMAT = "fxopt.view/1"


class _Strings:
    """A table of texts, each once."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.found.setdefault(text, len(self.found))


def data(program: Program, model: nn.Module, call: Call, *, predict: str = "ends", errors: bool = False) -> dict[str, Any]:
    """The page's data.

    Args:
        program: the last of its history. model: whose repeated blocks are regions of their own. call: the sizes are its.
        predict: "ends", "each" or "none": for which stages memory, saved values and the time of a step are predicted.
        errors: run every stage on the call and say how far each node's value is from the captured program's; needs the call's values and
            the model's weights.
    """
    said = explain(program, model, call, predict="none")
    stages = list(reversed(list(program.history())))
    wanted = {"ends": {0, len(stages) - 1}, "each": set(range(len(stages))), "none": set()}
    if predict not in wanted:
        raise FxoptError(f"predict is {predict!r}", do='write "ends", "each" or "none"')
    table = _Table(Symbols(), _Strings(), {}, present())
    shapes, blocks, runners = tuple(tuple(t.shape) for t in call.tensors), repeated_blocks(model), {}
    off = _errors(stages, model, call) if errors else [{} for _ in stages]
    shown, notes = [], list(said.notes)
    for at, stage in enumerate(stages):
        found: Forecast | None = None
        if at in wanted[predict]:
            try:
                found = forecast(stage, blocks, shapes, guards(stage), runners=runners)
            except FxoptError as error:
                notes.append(f"no prediction {f'after {stage.log[-1].text}' if at else 'for the program as captured'}: {error.what}")
        number = numbers(guards(stage).bind(shapes), shapes)
        work: Mapping[str, dry_run.Work] = found.work if found is not None else {}
        if found is None:
            try:
                work = forward_work(stage, blocks, number)
            except FxoptError as error:
                notes.append(f"no costs of nodes {f'after {stage.log[-1].text}' if at else 'as captured'}: {error.what}")
        shown.append(_stage(table, stage, number, work, found, off[at], said.steps[at - 1] if at else None))
    return {"format": FORMAT, "model": said.model, "passes": said.passes, "sizes": {name: list(shape) for name, shape in said.sizes.items()},
            "notes": notes, "verified": errors, "strings": list(table.strings.found), "rows": [list(row) for row in table.rows], "stages": shown}


class _Table:
    """Rows that stages share. A row: name, target, arguments, type, path, class of the block, source, code, passes, names that it reads,
    state that it reads, bytes, flops, seconds in nanoseconds."""

    def __init__(self, symbols: Symbols, strings: _Strings, rows: dict[Any, int], machine: Machine) -> None:
        self.symbols, self.strings, self.rows, self.machine = symbols, strings, rows, machine
        self.keys = _Strings()

    def key(self, text: str) -> int:
        """A number for a text that only needs to be compared."""
        return self.keys(text)


def _stage(table: _Table, program: Program, number: Any, work: Mapping[str, dry_run.Work], found: Forecast | None, off: Mapping[str, float],
           step: Explained | None) -> dict[str, Any]:
    strings = table.strings
    named = dict(zip((node.name for node in program.placeholders), program.signature.names()))
    body = [node for node in program.nodes if node.op in ("placeholder", "call_function")]
    state = {node: _state(table, program, node) for node in program.nodes if node.op == "get_attr"}
    ids = [_row(table, node, named, state, number, work) for node in body]
    keys = _Keys(program, table)
    at = {node.name: index for index, node in enumerate(body)}
    shown: dict[str, Any] = {
        "title": step.text if step is not None else "as captured", "label": step.label if step is not None else "what torch.export made of the model's code",
        "nodes": _runs(ids), "keys": [table.key(keys.of(node)) for node in body], "loose": [table.key(keys.of(node, loose=True)) for node in body],
        "outputs": [out.name if isinstance(out, fx.Node) else repr(out) for out in program.outputs],
        "error": {at[name]: value for name, value in off.items() if name in at},
        "saved": {at[name]: size for name, size in found.saved.items() if name in at} if found is not None else None,
        "predicted": _predicted(predicted(found)) if found is not None else None}
    if step is not None:
        shown |= {"promise": step.promise, "notes": list(step.notes), "did": [[f.count, f.rule, f.places, f.source] for f in step.did],
                  "did_not": [[f.count, f.rule, f.places, f.source, f.reason, f.advice] for f in step.did_not],
                  "arguments": [[a.name, a.value, a.says] for a in step.arguments]}
    return shown


def _predicted(found: Predicted) -> dict[str, Any]:
    return {"peak": found.peak, "parts": found.parts, "seconds": found.seconds}


def _state(table: _Table, program: Program, node: fx.Node) -> str:
    """A slot in words: name, type, and whether it is trained."""
    name = str(node.target)
    slot = program.slots.get(name)
    kind = "constant" if slot is None else f"{slot.kind}{', trainable' if program.trainable(name) else ', frozen' if slot.kind == 'parameter' else ''}"
    made = f", made by {slot.made.by}" if slot is not None and slot.made is not None else ""
    return f"{name}: {table.symbols.rename(meta.describe(meta.value(node)))}, {kind}{made}"


def _row(table: _Table, node: fx.Node, named: Mapping[str, str], state: Mapping[fx.Node, str], number: Any, work: Mapping[str, dry_run.Work]) -> int:
    strings, where = table.strings, meta.provenance(node)
    if node.op == "placeholder":
        target, arguments = "input", named[node.name]
    else:
        said = called_as(node, table.symbols, {source: str(source.target) for source in state if source in node.all_input_nodes})
        target, arguments = ("getitem", said) if node.target is operator.getitem else (said.partition("(")[0], said.partition("(")[2][:-1])
    block = block_of(where.path)
    cost = work.get(node.name) if node.op == "call_function" else None
    numbers_ = (_bytes(node, number), int(sum(cost.flops.values())) if cost is not None else 0,
                round(table.machine.seconds(cost) * 1e9) if cost is not None else 0)
    reads = tuple(strings(source.name) for source in node.all_input_nodes if source not in state)
    row = (strings(node.name), strings(target), strings(arguments), strings(table.symbols.rename(meta.describe(meta.value(node)))), strings(where.path),
           strings(dict(where.stack).get(block, "")), strings(where.source), strings(where.code), strings(", ".join(where.passes)), reads,
           tuple(strings(state[source]) for source in node.all_input_nodes if source in state), *numbers_)
    return table.rows.setdefault(row, len(table.rows))


def _bytes(node: fx.Node, number: Any) -> int:
    """Bytes of a node's value in the call."""
    total = 0
    for tensor in meta.tensors(node):
        size = tensor.element_size()
        for dim in tensor.shape:
            size *= number(dim)
        total += size
    return total


def _runs(ids: Iterable[int]) -> list[int]:
    """[first, how many, first, how many, ...] of consecutive numbers."""
    runs: list[int] = []
    for each in ids:
        if runs and runs[-2] + runs[-1] == each:
            runs[-1] += 1
        else:
            runs += [each, 1]
    return runs


class _Keys:
    """Texts that are equal for nodes at the same place of equal blocks: same call, type, source line, and wiring.

    A value of the same block is named by its position in it, one of an earlier repeated block by how many blocks back and its position,
    any other by its name. Loose keys name no value of another block: the first of equal blocks reads what comes before them.
    """

    def __init__(self, program: Program, table: _Table) -> None:
        self.program, self.table = program, table
        self.place: dict[fx.Node, tuple[int, int]] = {}  # node to (number of its section, position in it)
        self.block: dict[fx.Node, str] = {}
        section, position, last = -1, 0, None
        for node in program.nodes:
            if node.op != "call_function":
                continue
            block = block_of(meta.provenance(node).path)
            if block != last:
                section, position, last = section + 1, 0, block
            self.place[node], self.block[node] = (section, position), block
            position += 1

    def of(self, node: fx.Node, loose: bool = False) -> str:
        """The key of a node."""
        if node.op == "placeholder":
            return node.name
        own = self.block[node]
        names = {source: self._name(source, node, own, loose) for source in node.all_input_nodes}
        where = meta.provenance(node)
        return f"{called_as(node, self.table.symbols, names)} {meta.describe(meta.value(node))} {_within(where.path, own)} {where.source} {where.passes}"

    def _name(self, source: fx.Node, reader: fx.Node, own: str, loose: bool) -> str:
        if source.op == "get_attr":
            name = str(source.target)
            slot = self.program.slots.get(name)
            return f"{_within(name, own)}: {meta.describe(meta.value(source))} {slot is not None and self.program.trainable(name)}"
        if loose and (source not in self.place or self.place[source][0] != self.place[reader][0]):
            return "<outside>"
        if source not in self.place or not self.block[source].rsplit(".", 1)[-1].split("@")[0].isdigit():
            return source.name
        section, position = self.place[source]
        return f"<{self.place[reader][0] - section}:{position}>"


def _within(path: str, block: str) -> str:
    return "*" + path[len(block):] if block and (path == block or path.startswith(block + ".")) else path


def _errors(stages: list[Program], model: nn.Module, call: Call) -> list[dict[str, float]]:
    """For each stage and node that the captured program has too: the largest difference of their values on the call, relative to the
    captured value's largest magnitude. The same random numbers are drawn."""
    state: dict[str, torch.Tensor] = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    first: dict[str, torch.Tensor] = {}
    stages[0].watch(Sample(call.tensors, state), lambda node, value, _: first.update({node.name: value.clone()}) if _compared(node, value) else None)
    found: list[dict[str, float]] = [{}]
    for stage in stages[1:]:
        state = materialize(stage, state)
        off: dict[str, float] = {}

        def see(node: fx.Node, value: Any, _: Any, off: dict[str, float] = off) -> None:
            known = first.get(node.name)
            if known is not None and _compared(node, value) and known.shape == value.shape:
                largest = float(known.abs().amax()) or 1.0
                off[node.name] = float((value.to(known.dtype) - known).abs().amax()) / largest

        stage.watch(Sample(call.tensors, state), see)
        found.append(off)
    return found


def _compared(node: fx.Node, value: Any) -> bool:
    return node.op == "call_function" and isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 0
