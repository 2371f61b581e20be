"""Scoped patches of torch during a capture: the one place where names of another package are replaced.

torch.export was built for inference. Three things would be silently wrong in training without these patches (measured
on torch 2.13): the backward of a user's `autograd.Function` is lost, a reentrant `torch.utils.checkpoint` loses all
gradients, and a non-reentrant one loses its mark. Every patch is undone on exit, also after an error.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import sympy
import torch
import torch.fx.traceback as fx_traceback
import torch.nn as nn
from torch._decomp import decompositions
import torch.utils.checkpoint as checkpoint
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.proxy import TracerBase

from fxopt.torch_private import dynamo_config as dynamo, pytree

NAMESPACE = "fxopt_user"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_OPS: dict[Any, Any] = {}
_NUMBER = itertools.count()
_APPLY = torch.autograd.Function.__dict__["apply"]
# What a non-reentrant checkpoint runs around the function; since torch 2.14 the old name only calls this one.
_AROUND = next(name for name in ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator") if hasattr(checkpoint, name))


def _opaque(function: type, spec: pytree.TreeSpec, leaves: tuple[Any, ...]) -> tuple[Any, list[Any]]:
    """The custom op that stands for one kind of call of a user's Function, and a cell with its output structure.

    The op's Autograd kernel calls the real `apply`: the joint trace later runs the user's own backward.
    """
    key = (function, str(spec), tuple(repr(leaf) for leaf in leaves))
    if key in _OPS:
        return _OPS[key]
    name = f"{function.__name__}_{next(_NUMBER)}"
    structure: list[Any] = []

    def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        it = iter(tensors)
        args = pytree.tree_unflatten([next(it) if leaf is None else leaf[0] for leaf in leaves], spec)
        out = _APPLY.__func__(function, *args)
        flat, out_spec = pytree.tree_flatten(out)
        structure[:] = [out_spec, [None if isinstance(x, torch.Tensor) else (x,) for x in flat]]
        return [x for x in flat if isinstance(x, torch.Tensor)]

    _LIBRARY.define(f"{name}(Tensor[] tensors) -> Tensor[]")
    for dispatch in ("Autograd", "CPU", "CUDA", "Meta"):
        _LIBRARY.impl(name, run, dispatch)
    _OPS[key] = getattr(getattr(torch.ops, NAMESPACE), name).default, structure
    return _OPS[key]


@contextlib.contextmanager
def keep_autograd_functions() -> Iterator[None]:
    """Each `Function.apply` of a user becomes one op node, whose backward is the user's."""

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls.__name__.startswith("GeneratedBackwardFor") or kwargs:  # the autograd of a torch.library op is one node already
            return _APPLY.__func__(cls, *args, **kwargs)
        flat, spec = pytree.tree_flatten(args)
        leaves = tuple(None if isinstance(x, torch.Tensor) else (x,) for x in flat)
        op, structure = _opaque(cls, spec, leaves)
        outs = iter(op([x for x in flat if isinstance(x, torch.Tensor)]))
        out_spec, out_leaves = structure
        return pytree.tree_unflatten([next(outs) if leaf is None else leaf[0] for leaf in out_leaves], out_spec)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = _APPLY  # type: ignore[method-assign]


@contextlib.contextmanager
def mark_checkpoints() -> Iterator[None]:
    """`torch.utils.checkpoint` regions are traced through; their nodes carry the region's number."""
    numbers = itertools.count()

    class Through:
        @staticmethod
        def apply(function: Any, preserve: bool, *args: Any) -> Any:
            with fx_traceback.annotate({"checkpoint": next(numbers)}):
                return function(*args)

    def generator(function: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        with fx_traceback.annotate({"checkpoint": next(numbers)}):
            yield

    saved = checkpoint.CheckpointFunction, getattr(checkpoint, _AROUND)
    checkpoint.CheckpointFunction = Through  # type: ignore[assignment,misc]
    setattr(checkpoint, _AROUND, generator)
    try:
        with fx_traceback.preserve_node_meta():
            yield
    finally:
        checkpoint.CheckpointFunction = saved[0]  # type: ignore[misc]
        setattr(checkpoint, _AROUND, saved[1])


@contextlib.contextmanager
def put_aside(attributes: Iterable[tuple[nn.Module, str]]) -> Iterator[set[tuple[nn.Module, str]]]:
    """Within, attributes of modules are not where Python looks first, so that their reads are seen: the set that is yielded.

    What code sees does not change: a module's `__getattr__`, which is asked when an attribute is not found, has them.
    """
    read: set[tuple[nn.Module, str]] = set()
    aside = {(id(vars(module)), name): (module, vars(module).pop(name)) for module, name in attributes}
    saved = nn.Module.__getattr__

    def getattr_(self: nn.Module, name: str) -> Any:
        found = aside.get((id(self.__dict__), name))
        if found is None:
            return saved(self, name)
        read.add((found[0], name))
        return found[1]

    nn.Module.__getattr__ = getattr_  # type: ignore[method-assign]
    try:
        yield read
    finally:
        nn.Module.__getattr__ = saved  # type: ignore[method-assign]
        for (_, name), (module, value) in aside.items():
            vars(module).setdefault(name, value)  # what was set meanwhile stays


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torch.export prints when it fails: the whole graph so far, on stderr, and a log line. The error says what matters.
    And without a log line for each size of 1, which a capture may fix: guards know.

    Measured on torch 2.13: 40 KB for a model of four small blocks, at each attempt. What user code writes to stderr while it is traced
    is kept and written out behind.
    """
    loggers = [logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch._export.non_strict_utils", "torch._subclasses.fake_tensor")]
    levels, said = [logger.level for logger in loggers], io.StringIO()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(said):
            yield
    except BaseException as error:
        text, reason = said.getvalue(), error
        while reason is not None:
            if hasattr(reason, "partial_fx_graph"):
                text = text.replace(f"{reason.partial_fx_graph}\n", "")
            reason = reason.__cause__ or reason.__context__
        sys.stderr.write(text)
        raise
    else:
        sys.stderr.write(said.getvalue())
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextlib.contextmanager
def conversions_that_change_nothing() -> Iterator[None]:
    """`module.to(...)` in a forward returns the module if all its tensors are so already: torch would put other tensors in their place, which
    fails while fake ones stand there."""
    saved = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if memory_format is None and all((device is None or t.device == device) and (dtype is None or t.dtype == dtype or not t.is_floating_point())
                                         for t in (*self.parameters(), *self.buffers())):
            return self
        return saved(self, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.to = saved  # type: ignore[method-assign]


@contextlib.contextmanager
def without_fake_cache() -> Iterator[None]:
    """Fake tensors are computed anew for each operation: with symbolic sizes a cached result costs more to make and to look up than it
    saves. Captures take two thirds of the processor time (1.5 to 1.0 s for two layers of a decoder, 4.4 to 2.8 s for a state-space model)."""
    with dynamo.patch(fake_tensor_cache_enabled=False):
        yield


@contextlib.contextmanager
def all_user_frames() -> Iterator[None]:
    """A node remembers every frame of the user's code, from the model's `forward` inwards: torch keeps those of functions called `forward`, so that
    what a function of the model's file computes seems to stand at the line that calls it."""
    saved = TracerBase._filter_traceback_frames
    skipped = tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in (torch.__file__, os.path.dirname(__file__)))

    def keep(self: Any, summary: traceback.StackSummary) -> traceback.StackSummary:
        frames = [frame for frame in summary if not frame.filename.startswith(skipped)]
        start = next((i for i, frame in enumerate(frames) if frame.name == "forward"), len(frames))
        return traceback.StackSummary.from_list(frames[start:])

    TracerBase._filter_traceback_frames = keep  # type: ignore[method-assign]
    try:
        yield
    finally:
        TracerBase._filter_traceback_frames = saved  # type: ignore[method-assign]


@contextlib.contextmanager
def inference_without_gradients() -> Iterator[None]:
    """`torch.inference_mode()` in a forward is `torch.no_grad()`: a trace does not see it, and would give gradients to what is computed inside."""
    kind, running = torch.inference_mode, []
    saved = kind.__enter__, kind.__exit__

    def enter(self: Any) -> None:
        running.append(torch.no_grad() if self.mode else contextlib.nullcontext())
        running[-1].__enter__()

    def leave(self: Any, *error: Any) -> None:
        running.pop().__exit__(*error)

    kind.__enter__, kind.__exit__ = enter, leave  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.__enter__, kind.__exit__ = saved  # type: ignore[method-assign]


LARGEST_SIZE = 200
"""Terms of the expression of a size, counted with repetition. Measured in seven convolutional models: 7 to 95."""


@contextlib.contextmanager
def bounded_sizes() -> Iterator[list[str]]:
    """A comparison of sizes with more than LARGEST_SIZE terms ends the trace: torch would take minutes for each. What is yielded holds the
    reason afterwards."""
    saved, grew = ShapeEnv.evaluate_expr, []

    def evaluate(self: Any, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
        if sum(1 for _ in itertools.islice(sympy.preorder_traversal(orig_expr), LARGEST_SIZE + 1)) > LARGEST_SIZE:
            grew.append(f"a size has more than {LARGEST_SIZE} terms")
            raise RuntimeError(grew[0])
        return saved(self, orig_expr, *args, **kwargs)

    ShapeEnv.evaluate_expr = evaluate  # type: ignore[method-assign]
    try:
        yield grew
    finally:
        ShapeEnv.evaluate_expr = saved  # type: ignore[method-assign]


@contextlib.contextmanager
def recurrent_layers() -> Iterator[None]:
    """torch's rules that take recurrent layers apart, as training needs them.

    Where its input takes no gradient, an LSTM on a CPU becomes an operator for inference, whose backward fails: its weights learn all the
    same. And the dropout between layers is left out, since the rule compares the number of layers with that of the layer the wrong way round.
    """
    saved = decompositions.select_one_layer_lstm_function, decompositions._rnn_helper

    def helper(input: torch.Tensor, hidden: Any, params: Any, biases: Any, layers: int, dropout: float, train: bool, both: bool, batch_first: bool, layer: Any) -> Any:
        last: list[torch.Tensor] = []  # the input of the latest layer, and that with dropout

        def dropped(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # a layer that goes both ways is called twice
            if not last or x is not last[0]:
                last[:] = x, torch.dropout(x, dropout, train) if last and dropout else x
            return layer(last[1], *args, **kwargs)

        return saved[1](input, hidden, params, biases, layers, 0.0, train, both, batch_first, dropped)

    decompositions.select_one_layer_lstm_function = lambda input, hx, params: decompositions.one_layer_lstm
    decompositions._rnn_helper = helper
    try:
        yield
    finally:
        decompositions.select_one_layer_lstm_function, decompositions._rnn_helper = saved


@contextlib.contextmanager
def derivatives() -> Iterator[list[str]]:
    """What is yielded gets `file.py:line: code` of each place of the user's code that asks autograd for derivatives within."""
    saved, places = (torch.autograd.grad, torch.autograd.backward), []

    def seen(function: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*args: Any, **kwargs: Any) -> Any:
            places.append(_innermost(traceback.extract_stack()))
            return function(*args, **kwargs)

        return asked

    torch.autograd.grad, torch.autograd.backward = map(seen, saved)
    try:
        yield places
    finally:
        torch.autograd.grad, torch.autograd.backward = saved


def _innermost(frames: Iterable[traceback.FrameSummary]) -> str:
    """`file.py:line: code` of the innermost frame of the user's code, "" if there is none."""
    ours, torch_dir = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(os.path.abspath(torch.__file__))
    found = [frame for frame in frames if not frame.filename.startswith((ours, torch_dir, "<")) and "contextlib" not in frame.filename]
    return f"{found[-1].filename}:{found[-1].lineno}: {found[-1].line}" if found else ""


@contextlib.contextmanager
def for_capture() -> Iterator[None]:
    """All patches that a capture needs."""
    with keep_autograd_functions(), mark_checkpoints(), conversions_that_change_nothing(), without_fake_cache(), all_user_frames(), inference_without_gradients(), quiet():
        yield


class CallTrace:
    """Remembers which module was running, so that an error can be placed. `note` is told what the trace does in another way than asked."""

    def __init__(self, model: nn.Module, note: Callable[[str], None] | None = None) -> None:
        self.note = note or (lambda text: None)
        self.names = {module: name for name, module in model.named_modules()}
        self.running: list[str] = []
        self.deepest: str = ""
        self.hooks: frozenset[int] = frozenset()  # of the recording
        self.derivatives: list[str] = []  # lines that asked autograd for them

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Hooks on every module for the duration of one capture."""
        self.running.clear()
        handles = []

        def enter(module: nn.Module, args: Any) -> None:
            self.running.append(self.names.get(module, ""))
            self.deepest = self.running[-1]

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if self.running:
                self.running.pop()

        for module in self.names:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
        self.hooks = frozenset(handle.id for handle in handles)
        try:
            with derivatives() as self.derivatives:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def where(self, error: BaseException) -> tuple[str, str]:
        """(module path, `file.py:line: code`) at which a capture failed."""
        return (self.running[-1] if self.running else self.deepest), _innermost(traceback.extract_tb(error.__traceback__))
