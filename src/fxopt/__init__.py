"""fxopt: a compiler-style model-transform library for PyTorch."""

from fxopt import errors
from fxopt.api import Optimized, optimize
from fxopt.passes import presets
from fxopt.passes.pipeline import Pipeline, parse
from fxopt.runtime.loop import fit

__all__ = ["Optimized", "Pipeline", "errors", "fit", "optimize", "parse", "presets"]
