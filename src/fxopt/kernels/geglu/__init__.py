"""`fxopt::geglu`: reference.py (plain form, patterns), body.py (ATen), triton.py (CUDA), cases.py (test inputs)."""

from fxopt.kernels.geglu import body, reference
from fxopt.kernels.op import FusedOp, Kernel, register

_BACKWARD = Kernel(
    "geglu_backward(Tensor dy, Tensor gate, Tensor up, str approximate, bool[2] output_mask) -> (Tensor, Tensor)",
    rows=frozenset({0, 1, 2}),
    body=body.backward,
    fake=body.backward_fake,
    cuda="fxopt.kernels.geglu.triton:backward",
)


def _vjp(ctx, dy):
    if dy is None:
        return None, None, None
    return *_BACKWARD.overload(dy, *ctx.saved_tensors, ctx.approximate, list(ctx.needs_input_grad[:2])), None


OP = register(
    FusedOp(
        forward=Kernel(
            "geglu(Tensor gate, Tensor up, str approximate) -> Tensor",
            rows=frozenset({0, 1}),
            body=body.forward,
            fake=body.forward_fake,
            cuda="fxopt.kernels.geglu.triton:forward",
        ),
        reference=reference.geglu,
        backward=_BACKWARD,
        setup_context=body.setup_context,
        vjp=_vjp,
        patterns=reference.PATTERNS,
    )
)
