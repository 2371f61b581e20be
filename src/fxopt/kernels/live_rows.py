"""`fxopt::live_rows`: which rows of a batch are live. Found once a step; the number of rows is known only when it runs."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch.library import Library, register_fake

from fxopt.errors import CheckError
from fxopt.kernels.op import NAMESPACE
from fxopt.torch_private import ConstantSource, DimDynamic, FakeTensor

_LIBRARY = Library(NAMESPACE, "FRAGMENT")
_LIBRARY.define(
    "live_rows(Tensor? keep, SymInt[2] size, Tensor[] read, int[] cuts, Tensor[] alike, bool causal, bool blank, int multiple) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_COUNT = itertools.count()
_MOST: weakref.WeakKeyDictionary[Any, dict[sympy.Symbol, sympy.Expr]] = weakref.WeakKeyDictionary()


def live_rows(keep, size, read, cuts, alike, causal, blank, multiple):
    """The rows of a batch that are kept or read, in order, then rows of none up to a multiple.

    Args:
        keep: [batch, seq], integer or bool: where it is not zero a row is kept, and attends to the kept rows of its sequence; None
            where no row attends to others. size: batch and seq.
        read: bool tensors with one element for each row, flat or not: rows that something reads whether they are kept or not (a
            label, the first token). cuts: for each of them, how many tokens at the start and at the end of a sequence it leaves out.
        alike: tensors [batch, seq, ...], whose sizes are checked.
        causal: rows attend to those before them alone. blank: attention to no row at all gives zero.
        multiple: the number of rows is rounded up to it, and is at least 2: a size of 1 is one that broadcasts.

    Returns, for n rows:
        place [n] int64: the row in the flattened batch, in range also for a row of none. slot [n] int64: the same,
        batch * seq for a row of none. sequence, position [n] int64: the place as two numbers. segment [1, n] int64: equal for rows
        that attend to each other; a row that is read and not kept, and a row of none, are of segments without kept rows.
        real [n] bool: not a row of none. sees [n] bool: attends to a row.

    Raises:
        CheckError: sizes differ; a row is read and not kept, and attends to others: it would become one that they attend to.
    """
    batch, seq = size
    device = next(x.device for x in (keep, *read) if x is not None)
    if any(x.shape[:2] != (batch, seq) for x in (*alike, *(() if keep is None else (keep,)))) or keep is not None and keep.dim() != 2:
        shapes = ", ".join(str(list(x.shape)) for x in (*(() if keep is None else (keep,)), *alike))
        raise CheckError(f"rows are left out of tensors that are no rows of one batch [{batch}, {seq}]: {shapes}", do="pass tensors [batch, seq, ...] of one batch")
    live = kept = torch.zeros(batch, seq, dtype=torch.bool, device=device) if keep is None else keep != 0
    for each, start, stop in zip(read, cuts[::2], cuts[1::2], strict=True):
        if each.numel() != batch * max(seq - start - stop, 0):
            raise CheckError(f"rows are left out of a batch [{batch}, {seq}] with {each.numel()} labels", do="pass one label for each token")
        if each.numel():
            live = live | torch.nn.functional.pad(each.reshape(batch, -1), (start, stop), value=False)
    alone = live & ~kept
    if keep is not None and bool(alone.any()):
        around = kept.cumsum(1) > 0 if causal else kept.any(1, keepdim=True).expand_as(kept)
        wrong = alone & around if blank else alone
        if bool(wrong.any()):
            at = wrong.nonzero()[0].tolist()
            raise CheckError("a token of padding is read: its label counts in the loss, or the model takes its state", where=f"sequence {at[0]}, token {at[1]}",
                             do="give padding the label that the loss ignores, or leave out `pack` for such data")
    place = live.flatten().nonzero().squeeze(1)
    found = place.numel()
    total = _rounded(found, multiple)
    place = torch.cat([place, place.new_zeros(total - found)])
    number = torch.arange(total, device=device)
    real = number < found
    sequence, position = (place // seq, place % seq) if seq else (place, place)
    here = kept.flatten()[place] & real if kept.numel() else torch.zeros_like(real)
    segment = torch.where(here, sequence, torch.where(real, batch + 1 + number, batch))
    return place, torch.where(real, place, batch * seq), sequence, position, segment[None], real, here


def _fake(keep, size, read, cuts, alike, causal, blank, multiple):
    """The number of rows is a size of its own, with a hint: all of the example's rows are live, rounded to a prime, which no other
    size of a model is likely to be. Where all sizes are numbers (a dry run that asks for memory), as many as there can be."""
    like = next(x for x in (keep, *read) if x is not None)
    mode = like.fake_mode if isinstance(like, FakeTensor) else None
    env = mode.shape_env if mode is not None else None
    every = size[0] * size[1]
    rows = _rounded(every, multiple) if env is None else _unknown(env, max(2, multiple, _hint(every)))
    if env is not None:
        expr = sympy.Integer(every) if isinstance(every, int) else every.node.expr
        _MOST.setdefault(env, {})[rows.node.expr] = sympy.Max(sympy.ceiling(expr / multiple) * multiple, multiple, 2)
    number = like.new_empty((rows,), dtype=torch.int64)
    flag = like.new_empty((rows,), dtype=torch.bool)
    return *(torch.empty_like(number) for _ in range(4)), like.new_empty((1, rows), dtype=torch.int64), flag, torch.empty_like(flag)


def _unknown(env, hint):
    """A size that only a run knows."""
    while any(hint % d == 0 for d in range(2, int(hint**0.5) + 1)):
        hint += 1
    source = ConstantSource(f"live_rows_{next(_COUNT)}")
    return env.create_symintnode(env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None), hint=hint, source=source)


def _rounded(number, multiple):
    return max(-(-number // multiple) * multiple, multiple, 2)


def most(env: Any) -> Mapping[sympy.Symbol, sympy.Expr]:
    """For each number of rows that `live_rows` made in a shape environment: as many as there can be, by the environment's other sizes."""
    return _MOST.get(env, {})


def _hint(size):
    return size if isinstance(size, int) else size.node.hint or 2


_LIBRARY.impl("live_rows", live_rows, "CompositeExplicitAutograd")
register_fake(f"{NAMESPACE}::live_rows", _fake, lib=_LIBRARY)
OVERLOAD = torch.ops.fxopt.live_rows.default
