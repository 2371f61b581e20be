"""A certificate: what was tested of each pass application, and what was found. A value that is written as JSON and read back.

The schema is docs/certificate.schema.json. It is a record of randomized testing, not of a proof.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fxopt.errors import CheckError, DataError, UnprovenError

FORMAT, VERSION = "fxopt-certificate", 2
METHOD = "randomized testing: drawn and adversarial inputs, compared with fp64; not a proof"
STATUS = ("equal", "within", "skipped", "failed")
HOLDS, UNPROVEN, FAILS = "holds", "unproven", "fails"


@dataclass(frozen=True)
class Result:
    """One comparison on one case.

    Attributes:
        case: its name.
        against: what the program after the pass was compared with.
        status: "equal" (bitwise), "within" (the allowed error), "skipped" (`says` tells why), "failed".
        compared: how many tensors: outputs, gradients, buffers.
        worst, ratio: the tensor that came nearest to the allowed error, and its part of it.
        says: in words.
    """

    case: str
    against: str
    status: str
    compared: int = 0
    worst: str = ""
    ratio: float = 0.0
    says: str = ""


@dataclass(frozen=True)
class Stage:
    """One pass application.

    Attributes:
        text: of the pass.
        promise: what it promises.
        before, after: hashes of the programs (see ir/hashing.py).
        rewrites: how many sites it rewrote.
        facts: each structural fact, with None or what is wrong.
        results: of the comparisons.
        unseen: the outputs, gradients and buffers that were compared, and had no finite value other than zero on any case: of those, a
            comparison shows little.
    """

    text: str
    promise: Mapping[str, Any]
    before: str
    after: str
    rewrites: int
    facts: Mapping[str, str | None]
    results: tuple[Result, ...]
    unseen: tuple[str, ...] = ()

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong."""
        return ([f"{name}: {says}" for name, says in self.facts.items() if says is not None]
                + [f"{each.case}: {each.says}" for each in self.results if each.status == "failed"])

    @property
    def uncompared(self) -> list[str]:
        """What the stage should have been compared with, and was on no case: nothing wrong was found there, and nothing right either."""
        against = dict.fromkeys(each.against for each in self.results) or {"anything": None}
        return [name for name in against if not any(each.against == name and each.status in ("equal", "within") for each in self.results)]

    @property
    def verdict(self) -> str:
        """"fails": something is wrong. "unproven": nothing is, and something was compared on no case. "holds": neither."""
        return FAILS if self.problems else UNPROVEN if self.uncompared else HOLDS

    @property
    def holds(self) -> bool:
        """Whether it was compared and nothing is wrong."""
        return self.verdict == HOLDS

    def require(self) -> None:
        """Raise unless the stage holds.

        Raises:
            CheckError: with everything that is wrong, at most five of it.
            UnprovenError: nothing is known to be wrong, and nothing was compared.
        """
        if self.verdict == UNPROVEN:
            why = "; ".join(dict.fromkeys(f"{each.case}: {each.says}" for each in self.results[:5] if each.status == "skipped"))
            raise UnprovenError(f"nothing was compared with {', '.join(self.uncompared)}{f': {why}' if why else ''}", where=f"after {self.text}",
                                do="give an example that the model runs on, or leave the verification out")
        if self.problems:
            shown = self.problems[:5]
            raise CheckError("; ".join(shown) + (f"; and {len(self.problems) - 5} more" if len(self.problems) > 5 else ""), where=f"after {self.text}",
                             do="this is a bug of the pass, or its promise should be another; `fxopt bisect` finds the site")


@dataclass(frozen=True)
class Certificate:
    """What was tested of a model's passes.

    Attributes:
        model: as it was named to the command, or its class.
        inputs: how the example inputs were named to the command, or None.
        passes: the pipeline's text.
        training: mode.
        runs, seed: of the drawn cases.
        versions: of fxopt, torch and Python.
        state: hash of the weights that were used.
        cases: shapes of the inputs of each case, by its name.
        stages: one per pass application, and one for the lowered program if that was tested.
    """

    model: str
    inputs: tuple[str, ...] | None
    passes: str
    training: bool
    runs: int
    seed: int
    versions: Mapping[str, str]
    state: str
    cases: Mapping[str, list[list[int]]]
    stages: tuple[Stage, ...]

    @classmethod
    def joined(cls, parts: Mapping[str, Certificate], passes: str) -> Certificate:
        """One certificate of several parts of a model: each stage and case has the name of its part before its own.

        Raises:
            CheckError: there is no part.
        """
        if not parts:
            raise CheckError("there is no part to certify")
        hashed = hashlib.sha256("".join(each.state for each in parts.values()).encode()).hexdigest()
        return dataclasses.replace(next(iter(parts.values())), passes=passes, state=hashed,
                                   cases={f"{part}: {name}": shapes for part, each in parts.items() for name, shapes in each.cases.items()},
                                   stages=tuple(dataclasses.replace(stage, text=f"{part}: {stage.text}") for part, each in parts.items() for stage in each.stages))

    @property
    def holds(self) -> bool:
        """Whether every stage holds; there must be one."""
        return self.verdict == HOLDS

    @property
    def verdict(self) -> str:
        """The worst of the stages': "fails", "unproven" (also of no stage at all), "holds"."""
        found = {stage.verdict for stage in self.stages} or {UNPROVEN}
        return next(each for each in (FAILS, UNPROVEN, HOLDS) if each in found)

    @property
    def failures(self) -> list[Stage]:
        """The stages of which something is wrong."""
        return [stage for stage in self.stages if stage.verdict == FAILS]

    def require(self) -> Certificate:
        """This certificate, if it holds.

        Raises:
            CheckError: it does not; see `Stage.require`. What is wrong comes before what is unproven.
        """
        for stage in (*self.failures, *self.stages):
            stage.require()
        return self

    def json(self) -> str:
        """The certificate as JSON text, in a fixed order."""
        body = {"format": FORMAT, "version": VERSION, "method": METHOD, "verdict": self.verdict, **dataclasses.asdict(self)}
        for stage, made in zip(body["stages"], self.stages):
            stage["verdict"] = made.verdict
            for result in stage["results"]:
                result["ratio"] = _finite(result["ratio"])
        return json.dumps(body, indent=1) + "\n"

    @classmethod
    def read(cls, text: str, where: str = "") -> Certificate:
        """From JSON text.

        Raises:
            DataError: it is no certificate, or one of another version.
        """
        try:
            body = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"this is no JSON: {error}", where=where) from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise DataError("this is no certificate of fxopt", where=where)
        if body.get("version") != VERSION:
            raise DataError(f"the certificate has version {body.get('version')}, this is {VERSION}", where=where, do="certify the model again")
        try:
            stages = tuple(Stage(**{**{k: v for k, v in stage.items() if k != "verdict"}, "unseen": tuple(stage["unseen"]),
                                    "results": tuple(Result(**{**each, "ratio": float(each["ratio"])}) for each in stage["results"])}) for stage in body["stages"])
            fields = {field.name: body[field.name] for field in dataclasses.fields(cls) if field.name not in ("stages", "inputs")}
            return cls(**fields, stages=stages, inputs=tuple(body["inputs"]) if body["inputs"] is not None else None)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the certificate is damaged: {error}", where=where, do="certify the model again") from error

    def differences(self, now: Certificate) -> list[str]:
        """What is another in a certificate made `now` from the same model and passes: empty if the record is confirmed.

        Hashes, facts and verdicts must be equal; of the numbers it matters that they are within what is allowed.
        """
        found = [f"{name} was {getattr(self, name)} and is {getattr(now, name)}" for name in ("model", "passes", "training", "runs", "seed") if getattr(self, name) != getattr(now, name)]
        found += [f"{name} was {self.versions.get(name)} and is {version}" for name, version in now.versions.items() if self.versions.get(name) != version]
        if self.state != now.state:
            found.append("the model's weights are others")
        if len(self.stages) != len(now.stages):
            return [*found, f"{len(self.stages)} pass applications were certified, and there are {len(now.stages)}"]
        for a, b in zip(self.stages, now.stages):
            found += [f"{a.text}: {name} was {getattr(a, name)} and is {getattr(b, name)}" for name in ("text", "before", "after", "rewrites", "verdict") if getattr(a, name) != getattr(b, name)]
            found += [f"{a.text}: {x.case} was {x.status} and is {y.status}: {y.says}" for x, y in zip(a.results, b.results)
                      if (x.status == "failed", x.status == "skipped") != (y.status == "failed", y.status == "skipped")]
            if len(a.results) != len(b.results):
                found.append(f"{a.text}: {len(a.results)} comparisons were made, and there are {len(b.results)}")
        return found

    def __str__(self) -> str:
        lines = [f"{self.model}: {'FAILS' if self.verdict == FAILS else self.verdict} ({METHOD})", f"  passes: {self.passes}",
                 f"  cases: {', '.join(f'{name} {shapes}' for name, shapes in self.cases.items())}"]
        for stage in self.stages:
            ratio = max((each.ratio for each in stage.results), default=0.0)
            counts = {status: sum(each.status == status for each in stage.results) for status in STATUS}
            said = ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "nothing compared"
            lines.append(f"  {_SHOWN[stage.verdict]} {stage.text}: {stage.rewrites} rewrites, {said}, worst at {ratio:.2g} of the allowed error")
            lines += [f"       {says}" for says in stage.problems]
            lines += [f"       nothing was compared with {name}" for name in stage.uncompared if stage.verdict == UNPROVEN]
            if stage.unseen:
                more = f" and {len(stage.unseen) - _NAMED} more" if len(stage.unseen) > _NAMED else ""
                lines.append(f"       zero or not finite on every case, so little was seen of: {', '.join(stage.unseen[:_NAMED])}{more}")
            lines += [f"       {each.case}: {each.says}" for each in stage.results if each.status == "skipped"]
        return "\n".join(lines)


_SHOWN = {HOLDS: "ok  ", UNPROVEN: "??? ", FAILS: "FAIL"}
_NAMED = 6


def _finite(value: float) -> float | str:
    """JSON has no infinities."""
    return value if math.isfinite(value) else str(value)


def versions(fxopt: str, python: str) -> dict[str, str]:
    """What a certificate depends on beside the model."""
    return {"fxopt": fxopt, "torch": torch.__version__, "python": python}
