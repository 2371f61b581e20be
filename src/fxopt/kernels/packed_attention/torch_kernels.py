"""torch's own attention kernels, called as `scaled_dot_product_attention` and `varlen_attn` call them. The only file that
names them: they are private operators, and another release may change them."""

from __future__ import annotations

import torch

aten = torch.ops.aten

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDEST_HEAD = 256  # of the kernels for a GPU


def on_cpu(query, key, value):
    """Whether torch's flash attention for CPUs takes these, [batch, heads, seq, width]. It divides by sizes, so none may be 0."""
    same = query.shape[-1] == value.shape[-1] and query.dtype in FLOATS
    return query.device.type == "cpu" and same and 0 not in (*query.shape, *key.shape)


def cpu_forward(query, key, value, scale, causal, added=None):
    """(out [batch, heads, seq, width], lse [batch, heads, seq]). Key and value may have fewer heads than query. `added` to the scores: their dtype."""
    query, key, value = map(_whole_rows, (query, key, value))
    return aten._scaled_dot_product_flash_attention_for_cpu.default(query, key, value, 0.0, causal, attn_mask=added, scale=scale)


def cpu_backward(dout, query, key, value, out, lse, scale, causal, added=None):
    """The gradients of query, key and value."""
    dout, query, key, value, out = map(_whole_rows, (dout, query, key, value, out))
    return aten._scaled_dot_product_flash_attention_for_cpu_backward.default(dout, query, key, value, out, lse, 0.0, causal, attn_mask=added, scale=scale)


def varlen(query, value):
    """Whether torch's variable-length attention takes these, [batch, heads, seq, width]: 16-bit floats on a GPU of the
    Ampere generation or later, heads of one width, a multiple of 8."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16) or 0 in query.shape:
        return False
    width = query.shape[-1]
    if width != value.shape[-1] or width % 8 or width > WIDEST_HEAD:
        return False
    new = torch.version.hip is not None or torch.cuda.get_device_capability(query.device) >= (8, 0)
    return new and torch.backends.cuda.is_flash_attention_available()


def varlen_forward(query, key, value, offsets, longest, scale, causal):
    """(out [tokens, heads, width], lse [heads, tokens]) of query, key, value [tokens, heads, width].

    Args:
        offsets: int32, on the device, where each sequence begins, and the number of tokens.
        longest: length of the longest sequence.
    """
    query, key, value = map(_whole_rows, (query, key, value))
    out, lse, *_ = aten._flash_attention_forward.default(query, key, value, offsets, offsets, longest, longest, 0.0, causal, False, scale=scale)
    return out, lse


def varlen_backward(dout, query, key, value, out, lse, offsets, longest, scale, causal):
    """The gradients of query, key and value; arguments as `varlen_forward`."""
    dout, query, key, value, out = map(_whole_rows, (dout, query, key, value, out))
    # The state of a generator that draws nothing: there is no dropout.
    state, unused = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
    return aten._flash_attention_backward.default(
        dout, query, key, value, out, lse, offsets, offsets, longest, longest, 0.0, causal, state, unused, scale=scale)  # fmt: skip


def _whole_rows(x):
    """The kernels take any strides but in the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()
