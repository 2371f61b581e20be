"""Whether two modules are alike: the same classes, tensors and attributes, all the way down.

What Python code does with a module depends on its arguments, and on what it reads of the module. `differences` lists the
attributes that two alike modules do not share; whether that matters depends on whether the code reads them.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn

# Compared with `==`; a float by its text, since nan is nan and -0.0 is not 0.0.
_VALUES = (int, bool, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, inspect.Signature, range, slice)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Bookkeeping of nn.Module that its call does not read, or that is compared in another way.
_OWN = {*_HOOKS, "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_is_full_backward_hook",
        "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_parameters", "_buffers", "_modules"}
_PLAIN_SIZE = type("Plain", (), {}).__basicsize__
_DEPTH = 8

Attribute = tuple[nn.Module, str]


class Unlike(Exception):
    """Two modules, or two calls, cannot be compared or are not alike. The message is a sentence for the report."""


def plain(value: Any) -> bool:
    """Whether a value is compared with `==`, and can be an argument of a call that is compared."""
    return type(value) is float or type(value) is complex or type(value) in _VALUES


class Twins:
    """Two modules of the same structure.

    Attributes:
        of: for each module of the first one, by id, the module at its place in the second.
        differing: the attributes of the first one's modules that the second one does not share.

    Raises:
        Unlike: if they differ in classes, in names, in what a tensor is, or carry hooks that are not `known`.
    """

    def __init__(self, first: nn.Module, second: nn.Module, known: frozenset[int] = frozenset(), apart: frozenset[str] = frozenset()) -> None:
        self.of: dict[int, nn.Module] = {}
        self._mine: set[int] = {id(m) for m in first.modules()}
        self._pair(first, second, known, "")
        self.differing: list[Attribute] = []
        for module, skipped in [(m, apart if m is first else frozenset()) for m in first.modules()]:
            self.differing += [(module, name) for name in self._attributes(module, self.of[id(module)], skipped)]

    def _pair(self, a: nn.Module, b: nn.Module, known: frozenset[int], path: str) -> None:
        if type(a) is not type(b):
            raise Unlike(f"{path or 'it'} is a {type(b).__name__}, not a {type(a).__name__}")
        if self.of.setdefault(id(a), b) is not b:
            raise Unlike(f"{path} is shared in another way")
        hooked(b, known)
        for store in ("_parameters", "_buffers"):
            x, y = a.__dict__[store], b.__dict__[store]
            if list(x) != list(y) or any(_kind(x[name]) != _kind(y[name]) for name in x):
                raise Unlike(f"the tensors of {path or 'it'} have other names, sizes, dtypes or flags")
        if list(a._modules) != list(b._modules):
            raise Unlike(f"{path or 'it'} has other submodules")
        for name, child in a._modules.items():
            other = b._modules[name]
            if (child is None) != (other is None):
                raise Unlike(f"{path or 'it'} has other submodules")
            if child is not None and id(child) not in self.of:
                self._pair(child, other, known, f"{path}.{name}".lstrip("."))
            elif child is not None and self.of[id(child)] is not other:
                raise Unlike(f"{path} shares its submodules in another way")

    def _attributes(self, a: nn.Module, b: nn.Module, skipped: frozenset[str]) -> Iterator[str]:
        x, y = vars(a), vars(b)
        for name in {**x, **y}:
            if name not in _OWN and name not in skipped and not (name in x and name in y and self.equal(x[name], y[name])):
                yield name

    def equal(self, a: Any, b: Any, depth: int = 0) -> bool:
        """Whether two values are the same to code that does not look at identity; modules must stand at the same place."""
        if depth > _DEPTH:
            return False
        if isinstance(a, nn.Module):
            return self.of.get(id(a)) is b if id(a) in self._mine else a is b
        if a is b:
            return not _holds(a, self._mine)
        if type(a) is not type(b):
            return False
        if plain(a):
            return repr(a) == repr(b) if isinstance(a, (float, complex)) else bool(a == b)
        down: Callable[[Any, Any], bool] = functools.partial(self.equal, depth=depth + 1)
        if type(a) in (list, tuple, torch.Size) or (isinstance(a, tuple) and hasattr(a, "_fields")):
            return len(a) == len(b) and all(map(down, a, b))
        if type(a) is dict:
            return list(a) == list(b) and all(down(a[key], b[key]) for key in a)
        if type(a) in (set, frozenset):
            return all(map(plain, a)) and a == b
        if isinstance(a, functools.partial):
            return down(a.func, b.func) and down(a.args, b.args) and down(a.keywords, b.keywords)
        if isinstance(a, types.MethodType):
            return a.__func__ is b.__func__ and down(a.__self__, b.__self__)
        if isinstance(a, types.FunctionType):
            return a.__code__ is b.__code__ and down(a.__defaults__, b.__defaults__) and down(a.__kwdefaults__, b.__kwdefaults__) \
                and down([c.cell_contents for c in a.__closure__ or ()], [c.cell_contents for c in b.__closure__ or ()])
        if hasattr(a, "__dict__") and type(a).__basicsize__ == _PLAIN_SIZE:  # an object whose whole state is its attributes
            return down(vars(a), vars(b))
        return False


def _holds(value: Any, modules: set[int]) -> bool:
    """Whether one object that both have leads to a module of the first: to the second it is something else."""
    if isinstance(value, types.MethodType):
        return id(value.__self__) in modules
    if type(value) in (list, tuple):
        return any(id(item) in modules for item in value)
    if type(value) is dict:
        return any(id(item) in modules for item in value.values())
    return False


def hooked(module: nn.Module, known: frozenset[int] = frozenset()) -> None:
    """Raise Unlike if the module itself has hooks that are not `known`."""
    for name in _HOOKS:
        if not module.__dict__[name].keys() <= known:
            raise Unlike(f"a {type(module).__name__} in it has hooks")


def _kind(tensor: torch.Tensor | None) -> Any:
    if tensor is None:
        return None
    return type(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad, sorted(vars(tensor))


def contents(module: nn.Module) -> dict[Attribute, Any]:
    """What the attributes of a module and of its submodules hold, by identity; lists and dicts by what is in them."""
    found = {}
    for each in module.modules():
        for name, value in vars(each).items():
            if name not in _HOOKS:
                found[each, name] = _identity(value)
    return found


def _identity(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return id(value), tuple(map(id, value))
    if isinstance(value, dict):
        return id(value), tuple((key, id(item)) for key, item in value.items())
    if isinstance(value, (set, frozenset)):
        return id(value), frozenset(map(id, value))
    return id(value)
