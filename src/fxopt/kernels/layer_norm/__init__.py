"""`fxopt::layer_norm`: reference.py (plain form, patterns), body.py (ATen), triton.py (CUDA), cases.py (test inputs)."""

from fxopt.kernels.layer_norm import body, reference
from fxopt.kernels.op import FusedOp, Kernel, register

_BACKWARD = Kernel(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    rows=frozenset({0, 1, 4, 5}),
    body=body.backward,
    fake=body.backward_fake,
    cuda="fxopt.kernels.layer_norm.triton:backward",
)


def _vjp(ctx, dy):
    if dy is None:
        return (None,) * 4
    return *_BACKWARD.overload(dy, *ctx.saved_tensors, list(ctx.needs_input_grad[:3])), None


OP = register(
    FusedOp(
        forward=Kernel(
            "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
            rows=frozenset({0}),
            body=body.forward,
            fake=body.forward_fake,
            cuda="fxopt.kernels.layer_norm.triton:forward",
        ),
        reference=reference.layer_norm,
        backward=_BACKWARD,
        setup_context=body.setup_context,
        vjp=_vjp,
        patterns=reference.PATTERNS,
    )
)
