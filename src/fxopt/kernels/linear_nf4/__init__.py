"""`fxopt::linear_nf4`: reference.py (plain form), body.py (ATen), cases.py (test inputs)."""

from fxopt.kernels.linear_nf4 import body, reference
from fxopt.kernels.op import FusedOp, Kernel, register

_BACKWARD = Kernel(
    "linear_nf4_backward(Tensor dy, Tensor packed, Tensor absmax, SymInt[] shape, Tensor? bias, bool transposed, "
    "bool[2] output_mask) -> (Tensor, Tensor)",
    body=body.backward,
    fake=body.backward_fake,
)


def _vjp(ctx, dy):
    if dy is None:
        return (None,) * 6
    packed, absmax, bias = ctx.saved_tensors
    mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[4]]
    dx, dbias = _BACKWARD.overload(dy, packed, absmax, ctx.shape, bias, ctx.transposed, mask)
    return dx, None, None, None, dbias, None


OP = register(
    FusedOp(
        forward=Kernel(
            "linear_nf4(Tensor x, Tensor packed, Tensor absmax, SymInt[] shape, Tensor? bias, bool transposed) "
            "-> Tensor",
            body=body.forward,
            fake=body.forward_fake,
        ),
        reference=reference.linear_nf4,
        backward=_BACKWARD,
        setup_context=body.setup_context,
        vjp=_vjp,
        patterns=reference.PATTERNS,
    )
)
