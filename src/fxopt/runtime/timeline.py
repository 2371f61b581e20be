"""The memory of one training step, region after region: forward, then backward. From dry runs of the regions' graphs.

What is counted: the state of the model, the optimizer's, gradients of parameters, the values between regions, what each region keeps
for its backward, and the largest need inside the region that runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fxopt.ir.partition import Split
from fxopt.runtime.dry_run import Ran


@dataclass(frozen=True, eq=False)
class Stage:
    """A region as it runs in a step.

    Attributes:
        path: of its block; None for what lies between blocks.
        inputs, state, outputs: names of values; the graph's arguments are `inputs` then `state`.
        split: its graphs; None in a step without gradients.
        forward, backward: their dry runs.
        dead: values that nobody reads after it in the forward.
        holds_inputs: its arguments stay alive for its backward whatever it saves.
        gone: positions of saved values whose memory waits on the host; offloaded: its bytes. It is still there while the next region runs
            forward, and comes back while the next one runs backward.
    """

    path: str | None
    inputs: tuple[str, ...]
    state: tuple[str, ...]
    outputs: tuple[str, ...]
    split: Split
    forward: Ran
    backward: Ran | None
    dead: tuple[str, ...] = ()
    holds_inputs: bool = False
    gone: frozenset[int] = frozenset()
    offloaded: int = 0


@dataclass(frozen=True)
class Resident:
    """Bytes that are there during the whole step: weights and buffers, the optimizer's state, the inputs of the call, and gradients of
    parameters left by an earlier backward (accumulation)."""

    weights: int = 0
    optimizer: int = 0
    inputs: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.optimizer + self.inputs + self.gradients


@dataclass(frozen=True)
class Peak:
    """The moment of a step at which most memory is in use.

    Attributes:
        total: bytes.
        place: path of the region's block, or "between the blocks".
        phase: "forward" or "backward".
        node: the operation of the region's graph.
        parts: bytes by category; they sum to `total`.
    """

    total: int
    place: str
    phase: str
    node: str
    parts: dict[str, int]


class Timeline:
    """Walks through a step and remembers the peak.

    Args:
        stages: in the order of the forward.
        resident: what is there before the step.
        kept: names of values that the caller or a lazy output holds until the step ends.
    """

    def __init__(self, stages: Sequence[Stage], resident: Resident, kept: Sequence[str] = ()) -> None:
        self.stages, self.resident = stages, resident
        self.sizes: dict[object, int] = {}  # bytes of each piece of memory that is alive
        self.uses: Counter[object] = Counter()
        self.place_of: dict[str, object] = {}  # name of a value to its memory
        self.kept = set(kept)
        self.gradients: dict[str, int] = {}  # of values, while the backward runs
        self.of_parameters: dict[str, int] = {}
        self.moving = 0  # bytes on their way to or from the host
        self.behind = [0] * len(stages)  # bytes of gradients when the backward of each region begins
        self.peak = Peak(resident.total, "the model", "forward", "", {"weights": resident.weights, "optimizer": resident.optimizer, "inputs": resident.inputs,
                                                                   "gradients": resident.gradients})
        held = []
        for at, stage in enumerate(stages):
            held.append(self._forward(at, stage))
            self.moving = stage.offloaded or self.moving  # the device lets go of it when the next region sends something, or at the first that comes back
        sent = [stage.offloaded for stage in stages if stage.offloaded]
        for at in reversed(range(len(stages))):
            if stages[at].offloaded:
                self.moving = sent.pop() + (sent[-1] if sent else 0)
            self._backward(at, stages[at], held[at])
            if stages[at].offloaded:
                self.moving = sent[-1] if sent else 0

    def _hold(self, key: object, size: int) -> None:
        self.sizes[key] = size
        self.uses[key] += 1

    def _drop(self, key: object) -> None:
        self.uses[key] -= 1
        if self.uses[key] <= 0:
            self.uses.pop(key)
            self.sizes.pop(key, None)

    def _see(self, stage: Stage, phase: str, ran: Ran) -> None:
        resident, activations = self.resident, sum(self.sizes.values())
        between, own = sum(self.gradients.values()), sum(self.of_parameters.values())
        total = resident.total + activations + between + own + ran.peak + self.moving
        if total > self.peak.total:
            parts = {"weights": resident.weights, "optimizer": resident.optimizer, "inputs": resident.inputs, "gradients": resident.gradients + own,
                     "activations": activations, "gradients of activations": between, "inside the region": ran.peak, "to or from the host": self.moving}
            self.peak = Peak(total, stage.path or "between the blocks", phase, ran.node, parts)

    def _forward(self, at: int, stage: Stage) -> list[object]:
        self._see(stage, "forward", stage.forward)
        arguments = [self.place_of.get(name) for name in (*stage.inputs, *stage.state)]
        keys: list[object] = []
        for value in stage.forward.outputs:
            keys.append(None if value.source is None else arguments[value.source] if value.source >= 0 else (at, value.source))
        count, mutated = stage.split.n_outputs, len(stage.split.mutated)
        for name, value, key in zip(stage.outputs, stage.forward.outputs, keys[:count]):
            self.place_of[name] = key
            if key is not None:
                self._hold(key, self.sizes.get(key, value.size))
        saved = enumerate(zip(stage.forward.outputs[count + mutated:], keys[count + mutated:]))
        held = {key: value.size for i, (value, key) in saved if key is not None and i not in stage.gone}
        if stage.holds_inputs:
            held.update({key: self.sizes[key] for key in arguments if key in self.sizes})
        for key, size in held.items():
            self._hold(key, self.sizes.get(key, size))
        for name in stage.dead:
            key = self.place_of.get(name)
            if name not in self.kept and key is not None:
                self._drop(key)
        return list(held)

    def _backward(self, at: int, stage: Stage, held: list[object]) -> None:
        if stage.backward is None:
            for key in held:
                self._drop(key)
            return
        self.behind[at] = sum(self.gradients.values()) + sum(self.of_parameters.values())
        self._see(stage, "backward", stage.backward)
        for key in held:
            self._drop(key)
        for name in stage.outputs:
            self.gradients.pop(name, None)
        many = len(stage.inputs)
        for index, value in zip(stage.split.wanted, stage.backward.outputs):
            if value.source is None:
                continue
            if index < many:
                self.gradients[stage.inputs[index]] = max(self.gradients.get(stage.inputs[index], 0), value.size)
            elif not self.resident.gradients:  # else they are added to what is there
                name = stage.state[index - many]
                self.of_parameters[name] = max(self.of_parameters.get(name, 0), value.size)
