"""An output that is computed only if somebody looks at it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxopt.errors import CallError
from fxopt.torch_private import DisableTorchFunctionSubclass, make_wrapper_subclass, pytree


class LazyOutput(torch.Tensor):
    """A tensor whose values do not exist until the first operation on it (the logits beside a fused loss).

    Shape, dtype and device are known; any operation, also `.numpy()` or printing, computes it once, with autograd.
    If a parameter that it depends on was changed in the meantime, that is an error, not a wrong value (writes through
    `.data` bypass torch's version counter, and cannot be seen).
    """

    _compute: Callable[[], torch.Tensor]
    _made: torch.Tensor | None
    _versions: list[tuple[torch.Tensor, int]]

    @staticmethod
    def of(shape: torch.Size, dtype: torch.dtype, device: torch.device, compute: Callable[[], torch.Tensor], depends: list[torch.Tensor]) -> LazyOutput:
        """A lazy tensor. `depends`: tensors that must not be written before it is computed."""
        requires_grad = (dtype.is_floating_point or dtype.is_complex) and torch.is_grad_enabled() and any(t.requires_grad for t in depends)
        self = make_wrapper_subclass(LazyOutput, shape, dtype=dtype, device=device, requires_grad=requires_grad)
        self._compute, self._made = compute, None
        self._versions = [(t, t._version) for t in depends if not t.is_inference()]
        return self

    def value(self) -> torch.Tensor:
        """The plain tensor."""
        if self._made is None:
            if any(t._version != version for t, version in self._versions):
                raise CallError("this output was not computed when the model ran, and a parameter it depends on has changed since",
                                do='read it before the optimizer step, or keep it: use the pass `loss(logits="keep")`')
            with torch.set_grad_enabled(self.requires_grad):  # read first without gradients, it may still be differentiated later
                self._made = self._compute()
            self._versions = []
            del self._compute
        return self._made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KNOWN:
            with DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        plain = pytree.tree_map(lambda x: x.value() if isinstance(x, LazyOutput) else x, (args, kwargs or {}))
        return func(*plain[0], **plain[1])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = pytree.tree_map(lambda x: x.value() if isinstance(x, LazyOutput) else x, (args, kwargs or {}))
        return func(*plain[0], **plain[1])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.value().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.value().detach().clone()


_KNOWN = {
    torch.Tensor.shape.__get__, torch.Tensor.dtype.__get__, torch.Tensor.device.__get__, torch.Tensor.size, torch.Tensor.dim,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad.__get__, torch.Tensor.ndim.__get__, torch.Tensor.numel, torch.Tensor.is_floating_point, torch.Tensor.__len__,  # type: ignore[attr-defined]
    torch.Tensor.is_sparse.__get__, torch.Tensor.layout.__get__, torch.Tensor.is_cuda.__get__, torch.Tensor.is_complex,  # type: ignore[attr-defined]
}
