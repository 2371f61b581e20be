"""A dtype for each node, and the fewest casts."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx

from fxopt.errors import PassError
from fxopt.ir import meta
from fxopt.ir.autocast import State
from fxopt.ir.edit import Edit, rule_here
from fxopt.ir.facts import LossScale
from fxopt.ir.program import Program, Sample
from fxopt.ir.regions import is_view
from fxopt.kernels.tolerance import SELF_CHECK
from fxopt.passes import dtypes, dtypes_plan, dtypes_ranges
from fxopt.passes.base import Pass, Promise
from fxopt.passes.dtypes import NARROW, PRODUCT, STATISTIC, dtype_of
from fxopt.passes.residual import repeated
from fxopt.passes.verify import materialize
from fxopt.torch_private import cpu_has

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision(Pass):
    """a dtype for each node, and the fewest casts

    Parameters and buffers stay what they are, and so does what the caller gets: gradients of fp32 parameters are fp32 (their casts are
    nodes, and differentiated as such), outputs keep their dtypes. To store frozen weights in 16 bits as well, put `quantize(bf16)` in
    front. Which operators compute in 16 bits is said in passes/dtypes.py, where casts go in passes/dtypes_cut.py: the least bytes
    through casts, one cast for each value and dtype, none undone by another.

    What the model computes in 16 bits by itself stays so. A call under autocast is left alone, with a note: autocast decides
    there.

    Attributes:
        dtype: "bf16" or "fp16": products, and what lies between them, in 16 bits; statistics, residual streams, exponentials,
            sums and losses in fp32. "fp32": what the model computes in 16 bits, in fp32 (its weights stay stored as they are).
            "auto": bf16 on a GPU or CPU that has arithmetic for it, else fp32. fp16 needs a loss scaler (runtime/scaler.py), so it
            is never chosen unasked.
        margin: fp16 only. A value is kept in fp32 if its largest element on the example call, forward or (times the loss scale) backward,
            is above 65504 / margin, or below the smallest normal number. Other batches differ: 4 leaves them two binary orders. Without an
            example call the kinds of operators decide alone, and the report says so.
        measure: run the example call before and after, forward and backward, and report the largest error against the program as it
            was. It costs two interpreted steps (for fp16 one is needed anyway). It also finds operators without a kernel for the dtype
            on this device; they stay in fp32.

    Raises:
        PassError: an operator refuses its dtypes (a bug of this pass); margin below 1.
    """

    name: ClassVar[str] = "precision"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})  # one spelling of a cast, and no asserts of dtypes
    # three roundings of a bf16 product, see __post_init__; each instance has its own
    promise: ClassVar[Promise] = Promise(values="bounded", bound=0.012, of="dtypes")

    dtype: Literal["bf16", "fp16", "fp32", "auto"] = "auto"
    margin: float = 4.0
    measure: bool = True

    def __post_init__(self) -> None:
        if not self.margin >= 1:
            raise PassError(f"precision: margin must be at least 1, got {self.margin}")
        # of each product: both operands and the result rounded once, against the product of the absolute values (Higham, 2002,
        # "Accuracy and Stability of Numerical Algorithms", section 3.5, the sums in fp32)
        to = _DTYPES.get(self.dtype, torch.bfloat16)
        object.__setattr__(self, "promise", Promise(values="bounded", bound=1.5 * torch.finfo(to).eps, of="dtypes"))

    def run(self, edit: Edit) -> None:
        """Choose, cast, check every edge, measure, report."""
        devices = sorted({t.device.type for node in edit.nodes if node.op in ("placeholder", "get_attr") for t in meta.tensors(node)})
        for device in devices:
            if (ambient := State.now(device)).dtype is not None:
                edit.note(f"the call runs under autocast to {_short(ambient.dtype)}, which decides the dtypes: call it without autocast, "
                          "or leave precision out")
                return
        to = self._target(edit, devices)
        mine = Counter(_short(dtype_of(node)) for node in edit.nodes if node.op == "call_function" and dtype_of(node) in NARROW)
        if to in NARROW and mine:
            edit.note("computed by the model in 16 bits, and left so: " + ", ".join(f"{count} nodes in {name}" for name, count in mine.items()))
        sample = None
        if edit.sample is not None and self.measure:
            sample = Sample(edit.sample.inputs, materialize(edit.source, edit.sample.state))
        before, outside, scale = self._ranges(edit, to, sample)
        chosen, casts = self._apply(edit, to, before, outside, scale, sample)
        self._report(edit, chosen, casts, outside)

    def _target(self, edit: Edit, devices: list[str]) -> torch.dtype:
        if self.dtype != "auto":
            if self.dtype == "fp16" and devices == ["cpu"] and not cpu_has("amx_fp16"):
                # 0.8 GFLOP/s against 80 in fp32 and 524 in bf16 (measured, one core with AVX512_BF16, 512 x 1024 x 1024)
                edit.note("this CPU has no AMX-FP16: fp16 products may run without vector arithmetic, up to a hundred times slower "
                          "than fp32: right for a trial, not for speed")
            return _DTYPES[self.dtype]
        device = "cuda" if "cuda" in devices else devices[0] if devices else "cpu"
        fast, why = computes_bf16(device)
        edit.note(f"auto: {'bf16' if fast else 'fp32'}, because {why}")
        return torch.bfloat16 if fast else torch.float32

    def _ranges(self, edit: Edit, to: torch.dtype, sample: Sample | None) -> tuple[dtypes_ranges.Step | None, Mapping[str, str], float]:
        """(a step of the program as it is, which values do not fit, the loss scale)."""
        if sample is None:
            if to == torch.float16:
                edit.note("no example call to measure on: which values overflow in fp16 is not known, the kinds of operators decide alone")
                if edit.source.training and edit.source.grad:
                    edit.facts.add(LossScale(_FIRST_SCALE))
            return None, {}, _FIRST_SCALE if to == torch.float16 else 1.0
        before = dtypes_ranges.run(edit.source, sample, observe=to == torch.float16, backward=edit.source.grad)
        if to != torch.float16:
            return before, {}, 1.0
        window = dtypes_ranges.Window.of(to, self.margin)
        learned = {node.name for node in dtypes.learned(edit)}
        scale = dtypes_ranges.loss_scale([value for name, value in before.gradient.items() if name in learned], window)
        if before.gradient:
            edit.facts.add(LossScale(scale))
            edit.note(f"loss scale: {scale:g} puts most gradients of the example call into fp16's range (fxopt.runtime.scaler starts from it)")
        return before, dtypes_ranges.outside(before, window, scale), scale

    def _apply(self, edit: Edit, to: torch.dtype, before: dtypes_ranges.Step | None, outside: Mapping[str, str], scale: float,
               sample: Sample | None) -> tuple[dtypes_plan.Plan, list[fx.Node]]:
        """Plan and rewrite; with a sample on a trial first, for operators that have no kernel for the dtype."""
        beyond = _beyond(edit.source, sample, to)
        without: dict[Any, str] = {}
        while sample is not None and before is not None:
            trial = Edit(edit.source, edit.by, edit.sample)
            trial.values = edit.values
            _change(trial, to, outside, beyond, without)
            try:
                after = dtypes_ranges.run(_program(trial), sample, backward=edit.source.grad, scale=scale)
            except dtypes_ranges.Refused as refused:
                if refused.node is None or refused.node.target in without or to == torch.float32:
                    raise PassError(f"the program does not run in {_short(to)} here: {refused.why}",
                                    where=None if refused.node is None else f"{refused.node.name}: {meta.provenance(refused.node)}",
                                    do="use another dtype on this device") from refused
                without[refused.node.target] = refused.why
                continue
            _say_error(edit, to, before, after)
            break
        if edit.fuel is not None:  # a rewrite is a product in 16 bits: those beyond the fuel are kept
            products = [node.name for node in edit.nodes if node in dtypes_plan.plan(edit, to, outside=outside, inputs_beyond=beyond, without=without).narrow
                        and dtypes.rule(node).kind is PRODUCT]
            outside = {**outside, **dict.fromkeys(products[edit.fuel:], "no rewrites are left for it")}
        return _change(edit, to, outside, beyond, without)

    def _report(self, edit: Edit, chosen: dtypes_plan.Plan, casts: list[fx.Node], outside: Mapping[str, str]) -> None:
        to = chosen.to
        for node, why in chosen.reasons.items():
            edit.missed(self.name, node, f"kept in fp32: {why}")
        narrow = [node for node in edit.nodes if node in chosen.narrow]
        if not narrow:
            edit.note(f"no node computes in {_short(to)}" + (": the program is in fp32 already" if to == torch.float32 else ""))
            return
        for node in narrow:
            if dtypes.rule(node).kind is PRODUCT:
                edit.rewrote(rule_here(self.name), node)
        wide = [node for node in edit.nodes if node.op == "call_function" and node not in chosen.narrow and node not in casts and not is_view(node)
                and node.target is not operator.getitem
                and any(t.dtype in dtypes.FLOATS and t.dtype != to for t in meta.tensors(node))]
        products = sum(dtypes.rule(node).kind is PRODUCT for node in narrow)
        state = sum(_origin(cast).op == "get_attr" for cast in casts)
        edit.note(f"{len(narrow)} nodes compute in {_short(to)} ({products} products), {len(wide)} do not; {len(casts)} casts: {state} of state, "
                  f"{len(casts) - state} of other values")
        frozen = [cast for cast in casts if (source := _origin(cast)).op == "get_attr" and str(source.target) in edit.slots
                  and not edit.trainable(str(source.target)) and meta.tensor(cast).dim() > 1]
        if frozen and to in NARROW:
            size = sum(map(dtypes_plan.bytes_of, frozen))
            edit.note(f"{len(frozen)} frozen weights are cast in each step ({size / 2**20:.3g} MiB): quantize({_short(to)}) in front of this pass "
                      "stores them so")
        if to in NARROW:
            saved = sum(dtypes_plan.bytes_of(node) for node in narrow if not is_view(node) and node.op == "call_function" and dtype_of(node) == to)
            spent = sum(dtypes_plan.bytes_of(cast) for cast in casts if _origin(cast).op != "get_attr")
            edit.note(f"values take {saved / 2**20:.3g} MiB less than in fp32 under the sizes of the example call; casts of them take {spent / 2**20:.3g} MiB")
            kinds = Counter(_kind(node) for node in wide if node not in chosen.reasons)
            edit.note("kept in fp32 by kind: " + (", ".join(f"{kind} {count}" for kind, count in kinds.most_common(12)) or "nothing"))


_FIRST_SCALE = 2.0**16  # torch.amp.GradScaler's


def computes_bf16(device: str) -> tuple[bool, str]:
    """Whether a device has bf16 arithmetic, and how that is known. By capability, not by a timing: the same graph on every run.

    CPUs with AVX-512 but without its BF16 extension widen bf16 in software: 5.4 times slower than fp32 (measured, 1024 x 1024 x 3072).
    """
    if device == "cuda":
        return (True, "the GPU has bf16 arithmetic") if torch.cuda.is_bf16_supported(including_emulation=False) else (
            False, "the GPU has no bf16 arithmetic (fp16 needs a loss scaler: ask for precision(fp16))")
    if device == "cpu":
        for units, name in (("amx_tile", "AMX"), ("avx512_bf16", "AVX512_BF16")):
            if cpu_has(units):
                return True, f"the CPU has {name}"
        return False, "the CPU has no bf16 arithmetic"
    return False, f"nothing is known of bf16 on {device}"


def _beyond(program: Program, sample: Sample | None, to: torch.dtype) -> list[str]:
    """Inputs with finite numbers that `to` does not hold."""
    if sample is None or to not in NARROW:
        return []
    floats = [(node.name, value) for node, value in zip(program.placeholders, sample.inputs) if value.is_floating_point() and value.numel()]
    return [name for name, value in floats if torch.finfo(to).max < float(value.detach().abs().nan_to_num(posinf=0.0).max())]


def _program(edit: Edit) -> Program:
    return replace(edit.source, graph=edit.graph)


def _change(edit: Edit, to: torch.dtype, outside: Mapping[str, str], beyond: list[str], without: Mapping[Any, str]) -> tuple[dtypes_plan.Plan, list[fx.Node]]:
    """Plan, rewrite, check every edge."""
    before = dtypes.read_dtypes(edit.nodes)
    chosen = dtypes_plan.plan(edit, to, outside=outside, inputs_beyond=beyond, without=without)
    casts = dtypes_plan.rewrite(edit, chosen, repeated(edit.nodes))
    dtypes.check_edges(edit, before)
    return chosen, casts


def _say_error(edit: Edit, to: torch.dtype, before: dtypes_ranges.Step, after: dtypes_ranges.Step) -> None:
    output, error, slot, of_gradient = dtypes_ranges.difference(before, after)
    text = f"error against the program as it was, on the example call (relative, Frobenius): {error:.1e} at {output or 'no output'}"
    if slot:
        text += f"; gradients {of_gradient:.1e} at {slot}"
    edit.note(text)
    if not max(error, of_gradient) <= SELF_CHECK[torch.bfloat16 if to == torch.float32 else to]:
        edit.note(f"that is more than rounding to {_short(to)} explains in most programs: some values are ill-conditioned; compare the losses of "
                  "some steps with fp32")


def _origin(cast: fx.Node) -> fx.Node:
    """What a cast reads, behind a saturation."""
    source = cast.args[0]
    return source.args[0] if source.target is torch.ops.aten.clamp.default else source


def _kind(node: fx.Node) -> str:
    if dtypes.rule(node).kind is STATISTIC:
        return "norms"
    return str(node.target).removeprefix("aten.").removesuffix(".default").removesuffix(".Tensor")


def _short(dtype: torch.dtype | None) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, str(dtype).removeprefix("torch."))
