"""An interpreted twin of a `@triton.jit` function, and the language that it speaks while it runs.

Triton decides when `@triton.jit` runs whether a function is compiled or interpreted, for all of them. A twin is a copy of the
function whose globals name the twins of its helpers; `tl` functions are replaced for the time of a launch only. Helpers must
be globals of the kernel's module (imported by name), not attributes of another module.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import triton
import triton.language as tl
import triton.runtime.interpreter as stock
from triton.language.semantic import TritonSemantic
from triton.runtime.jit import JITFunction

from interpreter.builder import Builder, checked_reduce, checked_scan

BUILDER = Builder()
_SEMANTIC = TritonSemantic(BUILDER)
_LOCK = threading.RLock()
_MISSING = object()

# Triton imports its second language at this call; it must not do so while `tl` is replaced.
triton.runtime.jit.mangle_type(1)


class Twin(stock.InterpretedFunction):
    """Called by kernels: the language is replaced already."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)


_TWINS: dict[JITFunction, Twin] = {}


def twin(function: JITFunction) -> Twin:
    """The interpreted twin of a jitted function; made once."""
    if function not in _TWINS:
        original = function.fn
        copied = dict(original.__globals__)
        clone = types.FunctionType(original.__code__, copied, original.__name__, original.__defaults__, original.__closure__)
        clone.__kwdefaults__, clone.__annotations__ = original.__kwdefaults__, original.__annotations__
        clone.__module__, clone.__qualname__ = original.__module__, original.__qualname__
        _TWINS[function] = Twin(clone)  # Before its helpers: they may call it.
        for name in original.__code__.co_names:
            if isinstance(copied.get(name), JITFunction):
                copied[name] = twin(copied[name])
        copied["interpreter_semantic"] = _SEMANTIC
    return _TWINS[function]


def _bound(member: Callable) -> Callable:
    """A builtin of the language, made of our operations."""

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("_semantic", None)
        return member(*args, **kwargs, _semantic=_SEMANTIC)

    return call


def _method(function: Twin) -> Callable:
    return lambda *args, **kwargs: function(*args, **kwargs)


def _language() -> list[tuple[Any, str, Any]]:
    """(owner, name, replacement) of everything in `tl` that kernels use."""
    found: dict[tuple[int, str], tuple[Any, str, Any]] = {}
    scope = stock._LangPatchScope()
    try:
        stock._patch_lang_tensor(tl.tensor, scope)
        for module in (tl, tl.core):
            stock._patch_lang_core(module, scope)
        for owner, name, _ in scope._changes:
            found[id(owner), name] = (owner, name, vars(owner)[name])
    finally:
        scope.restore()
    for owner in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
        for name, member in inspect.getmembers(owner, tl.core.is_builtin):
            found.setdefault((id(owner), name), (owner, name, _bound(member)))
    for owner in (tl, tl.standard, tl.random, tl.tensor):
        for name, member in inspect.getmembers(owner, lambda value: isinstance(value, JITFunction)):
            found[id(owner), name] = (owner, name, _method(twin(member)) if owner is tl.tensor else twin(member))
    for owner in (tl, tl.core):
        found[id(owner), "reduce"] = (owner, "reduce", checked_reduce)
        found[id(owner), "associative_scan"] = (owner, "associative_scan", checked_scan)
    return list(found.values())


_REPLACEMENTS: list[tuple[Any, str, Any]] = []


@contextlib.contextmanager
def interpreted_language() -> Iterator[None]:
    """Inside, `tl` works on arrays; afterwards it is as before. One thread at a time."""
    with _LOCK:
        if not _REPLACEMENTS:
            _REPLACEMENTS.extend(_language())
        before = [(owner, name, vars(owner).get(name, _MISSING)) for owner, name, _ in _REPLACEMENTS]
        try:
            for owner, name, new in _REPLACEMENTS:
                setattr(owner, name, new)
            yield
        finally:
            for owner, name, old in before:
                if old is _MISSING:
                    delattr(owner, name)
                else:
                    setattr(owner, name, old)
