"""`fxopt::add_layer_norm`: reference.py (plain form), body.py (ATen), triton.py (CUDA), cases.py (test inputs)."""

from fxopt.kernels.add_layer_norm import body, reference
from fxopt.kernels.op import FusedOp, Kernel, register

_BACKWARD = Kernel(
    "add_layer_norm_backward(Tensor dy, Tensor? dsum, Tensor sum, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    rows=frozenset({0, 1, 2, 5, 6}),
    body=body.backward,
    fake=body.backward_fake,
    cuda="fxopt.kernels.add_layer_norm.triton:backward",
)


def _vjp(ctx, dy, dsum):
    needs = ctx.needs_input_grad
    if dy is None:  # The norm's result is not used: an add alone.
        return *(dsum if need else None for need in needs[:2]), *(None,) * 3
    mask = [needs[0] or needs[1], *needs[2:4]]
    dx, dweight, dbias = _BACKWARD.overload(dy, dsum, *ctx.saved_tensors, mask)
    return *(dx if need else None for need in needs[:2]), dweight, dbias, None


OP = register(
    FusedOp(
        forward=Kernel(
            "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
            rows=frozenset({0, 1}),
            body=body.forward,
            fake=body.forward_fake,
            cuda="fxopt.kernels.add_layer_norm.triton:forward",
        ),
        reference=reference.add_layer_norm,
        outputs=2,
        backward=_BACKWARD,
        setup_context=body.setup_context,
        vjp=_vjp,
    )
)
