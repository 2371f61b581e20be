"""Why a module's call is not a program, in words a reader can act on."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fxopt.errors import FxoptError

_VALUES = "its code goes on by the values of a tensor, which a graph cannot hold"
_CURES = (
    (re.compile(r"distributions\b|\b(Normal|LogNormal|Uniform|Laplace|Categorical|Bernoulli|Beta|Gamma|Dirichlet|Poisson|Independent|MixtureSameFamily)\("),
     "a distribution looks at the values that it is given: make it with validate_args=False"),
    (re.compile(r"^\s*for\b|nonzero|unique\("), "compute all of it at once, with grouped or batched products and masks (transformers' experts: "
     "`model.set_experts_implementation(\"grouped_mm\")`)"),
    (re.compile(r"\bprint\(|\blogg?(er|ing)?\."), "say it outside of the model, or in a hook of a module that runs as Python"),
    (re.compile(r"\braise\b|\bassert\b|max\(\)\s*[<>]|min\(\)\s*[<>]|isnan|isinf|isfinite"), "check values before the call, outside of the model"),
    (re.compile(r"\bif\b|\bwhile\b|\belse\b|\.any\(|\.all\("), "write the choice with torch.where or torch.cond, or pass the condition as an argument"),
    (re.compile(r"\.item\(|\.tolist\(|\bint\(|\bfloat\("), "keep the number a tensor, or pass it as an argument"),
)

_SIZE = re.compile(r"DynamicOutputShapeException: aten\.(\w+)")
_SIZES = {"_ctc_loss": "return the log-probabilities, and compute the CTC loss outside of the model",
          "nonzero": "use a mask with torch.where, or multiply by it, and do not pick elements",
          "masked_select": "use a mask with torch.where, or multiply by it, and do not pick elements",
          "repeat_interleave": "pass output_size, or gather with indices that are computed outside of the model"}
_ANY = "write it with torch.where and masks, or move it out of the model"


@dataclass(frozen=True)
class Failure:
    """One kind of call that is not a program.

    Attributes:
        reason: what stands against it, in a sentence.
        module: path of the module that forced it, "" for the model itself.
        line: `file.py:line: code` of the user, "" if unknown.
        do: what to change.
    """

    reason: str
    module: str
    line: str
    do: str

    @classmethod
    def of(cls, error: BaseException, path: str) -> Failure:
        """Read an error of the capture of the module at `path`."""
        if not isinstance(error, FxoptError):
            return cls(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}", path, "", "")
        place, _, line = (error.where or "").partition(", ")
        module = place.removeprefix("module ") if place.startswith("module ") else path
        if (sized := _SIZE.search(error.what)) is not None:
            return cls(f"how large the result of {sized[1].lstrip('_')} is depends on values, which a graph cannot hold", path if module == "<root>" else module, line,
                       _SIZES.get(sized[1], "compute it outside of the model"))
        if "but got FakeTensor" in error.what:
            return cls("a size there is the value of a tensor, which a graph cannot hold", path if module == "<root>" else module, line,
                       "pass sizes as numbers; leave sequences padded instead of packed (`pack_padded_sequence`), with a mask where it matters")
        values = "data-dependent" in error.what.lower() or "DataDependent" in error.what
        cure = next((cure for pattern, cure in _CURES if pattern.search(line.split(": ", 1)[-1])), _ANY) if values else None
        return cls(_VALUES if values else error.what, path if module == "<root>" else module, line, cure or error.do or "")

    def within(self, old: str, new: str) -> Failure:
        """The same in a module that is like the one at `old`."""
        return Failure(self.reason, f"{new}{self.module[len(old):]}" if self.module.startswith(old) else self.module, self.line, self.do)

    def __str__(self) -> str:
        line = f" ({self.line})" if self.line else ""
        return f"{self.module or 'the model itself'}{line}: {self.reason}{f': {self.do}' if self.do else ''}"
