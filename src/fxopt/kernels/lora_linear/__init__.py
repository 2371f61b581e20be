"""`fxopt::lora_linear`: reference.py (plain form), body.py (ATen), grouping.py (which tensor belongs to which sibling), cases.py
(test inputs)."""

from fxopt.kernels.lora_linear import body, reference
from fxopt.kernels.op import FusedOp, Kernel, register

_BACKWARD = Kernel(
    "lora_linear_backward(Tensor?[] dys, Tensor? x, Tensor[] bases, str[] formats, SymInt[] shapes, Tensor[] biases, "
    "Tensor[] lora_a, Tensor[] lora_b, Tensor low, float[] scales, bool transposed, float dropout, Tensor? seeds, "
    "bool[] output_mask) -> Tensor[]",
    rows=frozenset({0, 1, 8}),
    body=body.backward,
    fake=body.backward_fake,
    cuda="fxopt.kernels.lora_linear.triton:backward",
)


def _vjp(ctx, *dys):
    needs = ctx.needs_input_grad
    bases, biases, siblings = ctx.counts
    lists = [None, [None] * bases, None, None, [None] * biases, [None] * siblings, [None] * siblings, None, None, None, None]
    if all(dy is None for dy in dys):
        return tuple(lists)
    x, low, *rest = ctx.saved_tensors
    parts, rest = rest[:bases], rest[bases:]
    added, rest = rest[:biases], rest[biases:]
    a, b, seeds = rest[:siblings], rest[siblings : 2 * siblings], rest[2 * siblings]
    # the first part of a base is its weight where it is dense; only dense weights take a gradient
    places = ctx.first_parts
    weights = [bool(needs[1][place]) for place in places]
    mask = [needs[0], *weights, *(needs[4] or []), *needs[5], *needs[6]]
    grads = iter(_BACKWARD.overload(
        list(dys), x, parts, ctx.formats, ctx.shapes, added, a, b, low, ctx.scales, ctx.transposed, ctx.dropout, seeds, mask))
    taken = iter([next(grads) if on else None for on in mask])
    lists[0] = next(taken)
    for place in places:
        lists[1][place] = next(taken)
    for position, count in ((4, biases), (5, siblings), (6, siblings)):
        lists[position] = [next(taken) for _ in range(count)]
    return tuple(lists)


OP = register(
    FusedOp(
        forward=Kernel(
            "lora_linear(Tensor x, Tensor[] bases, str[] formats, SymInt[] shapes, Tensor[] biases, Tensor[] lora_a, "
            "Tensor[] lora_b, float[] scales, bool transposed, float dropout, Tensor? seeds) -> Tensor[]",
            rows=frozenset({0}),
            body=body.forward,
            fake=body.forward_fake,
            cuda="fxopt.kernels.lora_linear.triton:forward",
        ),
        reference=reference.lora_linear,
        outputs=-1,
        backward=_BACKWARD,
        setup_context=body.setup_context,
        vjp=_vjp,
        patterns=reference.PATTERNS,
    )
)
