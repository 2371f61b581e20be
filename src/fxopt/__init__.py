"""fxopt: a compiler-style model-transform library for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fxopt import errors

if TYPE_CHECKING:
    from fxopt import data
    from fxopt.api import Optimized, optimize
    from fxopt.passes import presets
    from fxopt.passes.pipeline import Pipeline, parse
    from fxopt.runtime.gguf_model import load_gguf
    from fxopt.runtime.region import differentiable_twice
    from fxopt.train.callbacks import Callback
    from fxopt.train.loader import Loader
    from fxopt.train.trainer import Trainer, fit

__all__ = ["Callback", "Loader", "Optimized", "Pipeline", "Trainer", "data", "differentiable_twice", "errors", "fit", "load_gguf", "optimize", "parse", "presets"]

# Loaded when first asked for: importing torch takes seconds, and `fxopt --help` needs none of it.
_PLACES = {"Optimized": "fxopt.api", "optimize": "fxopt.api", "Pipeline": "fxopt.passes.pipeline", "parse": "fxopt.passes.pipeline",
           "fit": "fxopt.train.trainer", "Trainer": "fxopt.train.trainer", "Callback": "fxopt.train.callbacks", "Loader": "fxopt.train.loader",
           "load_gguf": "fxopt.runtime.gguf_model", "differentiable_twice": "fxopt.runtime.region", "data": "fxopt.data", "presets": "fxopt.passes.presets"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'fxopt' has no attribute {name!r}")
    module = importlib.import_module(_PLACES[name])
    found = module if name in ("data", "presets") else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
