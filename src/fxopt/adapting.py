"""Adapters on a model that `optimize` returned: several on one base, saved, loaded, merged."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from fxopt.dispatch import Dispatcher
from fxopt.errors import DataError, FxoptError
from fxopt.ir.capture import Call
from fxopt.ir.program import Program
from fxopt.passes.lora import Lora
from fxopt.passes.pipeline import Pipeline, pipeline
from fxopt.runtime import adapted, adapter_files
from fxopt.runtime.merge import Merge, MergeReport
from fxopt.runtime.random_inputs import drawn


class Adapting:
    """The part of `Optimized` that deals with adapters."""

    model: nn.Module
    dispatcher: Dispatcher
    passes: Pipeline

    def prepare(self, inputs: tuple[Any, ...] | Mapping[str, Any]) -> Program | None:
        """See `Optimized.prepare`."""
        raise NotImplementedError

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters on this base."""
        return tuple(name for name in self.dispatcher.pipelines if name is not None)

    @property
    def active_adapter(self) -> str | None:
        """The adapter that calls run with; None while adapters are disabled, or if there is none."""
        return self.dispatcher.active if self.dispatcher.enabled else None

    def add_adapter(self, name: str, lora: str | Lora | None = None, *, inputs: tuple[Any, ...] | Mapping[str, Any] | None = None) -> None:
        """Another adapter on the same base, active from now on; its parameters are made when the next call is captured.

        Args:
            name: a word that no adapter has yet.
            lora: its lora pass ("lora(rank=4, targets=[q_proj])" or a value); None: like the present one.
            inputs: an example call, as `optimize` takes it: capture now.

        Raises:
            FxoptError: the name is taken, or the pipeline has no lora pass.
        """
        present = next((p for p in self.passes if isinstance(p, Lora)), None)
        if present is None or name in self.adapters:
            raise FxoptError(f"there is an adapter {name!r} already" if present else "the pipeline adds no adapters",
                             do="choose another name" if present else "optimize with a lora pass")
        chosen = next(iter(pipeline(lora))) if lora is not None else present
        if not isinstance(chosen, Lora):
            raise FxoptError(f"an adapter is described by a lora pass, not by {chosen}")
        chosen = dataclasses.replace(chosen, adapter=name)
        self.dispatcher.pipelines[name] = Pipeline(tuple(chosen if p is present else p for p in self.passes))
        self.set_adapter(name)
        if inputs is not None:
            self.prepare(inputs)

    def set_adapter(self, name: str) -> None:
        """Switch to an adapter: calls run with it, and only its parameters take gradients.

        Raises:
            FxoptError: there is no adapter of this name.
        """
        if name not in self.adapters:
            raise FxoptError(f"there is no adapter {name!r}", do=f"they are {', '.join(self.adapters) or 'none: optimize with a lora pass'}")
        self.dispatcher.activate(name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model is its base, bit for bit: the original code on the base's weights (dequantized where quantized)."""
        if not self.dispatcher.enabled:
            yield
            return
        self.dispatcher.enabled = False
        try:
            with adapted.using(self.model, None):
                yield
        finally:
            self.dispatcher.enabled = True

    def save_adapter(self, folder: str | Path) -> None:
        """Write the active adapter as a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`).

        An adapter that is not called `default` goes into a folder of its name inside, as in PEFT.

        Raises:
            DataError: the model has no adapters, or has one that PEFT's files cannot hold.
        """
        config = getattr(self.model, "config", None)
        adapter_files.save(self.model, self.dispatcher.active, folder, getattr(config, "_name_or_path", None) or None)

    def load_adapter(self, folder: str | Path) -> None:
        """Read a PEFT folder into the active adapter (its own, or the one above it that has a folder of the adapter's name).

        Raises:
            DataError: the file is malformed, or its targets, shapes or scale are not the model's.
        """
        if self.dispatcher.pending or self.dispatcher.active is None:
            raise DataError("the model has no adapters yet", do="optimize with the lora pass and `inputs`, then load")
        adapter_files.load(self.model, self.dispatcher.active, folder)

    def merge(self, base: str | None = None, *, original: nn.Module | Mapping[str, torch.Tensor] | None = None, adapter: str | None = None,
              inputs: tuple[Any, ...] | Mapping[str, Any] | None = None, certify: bool = True, dtype: torch.dtype | None = None) -> nn.Module:
        """An ordinary module of the original class, with an adapter folded into dense weights. A copy; certified.

        Args:
            base: which function is wanted where the base is quantized. "stored": what the codes stand for plus the adapter, as it
                was trained. "original": the weights before quantization plus the adapter. Not asked where nothing is quantized.
            original: for "original", a module or state dict with those weights under the model's names.
            adapter: its name; None: the active one.
            inputs: an example call for the certificate. None: like the last call, with random token ids if it has any.
            certify: compare the outputs of the merged module and of the adapted model. `merge_report` has the numbers.
            dtype: of the merged module's floating point state, if it should be another than the model's.

        Raises:
            FxoptError: no adapter is active; or the base is quantized and `base` does not say which function is wanted.
            DataError: `original` lacks a weight, or has another than the model was quantized from.
            CheckError: the merge changes nothing (the adapter is zero, or lost in rounding) or too much (not finite; not the adapted model).
        """
        name = adapter or self.active_adapter
        if name is None or self.dispatcher.pending and name == self.active_adapter:
            raise FxoptError("there is no adapter to merge" if not self.adapters else "no adapter is active, or it has not been made yet",
                             do="optimize with a lora pass and `inputs`, or leave `disable_adapter()`" if not adapter else "call the model once")
        merge = Merge(self.model, name, base, original, dtype)
        self._merge_report = merge.report
        if certify:
            last = self.dispatcher.example
            if inputs is None and last is None:
                raise FxoptError("the model was not called yet, so there is no example to certify the merge on", do="give `inputs`")
            if inputs is not None:
                call, what = call_of(inputs), "given"
            else:  # in parts, no graph says which input are token ids
                call, what = (last, "the last call") if self.dispatcher.partial else drawn(list(self.program.history())[-1], last)
            self._merge_report = merge.certify(call, what, self if name == self.active_adapter else None)
            self.dispatcher.example = last
        return merge.module

    @property
    def merge_report(self) -> MergeReport:
        """What the last `merge` did, in numbers; `print` it."""
        if "_merge_report" not in self.__dict__:
            raise FxoptError("nothing was merged yet", do="call `merge`")
        return self.__dict__["_merge_report"]

    def dense(self) -> Any:
        """`with opt.dense(): opt.generate(...)`: adapted weights are computed once for the block, not at every use.

        Memory: one dense copy of the adapted weights. No gradients inside.
        """
        return adapted.dense_weights(self.model)


def call_of(inputs: Any) -> Call:
    """A call from a tuple of arguments, a dict of keyword arguments, or the only argument."""
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {})
    return Call.of(args, kwargs)
