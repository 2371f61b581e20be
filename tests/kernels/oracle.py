"""The checker of the contract tests: an op, or anything called like it, against the fp64 truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxopt.kernels.op import Case, FusedOp
from fxopt.kernels.tolerance import NEARBY, eager_error, excess, nearby

KINDS = ("outputs", "grads")


@dataclass(frozen=True)
class Run:
    """Outputs and gradients of one call; a gradient is None where none was asked for."""

    outputs: tuple
    grads: tuple


def run(function, case: Case, args: tuple) -> Run:
    """Call function on fresh leaves of args and pull back seeded grad_outputs."""
    leaves = tuple(
        arg.detach().requires_grad_(place in case.grads) if isinstance(arg, torch.Tensor) else arg
        for place, arg in enumerate(args)
    )
    outputs = tuple(function(*case.packed(leaves)))
    pairs = [(out, pull) for out, pull in zip(outputs, grad_outputs(case, outputs), strict=True) if out.requires_grad]
    if pairs:
        torch.autograd.backward(*zip(*pairs, strict=True))
    grads = tuple(leaf.grad if isinstance(leaf, torch.Tensor) else None for leaf in leaves)
    return Run(tuple(out.detach() for out in outputs), grads)


def grad_outputs(case: Case, outputs) -> list[torch.Tensor]:
    """The same values for every dtype that can hold them: drawn in bf16 precision."""
    generator = torch.Generator().manual_seed(case.seed)
    pulls = []
    for out in outputs:
        pull = torch.randn(() if case.expanded else out.shape, generator=generator).bfloat16()
        pulls.append(pull.to(out).expand(out.shape))
    return pulls


def to_dtype(arg, source, target):
    """Floating tensors and dtype arguments of one dtype to another; the rest as it is."""
    if isinstance(arg, torch.Tensor) and arg.is_floating_point():
        return arg.to(target) if source in (None, arg.dtype) else arg
    return target if isinstance(arg, torch.dtype) and source in (None, arg) else arg


def in_fp64(arg):
    return to_dtype(arg, None, torch.float64)


def eager_errors(op: FusedOp, case: Case) -> dict[tuple[str, int], float]:
    """The error of the plain program in each output and gradient, here and nearby, in the dtype of
    the case and in fp32: the larger one. (In low precision plain PyTorch may compute something as
    exactly zero that is a difference of equal fp32 numbers.)"""
    generator, errors = torch.Generator().manual_seed(case.seed), {}
    for turn in range(NEARBY + 1):
        args = case.args
        if turn:
            args = tuple(nearby(arg.cpu(), generator).to(arg.device) if _floats(arg) else arg for arg in args)
        true = run(op.reference, case, tuple(map(in_fp64, args)))
        plain = run(op.reference, case, tuple(to_dtype(arg, torch.float64, torch.float32) for arg in args))
        wide = run(op.reference, case, tuple(to_dtype(arg, None, torch.float32) for arg in args))
        for kind in KINDS:
            for place, truth in enumerate(getattr(true, kind)):
                for eager in (getattr(plain, kind)[place], getattr(wide, kind)[place]):
                    if eager is not None:
                        dtype = torch.float64 if _fp64(case, kind, place) else eager.dtype
                        error = eager_error(eager, truth, dtype)
                        errors[kind, place] = max(error, errors.get((kind, place), 0.0))
    return errors


def _floats(arg):
    return isinstance(arg, torch.Tensor) and arg.is_floating_point()


def _fp64(case, kind, place):
    """Whether the candidate computes this result in fp64."""
    args = case.args if kind == "outputs" else case.args[place : place + 1]
    return torch.float64 in {arg if isinstance(arg, torch.dtype) else getattr(arg, "dtype", None) for arg in args}


def failures(op: FusedOp, case: Case, candidate=None) -> list[str]:
    """What is wrong with `candidate` (the op itself by default) on this case; empty if it passes."""
    before = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in case.args]
    got = run(candidate or op, case, case.args)
    wrong = [
        f"input {place} was written to"
        for place, (old, arg) in enumerate(zip(before, case.args, strict=True))
        if isinstance(arg, torch.Tensor) and not same_bits(old, arg)
    ]
    truth, errors = run(op.reference, case, tuple(map(in_fp64, case.args))), eager_errors(op, case)
    plain = run(op.reference, case, case.args)
    for kind in KINDS:
        for place, (mine, true) in enumerate(zip(getattr(got, kind), getattr(truth, kind), strict=True)):
            label = f"{kind[:-1]} {place}"
            if (mine is None) != (true is None):
                wrong.append(f"{label} is {'missing' if mine is None else 'there, but was not asked for'}")
            elif mine is not None:
                if mine.dtype != (expected := getattr(plain, kind)[place].dtype):
                    wrong.append(f"{label} is {mine.dtype}, not {expected}")
                over = excess(mine, true, errors[kind, place])
                if over > 0:
                    wrong.append(f"{label} is off by {over:.3g} more than allowed")
    return wrong


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal including signs of zero and NaN payloads."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (part.clone(memory_format=torch.contiguous_format).view(torch.uint8) for part in (a.flatten(), b.flatten()))
    return torch.equal(a, b)
