"""Rotary position embedding in plain PyTorch, and the ways in which programs write it.

Su et al., 2021, https://arxiv.org/abs/2104.09864. The "half" layout pairs column i with column
i + rotary_dim / 2, the interleaved layout pairs columns 2i and 2i + 1.
"""

from __future__ import annotations

import torch

from fxopt.kernels.op import Apply, Bind, Pattern


def rope(q, k, cos, sin, interleaved, half_tables):
    """Same arguments as `fxopt::rope`; returns (q_out, k_out)."""
    if half_tables:
        repeat = _repeat_pairs if interleaved else _repeat_halves
        cos, sin = repeat(cos), repeat(sin)
    rotate = _rotate_pairs if interleaved else _rotate_half
    q_out = _rotate(q, cos, sin, rotate)
    return q_out, (q.new_empty(0) if k is None else _rotate(k, cos, sin, rotate))


def _rotate(x, cos, sin, rotate):
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turned = (turned * cos + rotate(turned) * sin).to(x.dtype)
    return torch.cat((turned, rest), dim=-1)


def _repeat_halves(table):
    return torch.cat((table, table), dim=-1)


def _repeat_pairs(table):
    return table.repeat_interleave(2, dim=-1)


def _rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _rotate_pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


_LOW = torch.bfloat16


def _half(x, cos, sin, *, half):
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def _half_back(x, cos, sin, *, half):
    return x * cos + torch.cat((x[..., half:], -x[..., :half]), dim=-1) * sin


def _half_chunk(x, cos, sin):
    first, second = torch.chunk(x, 2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _half_wide(x, cos, sin, *, half):
    wide = x.float()
    return (wide * cos + torch.cat((-wide[..., half:], wide[..., :half]), dim=-1) * sin).to(x.dtype)


def _half_wide_after(x, cos, sin, *, half):
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x.float() * cos + rotated.float() * sin).to(x.dtype)


def _half_split(x, cos, sin, *, half):
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _half_split_chunk(x, cos, sin):
    first, second = torch.chunk(x, 2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _half_split_swapped(x, cos, sin, *, half):
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def _pairs(x, cos, sin):
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin


def _pairs_wide(x, cos, sin):
    wide = x.float()
    rotated = torch.stack((-wide[..., 1::2], wide[..., ::2]), dim=-1).flatten(-2)
    return (wide * cos + rotated * sin).to(dtype=x.dtype)


def _pairs_wide_after(x, cos, sin):
    rotated = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return (x.float() * cos + rotated.float() * sin).to(x.dtype)


def _pairs_split(x, cos, sin):
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)


def _pairs_to_halves(x, cos, sin):
    first, second = x[..., ::2], x[..., 1::2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _pairs_selected(x, cos, sin):
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2).type_as(x)


def _complex(x, turns):
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)


# What the op takes where a program holds it in another form.


def _as_tables(x, cos):
    return x.to(cos.dtype)


def _firsts_then_seconds(x, cos):
    return torch.cat((x[..., ::2], x[..., 1::2]), dim=-1).to(cos.dtype)


def _negative(sin):
    return -sin


def _cos_of(turns):
    return torch.view_as_real(turns).select(-1, 0)


def _sin_of(turns):
    return torch.view_as_real(turns).select(-1, 1)


def _check(bound, tables):
    x, cos, sin = bound["x"], bound["cos"], bound["sin"]
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        return f"cos {tuple(cos.shape)} {cos.dtype} and sin {tuple(sin.shape)} {sin.dtype} differ"
    if cos.shape[-1] * tables != x.shape[-1]:
        return f"the tables are {cos.shape[-1]} wide and x is {x.shape[-1]} wide"
    if cos.dim() > x.dim():
        return "the tables have more dimensions than x"
    if "half" in bound and bound["half"] * 2 != x.shape[-1]:
        return "x is not split in the middle"
    if cos.requires_grad or sin.requires_grad:
        return "the tables are trained"
    return None


def _check_full(bound):
    return _check(bound, 1)


def _check_half(bound):
    return _check(bound, 2)


def _check_complex(bound):
    turns = bound["turns"]
    return _check({"x": bound["x"], "cos": turns, "sin": turns}, 2)


def _check_promoted(bound, check):
    x, cos = bound["x"].dtype, bound["cos"].dtype
    if x == cos or torch.promote_types(x, cos) != cos:
        return f"{x} times {cos} is not {cos}, or nothing is widened"
    return check(bound)


def _check_full_promoted(bound):
    return _check_promoted(bound, _check_full)


def _check_half_promoted(bound):
    return _check_promoted(bound, _check_half)


def _pattern(fn, interleaved, half_tables, dtype=torch.float32, table=torch.float32, scalar=True, promoted=False, q=None, sin=None):
    width, low = 11 if half_tables else 22, {torch.float32: "", _LOW: "_low"}
    checks = (_check_full_promoted, _check_half_promoted) if promoted else (_check_full, _check_half)
    return Pattern(
        name=fn.__name__.lstrip("_") + ("_promoted" if promoted else low[dtype] + ("" if table == torch.float32 else "_tables")),
        fn=fn,
        inputs={"x": ((3, 7, 5, 22), dtype), "cos": ((3, 1, 5, width), table), "sin": ((3, 1, 5, width), table)},
        scalars={"half": 11} if scalar else {},
        arguments={
            "q": q or (Apply(_as_tables, ("x", "cos")) if promoted else Bind("x")),
            "k": None,
            "cos": Bind("cos"),
            "sin": sin or Bind("sin"),
            "interleaved": interleaved,
            "half_tables": half_tables,
        },
        check=checks[half_tables],
    )


def _promoted(fn, interleaved, half_tables, **more):
    """Low precision times wider tables, with no cast said: the product has the tables' dtype, and so has the result."""
    return _pattern(fn, interleaved, half_tables, dtype=_LOW, promoted=True, **more)


_BACK = Apply(_negative, ("sin",))
_REORDERED = Apply(_firsts_then_seconds, ("x", "cos"))

PATTERNS = (
    _pattern(_half, False, False),
    _pattern(_half_back, False, False, sin=_BACK),
    _pattern(_half_chunk, False, False, scalar=False),
    _pattern(_half_wide, False, False, dtype=_LOW),
    _pattern(_half_wide, False, False, dtype=_LOW, table=_LOW),
    _pattern(_half_wide_after, False, False, dtype=_LOW),
    _pattern(_half_split, False, True),
    _pattern(_half_split_chunk, False, True, scalar=False),
    _pattern(_half_split_swapped, False, True),
    _pattern(_pairs, True, False, scalar=False),
    _pattern(_pairs_wide, True, False, dtype=_LOW, scalar=False),
    _pattern(_pairs_wide, True, False, dtype=_LOW, table=_LOW, scalar=False),
    _pattern(_pairs_wide_after, True, False, dtype=_LOW, scalar=False),
    _pattern(_pairs_split, True, True, scalar=False),
    _pattern(_pairs_selected, True, True, scalar=False),
    _pattern(_pairs_selected, True, True, dtype=_LOW, scalar=False),
    _pattern(_pairs_to_halves, False, True, scalar=False, q=_REORDERED),
    _promoted(_half, False, False),
    _promoted(_half_back, False, False, sin=_BACK),
    _promoted(_half_chunk, False, False, scalar=False),
    _promoted(_half_split, False, True),
    _promoted(_half_split_chunk, False, True, scalar=False),
    _promoted(_half_split_swapped, False, True),
    _promoted(_pairs, True, False, scalar=False),
    _promoted(_pairs_split, True, True, scalar=False),
    *(
        Pattern(
            name="complex" if dtype == torch.float32 else "complex_low",
            fn=_complex,
            inputs={"x": ((3, 7, 5, 22), dtype), "turns": ((3, 1, 5, 11), torch.complex64)},
            arguments={
                "q": Bind("x"),
                "k": None,
                "cos": Apply(_cos_of, ("turns",)),
                "sin": Apply(_sin_of, ("turns",)),
                "interleaved": True,
                "half_tables": True,
            },
            check=_check_complex,
        )
        for dtype in (torch.float32, _LOW)
    ),
)
