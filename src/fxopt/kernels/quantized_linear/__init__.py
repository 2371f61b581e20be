"""`fxopt::quantized_linear`: reference.py (plain form), body.py (ATen), triton.py (GPU), cases.py (test inputs)."""

from fxopt.kernels.op import FusedOp, Kernel, register
from fxopt.kernels.quantized_linear import body, reference

_BACKWARD = Kernel(
    "quantized_linear_backward(Tensor dy, Tensor[] base, str format, SymInt[] shape, Tensor? bias, bool transposed, "
    "bool[2] output_mask) -> (Tensor, Tensor)",
    rows=frozenset({0}),
    body=body.backward,
    fake=body.backward_fake,
    cuda="fxopt.kernels.quantized_linear.triton:backward",
)


def _vjp(ctx, dy):
    *base, bias = ctx.saved_tensors
    if dy is None:
        return None, [None] * len(base), None, None, None, None
    mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[4]]
    dx, dbias = _BACKWARD.overload(dy, base, ctx.format, ctx.shape, bias, ctx.transposed, mask)
    return dx, [None] * len(base), None, None, dbias, None


OP = register(
    FusedOp(
        forward=Kernel(
            "quantized_linear(Tensor x, Tensor[] base, str format, SymInt[] shape, Tensor? bias, bool transposed) -> Tensor",
            rows=frozenset({0}),
            body=body.forward,
            fake=body.forward_fake,
            cuda="fxopt.kernels.quantized_linear.triton:forward",
        ),
        reference=reference.quantized_linear,
        backward=_BACKWARD,
        setup_context=body.setup_context,
        vjp=_vjp,
        patterns=reference.PATTERNS,
    )
)
