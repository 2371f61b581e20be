"""What a weight with an adapter is, as a formula: W' = W + scale * B A (Hu et al., 2021, https://arxiv.org/abs/2106.09685), and
DoRA's m * W' / ||W'|| (Liu et al., 2024, https://arxiv.org/abs/2402.09353). Rewritten programs are compared with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fxopt.ir.facts import LowRank, Trained
from fxopt.ir.program import Program


def adapted(program: Program) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None:
    """A function from state to the weights that the program's adapters make of it, by slot, differentiable; None if it has none."""
    found: dict[str, dict[str, str]] = {}
    facts: dict[str, LowRank | Trained] = {}
    for name, slot in program.slots.items():
        fact = slot.made.facts if slot.made is not None else None
        if isinstance(fact, LowRank):
            found.setdefault(fact.target, {})[fact.factor] = name
            facts[fact.target] = fact
        elif isinstance(fact, Trained):
            found[fact.target] = {"whole": name}
            facts[fact.target] = fact
    if not found:
        return None

    def weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {target: _weight(facts[target], state[target], {factor: state[name] for factor, name in names.items()}) for target, names in found.items()}

    return weights


def _weight(fact: LowRank | Trained, base: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if isinstance(fact, Trained):
        return parts["whole"].to(base.dtype)
    a, b = parts["a"], parts["b"]
    change = fact.scale * (torch.matmul(b.flatten(1), a.flatten(1)).reshape(b.shape[0], *a.shape[1:]) if fact.kind == "conv" else torch.matmul(b, a))
    if fact.transposed:
        change = change.transpose(-1, -2)
    if fact.variant != "dora":
        return base + change.to(base.dtype)
    whole = base.to(change.dtype) + change
    others = [0] if fact.transposed else list(range(1, whole.dim()))
    norm = torch.linalg.vector_norm(whole.detach(), dim=others, keepdim=True)  # a constant to the gradient, as in the paper's section 4.3
    return (parts["magnitude"].reshape(norm.shape) * whole / norm).to(base.dtype)
