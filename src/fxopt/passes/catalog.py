"""Every pass there is, by name. A new pass is one file and one line here."""

from __future__ import annotations

from fxopt.passes.base import Pass

PASSES: tuple[type[Pass], ...] = ()


def establishing(fact: str) -> list[str]:
    """Names of the passes after which `fact` holds."""
    return [cls.name for cls in PASSES if fact in cls.establishes]
