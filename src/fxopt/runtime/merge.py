"""Adapters folded into ordinary weights, and a certificate of what that did to the model's outputs.

A merged weight is base + scale * B A (DoRA: the same, rescaled), added in at least fp32 and rounded once to the weight's
dtype. On a quantized base two functions may be meant, and only the caller knows which: the one that was trained ("stored":
what the codes stand for, plus the adapter), or the one that would have been ("original": the 16- or 32-bit weights that
were quantized, plus the adapter).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from fxopt.errors import CallError, CaptureError, CheckError, DataError, FxoptError
from fxopt.ir import meta
from fxopt.ir.capture import Call
from fxopt.kernels import tolerance
from fxopt.runtime import adapted
from fxopt.runtime.binding import unbind
from fxopt.runtime.difference import Difference, Outputs, difference, outputs

BASES = ("stored", "original")
_SHOWN = 3


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. `str()` of it is for reading.

    Attributes:
        adapter: its name. base: "dense", "stored" or "original".
        weights: how many weights the adapter was folded into.
        unchanged: those that are the base's bit for bit.
        change: ||W' - W|| / ||W|| of the weight that changed most (Frobenius norms; W: the base that was chosen).
        lost: ||error of rounding W' to its dtype|| / ||what the adapter adds||, over all merged weights: 1 is as bad as no merge.
        replaced: frozen weights without an adapter that were taken from `original` because they differ there.
        inputs: what the certificate was made on: "given", "random" or "the last call"; None: not certified.
        merged: the merged model against the adapted one. adapter_effect: the base alone against the adapted model.
        allowed: for a dense or stored base, the largest `merged.relative` that rounding explains.
        notes: what else a reader should know.
    """

    adapter: str
    base: str
    weights: int
    unchanged: tuple[str, ...]
    change: float
    lost: float
    replaced: tuple[str, ...] = ()
    inputs: str | None = None
    merged: Difference | None = None
    adapter_effect: Difference | None = None
    allowed: float | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.adapter!r} merged into {self.weights} weights of the {self.base} base: the weights changed by up to "
                 f"{100 * self.change:.2g}%, rounding took {100 * self.lost:.2g}% of the change"]
        if self.unchanged:
            lines.append(f"unchanged bit for bit: {_some(self.unchanged)}")
        if self.replaced:
            lines.append(f"also taken from the original: {_some(self.replaced)}")
        if self.merged is not None and self.adapter_effect is not None:
            limit = "" if self.allowed is None else f" (allowed {self.allowed:.1e})"
            lines += [f"on {'the inputs of the last call' if self.inputs == 'the last call' else f'{self.inputs} inputs'}{f', {self.merged.positions} positions' if self.merged.positions else ''}:",
                      f"  merged against adapted: {self.merged}{limit}", f"  base against adapted:   {self.adapter_effect}"]
        else:
            lines.append("not certified")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


class Merge:
    """One merge: a module of the original classes, whose weights are written, checked, and can be written again.

    Args:
        model: the adapted model; it is not changed.
        adapter: name of the adapter to fold in; None: none, the module is the base alone in dense weights.
        base: "stored" or "original"; None where no weight is quantized.
        original: for "original", a module or state dict with the base's 16- or 32-bit weights under the model's names.
        dtype: of the merged module's floating point state; None: as the model's.

    Raises:
        FxoptError: the choice of the base is missing or unknown, or there is no such adapter.
        DataError: `original` lacks a weight, or holds another one than the model was quantized from.
        CheckError: the merge changes nothing, or next to nothing, for a reason that is said; or a merged weight is not finite.
    """

    def __init__(self, model: nn.Module, adapter: str | None, base: str | None = None, original: nn.Module | Mapping[str, torch.Tensor] | None = None,
                 dtype: torch.dtype | None = None) -> None:
        self.model, self.adapter, self.dtype = model, adapter, dtype
        records = [weight for *_, weight in adapted.weights_of(model)]
        if adapter is not None and not any(adapter in weight.adapters for weight in records):
            known = sorted({name for weight in records for name in weight.adapters})
            raise FxoptError(f"the model has no adapter {adapter!r}", do=f"they are {', '.join(known)}" if known else "optimize with a lora pass")
        self.base = _chosen(base, original, [weight.name for weight in records if weight.stored is not None])
        self.original = None if self.base != "original" else dict(original.state_dict() if isinstance(original, nn.Module) else original or {})
        self.module = self._copy()
        self.replaced = self._replace()
        self.report = self._first_write()

    def _copy(self) -> nn.Module:
        """The model without adapters; weights that are about to be written are shared with it until then."""
        memo: dict[int, Any] = {}
        for module, leaf, _ in adapted.weights_of(self.model):
            for kept in (module._parameters.get(leaf), module._modules.get(leaf), *_holders(module, leaf)):
                if kept is not None:
                    memo[id(kept)] = kept
        new = copy.deepcopy(self.model, memo)
        unbind(new)
        self.places: list[tuple[nn.Module, nn.Module, str]] = []
        for path, module, weights in list(adapted.adapted_modules(new)):
            source = self.model.get_submodule(path)
            self.places += [(source, module, leaf) for leaf in weights]
            adapted.strip(module)
            for leaf in weights.keys() & module._parameters.keys():  # written below; until then a cast must not reach the model's own
                module._parameters[leaf] = nn.Parameter(module._parameters[leaf].new_empty(0), requires_grad=False)
        if self.dtype is not None:
            new.to(self.dtype)
        return new

    def _replace(self) -> tuple[str, ...]:
        """Take frozen weights that no adapter changes from the original too. What is trained whole stays as it is trained."""
        if self.original is None:
            return ()
        written = {id(module._parameters[leaf]) for _, module, leaf in self.places if leaf in module._parameters}
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        replaced = []
        for name, parameter in self.module.named_parameters():
            if id(parameter) in written:
                continue
            given = self.original.get(name)
            if name in frozen and given is not None and parameter.is_floating_point():
                _check_same(name, parameter, given, "the model's")
                if not torch.equal(given.to(parameter), parameter):
                    replaced.append(name)
                    with torch.no_grad():
                        parameter.copy_(given)
        return tuple(replaced)

    def _base(self, source: nn.Module, leaf: str) -> torch.Tensor:
        """The weight that the adapter is added to, in its own dtype."""
        kept = adapted.base_of(source, leaf).detach()
        if self.original is None:
            return kept
        name = adapted.weight_of(source, leaf).name
        if name not in self.original:
            missing = [n for s, _, l in self.places if (n := adapted.weight_of(s, l).name) not in self.original]
            raise DataError(f"the original lacks {len(missing)} of {len(self.places)} weights", where=_some(missing),
                            do="give the module, or its state dict, that the base was quantized from")
        _check_same(name, kept, self.original[name], "what the base was quantized from")
        return self.original[name].detach().to(kept.device)

    def _value(self, source: nn.Module, leaf: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(the base, the merged weight), both fp64, not rounded yet."""
        wide = self._base(source, leaf).double()
        if self.adapter not in adapted.weight_of(source, leaf).adapters:
            return wide, wide
        return wide, adapted.with_adapter(wide, source, leaf, self.adapter)

    def _first_write(self) -> MergeReport | None:
        """Write every weight and say what that did."""
        touched: list[str] = []
        unchanged: list[str] = []
        change = added = error = 0.0
        written: dict[int, nn.Parameter] = {}
        with torch.no_grad():
            for source, module, leaf in self.places:
                weight = adapted.weight_of(source, leaf)
                if id(weight) in written:  # another place of a tied weight
                    _put(module, leaf, written[id(weight)], weight.position)
                    continue
                base, value = self._value(source, leaf)
                kept = module._parameters.get(leaf)
                dtype = self.dtype or (kept.dtype if kept is not None else source._modules[leaf].stored.dtype)
                made = value.to(dtype)
                if base.isfinite().all() and not made.isfinite().all():
                    raise CheckError(f"the merged weight {weight.name} is not finite in {dtype}", where=f"the adapter {self.adapter!r}",
                                     do="merge with dtype=torch.float32" if value.isfinite().all() else "the adapter's factors are not finite or too large: train again")
                if self.adapter in weight.adapters:
                    touched.append(weight.name)
                    if torch.equal(made, base.to(dtype)):
                        unchanged.append(weight.name)
                    gap = float((value - base).norm())
                    change, added = max(change, gap / max(float(base.norm()), _TINY)), added + gap**2
                    error += float((made.double() - value).norm()) ** 2
                written[id(weight)] = nn.Parameter(made, requires_grad=False)
                _put(module, leaf, written[id(weight)], weight.position)
        if self.adapter is None:
            return None
        if len(unchanged) == len(touched):
            raise _nothing(self.adapter, touched, change, dtype)
        lost = (error / added) ** 0.5
        if lost > tolerance.MERGE_LOST:
            raise CheckError(f"merging the adapter {self.adapter!r} loses it: rounding to {dtype} takes {100 * lost:.0f}% of what it adds", where=_some(touched),
                             do="merge with dtype=torch.float32, or train the adapter further")
        notes = (f"rounding to {dtype} takes {100 * lost:.0f}% of what the adapter adds: dtype=torch.float32 keeps it",) if lost > tolerance.MERGE_LOSES else ()
        return MergeReport(self.adapter, self.base or "dense", len(touched), tuple(unchanged), change, lost, self.replaced, notes=notes)

    @contextlib.contextmanager
    def rounded(self, eps: float, seed: int) -> Iterator[None]:
        """Inside, every floating point parameter of the module is moved by `eps` (relative), up or down at random."""
        generator = torch.Generator().manual_seed(seed)
        mine = {(id(module), leaf) for _, module, leaf in self.places}
        others = [(p, p.detach().clone()) for m in self.module.modules() for leaf, p in m._parameters.items()
                  if p is not None and p.is_floating_point() and (id(m), leaf) not in mine]

        def write(moved: bool) -> None:
            with torch.no_grad():
                for source, module, leaf in self.places:
                    kept = module._parameters[leaf]
                    value = self._value(source, leaf)[1]
                    kept.copy_(_moved(value, eps, generator) if moved else value)
                for p, value in others:
                    p.copy_(_moved(value.double(), eps, generator) if moved else value)

        try:
            write(True)
            yield
        finally:
            write(False)

    def certify(self, call: Call, what: str, program: Callable[..., Any] | None) -> MergeReport:
        """The report with the outputs of the merged module compared, on one call, in evaluation mode.

        Args:
            what: how the report calls the call's inputs.
            program: the optimized model, whose active adapter is the merged one; None, or where it cannot run this call: the
                original code on adapted weights stands for it.

        Raises:
            CheckError: outputs are NaN; or, on a dense or stored base, they differ by more than rounding explains.
        """
        assert self.report is not None
        args, kwargs = call.rebuild(call.tensors)
        notes: list[str] = []

        def original_code(adapter: str | None) -> Outputs:
            with adapted.using(self.model, adapter):
                return outputs(type(self.model).forward(self.model, *args, **kwargs))

        def with_adapter() -> Outputs:
            try:
                return outputs(program(*args, **kwargs)) if program is not None else original_code(self.adapter)
            except (CallError, CaptureError) as error:
                notes.append(f"compared with the original code on adapted weights, not with a program: {error.what}")
                return original_code(self.adapter)

        with torch.no_grad(), evaluating(self.module), evaluating(self.model):
            mine, wanted, plain = outputs(self.module(*args, **kwargs)), with_adapter(), original_code(None)
            for whose, tensors in ((f"the model with the adapter {self.adapter!r}", wanted.tensors), ("the merged module", mine.tensors)):
                if any(bool(tensor.isnan().any()) for tensor in tensors):
                    raise CheckError(f"{whose} gives NaN on {what} inputs", do="give other `inputs`; if that does not help, train the adapter again")
            merged, effect = difference(wanted, mine), difference(wanted, plain)
            report = dataclasses.replace(self.report, inputs=what, merged=merged, adapter_effect=effect)
            if self.base == "original":
                if merged.relative > effect.relative:
                    notes.append("the change of base moves the outputs further than the adapter does: the adapter was trained on another base")
                return dataclasses.replace(report, notes=(*report.notes, *notes))
            dtypes = {t.dtype for t in (*mine.tensors, *wanted.tensors, *self.model.parameters()) if t.is_floating_point()}
            ran = getattr(program, "programs", ())  # they may compute in a coarser dtype than they return
            eps = max(torch.finfo(dtype).eps for dtype in dtypes.union(*(meta.float_dtypes(each.nodes) for each in ran)))
            with self.rounded(eps, seed=0):
                response = difference(mine, outputs(self.module(*args, **kwargs))).relative
        allowed = tolerance.merged(response, eps)
        if effect.relative <= allowed:
            notes.append("what the adapter does to these outputs is no more than rounding does: the certificate cannot see it")
        report = dataclasses.replace(report, allowed=allowed, notes=(*report.notes, *notes))
        if not merged.relative <= allowed:
            raise CheckError(f"the merged module is not the adapted model: outputs differ by {merged.relative:.1e} (relative), rounding explains {allowed:.1e}",
                             where=f"adapter {self.adapter!r}\n{report}", do="this is a bug of merging or of the optimized program: report it with this text")
        return report


_TINY = torch.finfo(torch.float64).tiny


def _chosen(base: str | None, original: Any, stored: list[str]) -> str | None:
    if base is not None and base not in BASES:
        raise FxoptError(f"there is no base {base!r} to merge into", do='base="stored" or base="original"')
    if base is None and original is not None:
        raise FxoptError("`original` is given, but not that it is the base to merge into", do='say base="original"')
    if base is None and stored:
        raise FxoptError(f"{len(stored)} weights are quantized: which function should the merged module be?", where=_some(stored),
                         do='base="stored": what the codes stand for plus the adapter, as it was trained; '
                            'base="original", original=...: the weights before quantization plus the adapter')
    if base == "original" and original is None:
        raise FxoptError('base="original" needs the weights', do="give original=, a module or a state dict with the weights before quantization")
    if base == "stored" and original is not None:
        raise FxoptError('base="stored" reads no `original`', do='leave it out, or say base="original"')
    return base if stored or base == "original" else None


def _check_same(name: str, kept: torch.Tensor, given: torch.Tensor, what: str) -> None:
    """Raise unless `given` may be the weight that `kept` is an approximation of."""
    if not given.is_floating_point() or given.shape != kept.shape:
        raise DataError(f"{name} of the original is {given.dtype} {tuple(given.shape)}, the model's is {kept.dtype} {tuple(kept.shape)}",
                        do="give the floating point weights before quantization, under the model's names")
    wide = given.detach().to(kept.device).double()
    error = float((kept.detach().double() - wide).norm() / wide.norm().clamp_min(_TINY))
    if not error <= tolerance.SAME_WEIGHT:
        raise DataError(f"{name} of the original is not {what}: they differ by {100 * error:.0f}% (relative, Frobenius)",
                        do="give the weights of the same model, in the same layout and under the same names")


def _nothing(adapter: str, names: Sequence[str], change: float, dtype: torch.dtype) -> CheckError:
    if change == 0.0:
        return CheckError(f"merging the adapter {adapter!r} changes nothing: it adds exactly zero to all of its {len(names)} weights", where=_some(names),
                          do="train it, load it, or merge another one: its B factors are zero, as at the start")
    return CheckError(f"merging the adapter {adapter!r} changes nothing: it changes the weights by up to {change:.1e} (relative), and {dtype} cannot hold that",
                      where=_some(names), do="merge with dtype=torch.float32, or train the adapter further")


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def _holders(module: nn.Module, leaf: str) -> list[Any]:
    return [module._modules.get(adapted.holder_name(leaf, factor)) for factor in adapted.FACTORS]


def _put(module: nn.Module, leaf: str, parameter: nn.Parameter, position: int) -> None:
    if leaf in module._parameters:
        module._parameters[leaf] = parameter
    else:
        adapted.put(module, leaf, parameter, position)


def _moved(value: torch.Tensor, eps: float, generator: torch.Generator) -> torch.Tensor:
    signs = torch.randint(0, 2, value.shape, generator=generator, dtype=torch.int8).to(value.device) * 2 - 1
    return value * (1 + eps * signs)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each submodule's own mode after."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode
