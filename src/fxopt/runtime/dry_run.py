"""What a graph would take: bytes alive at once, floating point operations, bytes moved. It runs on fake tensors of real sizes.

The fused ops run their ATen bodies on the fake tensors too, so that their scratch memory counts; bodies that read values take the
worst case for fake ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import flop_registry

from fxopt.errors import LowerError
from fxopt.ir import meta
from fxopt.kernels.blocks import two_only
from fxopt.kernels.catalog import CATALOG
from fxopt.kernels.live_attention import live_attention, live_attention_backward
from fxopt.torch_private import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode, TorchDispatchMode, has_kernel, pytree

aten = torch.ops.aten
NEAR = 4 << 20  # bytes: blocks of the fused ops, and what a core's cache and its share of the last level hold
_BODIES: dict[Any, Callable[..., Any]] = {kernel.overload: kernel.body for op in CATALOG for kernel in op.kernels} | {
    torch.ops.fxopt.live_attention.default: live_attention, torch.ops.fxopt.live_attention_backward.default: live_attention_backward}
_ATTENTION = {aten._scaled_dot_product_flash_attention_for_cpu.default: (0, 1.0),
              aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (1, 2.5)}


@dataclass
class Work:
    """What some operations cost: their number, floating point operations of products by dtype, bytes read and written by others:
    `moved` from and to memory, `near` where all tensors of an operation fit into a cache."""

    calls: int = 0
    flops: dict[str, float] = field(default_factory=dict)
    moved: float = 0.0
    near: float = 0.0

    def add(self, other: Work) -> None:
        """Count the other's operations too."""
        self.calls += other.calls
        self.moved += other.moved
        self.near += other.near
        for kind, flops in other.flops.items():
            self.flops[kind] = self.flops.get(kind, 0.0) + flops


@dataclass(frozen=True)
class Value:
    """An output of a dry run: `source` is the position of the argument whose memory it shares, or a number of its own for each
    new piece of memory (negative), or None if it is no tensor; `size` the bytes of that memory."""

    source: int | None
    size: int


@dataclass(frozen=True)
class Ran:
    """One dry run of a graph.

    Attributes:
        peak: most bytes of new memory alive at once, outputs included.
        node: name of the node at the peak.
        outputs: one for each output.
        nodes: the work of each node, by name.
    """

    peak: int
    node: str
    outputs: tuple[Value, ...]
    nodes: dict[str, Work]

    @property
    def work(self) -> Work:
        """Of all nodes together."""
        total = Work()
        for work in self.nodes.values():
            total.add(work)
        return total


class _Counter(TorchDispatchMode):
    """Counts the memory of every new tensor while it lives, and the work of every operation, under the present node's name."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.known: dict[int, StorageWeakRef] = {}  # the arguments' memory: not counted
        self.now = self.peak = 0
        self.node, self.peak_node = "", ""
        self.times = 1
        self.nodes: dict[str, Work] = {}

    def ignore(self, tensor: torch.Tensor) -> None:
        """Memory that exists before the run."""
        reference = StorageWeakRef(tensor.untyped_storage())
        self.known[reference.cdata] = reference

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        body = _BODIES.get(func)
        if body is not None:
            with self:
                return body(*args, **kwargs)
        if func.namespace == "aten" and has_kernel(func.name(), "CompositeImplicitAutograd"):
            with self:  # called from a body it comes whole
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        results = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        for tensor in results:
            self._see(tensor)
        if not getattr(func, "is_view", False):
            self._count(func, args, kwargs, out, results)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        if tensor.is_sparse:  # made of the tensors of its indices and values, which are counted
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        for table in (self.known, self.alive):
            found = table.get(key)
            reference = found[0] if isinstance(found, tuple) else found
            if reference is not None and not reference.expired():
                return
        self.sweep()
        size = storage.nbytes()
        self.alive[key] = StorageWeakRef(storage), size
        self.now += size
        if self.now > self.peak:
            self.peak, self.peak_node = self.now, self.node

    def sweep(self) -> None:
        """Forget what has been freed."""
        for key in [key for key, (reference, _) in self.alive.items() if reference.expired()]:
            self.now -= self.alive.pop(key)[1]

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, results: list[torch.Tensor]) -> None:
        work = self.nodes.setdefault(self.node, Work())
        work.calls += self.times
        flops = _flops(func, args, kwargs, out)
        if flops:
            kind = str(results[0].dtype).removeprefix("torch.") if results else "float32"
            kind = f"attention {kind}" if func in _ATTENTION else kind
            work.flops[kind] = work.flops.get(kind, 0.0) + flops * self.times
            return
        if func.namespace == "aten" and func._schema.name.split("::")[1] in _FREE:
            return
        read = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        touched = sum(_bytes(t) for t in (*read, *results) if not t.is_sparse)
        if touched <= NEAR:
            work.near += touched * self.times
        else:
            work.moved += touched * self.times

    @contextlib.contextmanager
    def repeated(self, number: int) -> Iterator[None]:
        """What is done inside stands for `number` times the same."""
        self.times *= number
        try:
            yield
        finally:
            self.times //= number


_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "sym_size", "_unsafe_view"}


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes that an operation on the tensor touches: those of an expanded dimension once."""
    total = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride()):
        total *= size if stride else 1
    return total


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    if func in _ATTENTION:
        first, factor = _ATTENTION[func]
        (batch, heads, queries, width), keys = args[first].shape, args[first + 1].shape[2]
        causal = any(a is True for a in (*args[first + 3:], *kwargs.values()))
        return 4.0 * factor * batch * heads * queries * keys * width * (0.5 if causal else 1.0)
    packet = getattr(func, "_overloadpacket", None)
    if func.namespace == "aten" and str(packet).endswith("_"):
        packet = getattr(aten, str(packet).removeprefix("aten.")[:-1], packet)  # addmm_ costs what addmm does
    counted = flop_registry.get(packet)
    return float(counted(*args, **kwargs, out_val=out)) if counted is not None else 0.0


class _Interpreter(fx.Interpreter):
    """Where a size depends on data, a result has the size that `size` gives for the graph's value."""

    def __init__(self, module: fx.GraphModule, counter: _Counter, size: Callable[[Any], int]) -> None:
        super().__init__(module)
        self.counter, self.size = counter, size

    def run_node(self, n: fx.Node) -> Any:
        self.counter.node = n.name
        try:
            return super().run_node(n)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return pytree.tree_map(lambda val: _concrete(val, self.size), meta.value(n))
        except Exception as error:
            said = next(iter(str(error).splitlines()), "")
            raise LowerError(f"what `{n.name}` takes cannot be predicted: {type(error).__name__}: {said}", where=str(meta.provenance(n)),
                             do="leave out `memory`: `remat` and training need no prediction") from error


def run(module: fx.GraphModule, size: Callable[[Any], int]) -> Ran:
    """Run a graph on fake arguments like its placeholders' values.

    Args:
        size: the number that a symbolic size stands for.

    Raises:
        LowerError: an operation fails on fake tensors of such sizes.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    counter = _Counter()
    with mode, torch.no_grad():
        args = [_concrete(meta.value(node), size) for node in module.graph.nodes if node.op == "placeholder"]
        places: dict[int, int] = {}
        for index, arg in enumerate(args):
            if isinstance(arg, torch.Tensor):
                counter.ignore(arg)
                places[arg.untyped_storage()._cdata] = index
        with counter, two_only(counter.repeated):
            found = _Interpreter(module, counter, size).run(*args)
    outputs: list[Value] = []
    for value in found:
        if not isinstance(value, torch.Tensor):
            outputs.append(Value(None, 0))
            continue
        if value.is_sparse:
            outputs.append(Value(places.setdefault(id(value), -1 - len(places)), _bytes(value._indices()) + _bytes(value._values())))
            continue
        storage = value.untyped_storage()
        outputs.append(Value(places.setdefault(storage._cdata, -1 - len(places)), storage.nbytes()))
    return Ran(counter.peak, counter.peak_node, tuple(outputs), counter.nodes)


def _concrete(val: Any, size: Callable[[Any], int]) -> Any:
    if isinstance(val, torch.Tensor):
        shape = [size(s) for s in val.shape]
        return torch.empty_strided(shape, [size(s) for s in val.stride()], dtype=val.dtype, device=val.device)
    return size(val) if isinstance(val, torch.SymInt) else val
