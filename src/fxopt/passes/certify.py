"""Test every pass application of a pipeline on many calls: the one way in which values are verified.

`run(..., verify="values")`, `optimize(..., verify="values")`, `Optimized.verify` and `fxopt verify` all come here.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from fxopt.errors import CheckError, FxoptError, LowerError
from fxopt.ir import meta
from fxopt.ir.facts import LowRank, Stored, Trained
from fxopt.ir.hashing import digest, state_digest
from fxopt.ir.program import Program
from fxopt.kernels.formats import FORMATS
from fxopt.passes import low_rank, promises, verify
from fxopt.passes.base import Pass, Promise
from fxopt.passes.cases import Case, cases
from fxopt.passes.certificate import Certificate, Result, Stage, versions
from fxopt.passes.interpreted import bound_values, materialize
from fxopt.passes.quiet import quiet
from fxopt.passes.verify import Runs, drawn

RUNS, SEED = 2, 0
State = Mapping[str, torch.Tensor]
INTERPRETED = "the graph, interpreted"
BEFORE, FORMULA = "the program before", "W + scale * B A in the program before, with random factors"


class Certifier:
    """Tests pass applications one after the other, on the same cases.

    Args:
        tested: the cases.
        state: values of the first program's slots. Adapters that passes add get random values once their start was tested, so that
            later passes are tested on adapters that count.
    """

    def __init__(self, tested: Sequence[Case], state: State) -> None:
        self.cases = list(tested)
        plain = {name: value.detach() for name, value in state.items()}
        # by the name of the case that has weights of its own; "" for all others
        self.states: dict[str, dict[str, torch.Tensor]] = {"": plain, **{case.name: case.weights(plain) for case in tested if case.weights is not None}}
        self.kept: dict[str, Runs] = {}

    def advance(self, before: Program, after: Program) -> None:
        """Go on behind an application without testing it."""
        made = [name for name in after.slots if name not in before.slots]
        self.states = {key: _with_random(after, _adapters(after, made), materialize(after, state)) for key, state in self.states.items()}
        if made:
            self.kept.clear()

    def stage(self, pass_: Pass, before: Program, after: Program, *, stop: bool = False) -> Stage:
        """What is found of one application. Nothing is raised for what is wrong: see `Stage.require`.

        Args:
            stop: at the first case that fails.
        """
        facts = dict(promises.facts(pass_, before, after))
        made = {name: slot for name, slot in after.slots.items() if name not in before.slots}
        known = {key: materialize(after, state) for key, state in self.states.items()}
        results: list[Result] = []
        zero: set[str] = set()
        seen: set[str] = set()
        if all(says is None for name, says in facts.items() if name != "random"):
            stored = [slot.made.facts for slot in made.values() if slot.made is not None and isinstance(slot.made.facts, Stored)]
            adapters = _adapters(after, list(made))
            first = known if not stored else {key: dequantized(after, state) for key, state in known.items()}
            results += _bounds(pass_, stored, self.states[""], first[""])
            start = self.cases[:2] if adapters else self.cases
            shared: list[str] = []
            promise, coarser = _held_to(pass_.promise)
            if promise is None:
                results.append(Result("all", BEFORE, "skipped", says=f"not compared: the pass promises an approximation of values (bound {pass_.promise.bound})"))
            else:
                promise, old, new = _without_draws(promise, before, after)
                test = _Test(pass_, promise, coarser, old, new, zero, seen)
                results += _until_failed((self.compare(test, case, first, known, shared) for case in start), stop)
            facts["aliasing"] = shared[0] if shared else None
            if adapters:
                known = {key: _with_random(after, adapters, state) for key, state in known.items()}
                if promise is not None and not (stop and any(each.status == "failed" for each in results)):
                    results += _until_failed((self.formula(test, case, known) for case in self.cases), stop)
        if made:
            self.kept.clear()
        self.states = known
        promise = {name: value for name, value in dataclasses.asdict(pass_.promise).items() if value is not None}
        return Stage(pass_.text(), promise, digest(before), digest(after), len(after.log[-1].rewrites) if after.log else 0, facts, tuple(results), tuple(sorted(zero - seen)))

    def compare(self, test: _Test, case: Case, first: Mapping[str, State], second: Mapping[str, State], shared: list[str]) -> Result:
        """One case, the program before against the one after. What is wrong with the sharing of memory goes into `shared`."""
        scalars = test.promise.outputs == "declared"
        old = self.kept.get(case.name)
        if old is None or old.program is not test.before or old.scalars != scalars or first is not second:
            old = Runs(test.before, case.inputs, _of(case, first), scalars=scalars)
        new = Runs(test.after, case.inputs, _of(case, second), scalars=scalars)
        found = test.result(case, BEFORE, old, new)
        self.kept[case.name] = new
        if found.status in ("equal", "within") and not scalars and old.draws.shared != new.draws.shared:
            shared.append(f"on {case.name}, what outputs share memory with was {list(old.draws.shared)} and is {list(new.draws.shared)}")
        return found

    def formula(self, test: _Test, case: Case, states: Mapping[str, State]) -> Result:
        """One case, adapters with random values: the program before, on weights computed by their formula, against the one after."""
        state = _of(case, states)
        old, new = Runs(test.before, case.inputs, state, derive=low_rank.adapted(test.after)), Runs(test.after, case.inputs, state)
        return test.result(case, FORMULA, old, new)


@dataclass(frozen=True)
class _Test:
    """What one pass application is held to. `zero` and `seen` collect the names of `Finding`'s over the cases."""

    pass_: Pass
    promise: Promise
    coarser: bool
    before: Program
    after: Program
    zero: set[str]
    seen: set[str]

    def result(self, case: Case, against: str, old: Runs, new: Runs) -> Result:
        """Compare; a case that the model itself refuses says nothing about the pass."""
        try:
            assert old.own is not None
        except Exception as error:
            return Result(case.name, against, "skipped", says=f"the program before refuses this case: {_first(error)}")
        try:
            found = verify.compare(self.pass_, old, new, promise=self.promise, coarser=self.coarser)
        except CheckError as error:
            return Result(case.name, against, "failed", says=error.what)
        except Exception as error:
            return Result(case.name, against, "failed", says=f"the program after fails, and the one before does not: {_first(error)}")
        self.zero.update(found.zero)
        self.seen.update(found.seen)
        status = "skipped" if not found.compared else "equal" if not found.worst else "within"
        return Result(case.name, against, status, found.compared, found.worst, found.ratio, found.says)


def _first(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _held_to(promise: Promise) -> tuple[Promise | None, bool]:
    """What can be tested of a promise, and whether the allowed error is the new program's own (see `verify.compare`)."""
    if promise.values != "bounded":
        return promise, False
    if promise.of == "values":
        return None, False
    return dataclasses.replace(promise, values="tolerance"), promise.of == "dtypes"


def _without_draws(promise: Promise, before: Program, after: Program) -> tuple[Promise, Program, Program]:
    """Where a pass declares random numbers of its own: the programs with every probability of a zero at 0, if that leaves no others."""
    if promise.random != "declared" or drawn(before) == drawn(after):
        return promise, before, after
    both = quiet(before), quiet(after)
    if both[0] is None or both[1] is None:
        return promise, before, after
    return dataclasses.replace(promise, random="same"), both[0], both[1]


def _bounds(pass_: Pass, stored: Sequence[Stored], dense: State, back: State) -> Iterator[Result]:
    """How far each stored weight is off, against the pass's bound (relative, Frobenius norm)."""
    targets = {fact.target: fact for fact in stored if fact.target in dense}
    bound = pass_.promise.bound
    if not targets or bound is None:
        return
    errors = {}
    for name in targets:
        norm = float(dense[name].double().norm())
        errors[name] = float((back[name].double() - dense[name].double()).norm()) / max(norm, torch.finfo(torch.float64).tiny)
    worst = max(errors, key=lambda name: errors[name])
    says = f"{worst} is off by {errors[worst]:.3g} (relative, Frobenius norm), the bound is {bound:.3g}"
    yield Result("stored weights", "the dense weights", "within" if errors[worst] <= bound else "failed", len(errors), worst, errors[worst] / bound, says)


def dequantized(program: Program, state: State) -> dict[str, torch.Tensor]:
    """`state` with every weight that is stored quantized replaced by what its stored form means."""
    found, done = dict(state), set()
    for slot in program.slots.values():
        stored = slot.made.facts if slot.made is not None else None
        if isinstance(stored, Stored) and stored.target not in done:
            parts = [state[f"{stored.target}.{part.name}"] for part in FORMATS[stored.format].parts]
            found[stored.target] = FORMATS[stored.format].dequantize(parts, stored.shape, stored.dtype)
            done.add(stored.target)
    return found


def _until_failed(results: Iterator[Result], stop: bool) -> list[Result]:
    found = []
    for each in results:
        found.append(each)
        if stop and each.status == "failed":
            break
    return found


def _adapters(program: Program, made: Sequence[str]) -> list[str]:
    """Of the slots that a pass made, those of adapters."""
    return [name for name in made if (how := program.slots[name].made) is not None and isinstance(how.facts, (LowRank, Trained))]


def _counts(program: Program, name: str, value: torch.Tensor) -> bool:
    """Whether an adapter's slot gets a random value: all but DoRA's magnitudes, which are norms of what is there."""
    made = program.slots[name].made
    return not value.any() or made is None or not isinstance(made.facts, LowRank) or made.facts.factor != "magnitude"


def _of(case: Case, states: Mapping[str, State]) -> State:
    return states[case.name if case.weights is not None else ""]


def _with_random(program: Program, adapters: Sequence[str], state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state with adapters that count."""
    return {**state, **{name: _random(name, state[name]) for name in adapters if _counts(program, name, state[name])}}


def _random(name: str, value: torch.Tensor) -> torch.Tensor:
    """Values that count, where adapters start at zero."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return (0.1 * torch.randn(value.shape, generator=generator)).to(value.device, value.dtype)


def lowered(program: Program, run: Callable[[list[torch.Tensor]], Sequence[Any]], tested: Sequence[Case], live: State) -> Stage:
    """What is found of a program as it is run: `run(inputs)` gives flat outputs and reads the tensors `live`, against the interpreted graph."""
    scalars = any(isinstance(out, torch.fx.Node) and (found := meta.tensor(out)) is not None and not found.dim() and found.is_floating_point() for out in program.outputs)
    results = []
    test = _Test(Pass(), Promise(), False, program, program, set(), set())
    for case in tested:
        if case.weights is not None:
            continue  # the live weights are not touched
        old = Runs(program, case.inputs, live, scalars=scalars)
        try:
            assert old.truth is not None
        except Exception as error:
            results.append(Result(case.name, INTERPRETED, "skipped", says=f"the graph refuses this case: {_first(error)}"))
            continue
        try:
            found = old.computed(bound_values(program, run, case.inputs, live, scalars=scalars))
        except LowerError as error:  # a size that cannot be planned: a call with it is refused, not wrong
            results.append(Result(case.name, INTERPRETED, "skipped", says=f"the program as it is run refuses this case: {_first(error)}"))
            continue
        except Exception as error:
            results.append(Result(case.name, INTERPRETED, "failed", says=f"the program as it is run fails: {_first(error)}"))
            continue
        results.append(test.result(case, INTERPRETED, old, found))
    hashed = digest(program)
    return Stage("lowering", {"values": Promise().values}, hashed, hashed, 0, {}, tuple(results), tuple(sorted(test.zero - test.seen)))


# -- whole pipelines -------------------------------------------------------------------------------------------------


def certify(program: Program, passes: Sequence[Pass], example: Sequence[torch.Tensor], state: State, *, runs: int = RUNS, seed: int = SEED,
            text: str | None = None, model: str = "", inputs: Sequence[str] | None = None, run: Callable[[list[torch.Tensor]], Sequence[Any]] | None = None,
            live: State | None = None) -> Certificate:
    """Test how a program was made: every pass application in its history.

    Args:
        program: the last one.
        passes: every pass that was applied (see `pipeline.applied`).
        example: one tensor per placeholder.
        state: values of the captured program's slots.
        runs: how many drawn cases, beside the example and the adversarial ones.
        seed: of everything random.
        text, model, inputs: the pipeline, the model and its inputs as they were named, for the record.
        run, live: see `lowered`; None: the program is not run otherwise.

    Raises:
        FxoptError: the example or the state is not the program's.
    """
    if runs < 0:
        raise FxoptError(f"runs is how many inputs are drawn, got {runs}", do="0 leaves the example and the adversarial ones")
    history = list(reversed(list(program.history())))
    raw = history[0]
    missing = [name for name in raw.slots if name not in state and name not in raw.constants and any(n.op == "get_attr" and n.target == name for n in raw.nodes)]
    if missing:
        raise FxoptError(f"no value for state {missing[0]!r}", do="give the state of the model that the program was captured from")
    tested = cases(raw, example, runs, seed)
    certifier = Certifier(tested, {name: value for name, value in state.items() if name in raw.slots})
    known = {pass_.text(): pass_ for pass_ in passes}
    stages = [certifier.stage(made_by(after, known), before, after) for before, after in zip(history, history[1:])]
    if run is not None:
        stages.append(lowered(program, run, tested, live or {}))
    read = {name: value for name, value in state.items() if name in raw.slots and raw.slots[name].made is None}
    return Certificate(model, tuple(inputs) if inputs is not None else None, " | ".join(map(str, passes)) if text is None else text, raw.training, runs, seed, present_versions(),
                       state_digest(read), {case.name: case.shapes for case in tested}, tuple(stages))


def made_by(program: Program, known: Mapping[str, Pass]) -> Pass:
    """The pass that made a program, by the text in its log."""
    text = program.log[-1].text
    if text not in known:
        raise FxoptError(f"the pass {text!r} is none of the pipeline's", do="give `certify` every pass that was applied, those put in by themselves too")
    return known[text]


def present_versions() -> dict[str, str]:
    """Of fxopt, torch and Python."""
    return versions(metadata.version("fxopt"), platform.python_version())


def stage_of(pass_: Pass, before: Program, after: Program, certifier: Certifier) -> tuple[Stage, str]:
    """A stage, and a sentence about it for the report.

    Raises:
        CheckError: it fails.
        UnprovenError: nothing was compared, of a pass that does not declare that nothing can be (an approximation of values of another kind):
            who asks for verified values is not given others in silence.
    """
    stage = certifier.stage(pass_, before, after, stop=True)
    if stage.problems or _held_to(pass_.promise)[0] is not None:
        stage.require()
    said = [each for each in stage.results if each.says]
    return stage, max(said, key=lambda each: each.ratio).says if said else "nothing was compared"


def summary(certificate: Certificate) -> dict[str, Any]:
    """The verdict in a few numbers."""
    results = [each for stage in certificate.stages for each in stage.results]
    return {"holds": certificate.holds, "verdict": certificate.verdict, "stages": len(certificate.stages), "comparisons": len(results), "failed": sum(each.status == "failed" for each in results),
            "skipped": sum(each.status == "skipped" for each in results), "worst": max((each.ratio for each in results), default=0.0)}
