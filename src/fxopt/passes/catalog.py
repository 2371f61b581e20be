"""Every pass there is, by name. A new pass is one file and one line here."""

from __future__ import annotations

from fxopt.passes.base import Pass
from fxopt.passes.canonicalize import Canonicalize
from fxopt.passes.causal import Causal
from fxopt.passes.compact import Compact
from fxopt.passes.dead_code import DeadCode
from fxopt.passes.denominator import Denominator
from fxopt.passes.fuse import Fuse
from fxopt.passes.hoist import Hoist
from fxopt.passes.lora import Lora
from fxopt.passes.loss import Loss
from fxopt.passes.memory import Memory
from fxopt.passes.pack import Pack
from fxopt.passes.precision import Precision
from fxopt.passes.quantize import Quantize
from fxopt.passes.remat import Remat
from fxopt.passes.siblings import Siblings

PASSES: tuple[type[Pass], ...] = (
    Canonicalize,
    Causal,
    Lora,
    Quantize,
    Siblings,
    Fuse,
    Loss,
    Pack,
    Compact,
    Precision,
    Denominator,
    Remat,
    Memory,
    Hoist,
    DeadCode,
)


def establishing(fact: str) -> list[str]:
    """Names of the passes after which `fact` holds."""
    return [cls.name for cls in PASSES if fact in cls.establishes]
