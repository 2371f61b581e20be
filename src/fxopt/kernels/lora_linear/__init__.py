"""`fxopt::lora_linear`: reference.py (plain form), body.py (ATen), cases.py (test inputs)."""

from fxopt.kernels.lora_linear import body, reference
from fxopt.kernels.op import FusedOp, Kernel, register

_BACKWARD = Kernel(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor weight, Tensor? bias, Tensor? absmax, SymInt[] shape, "
    "Tensor lora_a, Tensor lora_b, Tensor low, float scale, bool transposed, bool[5] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    body=body.backward,
    fake=body.backward_fake,
)


def _vjp(ctx, dy):
    if dy is None:
        return (None,) * 9
    x, weight, bias, absmax, lora_a, lora_b, low = ctx.saved_tensors
    needs = ctx.needs_input_grad
    mask = [needs[0], needs[1], needs[2], needs[5], needs[6]]
    dx, dweight, dbias, da, db = _BACKWARD.overload(
        dy, x, weight, bias, absmax, ctx.shape, lora_a, lora_b, low, ctx.scale, ctx.transposed, mask
    )
    return dx, dweight, dbias, None, None, da, db, None, None


OP = register(
    FusedOp(
        forward=Kernel(
            "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? absmax, SymInt[] shape, Tensor lora_a, "
            "Tensor lora_b, float scale, bool transposed) -> (Tensor, Tensor)",
            body=body.forward,
            fake=body.forward_fake,
        ),
        reference=reference.lora_linear,
        backward=_BACKWARD,
        setup_context=body.setup_context,
        vjp=_vjp,
        patterns=reference.PATTERNS,
    )
)
