"""Inputs of `fxopt::lora_linear`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from fxopt.kernels.cases import HIDDEN, HUGE_ROWS, HUGE_WIDTH, MLP, RANK, TOKENS, dtypes, leading, normal, seeds, subset, tensors
from fxopt.kernels.formats import named
from fxopt.kernels.lora_linear.grouping import first_parts
from fxopt.kernels.op import Case

FORMATS = ("dense", "nf4")


@st.composite
def cases(draw):
    dtype, transposed, count = draw(dtypes()), draw(st.booleans()), draw(st.integers(1, 3))
    adapter = draw(st.sampled_from((dtype, torch.float32))) if dtype == torch.bfloat16 else dtype
    features, biased = draw(st.sampled_from((1, 5, 32, 65))), draw(st.booleans())
    dropout = draw(st.sampled_from((0.0, 0.0, 0.5)))
    x = draw(tensors((*draw(leading()), features), dtype))
    bases, formats, shapes, biases, lora_a, lora_b, scales = [], [], [], [], [], [], []
    for _ in range(count):
        outputs, rank = draw(st.sampled_from((1, 3, 24))), draw(st.sampled_from((1, 2, 8)))
        shape, name = [features, outputs] if transposed else [outputs, features], draw(st.sampled_from(FORMATS))
        bases += named(name).quantize(draw(tensors(tuple(shape), dtype)))
        formats.append(name)
        shapes += shape
        biases += [draw(tensors((outputs,), dtype))] if biased else []
        lora_a.append(draw(tensors((rank, features), adapter)))
        lora_b.append(draw(tensors((outputs, rank), adapter)))
        scales.append(draw(st.sampled_from((1.0, 0.25, 2.0))))
    seed = torch.arange(7, 7 + count) if dropout else None
    case = packed(x, bases, formats, shapes, biases, lora_a, lora_b, scales, transposed, dropout, seed)
    trained = [1 + place for place, name in zip(first_parts(formats), formats, strict=True) if name == "dense"]
    start = 3 + len(bases)
    places = (0, *trained, *range(start, start + len(biases) + 2 * count))
    return Case(case.args, draw(subset(places)), draw(st.booleans()), draw(seeds()), case.lists)


def packed(x, bases, formats, shapes, biases, lora_a, lora_b, scales, transposed, dropout, seed, grads=()) -> Case:
    """A case of these arguments, its lists of tensors open."""
    args: list[object] = [x]
    lists = []
    for group in (bases, formats, shapes, biases, lora_a, lora_b):
        if group is formats or group is shapes:
            args.append(group)
            continue
        lists.append((len(args), len(args) + len(group)))
        args += group
    return Case((*args, scales, transposed, dropout, seed), grads, lists=tuple(lists))


def rows() -> Iterator[tuple[str, Case]]:
    """A layer and two siblings of a gated unit, on a dense and on an NF4 base, with and without dropout."""
    calls = (("dense base", "dense", 1, 0.0), ("NF4 base", "nf4", 1, 0.0), ("two siblings, NF4 base", "nf4", 2, 0.0), ("dropout, NF4 base", "nf4", 1, 0.1))
    for label, name, count, dropout in calls:
        bases = [part for i in range(count) for part in named(name).quantize(normal(MLP, HIDDEN, scale=0.02, seed=i))]
        a, b = ([normal(*size, scale=scale, seed=i) for i in range(count)] for size, scale in (((RANK, HIDDEN), 0.04), ((MLP, RANK), 0.01)))
        start = 3 + len(bases)
        case = packed(normal(TOKENS, HIDDEN), bases, [name] * count, [MLP, HIDDEN] * count, [], a, b, [2.0] * count, False,
                      dropout, torch.arange(count) if dropout else None, (0, *range(start, start + 2 * count)))
        yield label, case
        if label != "dense base":
            yield f"{label}, 16 rows", dataclasses.replace(case, args=(case.args[0][:16], *case.args[1:]))
        if label == "NF4 base":
            yield "NF4 base, fp32 adapter", dataclasses.replace(case, fixed=tuple(range(start, start + 2 * count)))


def huge() -> Iterator[tuple[str, Case]]:
    """More than 2^31 elements of x, with and without dropout."""
    base, a, b = [torch.empty(64, HUGE_WIDTH)], [torch.empty(RANK, HUGE_WIDTH)], [torch.empty(64, RANK)]
    for label, dropout in (("plain", 0.0), ("dropout", 0.1)):
        seed = torch.empty(1, dtype=torch.int64) if dropout else None
        yield label, packed(torch.empty(HUGE_ROWS, HUGE_WIDTH), base, ["dense"], [64, HUGE_WIDTH], [], a, b, [2.0], False, dropout, seed, (0, 4, 5))
