"""Attention of some rows of a batch against attention of all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.errors import CheckError
from fxopt.kernels.live_attention import OVERLOAD
from fxopt.kernels.tolerance import same


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(st.data())
def test_it_is_attention_of_all_rows_read_at_some(data: st.DataObject) -> None:
    draw = data.draw
    batch, heads, groups, seq, width = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 7)), draw(st.sampled_from((2, 8)))
    dtype = draw(st.sampled_from((torch.float64, torch.float32)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    query, key, value = (torch.randn(batch, n, seq, width, dtype=dtype, generator=generator).requires_grad_() for n in (heads * groups, heads, heads))
    kind = draw(st.sampled_from(("none", "segments", "bool", "added")))
    causal, scale = draw(st.booleans()), draw(st.sampled_from((None, 0.3)))
    segments = mask = None
    places = torch.arange(seq)
    allowed = (places[None] <= places[:, None] if causal else torch.ones(seq, seq, dtype=torch.bool))[None, None]
    if kind == "segments":
        segments = torch.tensor([draw(st.lists(st.integers(0, 2), min_size=seq, max_size=seq)) for _ in range(draw(st.sampled_from((1, batch))))])
        allowed = allowed & (segments[:, None, :, None] == segments[:, None, None, :])
    elif kind != "none":
        shape = draw(st.sampled_from((1, batch))), draw(st.sampled_from((1, heads * groups))), draw(st.sampled_from((1, seq))), seq
        mask = torch.rand(shape, generator=generator) < 0.6
        mask[..., 0] = True
        if kind == "bool":
            allowed = allowed & mask
        else:
            mask = torch.randn(shape, dtype=dtype, generator=generator)
    added = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, float("-inf")) + (mask if kind == "added" else 0)
    chosen = torch.tensor(draw(st.lists(st.booleans(), min_size=batch * seq, max_size=batch * seq))).nonzero().squeeze(1)
    none = draw(st.integers(0, 2))
    place, real = torch.cat([chosen, chosen.new_zeros(none)]), torch.arange(len(chosen) + none) < len(chosen)
    whole = F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scale, enable_gqa=True)
    expected = (whole.transpose(1, 2).flatten(0, 1)[place] * real[:, None, None]).transpose(0, 1)[None]
    rows = query.transpose(1, 2).flatten(0, 1)[place].transpose(0, 1)[None]
    found, _ = OVERLOAD(rows, key, value, place, real, segments, mask, scale, causal)
    direction = torch.randn(expected.shape, dtype=dtype, generator=generator)
    assert same(found, expected)
    grads = [torch.autograd.grad((x * direction).sum(), (query, key, value)) for x in (found, expected)]
    total = max(float(g.norm()) for g in grads[1])
    assert all(float((a - b).norm()) <= 1e3 * torch.finfo(dtype).eps * max(total, 1.0) for a, b in zip(*grads, strict=True))


def test_shapes_that_do_not_fit_are_refused() -> None:
    x = torch.randn(1, 2, 5, 4)
    with pytest.raises(CheckError, match="live_attention takes rows"):
        OVERLOAD(x, x[:, :, :, :3], x, torch.arange(5), torch.ones(5, dtype=torch.bool), None, None, None, False)


def test_its_fake_value_has_its_shape_and_strides() -> None:
    x = torch.randn(1, 4, 5, 8)
    args = (x[:, :, :3], x, x, torch.tensor([0, 2, 3]), torch.ones(3, dtype=torch.bool), None, None, None, True)
    real = OVERLOAD(*args)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = OVERLOAD(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    assert [(a.shape, a.stride(), a.dtype) for a in real] == [(a.shape, a.stride(), a.dtype) for a in fake]
