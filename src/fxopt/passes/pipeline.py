"""Pipelines: passes in a row, their text form, and the one way a pass is applied."""

from __future__ import annotations

import dataclasses
import difflib
import time
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxopt.errors import FxoptError, PassError
from fxopt.ir.edit import Edit
from fxopt.ir.facts import Installed
from fxopt.ir.part import part_of
from fxopt.ir.program import Program, Sample
from fxopt.passes import certify, promises
from fxopt.passes.base import Pass, literal
from fxopt.passes.cases import cases
from fxopt.passes.catalog import PASSES, establishing
from fxopt.passes.language import Argument, Invocation, place, read


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order in which they are applied. `str(pipeline)` is its text form, which `parse` reads back."""

    passes: tuple[Pass, ...] = ()

    def text(self) -> str:
        """The text form: `lora(rank=16) | quantize(nf4)`."""
        return " | ".join(pass_.text() for pass_ in self.passes)

    def __str__(self) -> str:
        return self.text()

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def __or__(self, other: Pipeline | Pass | str) -> Pipeline:
        return Pipeline((*self.passes, *pipeline(other).passes))

    def __ror__(self, other: Pass | str) -> Pipeline:
        return pipeline(other) | self


def pipeline(value: str | Pass | Pipeline | Iterable[str | Pass | Pipeline]) -> Pipeline:
    """A Pipeline from anything that says one: a text, a Pass, a Pipeline, or several of those in order.

    Raises:
        PassError: if a text does not parse, or a value is none of these.
    """
    if isinstance(value, Pipeline):
        return value
    if isinstance(value, str):
        return parse(value)
    if isinstance(value, Pass):
        return Pipeline((value,))
    if isinstance(value, Iterable):
        return Pipeline(tuple(pass_ for item in value for pass_ in pipeline(item)))
    raise PassError(f"{value!r} is not a pass", do='pass a text ("lora(rank=16) | fuse"), a Pass, a Pipeline, or a list of those')


# -- text to passes --------------------------------------------------------------------------------------------------


def parse(text: str, catalog: Sequence[type[Pass]] = PASSES) -> Pipeline:
    """The Pipeline that `text` says. `parse(str(p)) == p` for every Pipeline of catalogued passes.

    Raises:
        PassError: for a text that is not in the language, an unknown pass, or an unknown, missing or wrongly typed
            argument; with the position and the nearest known names.
    """
    known = {cls.name: cls for cls in catalog}
    return Pipeline(tuple(_build(invocation, text, known) for invocation in read(text)))


def build(name: str, /, *args: Any, **kwargs: Any) -> Pass:
    """The pass `name` with these arguments, checked as `parse` checks them."""
    text = f"{name}({', '.join([*map(literal, args), *(f'{key}={literal(value)}' for key, value in kwargs.items())])})"
    arguments = (*(Argument(None, value, 0) for value in args), *(Argument(key, value, 0) for key, value in kwargs.items()))
    return _build(Invocation(name, arguments, 0), text, {cls.name: cls for cls in PASSES})


def _build(invocation: Invocation, text: str, known: Mapping[str, type[Pass]]) -> Pass:
    cls = known.get(invocation.name)
    here = place(text, invocation.at)
    if cls is None:
        raise PassError(f"there is no pass {invocation.name!r}", where=here, do=_nearest(invocation.name, known, "passes"))
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    names = list(fields)
    arguments: dict[str, Any] = {}
    named = False
    for position, argument in enumerate(invocation.arguments):
        where = place(text, argument.at)
        named = named or argument.name is not None
        if argument.name is not None:
            name = argument.name
        elif named:
            raise PassError("a positional argument follows a named one", where=where, do="put it first, or name it")
        elif position < len(names):
            name = names[position]
        else:
            raise PassError(f"{cls.name} takes {len(names)} arguments", where=where, do=f"they are {', '.join(names)}" if names else f"write `{cls.name}`")
        if name not in fields:
            raise PassError(f"{cls.name} has no argument {name!r}", where=where, do=_nearest(name, names, "arguments"))
        if name in arguments:
            raise PassError(f"{cls.name}: the argument {name!r} is given twice", where=where)
        try:
            arguments[name] = convert(argument.value, hints[name])
        except TypeError as error:
            raise PassError(f"{cls.name}: {name} must be {error}, got {literal(argument.value)}", where=where) from error
    for name, field in fields.items():
        if name not in arguments and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise PassError(f"{cls.name} needs the argument {name!r}", where=here, do=f"write `{cls.name}({name}=...)`")
    try:
        return cls(**arguments)
    except PassError as error:
        raise PassError(error.what, where=error.where or here, do=error.do) from error


def _nearest(name: str, known: Iterable[str], kind: str) -> str:
    """Advice: the nearest known names, or all of them."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"the {kind} are: {', '.join(known) or 'none'}"


def convert(value: Any, hint: Any) -> Any:
    """`value` as an argument of type `hint`: lists become tuples or lists, ints become floats, words become dtypes.

    Raises:
        TypeError: with what is wanted, in words.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in options:  # a value that already has one of the types stays what it is
            if type(value) is (option if isinstance(option, type) else typing.get_origin(option)):
                return convert(value, option)
        for option in options:
            try:
                return convert(value, option)
            except TypeError:
                continue
        raise TypeError(_said(hint))
    if origin is typing.Literal:
        for option in options:
            if type(value) is type(option) and value == option:
                return value
        raise TypeError(_said(hint))
    if origin in (tuple, list, Sequence, frozenset) and isinstance(value, (tuple, list)):
        of = options[0] if options else Any
        if origin is tuple and len(options) > 0 and options[-1] is not Ellipsis:
            if len(value) != len(options):
                raise TypeError(_said(hint))
            return tuple(convert(item, option) for item, option in zip(value, options))
        return (tuple if origin is Sequence else origin)(convert(item, of) for item in value)
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {convert(k, options[0]): convert(v, options[1]) for k, v in value.items()}
    if hint in (None, type(None)) and value is None:
        return None
    if hint is float and type(value) in (int, float) or hint is float and value in ("inf", "-inf"):
        return float(value)
    if hint is torch.dtype and isinstance(value, str):
        found = getattr(torch, value.removeprefix("torch."), None)
        if isinstance(found, torch.dtype):
            return found
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise TypeError(_said(hint))


def _said(hint: Any) -> str:
    """A type in words."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_said(option) for option in options)
    if origin is typing.Literal:
        return "one of " + ", ".join(literal(option) for option in options)
    if origin in (tuple, list, Sequence, frozenset):
        return f"a list of {_said(options[0])} values" if options else "a list"
    if origin in (dict, Mapping):
        return "a dict"
    names = {int: "an integer", float: "a number", str: "a word or string", bool: "true or false", type(None): "none", torch.dtype: "a dtype (bfloat16, ...)",
             tuple: "a list", list: "a list", dict: "a dict"}
    return names.get(hint, str(hint))


# -- applying --------------------------------------------------------------------------------------------------------


def apply(pass_: Pass, program: Program, sample: Sample | None = None, *, fuel: int | None = None, promised: bool = True) -> Program:
    """The program after one pass: facts checked and updated, time taken, the graph linted, the promise checked.

    Args:
        sample: for passes that measure.
        fuel: how many rewrites it may make; None: all. 0 leaves the program as it is. See `Edit.spent`.
        promised: check the promise on the graphs (what looks for a broken one does that itself).

    Raises:
        PassError: if a required fact does not hold (naming the passes that establish it), the pass fails, breaks its
            promise, or had to change something and did not.
    """
    name = pass_.name
    for fact in sorted(pass_.requires - program.facts):
        makers = establishing(fact)
        lost = [record.text for record in program.log] if program.log else ["nothing"]
        raise PassError(f"{name} requires {fact!r}, which does not hold here", where=f"after {' | '.join(lost)}",
                        do=f"put {' or '.join(makers)} before it" if makers else "no pass in the catalog establishes it")
    edit = Edit(program, by=name, sample=sample, fuel=fuel)
    fixed = _fixed(program)
    start = time.perf_counter()
    try:
        if fuel != 0:
            pass_.run(edit)
    except FxoptError:
        raise
    except Exception as error:
        raise PassError(f"{pass_} failed: {type(error).__name__}: {error}", do="this is a bug of the pass: report it with the program's text") from error
    ms = (time.perf_counter() - start) * 1e3
    if more := sorted(f"{symbol} = {_fixed(program)[symbol]}" for symbol in _fixed(program).keys() - fixed.keys()):
        raise PassError(f"{pass_} fixed sizes that calls may vary: {', '.join(more)}", do="this is a bug of the pass: report it with the program's text")
    edit.facts -= pass_.destroys
    edit.facts |= pass_.establishes
    tags = pass_.promise.values == "same" and edit.facts != program.facts
    if fuel is None and not (promises.changed(edit) or tags) or (fuel is None and pass_.must_fire and not edit.rewrites and not edit.installed.names):
        why = _reasons(edit)
        if pass_.must_fire and not edit.installed.names and part_of(program.facts) is None:
            raise PassError(f"{pass_} changed nothing{why}", do="change its arguments, or take it out of the pipeline")
        edit.note(f"changed nothing{why}")
    try:
        after = edit.finish(pass_.text(), ms)
    except RuntimeError as error:
        raise PassError(f"{pass_} made an invalid graph: {str(error).splitlines()[0]}", do="this is a bug of the pass") from error
    if promised:
        promises.check(pass_, program, after)
    return after


def _fixed(program: Program) -> dict[str, str]:
    """The symbolic sizes that are known to be one number."""
    env = program.fake_mode.shape_env
    return {} if env is None else {str(symbol): str(value) for symbol, value in env.replacements.items() if value.is_number}


def applied(program: Program, passes: Iterable[Pass] = ()) -> list[Pass]:
    """Every pass that made a program, in order: of those given, by text, else of the catalog.

    Raises:
        PassError: a pass in the program's log is neither.
    """
    known = {pass_.text(): pass_ for pass_ in passes}
    return [known[record.text] if record.text in known else next(iter(parse(record.text))) for record in program.log]


def _prerequisite(pass_: Pass, program: Program) -> Pass | None:
    """An exact pass that establishes what `pass_` requires and the program lacks: it is put in, and shows in the log."""
    for fact in sorted(pass_.requires - program.facts):
        for cls in PASSES:
            if fact in cls.establishes and cls.promise.values == "exact" and cls.promise.gradients == "all" and not cls.requires - program.facts:
                return cls()
    return None


def _reading_stored(passes: list[Pass], program: Program) -> list[Pass]:
    """The passes, and among them one that reads the weights that the model stores quantized, if it stores any."""
    stored = any(isinstance(fact, Installed) and fact.formats for fact in program.facts)
    if not stored or any("quantized" in pass_.establishes for pass_ in passes):
        return passes
    at = max((i + 1 for i, pass_ in enumerate(passes) if "adapters" in pass_.establishes), default=0)
    return [*passes[:at], *(cls() for cls in PASSES if "quantized" in cls.establishes), *passes[at:]]


def _reasons(edit: Edit) -> str:
    """Why a pass changed nothing, in the words of its near-misses and notes."""
    counts: dict[str, int] = {}
    for miss in edit.misses:
        key = f"{miss.rule}: {miss.reason}"
        counts[key] = counts.get(key, 0) + 1
    found = [f"{reason} ({count} places)" if count > 1 else reason for reason, count in counts.items()] + edit.notes
    return ": " + "; ".join(found[:8]) if found else ": nothing in the graph looks like what it rewrites"


def run(passes: str | Pass | Pipeline | Iterable[str | Pass | Pipeline], program: Program, *, verify: str | None = None,
        sample: Sample | None = None) -> Program:
    """The program after all passes of a pipeline.

    Where a pass requires a fact that an exact pass establishes (`canonicalize` for the patterns), that pass is put in front
    of it; and where the model stores weights quantized and no pass of the pipeline reads such weights, the one that does is put in
    behind the adapters. The log shows it.

    Args:
        verify: None checks types and structure only. "values" also certifies each pass application (see `certify`): on the sample,
            and on calls drawn from it, outputs, gradients and buffers before and after are compared.
        sample: the values of one call, for `verify` and for passes that measure.

    Raises:
        PassError: see `apply`.
        CheckError: if a certificate fails; says which tensor, by how much, on which case and after which pass.
    """
    if verify not in (None, "values"):
        raise PassError(f"verify must be None or 'values', got {verify!r}")
    certifier = None
    if verify == "values":
        example = sample.inputs if sample is not None else ()
        certifier = certify.Certifier(cases(program, example, certify.RUNS, certify.SEED), sample.state if sample is not None else {})
    waiting = _reading_stored(list(pipeline(passes)), program)
    while waiting:
        pass_ = waiting.pop(0)
        needed = _prerequisite(pass_, program)
        if needed is not None:
            waiting.insert(0, pass_)
            pass_ = needed
        after = apply(pass_, program, sample)
        if certifier is not None:
            _, note = certify.stage_of(pass_, program, after, certifier)
            record = dataclasses.replace(after.log[-1], notes=(*after.log[-1].notes, note))
            after = after.replace(log=(*after.log[:-1], record))
        program = after
    return program
