"""What random programs are made of: spellings of layers as graphs hold them. `kind(b, x, y, option)`: x, y and the result [batch, seq, WIDTH]."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.fx as fx

from fuzz.build import IGNORED, VOCABULARY, WIDTH, Builder, aten

HALF = WIDTH // 2


def linear(b: Builder, x: fx.Node, y: fx.Node, option: int) -> fx.Node:
    bias = b.parameter("bias", WIDTH, scale=0.1) if option % 2 else None
    weight = b.parameter("weight", WIDTH, WIDTH, scale=0.35)
    if option % 5 == 3:
        flat = b(aten.reshape.default, x, [-1, WIDTH])
        made = b(aten.addmm.default, b.parameter("bias", WIDTH), flat, weight)
        return b(aten.view.default, made, [b.size(x, 0), b.size(x, 1), WIDTH])
    if option % 5 == 4:
        return b(aten.matmul.default, x, b(aten.t.default, weight) if option % 2 else weight)
    return b(aten.linear.default, x, weight, bias) if bias is not None else b(aten.linear.default, x, weight)


def norm(b: Builder, x: fx.Node, y: fx.Node, option: int) -> fx.Node:
    weight = b.parameter("weight", WIDTH, scale=0.1, mean=1.0)
    kind = option % 7
    if kind < 3:
        wide = b(aten.to.dtype, x, torch.float32) if kind else x
        square = b(aten.pow.Tensor_Scalar, wide, 2) if option % 2 else b(aten.mul.Tensor, wide, wide)
        mean = b(aten.add.Tensor, b(aten.mean.dim, square, [-1], True), (1e-6, 1e-5)[option % 2])
        normed = b(aten.mul.Tensor, wide, b(aten.rsqrt.default, mean)) if kind != 2 else b(aten.div.Tensor, wide, b(aten.sqrt.default, mean))
        normed = b(aten.to.dtype, normed, b.dtype) if kind else normed
        return b(aten.mul.Tensor, weight, normed) if option % 3 else b(aten.mul.Tensor, normed, b(aten.add.Tensor, weight, 1.0))
    if kind == 3:
        return b(aten.layer_norm.default, x, [WIDTH], weight, b.parameter("bias", WIDTH, scale=0.1), 1e-5)
    if kind == 4:
        return b(aten.layer_norm.default, b(aten.add.Tensor, x, y), [WIDTH], weight, None, 1e-6)
    if kind == 5:
        return b(aten.rms_norm.default, b(aten.add.Tensor, x, y), [WIDTH], weight, 1e-6)
    centred = b(aten.sub.Tensor, x, b(aten.mean.dim, x, [-1], True))
    level = b(aten.rsqrt.default, b(aten.add.Tensor, b(aten.mean.dim, b(aten.pow.Tensor_Scalar, centred, 2), [-1], True), 1e-5))
    return b(aten.add.Tensor, b(aten.mul.Tensor, b(aten.mul.Tensor, centred, level), weight), b.parameter("bias", WIDTH, scale=0.1))


def activation(b: Builder, x: fx.Node, y: fx.Node, option: int) -> fx.Node:
    kind = option % 10
    plain = (aten.silu.default, aten.gelu.default, aten.relu.default, aten.tanh.default, aten.sigmoid.default, aten.softplus.default, aten.leaky_relu.default)
    if kind < 7:
        return b(plain[kind], x)
    if kind == 7:
        return b(aten.mul.Tensor, x, b(aten.sigmoid.default, x))
    return b(aten.softmax.int, x, -1) if kind == 8 else b(aten.gelu.default, x, approximate="tanh")


def gated(b: Builder, x: fx.Node, y: fx.Node, option: int) -> fx.Node:
    inner = 12
    down = b.parameter("down", WIDTH, inner, scale=0.3)
    if option % 4 == 3:
        both = b(aten.split.Tensor, b(aten.linear.default, x, b.parameter("both", 2 * inner, WIDTH, scale=0.35)), inner, -1)
        gate, up = b(operator.getitem, both, 0), b(operator.getitem, both, 1)
    else:
        gate = b(aten.linear.default, x, b.parameter("gate", inner, WIDTH, scale=0.35))
        up = b(aten.linear.default, x, b.parameter("up", inner, WIDTH, scale=0.35))
    turned = b(aten.silu.default, gate) if option % 2 else b(aten.gelu.default, gate, **({"approximate": "tanh"} if option % 3 else {}))
    product = b(aten.mul.Tensor, turned, up) if option % 5 else b(aten.mul.Tensor, up, turned)
    return b(aten.linear.default, product, down)


def combine(b: Builder, x: fx.Node, y: fx.Node, option: int) -> fx.Node:
    kind = option % 9
    plain = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.maximum.default)
    if kind < 4:
        return b(plain[kind], x, y)
    if kind == 4:
        return b(aten.add.Tensor, x, y, alpha=0.5)
    if kind == 5:
        return b(aten.where.self, b(aten.gt.Scalar, x, 0), x, y)
    if kind == 6:
        return b(aten.div.Tensor, x, b(aten.add.Tensor, b(aten.mul.Tensor, y, y), 1.0))
    return b(aten.lerp.Scalar, x, y, 0.3) if kind == 7 else b(aten.add.Tensor, x, b(aten.mul.Tensor, x, b(aten.tanh.default, y)))


def broadcast(b: Builder, x: fx.Node, y: fx.Node, option: int) -> fx.Node:
    kind = option % 8
    if kind == 0:
        return b(aten.mul.Tensor, x, b.parameter("scale", WIDTH, scale=0.1, mean=1.0))
    if kind == 1:
        return b(aten.add.Tensor, b.parameter("shift", 1, 1, WIDTH, kind="buffer"), b(aten.mul.Tensor, x, b.parameter("one", 1)))
    if kind == 2:
        return b(aten.div.Tensor, x, WIDTH**0.5)
    if kind == 3:
        return b(aten.mul.Tensor, x, b(aten.mean.dim, y, [1], True))
    if kind == 4:
        return b(aten.sub.Tensor, x, b(aten.slice.Tensor, y, 2, 0, 1))
    if kind == 5:
        places = b(aten.to.dtype, b(aten.arange.default, b.size(x, 1)), b.dtype)
        return b(aten.add.Tensor, x, b(aten.unsqueeze.default, b(aten.mul.Tensor, places, 0.1), 1))
    if kind == 6:
        return b(aten.sub.Tensor, b(aten.div.Tensor, b(aten.add.Tensor, b(aten.mul.Tensor, x, 1), 0.0), 1.0), 0)
    return b(aten.add.Tensor, x, b(aten.sum.dim_IntList, y, [0, 1]))


def _heads(b: Builder, x: fx.Node, count: int) -> fx.Node:
    return b(aten.transpose.int, b(aten.view.default, x, [b.size(x, 0), b.size(x, 1), count, HALF]), 1, 2)


def _turned(b: Builder, x: fx.Node, cos: fx.Node, sin: fx.Node) -> fx.Node:
    first, second = b(aten.slice.Tensor, x, 3, 0, HALF // 2), b(aten.slice.Tensor, x, 3, HALF // 2, 9223372036854775807)
    turned = b(aten.cat.default, [b(aten.neg.default, second), first], -1)
    return b(aten.add.Tensor, b(aten.mul.Tensor, x, cos), b(aten.mul.Tensor, turned, sin))


def attention(b: Builder, x: fx.Node, y: fx.Node, option: int) -> fx.Node:
    kind = option % 6
    q = _heads(b, b(aten.linear.default, x, b.parameter("q", WIDTH, WIDTH, scale=0.35), b.parameter("q_bias", WIDTH, scale=0.1)), 2)
    k = _heads(b, b(aten.linear.default, y, b.parameter("k", WIDTH, WIDTH, scale=0.35)), 2)
    v = _heads(b, b(aten.linear.default, y, b.parameter("v", WIDTH, WIDTH, scale=0.35)), 2)
    length = b.size(x, 1)
    if kind in (1, 3):
        angle = b(aten.mul.Tensor, b(aten.unsqueeze.default, b(aten.to.dtype, b(aten.arange.default, length), torch.float32), 1), b.parameter("frequency", HALF // 2, kind="buffer"))
        angle = b(aten.cat.default, [angle, angle], -1)
        cos, sin = (b(aten.to.dtype, b(target, angle), b.dtype) for target in (aten.cos.default, aten.sin.default))
        q, k = _turned(b, q, cos, sin), _turned(b, k, cos, sin)
    if kind == 4:
        scores = b(aten.div.Tensor, b(aten.matmul.default, q, b(aten.transpose.int, k, 2, 3)), HALF**0.5)
        mixed = b(aten.matmul.default, b(aten.softmax.int, scores, -1), v)
    elif kind in (2, 3, 5):
        places = b(aten.arange.default, length)
        allowed = b(aten.le.Tensor, b(aten.unsqueeze.default, places, 0), b(aten.unsqueeze.default, places, 1))
        if kind != 5:
            keys = b(aten.to.dtype, b.inputs[1], torch.bool)
            allowed = b(aten.bitwise_and.Tensor, allowed, b(aten.unsqueeze.default, b(aten.unsqueeze.default, keys, 1), 1))
        else:
            allowed = b(aten.unsqueeze.default, b(aten.unsqueeze.default, allowed, 0), 0)
        mixed = b(aten.scaled_dot_product_attention.default, q, k, v, allowed)
    else:
        mixed = b(aten.scaled_dot_product_attention.default, q, k, v, None, 0.0, kind == 1)
    joined = b(aten.reshape.default, b(aten.transpose.int, mixed, 1, 2), [b.size(x, 0), length, WIDTH])
    return b(aten.linear.default, joined, b.parameter("o", WIDTH, WIDTH, scale=0.35))


def shape(b: Builder, x: fx.Node, y: fx.Node, option: int) -> fx.Node:
    kind = option % 7
    if kind == 0:
        return b(aten.cat.default, [b(aten.slice.Tensor, x, 2, HALF, 9223372036854775807), b(aten.slice.Tensor, y, 2, 0, HALF)], -1)
    if kind == 1:
        four = b(aten.view.default, b(aten.contiguous.default, x), [b.size(x, 0), b.size(x, 1), 2, HALF])
        return b(aten.reshape.default, b(aten.transpose.int, four, 2, 3), [b.size(x, 0), b.size(x, 1), WIDTH])
    if kind == 2:
        padded = b(aten.constant_pad_nd.default, x, [0, 0, 1, 0])
        return b(aten.add.Tensor, b(aten.slice.Tensor, padded, 1, 0, -1), y)
    if kind == 3:
        return b(aten.transpose.int, b(aten.contiguous.default, b(aten.transpose.int, x, 0, 1)), 0, 1)
    if kind == 4:
        return b(aten.roll.default, b(aten.flip.default, x, [1]), [1], [2])
    if kind == 5:
        return b(aten.squeeze.dim, b(aten.unsqueeze.default, x, 1), 1)
    return b(aten.mean.dim, b(aten.stack.default, [x, y], -1), [-1])


def in_place(b: Builder, x: fx.Node, y: fx.Node, option: int) -> fx.Node:
    kind = option % 6
    z = b(aten.mul.Tensor, x, 1.5)
    if kind == 0:
        return b(aten.add_.Tensor, z, y)
    if kind == 1:
        return b(aten.add_.Tensor, b(aten.mul_.Tensor, z, 0.5), y, alpha=2)
    if kind == 2:
        b(aten.relu_.default, b(aten.slice.Tensor, z, 2, 1, 3))
        return b(aten.add.Tensor, z, y)
    if kind == 3:
        average = b.parameter("average", WIDTH, kind="buffer")
        found = b(aten.sub.Tensor, x, average)
        b(aten.add_.Tensor, b(aten.mul_.Tensor, average, 0.9), b(aten.mean.dim, b(aten.detach.default, x), [0, 1]), alpha=0.1)
        return found
    if kind == 4:
        return b(aten.add.Tensor, b(aten.relu_.default, z), x)
    copy = b(aten.clone.default, z)
    b(aten.copy_.default, b(aten.select.int, copy, 2, 0), b(aten.select.int, y, 2, 1))
    return b(aten.mul.Tensor, copy, z)


def special(b: Builder, x: fx.Node, y: fx.Node, option: int) -> fx.Node:
    kind = option % 7
    if kind == 0:
        return b(aten.dropout.default, x, 0.3, True)
    if kind == 1:
        last = b(aten.transpose.int, x, 1, 2)
        made = b(aten.batch_norm.default, last, b.parameter("weight", WIDTH, mean=1.0), b.parameter("bias", WIDTH), b.parameter("running_mean", WIDTH, kind="buffer"),
                 b.parameter("running_var", WIDTH, scale=0.1, mean=1.0, kind="buffer"), True, 0.1, 1e-5, False)
        return b(aten.transpose.int, made, 1, 2)
    if kind == 2:
        level = b(aten.mean.default, b(aten.abs.default, b(aten.detach.default, x)))
        return b(aten.div.Tensor, x, b(aten.add.Tensor, level, 1))
    if kind == 3:
        return b(aten.add.Tensor, x, b(aten.detach.default, y))
    if kind == 4:
        return b(aten.add.Tensor, b(aten.dropout.default, x, 0.2, True), b(aten.dropout.default, y, 0.5, True))
    if kind == 5:
        return b(aten.masked_fill.Scalar, x, b(aten.eq.Scalar, b(aten.unsqueeze.default, b.inputs[1], 2), 0), 0.0)
    return b(aten.clamp.default, b(aten.cumsum.default, x, 1), -3, 3)


KINDS: dict[str, Callable[[Builder, fx.Node, fx.Node, int], fx.Node]] = {
    "linear": linear, "norm": norm, "activation": activation, "gated": gated, "combine": combine, "broadcast": broadcast, "attention": attention, "shape": shape,
    "in_place": in_place, "special": special}


def _value(b: Builder, x: fx.Node, labels: fx.Node) -> list[fx.Node]:
    return [x]


def _loss(shift: bool = False, bias: bool = False, cap: bool = False, smooth: float = 0.0, total: bool = False, logits: bool = True) -> Callable[[Builder, fx.Node, fx.Node], list[fx.Node]]:
    def head(b: Builder, x: fx.Node, labels: fx.Node) -> list[fx.Node]:
        weight = b.parameter("weight", VOCABULARY, WIDTH, scale=0.35)
        made = b(aten.linear.default, x, weight, b.parameter("bias", VOCABULARY)) if bias else b(aten.linear.default, x, weight)
        if cap:
            made = b(aten.mul.Tensor, b(aten.tanh.default, b(aten.div.Tensor, made, 5)), 5)
        read, wanted = made, labels
        if shift:
            read = b(aten.contiguous.default, b(aten.slice.Tensor, made, 1, 0, -1))
            wanted = b(aten.contiguous.default, b(aten.slice.Tensor, labels, 1, 1, 9223372036854775807))
        loss = b(aten.cross_entropy_loss.default, b(aten.reshape.default, read, [-1, VOCABULARY]), b(aten.reshape.default, wanted, [-1]), None, 2 if total else 1, IGNORED, smooth)
        return [loss, made] if logits else [loss]

    return head


HEADS: dict[str, Callable[[Builder, fx.Node, fx.Node], list[fx.Node]]] = {
    "none": _value, "loss": _loss(), "loss alone": _loss(logits=False), "shift": _loss(shift=True), "bias": _loss(bias=True), "cap": _loss(cap=True), "smooth": _loss(smooth=0.1),
    "sum": _loss(total=True, logits=False)}
