"""`fxopt::rope`: reference.py (plain form, patterns), body.py (ATen), triton.py (CUDA), cases.py (test inputs)."""

from fxopt.kernels.op import FusedOp, Kernel, register
from fxopt.kernels.rope import body, reference

_BACKWARD = Kernel(
    "rope_backward(Tensor? dq, Tensor? dk, Tensor cos, Tensor sin, bool interleaved, bool half_tables) "
    "-> (Tensor, Tensor)",
    rows=frozenset({0, 1, 2, 3}),
    body=body.backward,
    fake=body.backward_fake,
    cuda="fxopt.kernels.rope.triton:backward",
)


def _vjp(ctx, dq, dk):
    dq, dk = (grad if needed else None for grad, needed in zip((dq, dk), ctx.needs_input_grad, strict=False))
    if dq is not None or dk is not None:
        dq, dk = _BACKWARD.overload(dq, dk, *ctx.saved_tensors, ctx.interleaved, ctx.half_tables)
    return dq, dk, None, None, None, None


OP = register(
    FusedOp(
        forward=Kernel(
            "rope(Tensor q, Tensor? k, Tensor cos, Tensor sin, bool interleaved, bool half_tables) "
            "-> (Tensor, Tensor)",
            rows=frozenset({0, 1, 2, 3}),
            body=body.forward,
            fake=body.forward_fake,
            cuda="fxopt.kernels.rope.triton:forward",
        ),
        reference=reference.rope,
        outputs=2,
        backward=_BACKWARD,
        setup_context=body.setup_context,
        vjp=_vjp,
        patterns=reference.PATTERNS,
    )
)
