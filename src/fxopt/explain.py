"""What the passes of a pipeline did to a program, what they did not do and why, what that is worth, and how to change it.

`explain` reads the history that a program keeps. Nothing is run again; only the predictions are made, from graphs alone.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from fxopt.errors import FxoptError
from fxopt.ir import meta
from fxopt.ir.capture import Call, guards
from fxopt.ir.program import Miss, Program, Record, Rewrite
from fxopt.ir.regions import repeated_blocks
from fxopt.ir.text import Symbols
from fxopt.passes.base import Pass, Promise, literal
from fxopt.passes.pipeline import parse
from fxopt.runtime.forecast import Forecast, forecast
from fxopt.runtime.plan import size

FORMAT = "fxopt.explain/1"  # of the JSON, see docs/explain.md
_NAMES = re.compile(r"`[^`]*`|\b\w+(?:\.\w+)+\b")
_SIZES = re.compile(r"\[[^\]]*\]")
_VALUES = {"exact": "the same values, bit for bit", "same": "marks only: nothing computes anything else",
           "tolerance": "equal in exact arithmetic; the rounding error stays a small factor of the original's",
           "bounded": "an approximation"}
# What a reader can do about a reason, by words of the reason. The first that fits is said.
ADVICE = (
    ("blocks are compiled apart", "nothing to do: each block is compiled by itself, so that equal ones are compiled once"),
    ("is the output head, which all-linear leaves out", "name it in targets to adapt it too"),
    ("the inner value", "let the second reader take the result instead, or compute what it needs by itself"),
    ("is also read by", "the readers share one weight: untie them in the model's config if one of them is to be treated alone"),
    ("is tied to", "untie the two in the model's config if each should have its own"),
    ("written in place", "write the result into a new tensor in the model's code"),
    ("may depend on them", "use reshape where the model's code uses view"),
    ("checkpointed region", "checkpoint the whole of it, or none: `remat` saves as much without torch.utils.checkpoint"),
    ("is no faster than", "nothing to do: the op would not help at this size"),
    ("nothing to save", "nothing to do: the op would not help at this size"),
    ("the op rounds more", "compute it in the dtypes that docs/passes.md names"),
    ("is not a function of positions", "nothing to do if the mask depends on data; else build it from positions alone"),
    ("the add broadcasts", "expand the smaller one in the model's code, if the fused op is worth its memory"),
    ("a view of the same memory, is read later", "write into a copy in the model's code; as it is, the write stays in place"),
    ("writes into an input or into the model's state", "nothing to do: others see such a write, so it stays in place"),
    ("not from a linear head", "compute the logits as one linear of the hidden states, and choose rows before it, not behind it"),
    ("the mask is neither causal nor full", "nothing to do: the mask stays an argument of attention (a window has no flag there)"),
    ("is not read as a linear", "multiply the weight itself, by nn.Linear or x @ weight.T, without what lies between; or leave it out of targets"),
    ("only frozen weights are quantized", "put lora in front of quantize, or freeze the weight"),
    ("was not seen in the call that errors are measured on", "give an example that reaches it, or a format with whole bits"),
    ("are also read by", "let the second reader take the result instead, or compute what it needs by itself"),
    ("returns other strides", "use reshape where the model's code uses view"),
    ("queries come from is needed for all rows", "nothing to do: other outputs of the model need all rows"),
    ("would change the dtype or the shape", "write it as x = x + y, with operands of one dtype and shape, in the model's code"),
    ("labels of the loss are not known where", "pass the labels as an argument of the model"),
    ("` calls ", "write the line as the pattern is written, if they should be the same"),
    (" where the pattern ", "write the line as the pattern is written, if they should be the same"),
)
# What a pass looks for, said where it found none and nothing that nearly is one.
LOOKS_FOR = {
    "canonicalize": "a computation that is not in its one spelling yet",
    "causal": "a scaled_dot_product_attention with a mask; attention that is written out as products and a softmax is not looked at",
    "dead_code": "a node that nobody reads",
    "fuse": "a norm, gated unit or rotary embedding as one of its patterns writes it",
    "loss": "a cross entropy",
}
SHOWN = 5  # lines of code for each rule that fired; with more of them, the text names the first
_NOTHING = "changed nothing: "


@dataclass(frozen=True)
class Found:
    """A rule that fired, or nearly did, in some like places.

    Attributes:
        rule: its name and, for patterns, where it is written.
        count: of the places; `places` folds their module paths ("model.layers.0 … 29.mlp").
        source: the model's source line, "" if unknown.
        reason: why it did not fire, in the words of the first place; "" where it fired.
        advice: what could be done about it, "" if nothing is known.
    """

    rule: str
    count: int
    places: str
    source: str
    reason: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Predicted:
    """A training step on the call: peak in bytes and what it is made of, seconds of forward and backward on this machine."""

    peak: int
    parts: dict[str, int]
    seconds: float


@dataclass(frozen=True)
class Argument:
    """An argument of a pass: its value, default and type as the pass language writes them, and what the pass says of it."""

    name: str
    value: str
    default: str
    type: str
    says: str


@dataclass(frozen=True)
class Explained:
    """One pass: see `Found`; node counts before and after, its time in ms, its arguments, and a prediction for what it left."""

    text: str
    label: str
    promise: str
    before: int
    after: int
    ms: float
    did: tuple[Found, ...]
    did_not: tuple[Found, ...]
    notes: tuple[str, ...]
    arguments: tuple[Argument, ...]
    predicted: Predicted | None


@dataclass(frozen=True)
class Explanation:
    """A pipeline on one kind of call. `print` it, or take `json()`.

    Attributes:
        model: class of the model. sizes: of the call's tensors. start: prediction for the program as captured.
        checks, notes: what was compared after capture, and what is to be known beside.
    """

    model: str
    passes: str
    sizes: dict[str, tuple[int, ...]]
    start: Predicted | None
    steps: tuple[Explained, ...]
    checks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        """The same as data that `json.dumps` takes; the keys are in docs/explain.md."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        lines = [f"{self.model} after {self.passes or 'no pass'}"]
        if self.steps:
            lines.append(f"  nodes {self.steps[0].before} -> {self.steps[-1].after}")
        last = self.steps[-1].predicted if self.steps else None
        if self.start is not None:
            sizes = ", ".join(f"{name} {list(shape)}" for name, shape in self.sizes.items())
            to = (lambda before, after: f"{before} -> {after}" if last is not None else before)
            lines.append(f"  predicted for a training step on {sizes}: peak {to(size(self.start.peak), size(last.peak) if last else '')}, "
                         f"forward and backward {to(_seconds(self.start.seconds), _seconds(last.seconds) if last else '')} on this machine")
        for number, step in enumerate(self.steps, 1):
            lines += ["", *_said(number, step)]
        rest = [f"check: {line}" for line in self.checks] + [f"note: {line}" for line in self.notes]
        return "\n".join([*lines, *([""] if rest else []), *rest])


def _said(number: int, step: Explained) -> list[str]:
    lines = [f"{number}. {step.text}: {step.label}",
             f"     {step.before} -> {step.after} nodes; {step.promise}"]
    if step.predicted is not None:
        lines.append(f"     predicted after it: peak {size(step.predicted.peak)}, forward and backward {_seconds(step.predicted.seconds)}")
    rules: dict[str, list[Found]] = {}
    for found in step.did:
        rules.setdefault(found.rule, []).append(found)
    for rule, places in rules.items():
        shown = places if len(places) <= SHOWN else places[:1]
        lines += [f"   did      x{found.count} {rule} in {_at(found)}" for found in shown]
        if len(shown) < len(places):
            lines.append(f"            x{sum(found.count for found in places[1:])} more, from {len(places) - 1} other lines of code")
    for found in step.did_not:
        lines.append(f"   did not  x{found.count} {found.rule} in {_at(found)}: {found.reason}")
        if found.advice:
            lines.append(f"            -> {found.advice}")
    lines += [f"   note     {note}" for note in step.notes]
    if step.arguments:
        lines.append("   change   " + ", ".join(f"{argument.name}={argument.value}" for argument in step.arguments))
    return lines


def _at(found: Found) -> str:
    return f"{found.places} ({found.source})" if found.source else found.places


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def explain(program: Program, model: nn.Module, call: Call, *, predict: str = "ends", checks: Sequence[str] = (), notes: Sequence[str] = ()) -> Explanation:
    """What made `program` of the program that was captured.

    Args:
        model: whose repeated blocks are regions of their own. call: whose sizes the predictions are for; its values are not read.
        predict: "ends" (the program as captured, and the last one), "each" (after every pass; each takes seconds), or "none".
        checks, notes: are passed on.

    Raises:
        FxoptError: `predict` is none of these.
    """
    if predict not in ("ends", "each", "none"):
        raise FxoptError(f"predict is {predict!r}", do='write "ends", "each" or "none"')
    stages = list(reversed(list(program.history())))
    wanted = {"ends": {0, len(stages) - 1}, "each": set(range(len(stages))), "none": set()}[predict]
    shapes = tuple(tuple(t.shape) for t in call.tensors)
    blocks, runners, said = repeated_blocks(model), {}, list(notes)
    predictions: list[Predicted | None] = []
    for at, stage in enumerate(stages):
        predictions.append(None)
        if at in wanted:
            try:
                predictions[-1] = predicted(forecast(stage, blocks, shapes, guards(stage), runners=runners))
            except FxoptError as error:
                said.append(f"no prediction {f'after {stage.log[-1].text}' if at else 'for the program as captured'}: {error.what}")
    steps = tuple(_explained(stage, prediction) for stage, prediction in zip(stages[1:], predictions[1:]))
    return Explanation(type(model).__name__, " | ".join(record.text for record in program.log), dict(zip(program.signature.names(), shapes)), predictions[0],
                       steps, tuple(checks), tuple(said))


def predicted(found: Forecast) -> Predicted:
    """A forecast in numbers."""
    return Predicted(found.plan.peak.total, {name: bytes_ for name, bytes_ in found.plan.peak.parts.items() if bytes_}, found.plan.seconds)


def _explained(stage: Program, prediction: Predicted | None) -> Explained:
    record = stage.log[-1]
    (pass_,) = parse(record.text)
    symbols = Symbols()
    for node in stage.placeholders:  # sizes are called what a dump calls them
        symbols.rename(meta.describe(meta.value(node)))
    misses = [dataclasses.replace(miss, reason=_SIZES.sub(lambda found: symbols.rename(found[0]), miss.reason)) for miss in record.misses]
    label = (type(pass_).__doc__ or "").splitlines()[0]
    return Explained(record.text, label, promised(pass_.promise), record.before, record.after, round(record.ms, 3), _grouped(record.rewrites),
                     _grouped(misses), _notes(record, pass_), arguments(pass_), prediction)


def _notes(record: Record, pass_: Pass) -> tuple[str, ...]:
    """A record's notes. That nothing was changed is said without the reasons, which are there already, or with what was looked for."""
    said = [note for note in record.notes if not note.startswith(_NOTHING)]
    if len(said) < len(record.notes):
        said.append("changed nothing" + (f": there is no {LOOKS_FOR[pass_.name].removeprefix('a ')}" if pass_.name in LOOKS_FOR and not record.misses and not said else ""))
    return tuple(said)


def promised(promise: Promise) -> str:
    """A promise in words."""
    said = _VALUES[promise.values] + (f" (relative error of a replaced value up to {promise.bound:g})" if promise.bound is not None else "")
    parts = [said]
    if promise.gradients == "declared":
        parts.append("which parameters take a gradient may change")
    if promise.outputs == "declared":
        parts.append("parts of what the model returns beside the loss may have other values")
    if promise.random == "declared":
        parts.append("other random numbers")
    return "; ".join(parts)


def arguments(pass_: Pass) -> tuple[Argument, ...]:
    """A pass's arguments as it has them."""
    says = _documented(type(pass_))
    found = []
    for field in dataclasses.fields(pass_):
        if not field.init:
            continue
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        default = "" if made is dataclasses.MISSING else literal(made)
        found.append(Argument(field.name, literal(getattr(pass_, field.name)), default, str(field.type), says.get(field.name, "")))
    return tuple(found)


def _documented(cls: type[Pass]) -> dict[str, str]:
    """What the section "Args:" or "Attributes:" of a pass's docstring says of each."""
    lines = re.split(r"^(?:Args|Attributes):\n", inspect.getdoc(cls) or "", maxsplit=1, flags=re.MULTILINE)[-1].splitlines()
    found: dict[str, str] = {}
    name = ""
    for line in lines:
        head = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if head is not None:
            for name in head[1].split(", "):
                found[name] = head[2]
        elif line.startswith("     ") and name:
            found[name] += " " + line.strip()
        elif line.strip():
            break
    return found


def _grouped(records: Iterable[Rewrite | Miss]) -> tuple[Found, ...]:
    """Like places together: the same rule, source line and reason, but for the names and numbers of blocks and nodes in it."""
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for each in records:
        reason = _NAMES.sub(lambda found: re.sub(r"\d+", "#", found[0]).rstrip("#_`"), getattr(each, "reason", ""))
        groups.setdefault((each.rule, reason, each.source), []).append(each)
    found = []
    for (rule, _, source), places in groups.items():
        reason = getattr(places[0], "reason", "")
        advice = next((advice for words, advice in ADVICE if words in reason), "")
        found.append(Found(rule, len(places), folded([place.path for place in places]), source, reason, advice))
    return tuple(found)


def folded(paths: Iterable[str]) -> str:
    """Module paths with the numbers of blocks together: `model.layers.0 … 29.mlp`."""
    families: dict[tuple[str, ...], list[list[int]]] = {}
    for path in dict.fromkeys(paths):
        parts = path.split(".")
        families.setdefault(tuple("#" if part.isdigit() else part for part in parts), []).append([int(part) for part in parts if part.isdigit()])
    said = []
    for family, numbers in families.items():
        columns = iter([sorted(set(column)) for column in zip(*numbers)])
        said.append(".".join(_range(next(columns)) if part == "#" else part for part in family) or "<root>")
    return ", ".join(said[:4]) + (f" and {len(said) - 4} more" if len(said) > 4 else "")


def _range(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} … {numbers[-1]}"
    return "{" + ", ".join(map(str, numbers[:6])) + (", …" if len(numbers) > 6 else "") + "}"
