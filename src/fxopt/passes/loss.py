"""loss: cross entropy as one op, with the language-model head in it so that the logits never exist."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.fx as fx

from fxopt.errors import PassError
from fxopt.ir import meta
from fxopt.ir.edit import Edit, effectful, rule_here
from fxopt.ir.index import Flow, called, static
from fxopt.ir.program import Lazy
from fxopt.kernels.catalog import cross_entropy, linear_cross_entropy
from fxopt.kernels.cross_entropy.rows import STATISTICS
from fxopt.passes.base import Pass, Promise
from fxopt.passes.labels import without_fill
from fxopt.passes.logits import NEVER, Head, Reading, Term, after, cheapest, outputs_of, read_back, read_head, read_term
from fxopt.passes.statistics import find_statistics, put
from fxopt.passes.z_loss import ZLoss, differs, find_z_loss

aten = torch.ops.aten

# Fewest classes for `cross_entropy` by device. On a CPU (one thread, forward and backward) eager time over the op's is, for 512 rows
# of 1,000, 2,048, 4,096 and 32,000 classes, 0.5, 1.2, 2.2 and 1.9 in fp32 and 0.5, 0.5, 1.6 and 3.7 in bf16; for 64 rows of 1,000
# 0.2 (0.3 ms). The op moves fewer bytes, which saves nothing while the logits are in cache. On a GPU it is the number of
# launches, not measured.
FEWEST_CLASSES = {"cpu": 2048, "cuda": 128}


@dataclass(frozen=True)
class Loss(Pass):
    """cross entropy as one op, without the logits in memory where they come from a head

    Rewrites linear [-> scale] [-> softcap] -> flatten -> cross entropy. Rows whose label is ignored never reach the
    head. Logits that the model also returns stay in the graph, as an output that is computed when the caller reads it.
    Where the logits must exist, or come from elsewhere, the cross entropy alone becomes an op that keeps the logits as they
    are, and neither their cast nor their log_softmax. A cross entropy may be written as one, as nll_loss of log_softmax, or as
    the log-probability of one class a row. A z-loss that is added to it is part of the op where it is of the same rows, and
    so are the accuracy, log-probabilities and entropy that are read of the same logits without a gradient.

    Args:
        chunk: rows whose logits exist at once; 0 lets the kernel choose.
        logits: what becomes of logits that the model returns: "lazy" computes them when the caller reads them, "keep"
            leaves such a head as it is.
        rows: on a GPU, the rows that go through the head: -1 those with a label (the host waits for their number, which a
            captured CUDA graph cannot), 0 all, or a bound that holds for every call (a call that breaks it has a loss of NaN).
    """

    chunk: int = 0
    logits: Literal["lazy", "keep"] = "lazy"
    rows: int = -1

    name: ClassVar[str] = "loss"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    establishes: ClassVar[frozenset[str]] = frozenset({"fused loss"})
    promise: ClassVar[Promise] = Promise(values="tolerance")

    def __post_init__(self) -> None:
        if self.chunk < 0:
            raise PassError(f"loss: chunk must be at least 0, got {self.chunk}")
        if self.rows < -1:
            raise PassError(f"loss: rows must be at least -1, got {self.rows}")

    def run(self, edit: Edit) -> None:
        """Try every cross entropy in the graph: with its head, else alone. Those that are gathered come last: they may be a
        statistic of another."""
        found = [(node, term) for node in edit.nodes if (term := read_term(node)) is not None]
        for node, term in sorted(found, key=lambda pair: isinstance(pair[1], Term) and pair[1].gathered):
            term = read_term(node) if node.users else None  # an earlier one may have replaced it, or what it reads
            if isinstance(term, str):
                edit.missed("head and loss", node, term)
            elif term is not None and not edit.spent and not (term.reduction == "none" and _lazy(edit, node)):
                self._fuse(edit, without_fill(term))
        edit.facts -= {fact for fact in edit.facts if isinstance(fact, Lazy) and edit.outputs[fact.index].name != fact.node}

    def _fuse(self, edit: Edit, term: Term) -> None:
        flow = Flow(edit.graph, edit.slots)
        readings, stop = read_back(term.logits, term.chain, term.shaping)
        z = None if term.gathered else find_z_loss(term.node)
        if isinstance(z, ZLoss):
            why = differs(z, term, readings[-1])
            z = z if why is None else f"`{z.chain[0].name}`: {why}"
        if isinstance(z, str):
            edit.missed("z-loss", term.node, z)
        target = _Target(edit, flow, term, z if isinstance(z, ZLoss) else None)
        reason = self._with_head(target, read_head(readings, stop))
        if reason is not None:
            edit.missed("head and loss", term.node, reason)
            reason = _alone(target, cheapest(term, readings))
            if reason is not None:
                edit.missed("loss", term.node, reason)

    def _with_head(self, at: _Target, head: Head | str) -> str | None:
        if isinstance(head, str):
            return head
        edit, term, loss, reading = at.edit, at.term, at.term.node, head.reading
        classes, width = meta.tensor(head.linear).shape[-1], meta.tensor(head.hidden).shape[-1]
        if static(classes) is None or static(width) is None or static(classes) < static(width):
            return f"the logits are {classes} wide and the hidden state {width}: there is nothing to save"
        if (reason := at.written((*reading.chain, *head.linear.all_input_nodes))) is not None:
            return reason
        statistics = find_statistics(edit, at.flow, term, reading)
        inputs = [x for x in (head.hidden, head.weight, head.bias, term.target) if x is not None]
        inputs += [x for node in reading.shaping for x in node.all_input_nodes if x not in reading.chain]
        before = min((loss, *(each.node for each in statistics)), key=at.flow.order.__getitem__)
        if not _hoist(edit, at.flow, inputs, before, [each.node for each in statistics]):
            for each in statistics:
                edit.missed("statistics", each.node, "the labels of the loss are not known where it is computed")
            statistics, before = [], loss
        lazy = outputs_of(edit, (*reading.chain, *at.z_chain), (loss, *at.replaced, *(each.node for each in statistics)))
        if isinstance(lazy, str):
            return lazy
        if lazy and self.logits == "keep":
            return "the model returns the logits, and they are to be kept"
        dtype = meta.tensor(head.linear).dtype  # under autocast this is not the inputs' dtype: cast as autocast does
        rows = term.select(edit, reading.rows(edit, head.hidden, static(width), loss, before), before)
        hidden, weight, bias = (_cast(edit, x, dtype, loss, before) for x in (rows, head.weight, head.bias))
        if bias is not None and meta.tensor(bias).dim() > 1:
            bias = edit.call(aten.reshape.default, (bias, [classes]), like=loss, before=before)
        mask = [trains and edit.source.grad for trains in (_trains(edit, head.hidden), _trains(edit, head.weight), _trains(edit, head.bias))]
        wanted = [any(each.place == place for each in statistics) for place in range(3)]
        options = (*at.options(reading), self.chunk, self.rows, mask, wanted)
        transposed = [x for x in head.linear.all_input_nodes if x.op == "call_function" and x is not head.hidden]
        call = edit.call(linear_cross_entropy.overload, (hidden, weight, bias, at.labels(before), *options), like=loss, before=before)
        for each in statistics:
            put(edit, each, term, call, 2 + each.place, rule_here(f"statistics: {STATISTICS[each.place]}"))
        at.replace(call, rule_here("head and loss"), (*(each.node for each in statistics), *reading.chain, *transposed))
        for index in lazy:
            edit.facts.add(Lazy(index, edit.outputs[index].name))
        return None


def _lazy(edit: Edit, node: fx.Node) -> bool:
    """Whether a value is only computed if the caller reads an output."""
    reached = {*after(node), node}
    found = {index for index, value in enumerate(edit.outputs) if value in reached}
    return found <= {fact.index for fact in edit.facts if isinstance(fact, Lazy)}


def _alone(at: _Target, reading: Reading) -> str | None:
    """Put `cross_entropy` in place of a loss; returns why not."""
    edit, term, loss = at.edit, at.term, at.term.node
    classes, device = static(meta.tensor(term.logits).shape[-1]), edit.device(term.logits).type
    fewest = FEWEST_CLASSES.get(device, FEWEST_CLASSES["cuda"])
    if classes is None or classes < fewest:
        return f"{'an unknown number of' if classes is None else classes} classes: below {fewest} the op is no faster than plain PyTorch ({device})"
    normalized = [node for node in term.chain if len(node.users) > 1 and not called(node, *_FREE)]
    if normalized:
        return f"`{normalized[0].name}` is also read by others"
    if (reason := at.written((*reading.chain, reading.source))) is not None:
        return reason
    logits = term.select(edit, reading.rows(edit, reading.source, classes, loss, loss), loss)
    call = edit.call(cross_entropy.overload, (logits, at.labels(loss), *at.options(reading)), like=loss)
    at.replace(call, rule_here("loss"), reading.chain)
    return None


_FREE = (aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.transpose.int, aten.permute.default)


@dataclass(frozen=True)
class _Target:
    """A loss to replace, with the z-loss that is added to it."""

    edit: Edit
    flow: Flow
    term: Term
    z: ZLoss | None

    @property
    def z_chain(self) -> tuple[fx.Node, ...]:
        return () if self.z is None else tuple(self.z.chain)

    @property
    def replaced(self) -> tuple[fx.Node, ...]:
        """What goes away with the z-loss."""
        return () if self.z is None else (self.z.total, *self.z.asserts)

    def written(self, nodes: Sequence[fx.Node]) -> str | None:
        """Why a value that these nodes hold cannot be read later than they read it."""
        return "a tensor of the loss is written in place" if any(self.flow.roots[node] & self.flow.written for node in (*nodes, *self.z_chain)) else None

    def options(self, reading: Reading) -> tuple[int, str, float, float, float, float]:
        """ignore_index, reduction, label_smoothing, softcap, logit_scale, z_loss."""
        term, z = self.term, self.z
        return term.ignore_index, term.reduction, term.label_smoothing, reading.softcap, reading.scale, 0.0 if z is None else z.coefficient

    def labels(self, before: fx.Node) -> fx.Node:
        """One class for each row of logits."""
        term = self.term
        column = term.gathered and term.ignore_index == NEVER  # else it is not what was gathered at, see `without_fill`
        return self.edit.call(aten.squeeze.dim, (term.target, -1), like=term.node, before=before) if column else term.target

    def replace(self, call: fx.Node, rule: str, chain: Sequence[fx.Node]) -> None:
        """Put result 0 of the call in the place of the loss, and drop what nobody reads any more."""
        edit, loss = self.edit, self.term.node
        new = _cast(edit, edit.call(operator.getitem, (call, 0), like=loss), meta.tensor(loss).dtype, loss, loss)
        if self.term.negative:
            new = edit.call(aten.neg.default, (new,), like=loss)
        if self.term.gathered and meta.tensor(new).dim() < meta.tensor(loss).dim():
            new = edit.call(aten.unsqueeze.default, (new, -1), like=loss)
        edit.replace(loss, new, rule=rule)
        idle: list[fx.Node] = []
        if self.z is not None:
            edit.replace(self.z.total, self.z.total.args[1 - self.z.whole], rule=rule_here("z-loss"))
            idle = [self.z.total, *(x for node in self.z.asserts for x in node.all_input_nodes)]
            for node in self.z.asserts:
                edit.erase(node)
        _drop(edit, (*idle, loss, *self.z_chain, *chain))


def _drop(edit: Edit, nodes: Sequence[fx.Node]) -> None:
    """Erase those of these nodes that nobody reads, and what only they read."""
    waiting = list(nodes)
    gone: set[fx.Node] = set()
    while waiting:
        node = waiting.pop(0)
        if node in gone or node.users or node.op != "call_function" or effectful(node):
            continue
        gone.add(node)
        sources = node.all_input_nodes
        edit.erase(node)
        waiting += sources


def _hoist(edit: Edit, flow: Flow, nodes: Sequence[fx.Node], before: fx.Node, without: Sequence[fx.Node]) -> bool:
    """Move what computes these nodes before another node; False, and nothing is moved, where that is impossible."""
    late: dict[fx.Node, None] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node in late or flow.order[node] < flow.order[before]:
            continue
        if node is before or node in without or effectful(node) or any(flow.roots[x] & flow.written for x in (node, *node.all_input_nodes)):
            return False
        late[node] = None
        waiting += node.all_input_nodes
    for node in sorted(late, key=flow.order.__getitem__):
        edit.move_before(node, before)
    return True


def _cast(edit: Edit, node: fx.Node | None, dtype: torch.dtype, like: fx.Node, before: fx.Node) -> fx.Node | None:
    if node is None or meta.tensor(node).dtype == dtype:
        return node
    return edit.call(aten.to.dtype, (node, dtype), like=like, before=before)


def _trains(edit: Edit, node: fx.Node | None) -> bool:
    """Whether the node's value takes a gradient, given what is frozen so far."""
    seen: set[fx.Node] = set()
    waiting = [node] if node is not None else []
    while waiting:
        node = waiting.pop()
        if node in seen or called(node, aten.detach.default):
            continue
        seen.add(node)
        val = meta.tensor(node)
        floating = val is not None and val.is_floating_point()
        if node.op == "placeholder" and floating and val.requires_grad:
            return True
        if node.op == "get_attr" and node.target in edit.slots and edit.trainable(node.target):
            return True
        waiting += node.all_input_nodes
    return False
