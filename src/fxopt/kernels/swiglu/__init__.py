"""`fxopt::swiglu`: reference.py (plain form, patterns), body.py (ATen), triton.py (CUDA), cases.py (test inputs)."""

from fxopt.kernels.op import FusedOp, Kernel, register
from fxopt.kernels.swiglu import body, reference

_BACKWARD = Kernel(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up, bool[2] output_mask) -> (Tensor, Tensor)",
    rows=frozenset({0, 1, 2}),
    body=body.backward,
    fake=body.backward_fake,
    cuda="fxopt.kernels.swiglu.triton:backward",
)


def _vjp(ctx, dy):
    if dy is None:
        return None, None
    return _BACKWARD.overload(dy, *ctx.saved_tensors, list(ctx.needs_input_grad[:2]))


OP = register(
    FusedOp(
        forward=Kernel(
            "swiglu(Tensor gate, Tensor up) -> Tensor",
            rows=frozenset({0, 1}),
            body=body.forward,
            fake=body.forward_fake,
            cuda="fxopt.kernels.swiglu.triton:forward",
        ),
        reference=reference.swiglu,
        backward=_BACKWARD,
        setup_context=body.setup_context,
        vjp=_vjp,
        patterns=reference.PATTERNS,
    )
)
