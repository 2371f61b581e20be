"""activation(gate) * up on a GPU: one pass in each direction, fp32 in registers, one rounding. `geglu` uses it too.

Gate and up may be the halves of one product ([rows, 2 * width], row stride 2 * width): rows are read where they are. Dense
tensors are one long row. Offsets are int64: the tensors may have more than 2^31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fxopt.kernels.blocks import as_rows
from fxopt.kernels.gated import check
from fxopt.kernels.launch import cdiv, launch

# Elements of a program: with 4 warps each thread moves 16 bytes of a 16-bit tensor in one instruction.
BLOCK = 1024


@triton.jit
def activation(x, KIND: tl.constexpr):
    """silu, gelu by erf, or gelu by tanh: 0.5 (1 + tanh(z)) = sigmoid(2 z)."""
    if KIND == "silu":
        return x * tl.sigmoid(x)
    elif KIND == "erf":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def derivative(x, KIND: tl.constexpr):
    """The derivative of `activation`. 1 - sigmoid(z) is sigmoid(-z): the difference would cancel where z is large."""
    if KIND == "silu":
        return tl.sigmoid(x) * (1 + x * tl.sigmoid(-x))
    elif KIND == "erf":
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    else:
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        return tl.sigmoid(z) * (1 + x * tl.sigmoid(-z) * (1.5957691216057308 * (1 + 0.134145 * x * x)))


@triton.jit
def gated_forward(gate, up, y, width, blocks, gate_row, gate_column, up_row, up_column, KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate + row * gate_row + column * gate_column, mask=inside, other=0.0).to(WIDE)
    u = tl.load(up + row * up_row + column * up_column, mask=inside, other=0.0).to(WIDE)
    tl.store(y + row * width + column, (activation(g, KIND) * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward(dy, gate, up, dgate, dup, width, blocks, dy_row, dy_column, gate_row, gate_column, up_row, up_column,
                   KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    pull = tl.load(dy + row * dy_row + column * dy_column, mask=inside, other=0.0).to(WIDE)
    g = tl.load(gate + row * gate_row + column * gate_column, mask=inside, other=0.0).to(WIDE)
    out = row * width + column
    if dgate is not None:
        u = tl.load(up + row * up_row + column * up_column, mask=inside, other=0.0).to(WIDE)
        tl.store(dgate + out, (pull * u * derivative(g, KIND)).to(dgate.dtype.element_ty), mask=inside)
    if dup is not None:
        tl.store(dup + out, (pull * activation(g, KIND)).to(dup.dtype.element_ty), mask=inside)


def launch_forward(gate, up, kind):
    """activation(gate) * up, contiguous; any strides, fp64 in fp64."""
    check(gate, up)
    y = gate.new_empty(gate.shape)
    gate, up = _rows(gate, up)
    rows, width = gate.shape
    blocks = cdiv(width, BLOCK)
    launch(gated_forward, (rows * blocks,), gate, up, y, width, blocks, *gate.stride(), *up.stride(), KIND=kind, WIDE=_wide(gate), BLOCK=BLOCK)
    return y


def launch_backward(dy, gate, up, kind, output_mask):
    """(dgate, dup), contiguous; None where the mask is off."""
    dgate, dup = (gate.new_empty(gate.shape) if wanted else None for wanted in output_mask)
    dy, gate, up = _rows(dy, gate, up)
    rows, width = gate.shape
    blocks = cdiv(width, BLOCK)
    if any(output_mask):
        launch(gated_backward, (rows * blocks,), dy, gate, up, dgate, dup, width, blocks, *dy.stride(), *gate.stride(), *up.stride(),
               KIND=kind, WIDE=_wide(gate), BLOCK=BLOCK)  # fmt: skip
    return dgate, dup


def _rows(*tensors):
    """As [rows, width]; one row where all are dense."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return tuple(tensor.view(1, tensor.numel()) for tensor in tensors)
    return tuple(as_rows(tensor) for tensor in tensors)


def _wide(tensor):
    return tl.float64 if tensor.element_size() == 8 else tl.float32


def forward(gate, up):
    """`body.forward`, rounded once."""
    return launch_forward(gate, up, "silu")


def backward(dy, gate, up, output_mask):
    """`body.backward`, rounded once."""
    return launch_backward(dy, gate, up, "silu", output_mask)
