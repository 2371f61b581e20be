"""`fxopt::rms_norm`: reference.py (plain form, patterns), body.py (ATen), triton.py (CUDA), cases.py (test inputs)."""

from fxopt.kernels.op import FusedOp, Kernel, register
from fxopt.kernels.rms_norm import body, reference

_BACKWARD = Kernel(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, float offset, "
    "bool[2] output_mask) -> (Tensor, Tensor)",
    rows=frozenset({0, 1, 3}),
    body=body.backward,
    fake=body.backward_fake,
    cuda="fxopt.kernels.rms_norm.triton:backward",
)


def _vjp(ctx, dy):
    x, weight, rstd = ctx.saved_tensors
    if dy is None:
        return (None,) * 5
    dx, dweight = _BACKWARD.overload(dy, x, weight, rstd, ctx.offset, list(ctx.needs_input_grad[:2]))
    return dx, dweight, None, None, None


OP = register(
    FusedOp(
        forward=Kernel(
            "rms_norm(Tensor x, Tensor? weight, float eps, float offset, str casting) -> (Tensor, Tensor)",
            rows=frozenset({0}),
            body=body.forward,
            fake=body.forward_fake,
            cuda="fxopt.kernels.rms_norm.triton:forward",
        ),
        reference=reference.rms_norm,
        backward=_BACKWARD,
        setup_context=body.setup_context,
        vjp=_vjp,
        patterns=reference.PATTERNS,
    )
)
