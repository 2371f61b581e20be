"""Which pass, and which of its rewrites, makes a program wrong: halving over the stages, then over the number of rewrites.

"Wrong" is what a judge says of a program: a certificate that fails, a value that is not finite, or a user's own predicate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fxopt.errors import CheckError, FxoptError
from fxopt.ir.program import Program, Rewrite, Sample
from fxopt.passes.base import Pass
from fxopt.passes.cases import Case, cases
from fxopt.passes.certificate import Certificate
from fxopt.passes.certify import RUNS, SEED, Certifier
from fxopt.passes.interpreted import materialize, values
from fxopt.passes.pipeline import apply
from fxopt.passes.repro import Repro, repro

State = Mapping[str, torch.Tensor]
Judge = Callable[[Program], bool]


@dataclass(frozen=True)
class Culprit:
    """What makes a program wrong.

    Attributes:
        pass_: the pass.
        stage: its number among the pass applications, from 0.
        site: the rewrites that are applied together and are wrong; empty if the pass is wrong without any.
        of: how many rewrites the pass makes.
        says: what is wrong, in words.
        repro: a script that shows it, or None with the reason in `no_repro`.
        tried: how many programs were judged.
    """

    pass_: Pass
    stage: int
    site: tuple[Rewrite, ...]
    of: int
    says: str
    repro: Repro | None
    no_repro: str
    tried: int

    def __str__(self) -> str:
        lines = [f"pass {self.stage + 1}, {self.pass_}: {self.says}"]
        if not self.site:
            lines.append("  it is wrong before it rewrites anything that it records")
        for rewrite in self.site[:4]:
            lines.append(f"  rewrite {rewrite.rule} of {self.of}, at {rewrite.path or '<root>'}{f' ({rewrite.source})' if rewrite.source else ''}: {rewrite.node}")
        if len(self.site) > 4:
            lines.append(f"  and {len(self.site) - 4} more, which the pass makes together")
        lines.append(f"  {self.tried} programs were tried")
        lines.append(f"  {self.repro.summary}" if self.repro is not None else f"  no script: {self.no_repro}")
        return "\n".join(lines)


def bisect(program: Program, passes: Sequence[Pass], example: Sequence[torch.Tensor], state: State, *, predicate: Judge | None = None,
           certificate: Certificate | None = None, runs: int = RUNS, seed: int = SEED) -> Culprit:
    """The pass and the site that make a program wrong.

    Args:
        program: the last one of its history. passes: every pass that was applied (see `pipeline.applied`).
        example: one tensor per placeholder. state: values of the captured program's slots.
        predicate: whether a program is wrong (see `not_finite`); None: whether its certificate fails.
        certificate: one of the program that fails; None: made now.
        runs, seed: of the certificate, if there is none.

    Raises:
        CheckError: nothing is wrong, or the program is wrong as captured.
    """
    history = list(reversed(list(program.history())))
    if certificate is not None:
        runs, seed = certificate.runs, certificate.seed
    tested = cases(history[0], example, runs, seed)
    search = _Search(history, list(passes), tested, dict(state), predicate, certificate)
    return search.run()


def not_finite(inputs: Sequence[torch.Tensor], state: State) -> Judge:
    """A predicate: an output or a gradient on these inputs is not finite."""

    def bad(program: Program) -> bool:
        found = values(program, inputs, materialize(program, state))
        return any(not bool(value.isfinite().all()) for value in found.values() if value.is_floating_point())

    return bad


class _Search:
    def __init__(self, history: list[Program], passes: list[Pass], tested: list[Case], state: dict[str, torch.Tensor], predicate: Judge | None,
                 certificate: Certificate | None) -> None:
        self.certificate = certificate
        self.history, self.passes, self.cases, self.state, self.predicate = history, passes, tested, state, predicate
        self.tried = 0
        self.says = ""
        self.failed = tested[0]

    def run(self) -> Culprit:
        stage = self.by_certificate() if self.predicate is None else self.by_predicate()
        pass_, before = self.passes[stage], self.history[stage]
        sample = Sample(tuple(self.cases[0].inputs), materialize(before, self.state))
        judge = self.judge(stage)
        full = self.history[stage + 1]
        low, good = 0, apply(pass_, before, sample, fuel=0, promised=False)
        high, wrong = len(full.log[-1].rewrites), full
        if high == 0 or judge(good):
            return self.culprit(stage, (), before, full)
        while high - low > 1:
            middle = (low + high) // 2
            tried = apply(pass_, before, sample, fuel=middle, promised=False)
            if judge(tried):
                high, wrong = middle, tried
            else:
                low, good = middle, tried
        if wrong is full:
            wrong = apply(pass_, before, sample, fuel=high, promised=False)
        site = wrong.log[-1].rewrites[len(good.log[-1].rewrites):]
        return self.culprit(stage, tuple(site), good, wrong)

    def culprit(self, stage: int, site: tuple[Rewrite, ...], good: Program, wrong: Program) -> Culprit:
        pass_ = self.passes[stage]
        script, why = repro(pass_, good, wrong, self.failed, self.state_at(stage, wrong), self.says)
        return Culprit(pass_, stage, site, len(self.history[stage + 1].log[-1].rewrites), self.says, script, why, self.tried)

    def by_certificate(self) -> int:
        """The first stage that does not hold."""
        certifier = Certifier(self.cases, self.state)
        for i, (before, after) in enumerate(zip(self.history, self.history[1:])):
            if self.certificate is not None:
                found = self.certificate.stages[i]
            else:
                found = certifier.stage(self.passes[i], before, after, stop=True)
                self.tried += 1
            if found.problems:
                self.says = found.problems[0]
                case = next((each.case for each in found.results if each.status == "failed"), self.cases[0].name)
                self.failed = next((each for each in self.cases if each.name == case), self.cases[0])
                return i
        raise CheckError("the certificate does not fail: there is nothing to find", do="give a predicate, or more runs, or another seed")

    def by_predicate(self) -> int:
        """By halving: the first program is right and the last wrong."""
        assert self.predicate is not None
        low, high = 0, len(self.history) - 1
        self.tried += 2
        if not self.predicate(self.history[high]):
            raise CheckError("the predicate does not hold of the program behind all passes: there is nothing to find")
        if self.predicate(self.history[low]):
            raise CheckError("the predicate holds of the program as captured: no pass is to blame", do="look at the model itself")
        while high - low > 1:
            middle = (low + high) // 2
            self.tried += 1
            low, high = (low, middle) if self.predicate(self.history[middle]) else (middle, high)
        self.says = "the predicate holds behind it, and not before"
        return low

    def judge(self, stage: int) -> Judge:
        """Whether a program that the stage's pass made is wrong. Only the case that failed is run again."""
        pass_, before = self.passes[stage], self.history[stage]

        def bad(after: Program) -> bool:
            self.tried += 1
            if self.predicate is not None:
                return self.predicate(after)
            certifier = Certifier([self.failed], self.state)
            for a, b in zip(self.history[:stage], self.history[1:stage + 1]):
                certifier.advance(a, b)
            try:
                return bool(certifier.stage(pass_, before, after, stop=True).problems)
            except FxoptError:
                return True

        return bad

    def state_at(self, stage: int, after: Program) -> dict[str, torch.Tensor]:
        """Values of the slots behind a stage, adapters random."""
        certifier = Certifier([self.failed], self.state)
        for a, b in zip(self.history[:stage], self.history[1:stage + 1]):
            certifier.advance(a, b)
        certifier.advance(self.history[stage], after)
        return certifier.states[self.failed.name if self.failed.weights is not None else ""]
