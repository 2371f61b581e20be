"""pack: a padded batch becomes one row of its real tokens, so that nothing is computed for padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from fxopt.errors import PassError
from fxopt.ir import meta
from fxopt.ir.edit import Edit, mutates, rule_here
from fxopt.ir.formula import EVERYWHERE, Affine, All, AtLeastZero, Data, simplify
from fxopt.ir.index import Flow, arguments, called, full_arguments, static
from fxopt.ir.masks import Reader, Unknown
from fxopt.ir.program import Lazy
from fxopt.ir.rows import Layout, Step
from fxopt.kernels.catalog import packed_attention
from fxopt.kernels.packed_attention.torch_kernels import FLOATS
from fxopt.passes.base import Pass, Promise
from fxopt.passes.causal import grouped
from fxopt.passes.row_loss import LOSSES, RowLoss
from fxopt.passes.row_plan import Plan, Stopped, hint
from fxopt.passes.row_space import Space, Unsized

aten = torch.ops.aten

_CAUSAL = AtLeastZero(Affine(0, ((-2, 1), (-1, -1))))  # q - k >= 0
_KEY = (Affine(0, ((-4, 1),)), Affine(0, ((-1, 1),)))
_ROWS = Layout(-2, -4)  # of queries, keys and values


@dataclass(frozen=True)
class Attention:
    """An attention whose mask hides padding and, perhaps, later tokens."""

    mask: fx.Node
    causal: bool
    blank: bool  # of no key at all it gives zero


@dataclass(frozen=True)
class Pack(Pass):
    """padded batches as one row of real tokens: nothing is computed for padding

    Where every attention hides exactly the tokens that a padding mask [batch, seq] calls padding (and, perhaps, later ones), no
    token sees padding, and padding is left out: the live tokens of all sequences become one row, each with its own position, and
    attention goes by sequence. That a row of the batch is computed from itself alone is proven for each operation between
    the embedding and the loss; else nothing changes, and the record says at which one and why. Losses whose label is
    ignored at padding, the state of one token of each sequence, and sums over what was multiplied by the mask come out
    as they did. What the model returns for each token is zero at padding, whatever it was. Dropout draws other masks of
    the same law. A call in which padding has a label that counts, or is the token whose state is taken, is refused unless
    that token sees none.

    Args:
        multiple: the number of tokens is rounded up to it, so that few different sizes occur.
    """

    multiple: int = 8

    name: ClassVar[str] = "pack"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    promise: ClassVar[Promise] = Promise(values="tolerance", random="declared", outputs="declared")

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise PassError(f"pack: multiple must be at least 1, got {self.multiple}")

    def run(self, edit: Edit) -> None:
        """Read the masks, prove that rows stay apart, and compute on the live ones."""
        attentions = _attentions(edit)
        if not attentions:
            return
        try:
            mask = _mask(attentions)
            plan = _Packing(edit, mask, attentions)
            plan.build(self.multiple)
        except Stopped as stopped:
            edit.missed("padding", stopped.node, stopped.reason)
        except Unsized as unsized:
            edit.missed("padding", unsized.node, unsized.reason)
        edit.dead()


def _attentions(edit: Edit) -> dict[fx.Node, Attention | str]:
    """What each attention's mask says, or why that is not padding; nothing, with a note, where no mask hides padding."""
    flow = Flow(edit.graph, edit.slots)
    reader = Reader(edit.source.constants, {node for root in flow.written for node in flow.aliases[root]})
    found: dict[fx.Node, Attention | str] = {}
    for node in edit.nodes:
        if called(node, aten.scaled_dot_product_attention.default):
            found[node] = _read(reader, node)
        elif called(node, packed_attention.overload):
            found[node] = "the sequences are packed documents already"
    if not any(isinstance(each, Attention) for each in found.values()):
        for node, why in found.items():
            edit.missed("padding", node, str(why))
        edit.note("no attention hides padding" + (": this program is for calls without any" if edit.assumptions else ""))
        return {}
    return found


def _read(reader: Reader, node: fx.Node) -> Attention | str:
    given = arguments(node)
    mask = given.get("attn_mask")
    if mask is None:
        return "it has no padding mask"
    if "dropout_p" in given:
        return f"it drops out with probability {given['dropout_p']}, and packed attention has no dropout"
    if meta.tensor(given["query"]).dtype not in FLOATS or meta.tensor(node).dim() != 4:
        return "packed attention takes floats [batch, heads, seq, width]"
    try:
        formula = simplify(reader.allowed(mask), {}, frozenset())
    except Unknown as unknown:
        return unknown.reason
    parts = list(formula.parts) if isinstance(formula, All) else [formula]
    causal = _CAUSAL in parts
    rest = [part for part in parts if part not in (_CAUSAL, EVERYWHERE)]
    if len(rest) != 1 or not isinstance(rest[0], Data) or rest[0].index != _KEY:
        return "its mask says something else than which keys are padding, and perhaps causal"
    leaf = reader.leaves[rest[0].leaf]
    if leaf.op != "placeholder":
        return f"its mask reads `{leaf.name}`, which is no input"
    return Attention(leaf, causal or bool(given.get("is_causal")), meta.tensor(mask).dtype == torch.bool)


def _mask(attentions: dict[fx.Node, Attention | str]) -> fx.Node:
    """The one padding mask of all attentions."""
    for node, each in attentions.items():
        if isinstance(each, str):
            raise Stopped(node, each)
    masks = {each.mask: node for node, each in attentions.items() if isinstance(each, Attention)}
    first = next(iter(masks))
    if len(masks) > 1:
        raise Stopped(list(masks.values())[1], f"it hides padding by `{list(masks)[1].name}`, another one by `{first.name}`")
    if any(static(size) is not None for size in meta.tensor(first).shape):
        raise Stopped(first, "the program is for one size of the batch")
    return first


class _Packing(Plan):
    """The plan of `pack`: which nodes run on live rows, and how their values leave."""

    def __init__(self, edit: Edit, mask: fx.Node, attentions: dict[fx.Node, Any]) -> None:
        super().__init__(edit)
        self.mask, self.attentions = mask, attentions
        hints = [hint(size) for size in meta.tensor(mask).shape]
        self.seeds = [node for node in self.inputs if meta.tensor(node).dim() > 1 and [hint(size) for size in meta.tensor(node).shape[:2]] == hints]
        for node in self.seeds:
            rank = meta.tensor(node).dim()
            self.layouts[node] = Layout(1 - rank, -rank)
        self.reads: list[int] = []  # tokens of each sequence whose state is taken
        self.losses: list[RowLoss] = []
        self.leaving: dict[fx.Node, set[fx.Node]] = {}  # values that are put back, and for which readers
        self.blank: set[fx.Node] = set()  # values that are zero at padding
        for node in edit.nodes:
            if node.op == "call_function":
                self._visit(node)
        self._outputs()

    # -- planning ------------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        read = [x for x in node.all_input_nodes if x in self.layouts or x in self.items]
        if not read:
            return
        if called(node, aten.sym_size.int):
            return
        if node in self.attentions:
            return self._attend(node)
        if self.cheap(node):
            return self.try_rows(node)
        loss = LOSSES.get(node.target)
        if loss is not None:
            found = RowLoss.of(node, self.layouts.get)
            if isinstance(found, str):
                raise Stopped(node, found)
            if found is not None:
                if not self.cheap(found.target):
                    raise Stopped(node, "its labels are computed by the model")
                self.losses.append(found)
                return
        why = self.try_rows(node)
        if why is None:
            if mutates(node):
                raise Stopped(node, "it writes into memory")
            self._carry_blank(node, read)
            return
        self._leave(node, [x for x in read if not self.cheap(x)], why)

    def _attend(self, node: fx.Node) -> None:
        given = arguments(node)
        for x in (given["query"], given["key"], given["value"]):
            if self.layouts.get(x) != _ROWS:
                raise Stopped(node, f"`{x.name}` is not laid out as [batch, heads, seq, width]")
        self.layouts[node], self.steps[node] = _ROWS, Step(_ROWS, "attention")

    def _carry_blank(self, node: fx.Node, read: list[fx.Node]) -> None:
        if called(node, aten.mul.Tensor) and any(isinstance(x, fx.Node) and (x in self.blank or self._is_mask(x)) for x in node.args):
            self.blank.add(node)
        elif (called(node, aten.to.dtype, aten.neg.default) or self.steps[node].how == "shape") and all(x in self.blank for x in read):
            self.blank.add(node)

    def _is_mask(self, node: fx.Node) -> bool:
        while called(node, aten.unsqueeze.default, aten.expand.default, aten.to.dtype):
            node = node.args[0]
        return node is self.mask

    def _leave(self, node: fx.Node, read: list[fx.Node], why: str) -> None:
        """A node that mixes rows: it reads the values as they were, if padding has no part in them or the rows that it reads are live."""
        taken = None
        if called(node, aten.select.int) and read[0] in self.layouts:
            layout, given = self.layouts[read[0]], full_arguments(node)
            if layout.batch is not None and given["dim"] == layout.seq and isinstance(given["index"], int) and not layout.start and not layout.stop:
                taken = given["index"]
        for x in read:
            if x not in self.layouts or not (taken is not None or x in self.blank):
                raise Stopped(node, why)
            self.leaving.setdefault(x, set()).add(node)
        if taken is not None:
            self.reads.append(taken)

    def _outputs(self) -> None:
        last = self.edit.graph.output_node()
        for x in self.edit.outputs:
            if isinstance(x, fx.Node) and x in self.layouts and not self.cheap(x):
                self.leaving.setdefault(x, set()).add(last)

    # -- building ------------------------------------------------------------------------------------------------------

    def build(self, multiple: int) -> None:
        """Make the live rows, run what is planned on them, and put back what leaves."""
        edit = self.edit
        rows = [node for node in edit.nodes if node in self.steps and not self.cheap(node)]
        alike = [x for x in self.seeds if x is not self.mask and any(user in self.steps and not self.cheap(user) for user in x.users)]
        first = self.lift([each.target for each in self.losses])
        size = tuple(edit.call(aten.sym_size.int, (self.mask, dim), like=self.mask, before=first) for dim in (0, 1))
        read = [*(loss.counted(edit, first) for loss in self.losses), *((self._taken(at, size[1], first), Layout(-1, -2)) for at in dict.fromkeys(self.reads))]
        attends = [each for each in self.attentions.values() if isinstance(each, Attention)]
        causal, blank = all(each.causal for each in attends), all(each.blank for each in attends)
        space = Space(edit, self.mask, size, read, alike, causal, blank, multiple, self.mask, first, self.steps)
        self.space, self.seen = space, {}
        for node in rows:
            for x in node.all_input_nodes if node not in self.attentions else ():
                if x in self.layouts and x not in space.made and (x.op == "placeholder" or self.cheap(x)) and x not in self.steps[node].aligned:
                    space.made[x] = space.gather(x, self.layouts[x], node)
            if self.steps[node].how == "attention":
                space.made[node] = self._attention(node, bool(read))
            else:
                space.run(node)
        for loss in self.losses:
            loss.build(edit, space)
            edit.rewrote(rule_here("padding left out of a loss"), loss.node)
        for x, readers in self.leaving.items():
            for reader in sorted(readers, key=lambda node: node.name):
                back = space.scatter(x, self.layouts[x], reader)
                self._put(x, back, reader)
        self.resize(self.mask)
        self.drop([*rows, *(loss.node for loss in self.losses)])
        edit.rewrote(rule_here("padding left out"), space.call)

    def _put(self, x: fx.Node, back: fx.Node, reader: fx.Node) -> None:
        edit = self.edit
        lazy = {fact for fact in edit.facts if isinstance(fact, Lazy) and fact.node == x.name} if reader.op == "output" else set()
        edit.replace(x, back, unless=lambda user: user is not reader)
        edit.facts = (edit.facts - lazy) | {Lazy(fact.index, back.name) for fact in lazy}

    def _taken(self, at: int, length: fx.Node, first: fx.Node) -> fx.Node:
        """[batch, seq] bool: the token of each sequence whose state is taken."""
        def call(target: Any, *args: Any, **named: Any) -> fx.Node:
            return self.edit.call(target, args, named, like=self.mask, before=first)

        places = call(aten.arange.default, length, device=meta.tensor(self.mask).device)
        here = call(aten.eq.Scalar, call(aten.sub.Tensor, places, length) if at < 0 else places, at)
        return call(aten.expand_as.default, here, self.mask)

    def _attention(self, node: fx.Node, alone: bool) -> fx.Node:
        """Attention within sequences; zero for a row that sees none."""
        edit, space, given = self.edit, self.space, arguments(node)
        sources = grouped(given)
        if any(x not in space.made for x in sources):
            sources = given["query"], given["key"], given["value"]
        made, dtype = [space.made[x] for x in sources], meta.tensor(node).dtype
        made = [x if meta.tensor(x).dtype == dtype else edit.call(aten.to.dtype, (x, dtype), like=node) for x in made]
        call = edit.call(packed_attention.overload, (*made, space.segment, given.get("scale"), self.attentions[node].causal), like=node)
        out = edit.item(call, 0, like=node)
        if not alone:
            return out
        if dtype not in self.seen:
            sees = edit.call(aten.reshape.default, (space.sees, [1, 1, -1, 1]), like=self.mask, before=node)
            self.seen[dtype] = edit.call(aten.to.dtype, (sees, dtype), like=self.mask, before=node)
        return edit.call(aten.mul.Tensor, (out, self.seen[dtype]), like=node)
