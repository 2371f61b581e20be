"""`fxopt::add_rms_norm`: reference.py (plain form), body.py (ATen), triton.py (CUDA), cases.py (test inputs)."""

from fxopt.kernels.add_rms_norm import body, reference
from fxopt.kernels.op import FusedOp, Kernel, register

_BACKWARD = Kernel(
    "add_rms_norm_backward(Tensor dy, Tensor? dsum, Tensor sum, Tensor? weight, Tensor rstd, float offset, "
    "bool[2] output_mask) -> (Tensor, Tensor)",
    rows=frozenset({0, 1, 2, 4}),
    body=body.backward,
    fake=body.backward_fake,
    cuda="fxopt.kernels.add_rms_norm.triton:backward",
)


def _vjp(ctx, dy, dsum):
    needs = ctx.needs_input_grad
    if dy is None:  # The norm's result is not used: an add alone.
        return *(dsum if need else None for need in needs[:2]), *(None,) * 4
    mask = [needs[0] or needs[1], needs[2]]
    dx, dweight = _BACKWARD.overload(dy, dsum, *ctx.saved_tensors, ctx.offset, mask)
    return *(dx if need else None for need in needs[:2]), dweight, None, None, None


OP = register(
    FusedOp(
        forward=Kernel(
            "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, str casting) -> (Tensor, Tensor, Tensor)",
            rows=frozenset({0, 1}),
            body=body.forward,
            fake=body.forward_fake,
            cuda="fxopt.kernels.add_rms_norm.triton:forward",
        ),
        reference=reference.add_rms_norm,
        outputs=2,
        backward=_BACKWARD,
        setup_context=body.setup_context,
        vjp=_vjp,
    )
)
