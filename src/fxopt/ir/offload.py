"""Saved values that wait in host memory: which of a region's may leave the device between its forward and its backward."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.joint import Joint
from fxopt.ir.partition import Classes, MinCut, Split
from fxopt.ir.regions import is_view
from fxopt.ir.tiling import Tiling

LEAST = 64 << 10
"""Bytes of a piece of memory below which it stays: a transfer costs about as much as one of 100 KiB takes (10 us at 10 GB/s)."""


@dataclass(frozen=True)
class Offloaded:
    """The policy `base`, with its saved values in host memory until the backward needs them. Exact: what comes back is what left.

    Attributes:
        inputs: also the region's inputs. It saves memory only if nobody else keeps them.
    """

    base: MinCut | Tiling
    inputs: bool = True

    @property
    def allowed(self) -> frozenset[str]:
        """Of the base."""
        return self.base.allowed

    def __call__(self, joint: Joint, classes: Classes) -> list[fx.Node]:
        """The values to save: those of the base."""
        return self.base(joint, classes)

    def apply(self, plan: Split) -> Split:
        """The base's plan with the positions of the saved values that may leave. State stays, and inputs without a gradient (masks, rotary tables, which
        all blocks share): they are there anyway."""
        if plan.backward is None:
            return plan
        graph = plan.forward.graph
        stays = {node for i, node in enumerate(n for n in graph.nodes if n.op == "placeholder") if not self.inputs or i >= plan.n_inputs or i not in plan.wanted}
        saved = graph.output_node().args[0][plan.n_outputs + len(plan.mutated):]
        leaves = tuple(i for i, value in enumerate(saved) if isinstance(value, fx.Node) and meta.tensor(value) is not None and _base(value) not in stays)
        return dataclasses.replace(plan, offloaded=leaves)


def _base(value: fx.Node) -> fx.Node:
    """What a view is of."""
    while value.op == "call_function" and is_view(value):
        value = value.all_input_nodes[0]
    return value
