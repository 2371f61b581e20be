"""Frozen weights stored in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import Edit, rule_here
from fxopt.ir.facts import Stored
from fxopt.ir.program import Made, Slot
from fxopt.kernels import nf4
from fxopt.kernels.linear_nf4 import OP as LINEAR_NF4
from fxopt.kernels.lora_linear import OP as LORA_LINEAR
from fxopt.passes import linears
from fxopt.passes.base import Pass, Promise


@dataclass(frozen=True)
class Quantize(Pass):
    """store frozen linear weights in 4 bits

    Each frozen weight that only linears read is stored as NF4 (Dettmers et al., 2023, https://arxiv.org/abs/2305.14314:
    4-bit codes of a normal-float table, one fp32 scale per 64 values, bitsandbytes' layout) and dequantized inside the
    op. No dense copy is kept.

    Attributes:
        format: "nf4".
        head: also the output head (a linear that everything else goes through).
    """

    name: ClassVar[str] = "quantize"
    establishes: ClassVar[frozenset[str]] = frozenset({"quantized"})
    # Gaussian weights: 9.2% relative error of the stored values (measured on 2048 x 2048)
    promise: ClassVar[Promise] = Promise(values="bounded", bound=0.12)
    must_fire: ClassVar[bool] = True

    format: Literal["nf4"] = "nf4"
    head: bool = False

    def run(self, edit: Edit) -> None:
        """Rewrite every linear whose weight is frozen."""
        parameters = {name for name, slot in edit.slots.items() if slot.kind == "parameter" and slot.made is None}
        found = linears.find(edit.nodes, parameters)
        products = [node for node in edit.nodes if node.target is LORA_LINEAR.forward.overload]
        uses: dict[str, list[linears.Linear | fx.Node]] = {}
        for linear in found:
            uses.setdefault(linear.name, []).append(linear)
        for node in products:
            if node.args[3] is None:  # its base is dense
                uses.setdefault(str(linears.uncast(node.args[1]).target), []).append(node)
        head = None if self.head else linears.head(edit, found, products)
        for name, users in uses.items():
            first = users[0].node if isinstance(users[0], linears.Linear) else users[0]
            reason = self._refuse(edit, name, users, head)
            if reason:
                edit.missed("quantize", first, f"{name} {reason}")
                continue
            for user in users:
                self._rewrite(edit, name, user)
        edit.dead()

    def _refuse(self, edit: Edit, name: str, users: list[linears.Linear | fx.Node], head: str | None) -> str | None:
        if edit.installed is not None:
            return None if f"{name}.packed" in edit.installed else "was not quantized when the model was first captured"
        if edit.trainable(name):
            return "is trained: only frozen weights are quantized (put lora before quantize)"
        if edit.slots[name].aliases:
            return f"is tied to {edit.slots[name].aliases[0]}"
        if name == head:
            return "is the output head (quantize(head=true) takes it too)"
        mine = {user.node if isinstance(user, linears.Linear) else user for user in users}
        for node in edit.nodes:
            if node.op == "get_attr" and node.target == name:
                for reader in node.users:
                    through = bool(reader.users) and all(u in mine for u in reader.users)
                    if reader not in mine and not through:
                        return f"is also read by {reader.name}, which is not a linear"
        if edit.slots[name].dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"is {edit.slots[name].dtype}"
        return None

    def _rewrite(self, edit: Edit, name: str, user: linears.Linear | fx.Node) -> None:
        if isinstance(user, linears.Linear):
            user = linears.read(user.node) or user  # its input may have been an earlier linear, and be another node now
        node = user.node if isinstance(user, linears.Linear) else user
        slot = edit.slots[name]
        n = slot.shape[0] * slot.shape[1]
        packed, absmax = (
            edit.state(Slot(f"{name}.{part}", shape, dtype, "buffer", False,
                            Made(self.name, nf4.quantize, name, item, True, Stored(name, part, self.format, slot.shape, slot.dtype))), like=node)
            for item, (part, shape, dtype) in enumerate((("packed", ((n + 1) // 2, 1), torch.uint8),
                                                         ("absmax", (-(-n // nf4.BLOCK),), torch.float32))))
        shape = list(slot.shape)
        if isinstance(user, linears.Linear):
            x, bias = (linears.cast(edit, n, meta.tensor(node).dtype, node) for n in (user.x, user.bias))
            new = edit.call(LINEAR_NF4.forward.overload, (x, packed, absmax, shape, bias, user.transposed), like=node)
        else:
            x, _, bias, _, _, a, b, scale, transposed = node.args
            new = edit.call(LORA_LINEAR.forward.overload, (x, packed, bias, absmax, shape, a, b, scale, transposed), like=node)
        edit.replace(node, new, rule=rule_here("quantize"))
        edit.erase(node)
