"""Callbacks of other trainers, recognised by where their classes come from."""

from __future__ import annotations

from typing import Any

from fxopt.errors import DataError
from fxopt.train.callbacks import EVENTS, Callback
from fxopt.train.huggingface import TrainerCallbackHooked
from fxopt.train.lightning import Hooked


def adopted(callback: Any, settings: Any, task: Any) -> Callback:
    """A callback of ours, of Lightning's or of Hugging Face's, as one of ours.

    Raises:
        DataError: something else.
    """
    if isinstance(callback, Callback):
        _known(callback)
        return callback
    if isinstance(callback, type):
        raise DataError(f"The callback {callback.__name__} is a class.", where="callbacks", do=f"Give an object: {callback.__name__}(...).")
    for cls in type(callback).__mro__:
        if cls.__name__ == "TrainerCallback" and cls.__module__.startswith("transformers."):
            return TrainerCallbackHooked(callback, settings)
        if cls.__name__ == "Callback" and cls.__module__.startswith(("lightning.", "pytorch_lightning.")):
            return Hooked(callback, settings, whole=True, task=task)
    raise DataError(f"A {type(callback).__name__} is no callback.", where="callbacks", do="Derive it from fxopt.Callback, or give one of Lightning's or Hugging Face's.")


def _known(callback: Callback) -> None:
    odd = [name for name in dir(type(callback)) if name.startswith("on_") and name not in EVENTS]
    if odd:
        raise DataError(f"There is no event {odd[0]!r}.", where=type(callback).__name__, do=f"The events are {', '.join(EVENTS)}.")
