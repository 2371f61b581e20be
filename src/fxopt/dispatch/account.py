"""What of a model in parts runs as graphs and what as Python, why, and how much of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fxopt.dispatch.failure import Failure
from fxopt.dispatch.parts import Candidate, Parts
from fxopt.ir import text
from fxopt.ir.program import Program

_NUMBER = re.compile(r"\d+")
_SHOWN = 12


@dataclass(frozen=True)
class Part:
    """One part of a model: a module whose calls run as programs, or one whose own code stays Python.

    Attributes:
        name: its path, "" for the model itself.
        captured: whether its calls run as programs.
        reason: why it, or (of a captured one) some kind of its calls, runs as Python; "" if nothing does.
        where: the user's line that forced it, `file.py:line: code`. do: what to change.
        parameters: its share of the model's parameters (elements, before passes), 0 to 1; of Python code without the parts in it.
        flops: its share of the FLOPs of products in the example call; None if they were not counted.
        programs: of a captured part, one for each kind of call.
    """

    name: str
    captured: bool
    reason: str = ""
    where: str = ""
    do: str = ""
    parameters: float = 0.0
    flops: float | None = None
    programs: tuple[Program, ...] = ()


def account(parts: Parts) -> tuple[Part, ...]:
    """The parts in the order of the model, then what stays Python."""
    programs: dict[Candidate, list[Program]] = {}
    for candidate, lowered in parts.programs():
        programs.setdefault(candidate, []).append(lowered.program)
    out = _left_out(parts)
    places = [*(c.path for c in programs), *out]
    counted: set[str] = set()  # a tied parameter counts once
    graphs = []
    for candidate, found in programs.items():
        failure = next(iter(candidate.failures.values()), candidate.unkeyed)
        reason = "" if failure is None else f"{len(candidate.failures) or 'some'} kinds of its calls run as Python: {failure.reason}"
        graphs.append(Part(candidate.path, True, reason, failure.line if failure else "", failure.do if failure else "",
                           *_shares(parts, candidate.path, places, counted), tuple(found)))
    return (*graphs, *(Part(path, False, f.reason, f.line, f.do, *_shares(parts, path, places, counted)) for path, f in out.items()))


def _left_out(parts: Parts) -> dict[str, Failure]:
    """Each module whose own code stays Python, with the first reason."""
    found = {parts.why.module: parts.why}
    for candidate in parts.candidates.values():
        for failure in candidate.failures.values() if not candidate.captured else ():
            found.setdefault(failure.module, failure)
        if not candidate.captured and candidate.unkeyed is not None:
            found.setdefault(candidate.unkeyed.module, candidate.unkeyed)
        if not candidate.called:
            found[candidate.path] = Failure("it was not called in the example", candidate.path, "", "call the model so that it is")
    captured = {c.path for c in parts.captured}
    found = {path: failure for path, failure in found.items() if not any(_in(path, other) for other in captured)}
    if "" not in found:  # the model's own code around all that
        inner = next(iter(found), "")
        found[""] = Failure(f"its code calls {inner}", "", "", "") if inner else parts.why
    return dict(sorted(found.items(), key=lambda item: list(parts.owned).index(item[0]) if item[0] in parts.owned else -1))


def _in(path: str, other: str) -> bool:
    return path == other or not other or path.startswith(f"{other}.")


def _shares(parts: Parts, path: str, places: Sequence[str], counted: set[str]) -> tuple[float, float | None]:
    """Shares of parameters and FLOPs of a place, without the places in it, and without parameters that were counted."""
    inner = [other for other in places if other != path and _in(other, path)]
    outermost = [other for other in inner if not any(other != more and _in(other, more) for more in inner)]
    names = parts.owned[path].difference(counted, *(parts.owned[other] for other in inner))
    counted |= names
    parameters = sum(parts.sizes[name] for name in names) / max(sum(parts.sizes.values()), 1)
    if not parts.total:
        return parameters, None
    whole = parts.total if not path else parts.shares[path].inside if path in parts.shares else 0
    return parameters, (whole - sum(parts.shares[other].inside for other in outermost if other in parts.shares)) / parts.total


def _group(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} like it"


def summary(parts: Parts) -> str:
    """How much runs as graphs, and each reason for what does not."""
    found = account(parts)
    graphs, rest = [p for p in found if p.captured], [p for p in found if not p.captured]
    shares = f"{100 * sum(p.parameters for p in graphs):.1f}% of the parameters"
    if parts.total:
        shares += f" and {100 * sum(p.flops or 0.0 for p in graphs):.1f}% of the FLOPs of products"
    lines = [f"captured in parts: {len(graphs)} modules run as graphs, with {shares}; {len(rest)} as Python code"]
    groups: dict[tuple[str, ...], list[Part]] = {}
    for part in (*rest, *(p for p in graphs if p.reason)):
        groups.setdefault((part.reason, part.where, part.do), []).append(part)
    for (reason, where, do), group in groups.items():
        alike: dict[str, list[str]] = {}
        for part in group:
            alike.setdefault(_NUMBER.sub("*", part.name), []).append(part.name or "the model itself")
        name = ", ".join(_group(paths) for paths in alike.values())
        share = sum(part.parameters for part in group)
        own = f" [{100 * share:.1f}% of the parameters]" if share and not group[0].captured else ""
        lines.append(f"left out: {name}{own}{f' ({where})' if where else ''}: {reason}{f': {do}' if do else ''}")
    return "\n".join(lines)


def _changed(said: str) -> bool:
    """Whether a pass's report tells of a rewrite."""
    return any(" rewrites, " in line and ", 0 rewrites, " not in line for line in said.splitlines())


def report(parts: Parts) -> str:
    """The summary, and what passes did in each part; parts that are alike are shown once."""
    lines = [summary(parts)]
    shown: dict[str, list[tuple[str, str, list[str]]]] = {}
    for candidate, lowered in parts.programs():
        shown.setdefault(_NUMBER.sub("*", candidate.path), []).append((candidate.path, text.report(lowered.program), lowered.checks))
    quiet = [name for name, group in shown.items() if not _changed(group[0][1])]
    if quiet:
        lines.append(f"no pass changed anything in: {', '.join(_group([path for path, *_ in shown.pop(name)]) for name in quiet)}")
    for group in list(shown.values())[:_SHOWN]:
        lines += [f"part {_group(list(dict.fromkeys(path for path, *_ in group)))}:", group[0][1].rstrip(), *(f"check: {check}" for check in group[0][2])]
    if len(shown) > _SHOWN:
        lines.append(f"... and {len(shown) - _SHOWN} parts more: see `parts`")
    return "\n".join([*lines, *(f"check: {check}" for check in parts.checks)])
