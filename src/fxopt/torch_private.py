"""What fxopt uses of torch that torch does not document: every such name is here, and nowhere else.

`tests/test_torch_private.py` tries each of them, so that a release of torch that drops or changes one says so by name. The scoped
patches of a capture are in `ir/torch_patches.py`, what they are undone with too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch._C._dynamo.guards import TensorGuards
from torch._dynamo import config as dynamo_config
from torch._dynamo.source import ConstantSource
from torch._functorch import aot_autograd
from torch._guards import detect_fake_mode
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.nn.modules.module import _global_buffer_registration_hooks as buffer_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

if torch.distributed.is_available():  # some builds of torch come without it
    from torch.distributed.distributed_c10d import _get_default_store as default_store

__all__ = ["ConstantSource", "DataDependentOutputException", "DimDynamic", "DisableTorchFunctionSubclass", "DynamicOutputShapeException", "FakeTensor",
           "FakeTensorMode", "HigherOrderOperator", "OpOverload",
           "TorchDispatchMode", "aot_autograd", "buffer_hooks", "cpu_has", "default_store", "detect_fake_mode", "dynamo_config", "composites_on_symbols", "foreach_copy_", "foreach_lerp_", "foreach_mul", "foreach_mul_",
           "foreach_norm", "fused_adamw_", "has_kernel", "in_backward", "make_fx", "make_wrapper_subclass", "pytree", "set_grad_enabled", "tensor_guards"]

# Up to torch 2.12 some composite operators (`linear` without bias) ask symbolic sizes for the number of elements, unless Python's dispatcher takes
# them apart. It makes fake runs a third slower, so later releases go without.
if torch.torch_version.TorchVersion(torch.__version__) < (2, 13):
    from torch._dispatch.python import enable_python_dispatcher as composites_on_symbols
else:
    composites_on_symbols = contextlib.nullcontext

make_wrapper_subclass = torch.Tensor._make_wrapper_subclass
DisableTorchFunctionSubclass = torch._C.DisableTorchFunctionSubclass
set_grad_enabled = torch._C._set_grad_enabled  # at once, and not a context manager
foreach_copy_, foreach_lerp_, foreach_mul, foreach_mul_, foreach_norm = (
    torch._foreach_copy_, torch._foreach_lerp_, torch._foreach_mul, torch._foreach_mul_, torch._foreach_norm)
fused_adamw_ = torch._fused_adamw_
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
"""`has_kernel("aten::linear", "CompositeImplicitAutograd")`: whether an operator has a kernel of its own for a dispatch key."""


def tensor_guards(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """`check(*others)`: whether tensors, as many, have in each place the type, dtype, device, shape and `requires_grad` of these, in the
    present autocast and inference modes, and no tensor is there twice. In one call, of 0.1 microseconds for each tensor."""
    return TensorGuards(*tensors, dynamic_dims_sizes=[list(t.shape) for t in tensors], dynamic_dims_strides=[[None] * t.dim() for t in tensors]).check


def in_backward() -> bool:
    """Whether this thread is inside a backward: what runs now is a hook, or a checkpointed forward that is run again."""
    return torch._C._current_graph_task_id() != -1


def cpu_has(units: str) -> bool:
    """Whether this processor has arithmetic units of a kind: "avx512_bf16", "amx_tile" (bf16 products) or "amx_fp16"."""
    return {"avx512_bf16": torch.cpu._is_avx512_bf16_supported, "amx_tile": torch.cpu._is_amx_tile_supported, "amx_fp16": torch.cpu._is_amx_fp16_supported}[units]()
