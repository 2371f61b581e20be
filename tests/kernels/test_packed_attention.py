"""packed_attention beyond the contract: documents apart equal documents packed, nothing crosses, and the path of a GPU."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from oracle import failures
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.errors import CheckError
from fxopt.kernels import tolerance
from fxopt.kernels.catalog import packed_attention
from fxopt.kernels.packed_attention import body, cuda, torch_kernels
from fxopt.kernels.packed_attention import runs as segment_runs
from fxopt.kernels.packed_attention.cases import cases
from fxopt.kernels.packed_attention.runs import runs

on_cases = settings(max_examples=60, derandomize=True, deadline=None, database=None, phases=(Phase.generate,))


def qkv(batch, seq, heads=4, kv_heads=2, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seq)
    return tuple(torch.randn(batch, n, seq, width, generator=generator, dtype=torch.float64).to(dtype) for n in (heads, kv_heads, kv_heads))


@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_are_documents_apart(causal):
    """Values and gradients, with a document that is continued after another one, and one of a single token."""
    segments = torch.tensor([[5, 5, 5, 2, 5, 5, 7, 7, 7, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    leaves = [x.requires_grad_() for x in qkv(2, 11)]
    (packed,) = packed_attention(*leaves, segments, None, causal)
    pull = torch.randn(packed.shape, generator=torch.Generator().manual_seed(0))
    mine = torch.autograd.grad(packed, leaves, pull)
    total = torch.zeros(())
    for row in range(2):
        for document in segments[row].unique():
            (at,) = torch.where(segments[row] == document)
            alone = F.scaled_dot_product_attention(*(x[row : row + 1, :, at] for x in leaves), is_causal=causal, enable_gqa=True)
            assert tolerance.same(packed[row : row + 1, :, at], alone)
            total = total + (alone * pull[row : row + 1, :, at]).sum()
    assert all(map(tolerance.same, mine, torch.autograd.grad(total, leaves)))


def test_what_is_not_finite_stays_in_its_document():
    """Under a dense mask a key that is NaN reaches every token, because 0 * NaN is NaN."""
    query, key, value = qkv(1, 6)
    segments = torch.tensor([[1, 1, 2, 2, 1, 1]])
    key[:, :, 2], value[:, :, 3] = float("nan"), float("inf")
    (out,) = packed_attention(query, key, value, segments, None, False)
    assert out[:, :, [0, 1, 4, 5]].isfinite().all() and not out[:, :, [2, 3]].isfinite().all()


def test_nothing_of_all_tokens_by_all_tokens_is_made_or_kept():
    seq = 64
    made = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            results = func(*args, **(kwargs or {}))
            made.extend(part.numel() for part in torch.utils._pytree.tree_leaves(results) if isinstance(part, torch.Tensor))
            return results

    query, key, value = qkv(1, seq, 1, 1, 4)
    segments = torch.arange(4).repeat_interleave(seq // 4)[None]
    with Sizes():
        out, lse = body.forward(query, key, value, segments, None, True)
        body.backward(out, query, key, value, segments, out, lse, None, True, [True] * 3)
    assert max(made) == seq * 4  # a query
    (out,) = packed_attention(*(x.requires_grad_() for x in (query, key, value)), segments, None, True)
    assert sum(part.numel() for part in out.grad_fn.saved_tensors) == 4 * seq * 4 + 2 * seq  # query, key, value, out; segments, lse


def test_the_runs():
    found = runs(torch.tensor([[1, 1, 2, 3, 3]]))
    assert found.order is None and found.bounds == ((0, 2, 3, 5),)
    assert list(found.pieces(2)) == [(slice(0, 2), slice(0, 2)), (slice(0, 2), slice(2, 3)), (slice(0, 2), slice(3, 5))]
    found = runs(torch.tensor([[1, 2, 1], [4, 4, 4]]))
    assert found.order.tolist() == [[0, 2, 1], [0, 1, 2]] and found.bounds == ((0, 2, 3), (0, 3))
    x = torch.randn(2, 3, 3, 4)
    assert torch.equal(found.apart(*found.together(x))[0], x) and found.apart(None) == [None]
    assert runs(torch.zeros(1, 0, dtype=torch.int64)).bounds == ((0,),)


def test_a_buffer_that_numpy_fills_again_is_read_again():
    buffer, leaves = np.array([[1, 1, 1, 2, 2, 2]]), qkv(1, 6)
    segments = torch.from_numpy(buffer)
    for row in ([1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 2, 2], [1, 2, 3, 1, 2, 3]):
        buffer[:] = row
        assert torch.equal(packed_attention(*leaves, segments, None, True)[0], packed_attention(*leaves, torch.tensor([row]), None, True)[0])


def test_segments_on_a_device_are_read_once_and_again_after_a_write(monkeypatch):
    reads = []
    monkeypatch.setattr(segment_runs, "_shared", lambda segments: False)
    monkeypatch.setattr(segment_runs, "_read", lambda segments, read=segment_runs._read: reads.append(1) or read(segments))
    leaves = [x.requires_grad_() for x in qkv(1, 6)]
    segments = torch.tensor([[1, 1, 1, 2, 2, 2]])
    layers = [packed_attention(*leaves, segments, None, causal)[0] for causal in (True, False, True)]
    sum(layers).sum().backward()
    assert len(reads) == 1
    before = packed_attention(*leaves, segments, None, False)[0]
    segments[0, 3] = 1
    after = packed_attention(*leaves, segments, None, False)[0]
    assert len(reads) == 2 and not torch.equal(before, after)
    assert torch.equal(after, packed_attention(*leaves, segments.clone(), None, False)[0]) and len(reads) == 3
    with torch.inference_mode():
        segments = torch.tensor([[1, 1, 1, 1, 2, 2]])
        assert torch.equal(after, packed_attention(*leaves, segments, None, False)[0])
        segments[0, 3] = 2
        assert torch.equal(before, packed_attention(*leaves, segments, None, False)[0])


def test_a_cuda_graph_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode(), pytest.raises(CheckError, match="CUDA graph"):
        cuda.forward(*[torch.empty(1, 2, 6, 8, device="cuda")] * 3, torch.empty(1, 6, dtype=torch.int64, device="cuda"), None, True)


@pytest.mark.parametrize("change", [lambda q, k, v, s: (q, k[:, :, :-1], v, s), lambda q, k, v, s: (q, k, v, s[:, :-1]), lambda q, k, v, s: (q[:, :3], k, v, s)])
def test_shapes_that_do_not_fit_are_refused(change):
    with pytest.raises(CheckError, match="a segment for each token"):
        packed_attention(*change(*qkv(2, 5), torch.zeros(2, 5, dtype=torch.int64)), None, True)


# -- the path of a GPU, with a plain stand-in for torch's variable-length kernels ------------------------------------


def _each(offsets):
    return [slice(start, stop) for start, stop in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)]


def _heads_first(x, at):
    return x[at].transpose(0, 1)[None]


def plain_varlen_forward(query, key, value, offsets, longest, scale, causal):
    assert offsets.dtype == torch.int32 and longest == offsets.diff().max() and offsets[-1] == len(query)
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32 if query.dtype != torch.float64 else query.dtype)
    for at in _each(offsets):
        part, sums = body._attend(*(_heads_first(x, at) for x in (query, key, value)), scale, causal)
        out[at], lse[:, at] = part[0].transpose(0, 1).to(out.dtype), sums[0]
    return out, lse


def plain_varlen_backward(dout, query, key, value, out, lse, offsets, longest, scale, causal):
    assert lse.shape == (query.shape[1], len(query)) and lse.is_contiguous()
    grads = [torch.empty_like(x) for x in (query, key, value)]
    for at in _each(offsets):
        parts = body._pull(*(_heads_first(x, at) for x in (dout, query, key, value, out)), lse[None, :, at], scale, causal)
        for grad, part in zip(grads, parts, strict=True):
            grad[at] = part[0].transpose(0, 1).to(grad.dtype)
    return grads


class OnGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, segments, scale, causal):
        out, lse = cuda.forward(query, key, value, segments, scale, causal)
        ctx.save_for_backward(query, key, value, segments, out, lse)
        ctx.options = scale, causal, list(ctx.needs_input_grad[:3])
        return out

    @staticmethod
    def backward(ctx, dout):
        return (*cuda.backward(dout, *ctx.saved_tensors, *ctx.options), None, None, None)


@pytest.fixture
def varlen_anywhere(monkeypatch):
    monkeypatch.setattr(torch_kernels, "varlen", lambda query, value: query.numel() > 0 and query.shape[-1] == value.shape[-1])
    monkeypatch.setattr(torch_kernels, "varlen_forward", plain_varlen_forward)
    monkeypatch.setattr(torch_kernels, "varlen_backward", plain_varlen_backward)


def test_all_segments_in_one_launch(varlen_anywhere):
    """Flattening, offsets and order are right for any segments; strides are those that the fake kernel says."""
    seen = []

    @on_cases
    @given(cases())
    def check(case):
        seen.append(torch_kernels.varlen(case.args[0], case.args[2]))
        assert failures(packed_attention, case, lambda *args: (OnGpu.apply(*args),)) == []

    check()
    assert sum(seen) > 20


def test_another_order_of_the_batch_would_show(varlen_anywhere, monkeypatch):
    offsets = cuda._offsets
    monkeypatch.setattr(cuda, "_offsets", lambda found, query: offsets(dataclasses.replace(found, bounds=found.bounds[:1] * len(found.bounds)), query))
    query, key, value = qkv(2, 6)
    segments = torch.tensor([[1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 2, 2]])
    assert not tolerance.same(cuda.forward(query, key, value, segments, None, True)[0], body.forward(query, key, value, segments, None, True)[0])


def test_the_private_operators_take_what_they_are_given():
    """The calls that only a GPU runs, on fake tensors: a release of torch with other signatures fails here."""
    with FakeTensorMode():
        query, key, value = (torch.empty(10, heads, 64, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2))
        offsets = torch.empty(4, dtype=torch.int32, device="cuda")
        out, lse = torch_kernels.varlen_forward(query, key, value, offsets, 5, 0.1, True)
        grads = torch_kernels.varlen_backward(query, query, key, value, out, lse, offsets, 5, 0.1, True)
    assert out.shape == query.shape and lse.shape == (4, 10) and lse.dtype == torch.float32
    assert [grad.shape for grad in grads] == [x.shape for x in (query, key, value)]
