"""An embedding with a low-rank adapter: two gathers and one small product.

The plain form writes the adapter's rows, their scaled copy and the sum, three passes over [tokens, width]; here the product is
added into the gathered rows. Backward saves ids and the gathered columns of A; the gradient of A touches the columns of the
tokens that occur.
"""

from __future__ import annotations

import torch

from fxopt.errors import CheckError
from fxopt.kernels.blocks import as_rows

aten = torch.ops.aten


def forward(weight, ids, lora_a, lora_b, scale, padding_idx):
    """y = W[ids] + scale (B A)^T[ids].

    Args:
        weight: [vocabulary, width], fp16, bf16, fp32 or fp64.
        ids: [...], int32 or int64, in [0, vocabulary).
        lora_a: [r, vocabulary]. lora_b: [width, r]. Of one dtype, the weight's or a wider one, in which their product is computed.
        scale: of the product, alpha / r. padding_idx: the id whose row of W and column of A take no gradient; -1: none.

    Returns:
        y: [..., width] in the weight's dtype, with a product of zero equal to the plain embedding bit for bit.
        low: [..., r], A^T[ids] in the adapter's dtype, kept for the gradient of lora_b.

    Raises:
        CheckError, RuntimeError: shapes or dtypes do not fit.

    Source: Hu et al., 2021, https://arxiv.org/abs/2106.09685.
    """
    check(weight, ids, lora_a, lora_b)
    y = aten.embedding(weight, ids)
    low = lora_a.index_select(1, ids.reshape(-1)).t()
    rows = as_rows(y)
    if rows.dtype == low.dtype:
        rows.addmm_(low, lora_b.t(), alpha=scale)
    else:
        rows.add_(low.mm(lora_b.t()), alpha=scale)
    return y, low.contiguous().view(*ids.shape, low.shape[1])


def check(weight, ids, lora_a, lora_b):
    words, width = weight.shape
    torch._check(
        lora_a.dim() == 2 and lora_b.dim() == 2 and lora_a.shape[1] == words and lora_b.shape[0] == width and lora_a.shape[0] == lora_b.shape[1],
        lambda: f"lora_a {tuple(lora_a.shape)}, lora_b {tuple(lora_b.shape)}: need [r, {words}], [{width}, r]",
    )
    if ids.dtype not in (torch.int32, torch.int64):
        raise CheckError(f"the ids are {ids.dtype}", do="give int32 or int64")
    if lora_a.dtype != lora_b.dtype:
        raise CheckError(f"lora_a is {lora_a.dtype} and lora_b is {lora_b.dtype}", do="keep them in one dtype")


def forward_fake(weight, ids, lora_a, lora_b, scale, padding_idx):
    check(weight, ids, lora_a, lora_b)
    return weight.new_empty((*ids.shape, weight.shape[1])), lora_a.new_empty((*ids.shape, lora_a.shape[0]))


def backward(dy, ids, lora_a, lora_b, low, scale, padding_idx, words, output_mask):
    """Gradients of `lora_embedding`. With u = scale dy B [tokens, r]:

    dW[i] = sum of dy, dA[:, i] = sum of u over the tokens whose id is i, and dB = scale dy^T low. dA is accumulated in fp32.

    Args:
        dy: [..., width], any strides. words: size of the vocabulary. output_mask: dW, dA, dB.

    Returns:
        dweight [words, width] in dy's dtype, dlora_a, dlora_b; None where the mask is off.
    """
    rows, flat = as_rows(dy), ids.reshape(-1)
    wide = rows.to(lora_b.dtype)
    d_weight = aten.embedding_dense_backward(dy, ids, words, padding_idx, False) if output_mask[0] else None
    d_a = None
    if output_mask[1]:
        up = wide.mm(lora_b).mul_(scale)
        if padding_idx >= 0:
            up.masked_fill_((flat == padding_idx).unsqueeze(1), 0.0)
        acc = torch.promote_types(lora_a.dtype, torch.float32)
        d_a = torch.zeros(lora_a.shape, dtype=acc, device=dy.device).index_add_(1, flat, up.t().to(acc)).to(lora_a.dtype)
    d_b = wide.t().mm(as_rows(low)).mul_(scale) if output_mask[2] else None
    return d_weight, d_a, d_b


def backward_fake(dy, ids, lora_a, lora_b, low, scale, padding_idx, words, output_mask):
    d_weight = dy.new_empty((words, dy.shape[-1])) if output_mask[0] else None
    return d_weight, lora_a.new_empty(lora_a.shape) if output_mask[1] else None, lora_b.new_empty(lora_b.shape) if output_mask[2] else None


def setup_context(ctx, inputs, output):
    weight, ids, lora_a, lora_b, ctx.scale, ctx.padding_idx = inputs
    ctx.words = weight.shape[0]
    ctx.save_for_backward(ids, lora_a, lora_b, output[1])
