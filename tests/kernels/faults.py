"""Wrong variants of every op, each called like the op. The checker must fail on all of them."""

from __future__ import annotations

import torch

from fxopt.kernels.catalog import CATALOG

OPS = {op.name: op for op in CATALOG}


def without_gradient(op, place):
    """The gradient of one argument is lost."""

    def candidate(*args):
        args = list(args)
        args[place] = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args[place])
        return op(*args)

    return candidate


def with_argument(op, place, change):
    """One argument is not what the caller gave (an option ignored, an operand scaled)."""

    def candidate(*args):
        args = list(args)
        args[place] = change(args[place])
        return op(*args)

    return candidate


def writes_to(op, place):
    def candidate(*args):
        out = op(*args)
        args[place].detach().add_(1)
        return out

    return candidate


def ignores_the_mask(op):
    """A gradient is produced for what nobody asked a gradient of."""

    def candidate(*args):
        for arg in args[:2] if op.name == "rope" else args:  # Its tables have no gradient.
            for part in arg if isinstance(arg, list) else [arg]:
                if isinstance(part, torch.Tensor) and part.is_floating_point():
                    part.requires_grad_()
        return op(*args)

    return candidate


def rounds_to(op, dtype):
    return lambda *args: tuple(out.to(dtype).to(out.dtype) for out in op(*args))


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, change):
        ctx.change = change
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


def changed_pull(op, change):
    """Backward starts from another grad_output."""
    return lambda *args: tuple(ScaledGradient.apply(out, change) for out in op(*args))


def _first_row(grad):
    return grad.reshape(-1)[0].expand(grad.shape) if grad.dim() and grad.numel() else grad


def _rms_constant_rstd(x, weight, eps, offset, casting):
    rstd = torch.rsqrt(x.detach().double().pow(2).mean(-1, keepdim=True) + eps).to(x.dtype)
    y = x * rstd
    return (y if weight is None else y * (weight + offset),)


def _rms_eps_outside(x, weight, eps, offset, casting):
    y = x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps)
    return (y if weight is None else y * (weight + offset),)


def _layer_constant_mean(x, weight, bias, eps):
    y = (x - x.mean(-1, keepdim=True).detach()) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias,)


def _without_path(op, place):
    """The gradient that comes in through one of the results is lost."""
    return lambda *args: tuple(out.detach() if i == place else out for i, out in enumerate(op(*args)))


def _norm_of_x_alone(norm):
    return lambda x, residual, *rest: (*norm(x, *rest), x + residual)


def _rope_inverse_gradient(q, k, cos, sin, interleaved, half_tables):
    class Inverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return OPS["rope"](x, None, cos, sin, interleaved, half_tables)[0]

        @staticmethod
        def backward(ctx, grad):
            return OPS["rope"](grad, None, cos, -sin, interleaved, half_tables)[0]

    return Inverse.apply(q), (q.new_empty(0) if k is None else Inverse.apply(k))


def _rope_keys_alone(q, k, cos, sin, interleaved, half_tables):
    out = OPS["rope"](q, k, cos, sin, interleaved, half_tables)
    return (out[0], out[1] if k is None else k * 1)


def with_parts(op, place, change):
    """The parts of a stored weight are not what the caller gave; `change` gives them back for (parts, format)."""
    return lambda *args: op(*args[:place], change(args[place], args[place + 1]), *args[place + 1 :])


def _scales_of_the_next_block(base, format):
    """Where a format has scales of their own, those of another block."""
    return [part.roll(1) if part.is_floating_point() and part.dim() == 1 and part.numel() > 16 else part for part in base]


def _first_codes_swapped(base, format):
    return [_swap_nibbles(base[0]) if base[0].dtype == torch.uint8 else base[0], *base[1:]]


def _writes_to_parts(op, place):
    def candidate(*args):
        out = op(*args)
        args[place][-1].detach().view(-1)[:1].add_(1)
        return out

    return candidate


def _adam_with_l2(param, grad, *rest):
    return OPS["adamw_"](param, grad + rest[7] * param, *rest[:7], 0.0, *rest[8:])


def _adamw_eps_inside(param, grad, exp_avg, exp_avg_sq, *rest):
    return OPS["adamw_"](param, grad, exp_avg, exp_avg_sq + rest[4], *rest[:4], 0.0, *rest[5:])


def _swap_nibbles(packed):
    return packed >> 4 | packed << 4


def _shift_blocks(absmax):
    return absmax.roll(1)


def _lora_without_scale(*args):
    return OPS["lora_linear"](*args[:7], [1.0] * len(args[7]), *args[8:])


def _loss_over_all_rows(*args):
    (loss,) = OPS["linear_cross_entropy"](*args)
    count = (args[3] != args[4]).sum()
    return (loss * count / args[3].numel() if args[5] == "mean" else loss,)


def _mean_over_all_rows(*args):
    (loss,) = OPS["cross_entropy"](*args)
    return (loss * (args[1] != args[2]).sum() / args[1].numel() if args[3] == "mean" else loss,)


def _cap_without_derivative(*args):
    def apply(logits):
        capped = args[5] * torch.tanh(logits.double() * args[6] / args[5]) if args[5] else logits * args[6]
        return logits * args[6] + (capped - logits * args[6]).detach()

    return OPS["cross_entropy"](apply(args[0]).to(args[0].dtype), *args[1:5], 0.0, 1.0, args[7])


def _common(op, place=0):
    return {
        "lost gradient": without_gradient(op, place),
        "gradient of a frozen input": ignores_the_mask(op),
        "doubled gradient": changed_pull(op, lambda grad: 2 * grad),
        "grad_output of the first row": changed_pull(op, _first_row),
        "input written": writes_to(op, place),
        "rounded to bf16": rounds_to(op, torch.bfloat16),
    }


def _sums(op, norm):
    return _common(op) | {
        "residual gradient lost": without_gradient(op, 1),
        "gradient of the norm lost": _without_path(op, 0),
        "gradient of the sum lost": _without_path(op, 1),
        "residual not added": _norm_of_x_alone(norm),
        "results swapped": lambda *args: op(*args)[::-1],
    }


def _runs_apart(segments):
    """A number of its own for each run."""
    return torch.cat([torch.zeros_like(segments[:, :1]), segments[:, 1:] != segments[:, :-1]], 1).cumsum(1)


def _faults():
    rms, layer, swiglu, geglu, rope = (OPS[name] for name in ("rms_norm", "layer_norm", "swiglu", "geglu", "rope"))
    add_rms, add_layer = OPS["add_rms_norm"], OPS["add_layer_norm"]
    lora, loss, logits_loss = OPS["lora_linear"], OPS["linear_cross_entropy"], OPS["cross_entropy"]
    adamw, adamw_8bit, packed = OPS["adamw_"], OPS["adamw_8bit_"], OPS["packed_attention"]
    none = lambda value: None  # noqa: E731
    flip = lambda value: not value  # noqa: E731
    return {
        "rms_norm": _common(rms)
        | {
            "constant rstd": _rms_constant_rstd,
            "eps outside the root": _rms_eps_outside,
            "offset ignored": with_argument(rms, 3, lambda offset: 0.0),
            "weight ignored": with_argument(rms, 1, none),
            "weight gradient lost": without_gradient(rms, 1),
        },
        "layer_norm": _common(layer)
        | {
            "constant mean": _layer_constant_mean,
            "eps ignored": with_argument(layer, 3, lambda eps: 0.0),
            "bias ignored": with_argument(layer, 2, none),
            "weight gradient lost": without_gradient(layer, 1),
            "bias gradient lost": without_gradient(layer, 2),
        },
        "add_rms_norm": _sums(add_rms, rms)
        | {
            "offset ignored": with_argument(add_rms, 4, lambda offset: 0.0),
            "weight gradient lost": without_gradient(add_rms, 2),
        },
        "add_layer_norm": _sums(add_layer, layer)
        | {
            "eps ignored": with_argument(add_layer, 4, lambda eps: 0.0),
            "weight gradient lost": without_gradient(add_layer, 2),
            "bias gradient lost": without_gradient(add_layer, 3),
        },
        "swiglu": _common(swiglu)
        | {
            "operands swapped": lambda gate, up: swiglu(up, gate),
            "sigmoid for silu": lambda gate, up: (torch.sigmoid(gate) * up,),
            "up gradient lost": without_gradient(swiglu, 1),
        },
        "geglu": _common(geglu)
        | {
            "operands swapped": lambda gate, up, how: geglu(up, gate, how),
            "approximation ignored": with_argument(geglu, 2, lambda how: "none"),
            "up gradient lost": without_gradient(geglu, 1),
        },
        "rope": _common(rope)
        | {
            "sin negated": with_argument(rope, 3, torch.neg),
            "inverse for transpose": _rope_inverse_gradient,
            "other layout": with_argument(rope, 4, flip),
            "keys not rotated": _rope_keys_alone,
        },
        "packed_attention": _common(packed)
        | {
            "causal ignored": with_argument(packed, 5, lambda causal: False),
            "scale ignored": with_argument(packed, 4, none),
            "one segment": with_argument(packed, 3, torch.zeros_like),
            "a segment that comes back is another": with_argument(packed, 3, _runs_apart),
            "first row's segments for all": with_argument(packed, 3, lambda segments: segments[:1]),
            "key gradient lost": without_gradient(packed, 1),
            "value gradient lost": without_gradient(packed, 2),
        },
        "dequantize": {
            "nibbles swapped": with_parts(OPS["dequantize"], 0, _first_codes_swapped),
            "scales of the next block": with_parts(OPS["dequantize"], 0, _scales_of_the_next_block),
            "input written": _writes_to_parts(OPS["dequantize"], 0),
            "rounded to bf16": rounds_to(OPS["dequantize"], torch.bfloat16),
        },
        "quantized_linear": _common(OPS["quantized_linear"])
        | {
            "bias ignored": with_argument(OPS["quantized_linear"], 4, none),
            "bias gradient lost": without_gradient(OPS["quantized_linear"], 4),
            "nibbles swapped": with_parts(OPS["quantized_linear"], 1, _first_codes_swapped),
        },
        "lora_linear": _common(lora)
        | {
            "scale dropped": _lora_without_scale,
            "gradient of lora_a lost": without_gradient(lora, 5),
            "gradient of lora_b lost": without_gradient(lora, 6),
            "weight gradient lost": without_gradient(lora, 1),
            "bias gradient lost": without_gradient(lora, 4),
            "bias ignored": with_argument(lora, 4, lambda biases: []),
            "dropout ignored": with_argument(lora, 9, lambda p: 0.0),
            "one mask for all": with_argument(lora, 10, lambda seeds: None if seeds is None else seeds[:1].expand(len(seeds))),
            "first sibling for all": with_argument(lora, 6, lambda bs: [bs[0]] * len(bs) if len({b.shape for b in bs}) == 1 else bs),
        },
        "lora_embedding": _common(OPS["lora_embedding"])
        | {
            "gradient of lora_b lost": without_gradient(OPS["lora_embedding"], 3),
            "gradient of lora_a lost": without_gradient(OPS["lora_embedding"], 2),
            "scale ignored": with_argument(OPS["lora_embedding"], 4, lambda scale: 1.0),
            "padding ignored": with_argument(OPS["lora_embedding"], 5, lambda padding: -1),
            "the word before": with_argument(OPS["lora_embedding"], 1, lambda ids: ids.clamp(min=1) - 1),
        },
        "dora_norm": {
            "scale ignored": with_argument(OPS["dora_norm"], 5, lambda scale: 1.0),
            "adapter ignored": with_argument(OPS["dora_norm"], 4, torch.zeros_like),
            "norm of the base's columns": lambda *args: (OPS["dora_norm"].reference(*args)[0].flip(0),),
            "rounded to bf16": rounds_to(OPS["dora_norm"], torch.bfloat16),
        },
        "cross_entropy": {label: fault for label, fault in _common(logits_loss).items() if label != "gradient of a frozen input"}
        | {
            "ignored rows counted": with_argument(logits_loss, 2, lambda index: -7777),
            "mean over all rows": _mean_over_all_rows,
            "label smoothing ignored": with_argument(logits_loss, 4, lambda smoothing: 0.0),
            "cap ignored": with_argument(logits_loss, 5, lambda cap: 0.0),
            "logit scale ignored": with_argument(logits_loss, 6, lambda scale: 1.0),
            "z-loss ignored": with_argument(logits_loss, 7, lambda z_loss: 0.0),
            "cap without its derivative": _cap_without_derivative,
            "another label": with_argument(logits_loss, 1, lambda target: target.clamp(min=1) - 1),
        },
        "linear_cross_entropy": _common(loss)
        | {
            "bias ignored": with_argument(loss, 2, none),
            "ignored rows counted": with_argument(loss, 4, lambda index: -7777),
            "mean over all rows": _loss_over_all_rows,
            "label smoothing ignored": with_argument(loss, 6, lambda smoothing: 0.0),
            "cap ignored": with_argument(loss, 7, lambda cap: 0.0),
            "logit scale ignored": with_argument(loss, 8, lambda scale: 1.0),
            "z-loss ignored": with_argument(loss, 9, lambda z_loss: 0.0),
            "weight gradient lost": without_gradient(loss, 1),
            "bias gradient lost": without_gradient(loss, 2),
        },
        "adamw_": {
            "decay ignored": with_argument(adamw, 9, lambda decay: 0.0),
            "decay coupled": _adam_with_l2,
            "eps inside the root": _adamw_eps_inside,
            "bias not corrected": with_argument(adamw, 10, lambda step: 1_000_000),
            "factor ignored": with_argument(adamw, 4, none),
            "one factor for both averages": with_argument(adamw, 7, lambda beta2: 0.99),
            "gradient written": writes_to(adamw, 1),
            "rounded to bf16": rounds_to(adamw, torch.bfloat16),
        },
        "adamw_8bit_": {
            "decay ignored": with_argument(adamw_8bit, 12, lambda decay: 0.0),
            "factor ignored": with_argument(adamw_8bit, 7, none),
            "gradient written": writes_to(adamw_8bit, 1),
            "scales of the next block": with_argument(adamw_8bit, 3, _shift_blocks),
            "sign lost": lambda *args: [part.abs() if place == 1 else part for place, part in enumerate(adamw_8bit(*args))],
            "averages not stored": lambda *args: (adamw_8bit(*args)[0], *adamw_8bit.results(args)[1:]),
        },
    }


FAULTS = [(name, label, fault) for name, group in _faults().items() for label, fault in group.items()]
