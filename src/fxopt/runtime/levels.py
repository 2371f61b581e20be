"""The ways to run a region, from what keeps everything to what keeps only its inputs, each with a dry run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir.compress import Compressed
from fxopt.ir.joint import Joint
from fxopt.ir.offload import LEAST, Offloaded
from fxopt.ir.partition import MinCut, Policy, Split, classify, heavy, min_cut, save_all, value_bytes
from fxopt.ir.tiling import Tiling
from fxopt.runtime.dry_run import Ran, Value, run
from fxopt.runtime.machine import Machine
from fxopt.runtime.region import RegionRunner
from fxopt.runtime.solver import Option

TRIED = 8  # heavy nodes that are weighed against each other for the next level
MOST = 12  # levels


@dataclass(frozen=True, eq=False)
class Level:
    """A region under one policy, for some sizes.

    Attributes:
        kept: the pieces of memory that the forward leaves for the backward.
        again: names of the heavy nodes that the backward computes again.
        seconds: predicted, forward and backward.
        gone: positions of the saved values whose memory waits on the host in the meantime; `offloaded`: its bytes.
    """

    policy: Policy
    split: Split
    forward: Ran
    backward: Ran | None
    kept: tuple[Value, ...]
    again: tuple[str, ...]
    seconds: float
    gone: frozenset[int] = frozenset()
    offloaded: int = 0

    def option(self, inputs: Sequence[str], dead: Sequence[str]) -> Option:
        """The same for the solver. An input counts as kept where nobody reads it after the region (`dead`): else it is there anyway.
        What leaves for the host is still there while the next region runs, and comes back while the one behind it does: regions are taken as alike."""
        kept = sum(v.size for v in self.kept if v.source < 0 or (v.source < len(inputs) and inputs[v.source] in dead))
        return Option(kept, self.forward.peak + self.offloaded, (self.backward.peak if self.backward is not None else 0) + 2 * self.offloaded, self.seconds)


def dry(plan: Split, policy: Policy, machine: Machine, size: Callable[[Any], int]) -> Level:
    """Dry runs of a split region."""
    forward = run(plan.forward, size)
    backward = run(plan.backward, size) if plan.backward is not None else None
    kept = {value.source: value for value in forward.outputs[plan.n_outputs + len(plan.mutated):] if value.source is not None}
    seconds = machine.seconds(forward.work) + (machine.seconds(backward.work) if backward is not None else 0.0)
    allowed = getattr(policy, "allowed", frozenset())
    again = tuple(name for name in plan.recomputed if name in allowed)
    return Level(policy, plan, forward, backward, tuple(kept.values()), again, seconds)


def away(base: Level, plan: Split, policy: Policy, machine: Machine) -> Level:
    """A level with what `plan` allows on the host. Transfers go on beside the computation, once in each direction; of the rate of the device's
    memory they take their share."""
    saved = base.forward.outputs[plan.n_outputs + len(plan.mutated):]
    gone = frozenset(i for i in plan.offloaded if saved[i].size >= LEAST)
    kept = {value.source: value for i, value in enumerate(saved) if value.source is not None and i not in gone}
    offloaded = sum({saved[i].source: saved[i].size for i in gone}.values())
    times = [machine.seconds(ran.work) for ran in (base.forward, base.backward) if ran is not None]
    seconds = sum(max(time, offloaded / machine.host) for time in times) + 2 * offloaded / machine.bytes
    return replace(base, policy=policy, split=plan, kept=tuple(kept.values()), seconds=seconds, gone=gone, offloaded=offloaded)


class Levels:
    """The levels of one region for one pattern of arguments that require a gradient; found once, dry-run for each set of sizes.

    `policies` is a chain: keep all, recompute what is pointwise, then one heavy node more at a time, the one that frees most bytes for its
    time first, down to nothing but inputs and what is random.
    """

    def __init__(self, runner: RegionRunner, requires_grad: tuple[bool, ...], autocast: torch.dtype | None, machine: Machine) -> None:
        self.runner, self.requires_grad, self.autocast, self.machine = runner, requires_grad, autocast, machine
        self._policies: list[Policy] | None = None
        self.seen: dict[Any, Level] = {}

    def level(self, policy: Policy, size: Callable[[Any], int], sizes: Any) -> Level:
        """The region under a policy. `sizes`: what `size` depends on, a key."""
        key = policy, sizes
        if key not in self.seen:
            plan = self.runner.compile(self.requires_grad, self.autocast, policy).split
            if isinstance(policy, Offloaded):
                self.seen[key] = away(self.level(policy.base, size, sizes), plan, policy, self.machine)
            else:
                self.seen[key] = dry(plan, policy, self.machine, size)
        return self.seen[key]

    def all(self, size: Callable[[Any], int], sizes: Any) -> list[Level]:
        """Every level that is exact. Those with values on the host only on a device that has memory of its own."""
        if self._policies is None:
            joint, _ = self.runner.joint(self.requires_grad, self.autocast)
            forward = self.level(min_cut, size, sizes).forward
            cuts = chain(joint, {name: self.machine.seconds(work) for name, work in forward.nodes.items()})
            tiled = [p for p in (Tiling(cuts[-1], dim) for dim in (0, 1)) if self.runner.compile(self.requires_grad, self.autocast, p).split.tiled]
            away = [Offloaded(p, inputs) for p in dict.fromkeys((cuts[0], cuts[len(cuts) // 2], cuts[-1], *tiled)) for inputs in (True, False)]
            self._policies = [save_all, *cuts, *tiled, *(away if self.machine.host else ())]
        return [self.level(policy, size, sizes) for policy in self._policies]

    def compressed(self, size: Callable[[Any], int], sizes: Any) -> list[Level]:
        """Further levels, in which saved values are kept in 8 bits: of the cut that runs nothing heavy again, with and without the region's
        inputs, and of the one half way. (At the end of the chain only inputs are left, from which attention runs again.)"""
        cuts = [level.policy for level in self.all(size, sizes) if isinstance(level.policy, MinCut)]
        chosen = dict.fromkeys((Compressed(cuts[0]), Compressed(cuts[0], inputs=False), Compressed(cuts[len(cuts) // 2])))
        return [self.level(policy, size, sizes) for policy in chosen if self.runner.compile(self.requires_grad, self.autocast, policy).split.compressed]


def chain(joint: Joint, seconds: Mapping[str, float]) -> list[MinCut]:
    """Minimum cuts with more and more heavy nodes allowed to run again; each saves fewer bytes than the one before.

    Args:
        seconds: of the nodes of the forward, by name.
    """
    if not any(g is not None for g in joint.gradients) or not joint.tangents:
        return [min_cut]
    classes = classify(joint)

    def kept(allowed: frozenset[str]) -> int:
        return sum(value_bytes(node) for node in MinCut(allowed)(joint, classes) if node.op != "placeholder")

    rest: list[fx.Node] = [n for n in classes.forward if n.op == "call_function" and heavy(n)]
    cost = {n: seconds.get(n.name, 0.0) + 1e-6 for n in rest}
    rest.sort(key=lambda n: -sum(value_bytes(part) for part in (n, *n.users)) / cost[n])
    found: list[MinCut] = [min_cut]
    allowed: frozenset[str] = frozenset()
    least = kept(allowed)
    while rest and len(found) < MOST:
        tried = [(kept(allowed | {node.name}), node) for node in rest[:TRIED]]
        left, best = max(tried, key=lambda entry: (least - entry[0]) / cost[entry[1]])
        if left < least:
            allowed |= {best.name}
            rest.remove(best)
        else:  # no single one helps: all of them together may
            allowed |= {node.name for node in rest}
            rest = []
            left = kept(allowed)
        if left < least:
            found.append(MinCut(allowed))
            least = left
    return found
