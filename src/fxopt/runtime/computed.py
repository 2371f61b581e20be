"""The value of an adapted weight as the original code reads it: an ordinary tensor, but writing into it is an error."""

from __future__ import annotations

from typing import Any

import torch

from fxopt.errors import FxoptError
from fxopt.torch_private import DisableTorchFunctionSubclass, pytree

_ALLOWED = {"requires_grad_", "retain_grad"}
_COPIES = {"__deepcopy__", "__reduce_ex__"}


class Computed(torch.Tensor):
    """base + scale * B A, made anew at every read: what is written into it would be lost, so that writing raises.

    Views of it, `.data` and `.detach()` included, are of this class too. Everything computed from it is an ordinary tensor.
    """

    @classmethod
    def of(cls, value: torch.Tensor) -> torch.Tensor:
        """A value, with its place in autograd. In a compiler's trace, which holds no memory to write into, it stays what it is."""
        return value if type(value) is not torch.Tensor or torch.compiler.is_compiling() else value.as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if _writes(func, name, args, kwargs):
            raise FxoptError(f"`{name}` would write into an adapted weight, which is computed from its base and adapter when it is read",
                             do="write into the adapter's own parameters (`lora_A`, `lora_B`), or into the base's: `module._parameters`; "
                                "`opt.merge()` gives a module with ordinary weights")
        if name in _COPIES:
            args = pytree.tree_map_only(Computed, lambda value: value.as_subclass(torch.Tensor), args)
        with DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        if name in _COPIES:
            return out
        if isinstance(out, torch.Tensor):
            return cls.of(out) if _shares(out, args) else out
        if isinstance(out, (tuple, list)) and any(isinstance(each, torch.Tensor) and _shares(each, args) for each in out):
            return type(out)(cls.of(each) for each in out)  # `split`, `unbind` and the like
        return out


def _shares(value: torch.Tensor, args: Any) -> bool:
    """Whether a result lies in the memory of an argument."""
    if isinstance(value, Computed):
        return False  # marked already: the argument itself
    try:
        storage = value.untyped_storage()._cdata
        return any(isinstance(each, Computed) and each.untyped_storage()._cdata == storage for each in args)
    except NotImplementedError:  # inside a function transform: a batched tensor, of no memory of its own
        return False


def _writes(func: Any, name: str, args: Any, kwargs: Any) -> bool:
    """Whether a call changes the values of its first argument, or of `out`."""
    if "out" in kwargs and any(isinstance(value, Computed) for value in pytree.tree_leaves(kwargs["out"])):
        return True
    first = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(first, Computed) or name in _ALLOWED:
        return False
    if name == "__set__":  # of an attribute: `.grad` is its own tensor
        return func == torch.Tensor.data.__set__
    in_place = name.startswith("__i") and name.endswith("__") and name not in ("__index__", "__int__", "__invert__")
    return in_place or name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or bool(kwargs.get("inplace"))
