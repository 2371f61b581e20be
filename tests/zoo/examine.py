"""One entry under the library: is it captured, what fires, and are its training steps those of eager code.

The references know nothing of graphs: a deep copy of the model in eager code; and for adapters, that copy with its weights replaced
by W + scale * B A, whose dense gradients give those of A and B by the chain rule.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch.utils import _pytree as pytree

from fxopt.api import Optimized, optimize
from fxopt.errors import FxoptError
from fxopt.ir import meta
from fxopt.ir.facts import LowRank
from fxopt.ir.program import Program
from fxopt.ir.structure import opened
from fxopt.kernels import tolerance
from fxopt.passes import presets
from fxopt.runtime import adapted
from tests.zoo import coverage
from tests.zoo.entry import Batch, Entry, call_of
from tests.zoo.sites import KINDS, Sites, count

OPS = {"rms_norm": "RMSNorm", "add_rms_norm": "RMSNorm", "layer_norm": "LayerNorm", "add_layer_norm": "LayerNorm", "swiglu": "gated MLP",
       "geglu": "gated MLP", "rope": "RoPE", "linear_cross_entropy": "loss", "cross_entropy": "loss"}
"""The kind of place that each op fills."""
MODES = ("fp32", "bf16", "autocast")
ADAPTED = presets.finetune(rank=4)
RESPONSES = 3  # steps with every parameter moved by one rounding


@dataclass
class Result:
    """What was found of one entry.

    Attributes:
        captured: "whole", "in parts" or "refused".
        reason: why not whole.
        fired: for each mode, for each kind of place, how many ops fired and how many places there are.
        ops: fused ops of the fp32 program, by name.
        impossible: modules in which more ops fired than were counted as places: the count does not know them.
        why: for each kind with more places than ops, the reasons and at how many places, by mode.
        errors: relative error of the loss and the largest of any gradient or buffer, by check ("plain", "adapted") and step.
        where: the name of that gradient or buffer.
        wrong: what differs by more than is allowed.
        adapters: how many weights have an adapter; None if the pass refuses, see `refused_adapters`.
        seconds: of `optimize` with its check, processor time.
        captures: programs after two steps of different sizes.
        parameters, flops: the shares that run in graphs.
    """

    name: str
    family: str
    captured: str = "whole"
    reason: str = ""
    fired: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    ops: dict[str, int] = field(default_factory=dict)
    impossible: list[str] = field(default_factory=list)
    why: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    errors: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    adapters: int | None = None
    refused_adapters: str = ""
    gradients: int = 0
    seconds: float = 0.0
    captures: int = 0
    parameters: float = 1.0
    flops: float = 1.0


def examine(entry: Entry, modes: tuple[str, ...] = MODES, adapters: bool = True) -> Result:
    """Everything about one entry: the exact passes on two sizes, adapters on two sizes, the ops that fire in other modes."""
    result = Result(entry.name, entry.family)
    places = count(entry.build(), entry.inputs())
    start = time.process_time()
    try:
        opt = _optimized(entry.build(), None, entry.inputs())
    except FxoptError as error:
        result.captured, result.reason = "refused", coverage.relative(" ".join(str(error).split()))
        result.fired = {MODES[0]: {kind: (0, sum(places[kind].values())) for kind in KINDS}}
        result.parameters = result.flops = 0.0
        return result
    result.seconds = time.process_time() - start
    _coverage(entry, opt, result)
    programs = coverage.programs(opt)
    _count(programs, places, MODES[0], result)
    _compare(result, "plain", entry, entry.build(), opt, programs, lambda eager: dict(_learning(eager)), lambda: dict(_learning(opt.model)))
    result.captures = coverage.captures(opt)
    if adapters:
        _adapted(entry, result)
    if any(n for _, n in result.fired[MODES[0]].values()):
        for mode in modes[1:]:
            _mode(entry, mode, result)
    return result


def _optimized(model: nn.Module, passes: Any, batch: Batch, check: bool = True) -> Optimized:
    args, kwargs = call_of(batch)
    if args and kwargs:
        raise ValueError("an entry takes positional or keyword arguments")
    return optimize(model, passes, inputs=args or kwargs, check=check)


def _learning(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


# -- which places are filled ---------------------------------------------------------------------------------------------


def fired(programs: Mapping[str, Program]) -> tuple[Sites, Counter[str]]:
    """The fused ops of programs of modules (by path) by kind and module path, and by name; a rotation counts once for each tensor
    that it turns."""
    found: Sites = {kind: Counter() for kind in KINDS}
    names: Counter[str] = Counter()
    for prefix, program in programs.items():
        for node in program.nodes:
            namespace, _, rest = str(node.target).partition(".")
            name = rest.partition(".")[0]
            if node.op == "call_function" and namespace == "fxopt":
                names[name] += 1
                if name in OPS:
                    path = f"{prefix}.{meta.provenance(node).path}".strip(".")
                    found[OPS[name]][path] += sum(x is not None for x in node.args[:2]) if name == "rope" else 1
    return found, names


def impossible(done: Sites, places: Sites) -> list[str]:
    """Modules in which more ops fired than were counted as places."""
    return [f"{kind} in {path or 'the root'}" for kind in KINDS if kind != "loss" for path, number in done[kind].items() if number > places[kind][path]]


def _count(programs: Mapping[str, Program], places: Sites, mode: str, result: Result) -> None:
    done, names = fired(programs)
    result.fired[mode] = {kind: (sum(done[kind].values()), sum(places[kind].values())) for kind in KINDS}
    result.impossible += impossible(done, places)
    if mode == MODES[0]:
        result.ops = dict(names)
    for kind, counts in reasons(programs, done, places).items():
        result.why.setdefault(kind, {})[mode] = dict(counts)


def reasons(programs: Mapping[str, Program], done: Sites, places: Sites) -> dict[str, Counter[str]]:
    """Why places are not filled, in the words of the passes' reports."""
    said: dict[str, Counter[str]] = {}
    for kind in KINDS:
        label = "loss" if kind == "loss" else "fuse"
        misses = [(f"{prefix}.{miss.path}".strip("."), miss) for prefix, program in programs.items() for record in program.log for miss in record.misses
                  if record.text.startswith(label)]
        if kind == "loss":
            k, n = sum(done[kind].values()), sum(places[kind].values())
            left = {"": n - k} if k < n else {}
        else:
            left = {path: n - done[kind][path] for path, n in places[kind].items() if n > done[kind][path]}
        for path, number in left.items():
            near = [miss for at, miss in misses if path == "" or at == path or at.startswith(f"{path}.")]
            own = [miss for miss in near if OPS.get(miss.rule.partition(".")[0]) == kind]
            words = [f"{miss.rule.partition(' (')[0]}: {miss.reason}" for miss in own or near] or ["no operators there are near to a pattern"]
            said.setdefault(kind, Counter())[words[0]] += number
    return said


def _mode(entry: Entry, mode: str, result: Result) -> None:
    """The places that are filled with weights of 16 bits, or under autocast to them."""
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    model, batch = entry.build(dtype), entry.inputs(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        try:
            places = count(copy.deepcopy(model), batch)
        except (RuntimeError, ValueError, NotImplementedError):
            return  # the model itself does not run in this mode
        try:
            _count(coverage.programs(_optimized(model, None, batch, check=False)), places, mode, result)
        except FxoptError as error:
            result.why.setdefault("capture", {})[mode] = {" ".join(str(error).split())[:300]: 1}


def _coverage(entry: Entry, opt: Optimized, result: Result) -> None:
    """Whether the whole model is one graph; else why not, and which shares of it run as graphs."""
    result.reason = coverage.left_out(opt)
    if result.reason:
        result.captured = "in parts"
        result.parameters, result.flops = coverage.shares(opt, entry.build(), entry.inputs())


# -- numbers -------------------------------------------------------------------------------------------------------------


def loss_of(output: Any) -> torch.Tensor:
    """The loss in what a model returns: by its name, or all scalars that learn, or a fixed projection of what it computes."""
    named = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(named, torch.Tensor):
        return named
    leaves = [x for x in pytree.tree_leaves(opened(output)) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.requires_grad]
    scalars = [x for x in leaves if x.dim() == 0]
    parts = scalars or [(x * torch.randn(x.shape, generator=torch.Generator().manual_seed(x.numel())).to(x.dtype)).mean() for x in leaves]
    return torch.stack([part.double() for part in parts]).sum()


def step(model: nn.Module, batch: Batch) -> torch.Tensor:
    """One training step without an optimizer, the same random numbers at each call. The loss."""
    args, kwargs = call_of(batch)
    model.zero_grad()
    torch.manual_seed(0)
    loss = loss_of(model(*args, **kwargs))
    loss.backward()
    return loss.detach()


Values = dict[str, torch.Tensor | None]


def _compare(result: Result, check: str, entry: Entry, eager: nn.Module, opt: Optimized, programs: Mapping[str, Program],
             expected: Callable[[nn.Module], Mapping[str, Any]], found: Callable[[], Mapping[str, Any]]) -> None:
    """Steps of two sizes of an eager model against the optimized one. `expected` and `found` name what takes a gradient in each."""
    allowed = max(tolerance.SELF_CHECK.get(dtype, 0.0) for program in programs.values() for dtype in meta.float_dtypes(program.nodes))
    for number in range(len(entry.sizes)):
        before = _copied(eager)
        try:
            mine = _values(lambda: step(opt, entry.inputs(number)), found, opt.model)
        except (FxoptError, RuntimeError) as error:
            result.wrong.append(f"{check}, step {number}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            return
        theirs = _values(lambda: step(eager, entry.inputs(number)), lambda: expected(eager), eager)
        if check == "plain":
            result.gradients = sum(name.startswith("the gradient of") for name in theirs)
        errors = differences(theirs, mine)
        over = {name: error for name, error in errors.items() if not error <= allowed}
        if over:
            responses = [differences(theirs, _moved(before, entry.inputs(number), expected, trial)) for trial in range(RESPONSES)]
            for name, error in over.items():
                if not error <= tolerance.SELF_CHECK_RESPONSE * max(response[name] for response in responses):
                    result.wrong.append(f"{check}, step {number}: {name} differs by {error:.1e}")
        rest = {name: error for name, error in errors.items() if name != "the loss"} or {"nothing": 0.0}
        worst = max(rest, key=rest.__getitem__)
        result.errors.setdefault(check, []).append((errors["the loss"], rest[worst]))
        if rest[worst] >= max(gradient for _, gradient in result.errors[check]):
            result.where[check] = worst


def _values(run: Callable[[], torch.Tensor], learning: Callable[[], Mapping[str, Any]], model: nn.Module) -> Values:
    """The loss, gradients and buffers after a step."""
    values: Values = {"the loss": run()}
    values |= {f"the gradient of {name}": grad.grad if isinstance(grad, nn.Parameter) else grad for name, grad in learning().items()}
    return values | {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers() if not name.startswith("_fxopt")}


def _copied(model: nn.Module) -> nn.Module:
    """A copy of a model that may keep results of its last step as attributes, which torch refuses to copy."""
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor) and not value.is_leaf]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in kept})


def _moved(model: nn.Module, batch: Batch, expected: Callable[[nn.Module], Mapping[str, Any]], trial: int) -> Values:
    """The step of an eager model with every parameter moved by one rounding: what rounding alone does to an ill-conditioned model."""
    model, generator = _copied(model), torch.Generator().manual_seed(trial)
    with torch.no_grad():
        for p in model.parameters():
            signs = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
            p.copy_((p.double() * (1 + torch.finfo(p.dtype).eps * signs)).to(p.dtype))
    return _values(lambda: step(model, batch), lambda: expected(model), model)


def differences(expected: Values, found: Values) -> dict[str, float]:
    """Relative errors by name (Frobenius norm); gradients far below the largest one are measured against a part of that."""
    floor = tolerance.SELF_CHECK_FLOOR * max([float(v.double().norm()) for n, v in expected.items() if v is not None and "gradient" in n] or [0.0])
    errors = {}
    for name in expected.keys() | found.keys():
        a, b = expected.get(name), found.get(name)
        if a is None or b is None:
            one = b if a is None else a  # a gradient of zeros and no gradient
            errors[name] = 0.0 if one is None or not one.any() else float("inf")
        elif a.shape != b.shape:
            errors[name] = float("inf")
        elif torch.equal(a, b):
            errors[name] = 0.0
        else:
            errors[name] = float((a.double() - b.double()).norm()) / max(float(a.double().norm()), floor if "gradient" in name else 0.0, 1e-30)
    return errors


# -- adapters ------------------------------------------------------------------------------------------------------------


def _adapted(entry: Entry, result: Result) -> None:
    """The fine-tuning passes with random adapters, against eager code with dense weights."""
    eager = entry.build()
    try:
        opt = _optimized(entry.build(), ADAPTED, entry.inputs(), check=False)  # what follows is the check
    except FxoptError as error:
        result.refused_adapters = " ".join(str(error).split())[:300]
        return
    records = {weight.name: (module, leaf, weight) for module, leaf, weight in adapted.weights_of(opt.model)}
    result.adapters = len(records)
    generator = torch.Generator().manual_seed(5)
    parameters = dict(eager.named_parameters(remove_duplicate=False))
    factors: dict[str, tuple[LowRank, dict[str, nn.Parameter]]] = {}
    with torch.no_grad():
        for name, (module, leaf, weight) in sorted(records.items()):
            fact, parts = weight.adapters["default"], adapted.factors(module, leaf, "default")
            for part in parts.values():
                part.copy_(0.05 * torch.randn(part.shape, generator=generator))
            factors[name] = fact, parts  # type: ignore[assignment]
            parameters[name].add_(change(fact, parts).to(parameters[name].dtype))  # type: ignore[arg-type]
            parameters[name].requires_grad_(True)

    def expected(model: nn.Module) -> dict[str, Any]:
        dense = dict(model.named_parameters(remove_duplicate=False))
        return {f"{name} {factor}": grad for name, (fact, parts) in factors.items() for factor, grad in chained(fact, parts, dense[name].grad).items()}

    def found() -> dict[str, Any]:
        stray = {f"{name} (frozen)": p.grad for name, p in opt.named_parameters() if p.grad is not None and not p.requires_grad}
        return {f"{name} {factor}": part for name, (_, parts) in factors.items() for factor, part in parts.items()} | stray

    _compare(result, "adapted", entry, eager, opt, coverage.programs(opt), expected, found)


def change(fact: LowRank, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """scale * B A in the layout of the weight, see `LowRank`."""
    a, b = parts["a"], parts["b"]
    product = torch.einsum("or,r...->o...", b.flatten(1), a) if fact.kind == "conv" else torch.einsum("...or,...ri->...oi", b, a)
    return fact.scale * (product.transpose(-1, -2) if fact.transposed else product)


def chained(fact: LowRank, parts: Mapping[str, nn.Parameter], dense: torch.Tensor | None) -> Values:
    """The gradients of the factors, from that of the dense weight."""
    if dense is None:
        return {factor: None for factor in parts}
    leaves = {factor: part.detach().requires_grad_() for factor, part in parts.items()}
    grads = torch.autograd.grad(change(fact, leaves), list(leaves.values()), dense.to(parts["a"].dtype))
    return dict(zip(leaves, grads))
