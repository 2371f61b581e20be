"""`fxopt::lora_embedding`: reference.py (plain form), body.py (ATen), cases.py (test inputs), triton.py (GPU)."""

from fxopt.kernels.lora_embedding import body, reference
from fxopt.kernels.op import FusedOp, Kernel, register

_BACKWARD = Kernel(
    "lora_embedding_backward(Tensor dy, Tensor ids, Tensor lora_a, Tensor lora_b, Tensor low, float scale, int padding_idx, SymInt words, "
    "bool[] output_mask) -> (Tensor, Tensor, Tensor)",
    body=body.backward,
    fake=body.backward_fake,
    cuda="fxopt.kernels.lora_embedding.triton:backward",
)


def _vjp(ctx, dy):
    if dy is None:
        return (None,) * 6
    mask = [ctx.needs_input_grad[place] for place in (0, 2, 3)]
    found = _BACKWARD.overload(dy, *ctx.saved_tensors, ctx.scale, ctx.padding_idx, ctx.words, mask)
    d_weight, d_a, d_b = (grad if on else None for grad, on in zip(found, mask, strict=True))
    return d_weight, None, d_a, d_b, None, None


OP = register(
    FusedOp(
        forward=Kernel(
            "lora_embedding(Tensor weight, Tensor ids, Tensor lora_a, Tensor lora_b, float scale, int padding_idx) -> (Tensor, Tensor)",
            body=body.forward,
            fake=body.forward_fake,
            cuda="fxopt.kernels.lora_embedding.triton:forward",
        ),
        reference=reference.lora_embedding,
        backward=_BACKWARD,
        setup_context=body.setup_context,
        vjp=_vjp,
        patterns=reference.PATTERNS,
    )
)
