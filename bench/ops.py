"""Every fused op of the catalog against its reference, eager and under torch.compile; one process per system.

    python -m bench.ops OUT --system fxopt|eager|compile --rounds N

Shapes are those of SmolLM2-135M on 1,024 tokens, fp32; each round is forward and backward of every op.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
import gc
import json
from pathlib import Path
import time
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.catalog import CATALOG
from fxopt.kernels.nf4.reference import quantize
from fxopt.kernels.op import FusedOp
from fxopt.runtime.memory import peak_bytes, reset_peak, resident_bytes

TOKENS, BATCH = 1024, 4
HIDDEN, MLP, VOCABULARY = 576, 1536, 49152
HEADS, KV_HEADS, HEAD_DIM, RANK = 9, 3, 64, 16
WARMUP = 2


@dataclass(frozen=True)
class Row:
    """One call to measure: an op, its arguments, and which of them need a gradient."""

    op: FusedOp
    label: str
    args: tuple[Any, ...]
    grads: tuple[int, ...]


def _normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape) * scale


def _target(supervised: float) -> Tensor:
    target = torch.randint(0, VOCABULARY, (TOKENS,))
    target[torch.rand(TOKENS) >= supervised] = -100
    return target


def _head(supervised: float) -> tuple[Any, ...]:
    weight = _normal(VOCABULARY, HIDDEN, scale=0.02)
    mask = [True, False, False]
    return (_normal(TOKENS, HIDDEN), weight, None, _target(supervised), -100, "mean", 0.0, 0.0, 1.0, 0, mask)


def _lora(quantized: bool) -> tuple[Any, ...]:
    weight, absmax = _normal(MLP, HIDDEN, scale=0.02), None
    if quantized:
        weight, absmax = quantize(weight)
    a, b = _normal(RANK, HIDDEN, scale=0.04), _normal(MLP, RANK, scale=0.01)
    return (_normal(TOKENS, HIDDEN), weight, None, absmax, [MLP, HIDDEN], a, b, 2.0, False)


def _rope() -> tuple[Any, ...]:
    seq = TOKENS // BATCH
    q, k = _normal(BATCH, HEADS, seq, HEAD_DIM), _normal(BATCH, KV_HEADS, seq, HEAD_DIM)
    angle = _normal(1, 1, seq, HEAD_DIM)
    return (q, k, angle.cos(), angle.sin(), False, False)


def _nf4() -> tuple[Any, ...]:
    return (*quantize(_normal(MLP, HIDDEN, scale=0.02)), [MLP, HIDDEN], torch.float32)


_ARGUMENTS: dict[str, list[tuple[str, Callable[[], tuple[Any, ...]], tuple[int, ...]]]] = {
    "rms_norm": [("", lambda: (_normal(TOKENS, HIDDEN), torch.ones(HIDDEN), 1e-5, 0.0, "none"), (0,))],
    "layer_norm": [("", lambda: (_normal(TOKENS, HIDDEN), torch.ones(HIDDEN), torch.zeros(HIDDEN), 1e-5), (0,))],
    "swiglu": [("", lambda: (_normal(TOKENS, MLP), _normal(TOKENS, MLP)), (0, 1))],
    "geglu": [("", lambda: (_normal(TOKENS, MLP), _normal(TOKENS, MLP), "tanh"), (0, 1))],
    "rope": [("", _rope, (0, 1))],
    "nf4_dequantize": [("", _nf4, ())],
    "linear_nf4": [("", lambda: (_normal(TOKENS, HIDDEN), *_nf4()[:3], None, False), (0,))],
    "lora_linear": [("dense base", lambda: _lora(False), (0, 5, 6)), ("NF4 base", lambda: _lora(True), (0, 5, 6))],
    "linear_cross_entropy": [
        ("all rows supervised", lambda: _head(1.0), (0,)),
        ("20% of rows supervised", lambda: _head(0.2), (0,)),
    ],
}


def rows() -> Iterator[Row]:
    """A row or more for every op of the catalog."""
    missing = [op.name for op in CATALOG if op.name not in _ARGUMENTS]
    if missing:
        raise SystemExit(f"no benchmark row for {', '.join(missing)}: add one to bench/ops.py")
    for op in CATALOG:
        for label, build, grads in _ARGUMENTS[op.name]:
            torch.manual_seed(0)
            yield Row(op, f"{op.name} {label}".strip(), build(), grads)


def step(call: Callable[..., Any], row: Row) -> tuple[float, list[Tensor], list[Tensor]]:
    """Seconds of one forward and backward, the outputs and the gradients."""
    args = [
        arg.detach().requires_grad_(True) if place in row.grads else arg for place, arg in enumerate(row.args)
    ]
    torch.manual_seed(1)
    start = time.perf_counter()
    outputs = [out for out in call(*args) if isinstance(out, Tensor)][: row.op.outputs]
    forward = time.perf_counter() - start
    upstream = [torch.randn_like(out) for out in outputs]
    start = time.perf_counter()
    if row.grads:
        torch.autograd.backward(outputs, upstream)
    seconds = forward + time.perf_counter() - start
    return seconds, [out.detach() for out in outputs], [args[place].grad for place in row.grads]


def measure(row: Row, system: str, rounds: int) -> dict[str, Any]:
    """The seconds of each round after warm-up, peak memory above the arguments, and the parity with eager."""
    reference = row.op.reference
    calls = {"fxopt": row.op, "eager": reference, "compile": torch.compile(reference)}
    call = calls[system]
    first, outputs, grads = step(call, row)
    if system != "eager":
        _, wanted, wanted_grads = step(reference, row)
        pairs = list(zip([*outputs, *grads], [*wanted, *wanted_grads], strict=True))
        error = max(float((a - b).norm() / b.norm()) for a, b in pairs)
        del wanted, wanted_grads, pairs
    else:
        error = 0.0
    norms = [float(grad.norm()) for grad in grads]
    del outputs, grads
    for _ in range(WARMUP):
        step(call, row)
    gc.collect()
    reset_peak()
    before = resident_bytes() or 0
    seconds = [step(call, row)[0] for _ in range(rounds)]
    if error > 1e-4 or not all(norm > 0 for norm in norms):
        raise SystemExit(f"{row.label} in {system}: relative error {error:.1e}, gradient norms {norms}")
    return {
        "row": row.label,
        "system": system,
        "seconds": seconds,
        "first_call_seconds": first,
        "above": peak_bytes() - before,
        "relative_error": error,
    }


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--system", choices=("fxopt", "eager", "compile"), required=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    records = [measure(row, options.system, options.rounds) for row in rows()]
    options.out.write_text(json.dumps(records) + "\n")


if __name__ == "__main__":
    main()
