"""One random program through every legal pass and through random orders: wrong results, untyped errors, and nothing else, are failures."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import torch

from fxopt.errors import PassError
from fxopt.ir.program import Program, Sample
from fxopt.passes.base import Pass
from fxopt.passes.cases import Case, Maker
from fxopt.passes.certificate import UNPROVEN
from fxopt.passes.certify import Certifier
from fxopt.passes.pipeline import apply, parse
from fuzz.build import Built, Plan, build, drawn
from fuzz.steps import HEADS, KINDS

LORA = "lora(rank=2)"
# Every pass of the catalog, with what is applied to the canonical program before it. Where several ways stand in a line, programs take turns.
EACH: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("causal",),), (("causal(assume=false)", "pack"),), ((LORA, "quantize(format=int8)"),), ((LORA, "siblings"),),
    (("lora(rank=2, variant=dora)",), ("lora(rank=2, dropout=0.2, variant=rslora)",)),
    (("fuse", "loss"),), (("loss", "compact"),), (("precision(dtype=bf16)",), ("precision(dtype=fp32)",)),
    (("denominator",),), (("remat",),), (("memory(budget=least)",),), (("dead_code",),),
)
ORDER = ("causal(assume=false)", LORA, "quantize(format=int8)", "siblings", "fuse", "loss", "pack", "compact", "precision(dtype=bf16)", "dead_code", "canonicalize")
_ONE_BY_ONE = {text: next(iter(parse(text))) for text in {*ORDER, *(text for ways in EACH for way in ways for text in way), "canonicalize"}}


class Failure(AssertionError):
    """A wrong result, or an error that is not one of ours."""


@dataclass
class Counts:
    """What happened in a run."""

    programs: int = 0
    applications: int = 0
    changed: int = 0
    unproven: int = 0
    refused: Counter[str] = field(default_factory=Counter)


class Trial:
    """A program with what its passes are tested on."""

    def __init__(self, built: Built, counts: Counts, seed: int) -> None:
        self.program, self.counts = built.program, counts
        self.sample = Sample(built.inputs, built.state)
        self.certifier = Certifier(_some(built, seed), built.state)
        self.path: tuple[str, ...] = ()

    def copy(self, on: slice = slice(None)) -> Trial:
        """The same, to go on in another way, on some of the cases. What the program gave on them, in fp64 too, is shared."""
        other = object.__new__(Trial)
        other.__dict__.update(self.__dict__)
        other.certifier = object.__new__(Certifier)
        other.certifier.__dict__.update(self.certifier.__dict__)
        other.certifier.kept, other.certifier.cases = dict(self.certifier.kept), self.certifier.cases[on]
        return other

    def apply(self, text: str) -> bool:
        """Apply a pass and certify it; False if it may not come here or refuses."""
        pass_: Pass = _ONE_BY_ONE[text]
        if pass_.requires - self.program.facts:
            return False
        self.path += (text,)
        self.counts.applications += 1
        try:
            after = apply(pass_, self.program, self.sample)
        except PassError as error:
            if any(says in error.what for says in ("failed:", "broke its promise", "invalid graph")):
                raise Failure(f"{' | '.join(self.path)}: {error}") from error
            self.counts.refused[f"{text}: {error.what.split(':')[0]}"] += 1
            self.path = self.path[:-1]
            return False
        except Exception as error:
            raise Failure(f"{' | '.join(self.path)}: {type(error).__name__}: {error}") from error
        if after.log[-1].rewrites or not _same(self.program, after):
            self.counts.changed += 1
            stage = self.certifier.stage(pass_, self.program, after, stop=True)
            self.counts.unproven += stage.verdict == UNPROVEN
            if stage.problems:
                raise Failure(f"{' | '.join(self.path)}: {stage.problems[0]}")
        else:
            self.certifier.advance(self.program, after)
        self.program = after
        return True


def _same(a: Program, b: Program) -> bool:
    return len(a.graph.nodes) == len(b.graph.nodes) and all(
        (x.op, x.name, x.target, str(x.args)) == (y.op, y.name, y.target, str(y.args)) for x, y in zip(a.graph.nodes, b.graph.nodes))


def _some(built: Built, seed: int) -> list[Case]:
    """Two cases: one of the adversarial ones in its turn, and a drawn (or the given) one; in turns which comes first."""
    maker = Maker(built.program, built.inputs, seed)
    more = list(maker.adversarial())
    found = [more[seed // 2 % len(more)], maker.drawn(0) if seed % 4 > 1 else maker.given()]
    return found if seed % 2 else found[::-1]


def check(plan: Plan, counts: Counts | None = None) -> None:
    """Raise a Failure if a pass is wrong on the plan's program."""
    counts = counts or Counts()
    counts.programs += 1
    torch.set_num_threads(1)
    base = Trial(build(plan, KINDS, HEADS), counts, plan.seed)
    base.apply("canonicalize")
    known: dict[tuple[str, ...], Trial | None] = {(): base.copy(slice(1))}
    rng = random.Random(plan.seed)
    order = rng.sample(ORDER, 5)
    for ways in EACH:
        _reach(rng.choice(ways), known)
    trial = base.copy(slice(1, None))
    for text in order:
        trial.apply(text)


def _reach(path: tuple[str, ...], known: dict[tuple[str, ...], Trial | None]) -> Trial | None:
    """The trial behind some passes, each applied and certified once; None if one may not come there or refuses."""
    if path not in known:
        before = _reach(path[:-1], known)
        trial = None if before is None else before.copy()
        known[path] = trial if trial is not None and trial.apply(path[-1]) else None
    return known[path]


def plan_of(seed: int) -> Plan:
    """Plan number `seed`."""
    return drawn(seed, sorted(KINDS), sorted(HEADS))
