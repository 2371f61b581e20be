"""`fxopt::packed_attention`: reference.py (plain form), body.py (one segment after the other), cuda.py (all at once),
torch_kernels.py (torch's attention kernels under both), cases.py (test inputs)."""

from fxopt.kernels.op import FusedOp, Kernel, register
from fxopt.kernels.packed_attention import body, reference

_BACKWARD = Kernel(
    "packed_attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor segments, Tensor out, Tensor lse, "
    "float? scale, bool causal, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    body=body.backward,
    fake=body.backward_fake,
    cuda="fxopt.kernels.packed_attention.cuda:backward",
)


def _vjp(ctx, dout):
    if dout is None:
        return (None,) * 6
    grads = _BACKWARD.overload(dout, *ctx.saved_tensors, ctx.scale, ctx.causal, list(ctx.needs_input_grad[:3]))
    return *grads, None, None, None


OP = register(
    FusedOp(
        forward=Kernel(
            "packed_attention(Tensor query, Tensor key, Tensor value, Tensor segments, float? scale, bool causal) -> (Tensor, Tensor)",
            body=body.forward,
            fake=body.forward_fake,
            cuda="fxopt.kernels.packed_attention.cuda:forward",
        ),
        reference=reference.packed_attention,
        backward=_BACKWARD,
        setup_context=body.setup_context,
        vjp=_vjp,
    )
)
