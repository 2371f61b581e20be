"""`fxopt::linear_cross_entropy`: reference.py (plain form), sweep.py (the chunk loop), body.py
(ATen), triton.py (CUDA), cases.py (test inputs)."""

from fxopt.kernels.linear_cross_entropy import body, reference
from fxopt.kernels.op import FusedOp, Kernel, register

_OPTIONS = (
    "int ignore_index, str reduction, float label_smoothing, float softcap, float logit_scale, float z_loss, "
    "SymInt chunk, SymInt rows, "
)

_BACKWARD = Kernel(
    "linear_cross_entropy_backward(Tensor grad_loss, Tensor count, Tensor? d_hidden, Tensor? d_weight, "
    "Tensor? d_bias, Tensor? hidden, Tensor? weight, Tensor? bias, Tensor target, "
    + _OPTIONS
    + "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    body=body.backward,
    fake=body.backward_fake,
    cuda="fxopt.kernels.linear_cross_entropy.triton:backward",
)


def _vjp(ctx, grad_loss):
    if grad_loss is None:
        return (None,) * 14
    mask = list(ctx.needs_input_grad[:3])
    return *_BACKWARD.overload(grad_loss, *ctx.saved_tensors, *ctx.options, mask), *(None,) * 11


OP = register(
    FusedOp(
        forward=Kernel(
            "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, "
            + _OPTIONS
            + "bool[3] grad_mask, bool[3] statistics) "
            "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
            body=body.forward,
            fake=body.forward_fake,
            cuda="fxopt.kernels.linear_cross_entropy.triton:forward",
        ),
        reference=reference.linear_cross_entropy,
        backward=_BACKWARD,
        setup_context=body.setup_context,
        vjp=_vjp,
        patterns=reference.PATTERNS,
    )
)
