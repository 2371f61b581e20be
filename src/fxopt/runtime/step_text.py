"""A whole training step as text: forward and backward of every region, what is saved between them, and how many bytes that is."""

from __future__ import annotations

from collections.abc import Iterable

import torch.fx as fx
import torch.nn as nn

from fxopt.ir import meta
from fxopt.ir.capture import guards
from fxopt.ir.program import Program
from fxopt.ir.regions import repeated_blocks
from fxopt.ir.text import Symbols, called_as, line
from fxopt.runtime.forecast import Part, Saved, forecast, origin
from fxopt.runtime.plan import size


def step_text(program: Program, model: nn.Module, shapes: tuple[tuple[int, ...], ...]) -> str:
    """The step that a program makes of a call, region after region; equal regions once. The same in every run: it says bytes, not times.

    Args:
        model: whose repeated blocks are regions of their own. shapes: of the call's tensors, in order; bytes are for them.

    Raises:
        CallError: the program asks for a budget that cannot be kept.
        LowerError: the program cannot be cut, or its backward cannot be traced.
    """
    found = forecast(program, repeated_blocks(model), shapes, guards(program))
    peak = found.plan.peak
    lines = [f"# step: {', '.join(f'{name} {list(shape)}' for name, shape in zip(program.signature.names(), shapes))}",
             f"# passes: {' | '.join(record.text for record in program.log) or 'none'}",
             f"# peak: {size(peak.total)} in the {peak.phase} of {peak.place}, at {peak.node or 'its start'}",
             f"#       {', '.join(f'{name} {size(bytes_)}' for name, bytes_ in peak.parts.items() if bytes_)}"]
    symbols = Symbols()
    for part in found.parts:
        lines += ["", *_part(part, symbols)]
    total = sum(_own(part.saved) * len(part.paths) for part in found.parts)
    lines += ["", f"# saved for the backward, beside what is alive anyway: {size(total)} ({total} bytes)"]
    return "\n".join(lines) + "\n"


def _own(saved: Iterable[Saved]) -> int:
    return sum(value.bytes for value in saved if not value.received)


def _part(part: Part, symbols: Symbols) -> list[str]:
    paths = [path or "between the blocks" for path in part.paths]
    where = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} equal to it, up to {paths[-1]}"
    lines = [f"# {where}" + (f" (x{len(paths)})" if len(paths) > 1 else "")]
    names = [*part.region.inputs, *part.region.state]
    nodes = {node.name: own for node, own in zip(part.compiled.graph.nodes, part.region.graph.nodes)}
    forward, backward = part.split.forward.graph, part.split.backward.graph if part.split.backward is not None else None
    lines += _graph("forward", forward, dict(zip(_placeholders(forward), names)), nodes, symbols, part.split.n_outputs)
    if backward is None:
        return [*lines, "", "    # no backward: nothing takes a gradient"]
    kept = _own(part.saved)
    lines += ["", f"    # saved: {len(part.saved)} values, {size(kept)} ({kept} bytes) beside what is alive anyway" + (f", in each of {len(paths)}" if len(paths) > 1 else "")]
    lines += [line(f"{value.name}", [f"{value.bytes} bytes", "received" if value.received else f"computed by {value.node or 'the region'}"]) for value in part.saved]
    again = set(part.split.recomputed)
    if again:
        lines += [f"    # computed again in the backward: {', '.join(part.split.recomputed)}"]
    said = dict(zip(_placeholders(backward), [*_saved_names(part), *(f"gradient of {part.region.outputs[i]}" for i in part.split.tangents)]))
    lines += ["", *_graph("backward", backward, said, nodes, symbols, None, again)]
    return [*lines, f"    # the gradients of: {', '.join(names[i] for i in part.split.wanted)}"]


def _saved_names(part: Part) -> list[str]:
    """What the backward's first arguments are, in order: the saved values, sizes among them."""
    graph = part.split.forward.graph
    arguments = dict(zip(_placeholders(graph), (*part.region.inputs, *part.region.state)))
    return [arguments.get(value, value.name) if isinstance(value, fx.Node) else str(value)
            for value in graph.output_node().args[0][part.split.n_outputs + len(part.split.mutated):]]


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _graph(title: str, graph: fx.Graph, names: dict[fx.Node, str], nodes: dict[str, fx.Node], symbols: Symbols, outputs: int | None,
           again: Iterable[str] = ()) -> list[str]:
    """A graph of a region; `outputs`: how many of what it returns leave the region."""
    lines = [f"def {title}("]
    lines += [line(f"{node.name},", [symbols.rename(meta.describe(meta.value(node))), names.get(node, "")]) for node in _placeholders(graph)]
    lines.append("):")
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        says = [symbols.rename(meta.describe(meta.value(node)))]
        source = nodes.get(origin(node))
        if source is not None:
            where = meta.provenance(source)
            says += [where.path, where.source]
        if node.name in again:
            says.append("again")
        lines.append(line(f"{node.name} = {called_as(node, symbols)}", says))
    last = graph.output_node().args[0]
    returned = [value.name if isinstance(value, fx.Node) else repr(value) for value in (last if outputs is None else last[:outputs])]
    return [*lines, f"    return {', '.join(returned)}" + ("" if outputs is None else "  # and what is saved")]
