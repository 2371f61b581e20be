"""`fxopt::cross_entropy`: reference.py (plain form), rows.py (the arithmetic of a row), body.py (ATen), triton.py (CUDA),
cases.py (test inputs)."""

from fxopt.kernels.cross_entropy import body, reference
from fxopt.kernels.op import FusedOp, Kernel, register

_OPTIONS = "int ignore_index, str reduction, float label_smoothing, float softcap, float logit_scale, float z_loss"

_BACKWARD = Kernel(
    f"cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor maximum, Tensor others, Tensor count, {_OPTIONS}) -> Tensor",
    body=body.backward,
    fake=body.backward_fake,
    cuda="fxopt.kernels.cross_entropy.triton:backward",
)


def _vjp(ctx, grad_loss):
    if grad_loss is None:
        return (None,) * 8
    return _BACKWARD.overload(grad_loss, *ctx.saved_tensors, *ctx.options), *(None,) * 7


OP = register(
    FusedOp(
        forward=Kernel(
            f"cross_entropy(Tensor logits, Tensor target, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
            body=body.forward,
            fake=body.forward_fake,
            cuda="fxopt.kernels.cross_entropy.triton:forward",
        ),
        reference=reference.cross_entropy,
        backward=_BACKWARD,
        setup_context=body.setup_context,
        vjp=_vjp,
        patterns=reference.PATTERNS,
    )
)
