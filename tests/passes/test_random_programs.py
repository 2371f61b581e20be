"""Every pass, and random legal orders of passes, on random programs: outputs, all gradients, buffers, other sizes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import pytest
import torch
import torch.nn as nn
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from strategies import SIZE, Spec, Step, build, inputs, specs

from fxopt.errors import PassError
from fxopt.ir.capture import Call, capture, guards
from fxopt.ir.facts import Stored
from fxopt.ir.program import Program
from fxopt.kernels.formats import FORMATS
from fxopt.passes import verify
from fxopt.passes.base import Pass
from fxopt.passes.catalog import PASSES
from fxopt.passes.pipeline import apply, build as make

# No shrinking in CI: it would capture hundreds of programs. A spec is small enough to read as it is drawn. Few: tests/fuzz has more, which
# are not captured; these see what a capture makes.
QUICK = settings(max_examples=4, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])
LONG = settings(QUICK, max_examples=400, phases=list(Phase))
SIZES = (SIZE, (2, 7), (4, 3))

# Arguments worth trying, by pass; a pass that is not here is tried as it is.
ARGUMENTS: dict[str, tuple[dict[str, object], ...]] = {
    "memory": ({"budget": "least"},),
    "precision": ({"dtype": "fp32"},),  # as exact as before or more; what 16 bits do is in test_precision.py
    "lora": ({"rank": 2}, {"rank": 3, "alpha": 1.0}, {"rank": 2, "variant": "rslora"}, {"rank": 2, "variant": "dora"}, {"rank": 2, "dropout": 0.2}),
    "quantize": ({"format": "nf4"}, {"format": "nf4", "head": True}, {"format": "nf4_nested"}, {"format": "int8"}, {"format": "fp8"}),
}


class Trial:
    """A captured random program with its state and inputs of several sizes, carried through passes."""

    def __init__(self, spec: Spec) -> None:
        self.model = build(spec)
        kwargs = [inputs(spec, *size) for size in (SIZES[:1] if spec.static else SIZES)]
        self.program = capture(self.model, Call.of((), kwargs[0]))
        known = guards(self.program)
        called = [Call.of((), found).tensors for found in kwargs]
        verdicts = [known.check(tuple(tuple(t.shape) for t in tensors)) for tensors in called]
        assert set(verdicts) == {"ok"}, f"a random program must take any batch size and length: {verdicts}"
        self.inputs = called
        self.state = {name: value.detach() for name, value in (*self.model.named_parameters(), *self.model.named_buffers())}

    def __or__(self, pass_: Pass) -> Trial:
        """After one pass: its values compared with those before, at every size."""
        new = copy.copy(self)
        new.program = apply(pass_, self.program)
        new.state = verify.materialize(new.program, self.state)
        before, state = (self.program, new.state) if pass_.promise.values != "bounded" else (self.program, dequantized(new.program, new.state))
        for tensors in self.inputs:
            verify.check(exactly(pass_), before, new.program, tensors, state)
        for name in new.state.keys() - self.state.keys():
            if new.program.trainable(name):  # adapters start at zero: from here on they must count
                new.state[name] = 0.1 * torch.randn(new.state[name].shape, generator=torch.Generator().manual_seed(len(name))).to(new.state[name].dtype)
        return new


def dequantized(program: Program, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with every weight that is stored quantized replaced by what its stored form means."""
    found, done = dict(state), set()
    for slot in program.slots.values():
        stored = slot.made.facts if slot.made is not None else None
        if isinstance(stored, Stored) and stored.target not in done:
            parts = [state[f"{stored.target}.{part.name}"] for part in FORMATS[stored.format].parts]
            found[stored.target] = FORMATS[stored.format].dequantize(parts, stored.shape, stored.dtype)
            done.add(stored.target)
    return found


def exactly(pass_: Pass) -> Pass:
    """The pass, held to equal values even if it promises an approximation (its weights are dequantized beforehand)."""
    if pass_.promise.values != "bounded":
        return pass_
    strict = dataclasses.dataclass(frozen=True)(type("Strict", (type(pass_),), {"promise": dataclasses.replace(pass_.promise, values="tolerance")}))
    made = strict(**{field.name: getattr(pass_, field.name) for field in dataclasses.fields(pass_)})
    object.__setattr__(made, "promise", dataclasses.replace(pass_.promise, values="tolerance"))
    return made


def leading_to(cls: type[Pass], facts: frozenset[object] = frozenset()) -> list[Pass]:
    """Passes that establish what `cls` requires, in order."""
    found: list[Pass] = []
    for fact in sorted(cls.requires - facts):
        maker = next(other for other in PASSES if fact in other.establishes)
        found += [*leading_to(maker, facts), make(maker.name)]
        facts |= maker.establishes
    return found


def fires_not(error: PassError) -> bool:
    """Whether a pass that must fire says that there is nothing to do."""
    return "changed nothing" in error.what


def try_passes(trial: Trial, passes: Sequence[Pass]) -> None:
    """Apply passes in order, leaving out those that may not come here or find nothing to do."""
    for pass_ in passes:
        if pass_.requires - trial.program.facts:
            continue
        try:
            trial = trial | pass_
        except PassError as error:
            if not fires_not(error):
                raise


def passes() -> st.SearchStrategy[Pass]:
    """A pass of the catalog with some of its arguments."""
    return st.sampled_from(PASSES).flatmap(lambda cls: st.sampled_from(ARGUMENTS.get(cls.name, ({},))).map(lambda found: make(cls.name, **found)))


def check_each(spec: Spec) -> None:
    trial = Trial(spec)
    for cls in PASSES:
        for arguments in ARGUMENTS.get(cls.name, ({},)):
            before = [make("lora", rank=2)] if cls.name == "quantize" else []  # only frozen weights are quantized
            try_passes(trial, [*leading_to(cls), *before, make(cls.name, **arguments)])


@QUICK
@given(specs())
def test_each_pass(spec: Spec) -> None:
    check_each(spec)


@QUICK
@given(specs(), st.lists(passes(), min_size=2, max_size=5))
def test_random_orders(spec: Spec, order: list[Pass]) -> None:
    try_passes(Trial(spec), [make("canonicalize"), *order])


@pytest.mark.slow
@LONG
@given(specs(max_steps=25))
def test_each_pass_on_many(spec: Spec) -> None:
    check_each(spec)


@pytest.mark.slow
@LONG
@given(specs(max_steps=25), st.lists(passes(), min_size=2, max_size=8))
def test_random_orders_on_many(spec: Spec, order: list[Pass]) -> None:
    try_passes(Trial(spec), order)


@settings(QUICK, max_examples=6)
@given(specs())
def test_the_captured_program_is_the_model(spec: Spec) -> None:
    """The strategies' own check: what the passes are compared with is what the module computes, bit for bit."""
    trial = Trial(spec)
    for size, tensors in zip(SIZES, trial.inputs):
        model = copy.deepcopy(trial.model)
        torch.manual_seed(verify.SEED)
        outputs = model(**inputs(spec, *size))
        wanted = list(outputs.values()) if isinstance(outputs, dict) else list(outputs) if isinstance(outputs, tuple) else [outputs]
        found = verify.values(trial.program, tensors, trial.state)
        for i, out in enumerate(wanted):
            assert torch.equal(out, found[f"output {i}"]), f"output {i}"
        for name, value in model.named_buffers():
            assert torch.equal(value, found.get(f"buffer {name}", value)), name


def test_no_pass_fixes_a_size() -> None:
    """Strides of a retyped pad once made the program one for 3 x 5 tokens."""
    kinds = [("shape", 0, 0, 8), ("shape", 0, 2, 6), ("special", 3, 1, 8), ("in_place", 1, 0, 3), ("linear", 3, 2, 6), ("norm", 3, 1, 0), ("special", 3, 2, 1),
             ("gated", 2, 1, 9), ("shape", 1, 0, 2), ("broadcast", 2, 3, 6), ("norm", 1, 2, 1), ("shape", 0, 0, 8)]
    spec = Spec(tuple(Step(*kind) for kind in kinds), head="smooth", outputs="value", training=False, seed=20, dtype=torch.bfloat16)
    try_passes(Trial(spec), [make("canonicalize"), make("precision", dtype="fp32"), make("denominator")])


def test_a_wrong_pass_is_caught() -> None:
    """The check can fail: an epsilon that is off by little."""
    spec = Spec((Step("norm", option=0), Step("linear")), head="plain")

    class Wrong(Pass):
        """moves an epsilon"""

        name = "wrong"

        def run(self, edit) -> None:  # type: ignore[no-untyped-def]
            node = next(node for node in edit.nodes if node.target is torch.ops.aten.add.Tensor and node.args[1] == 1e-6)
            edit.set_args(node, (node.args[0], 1e-5))

    with pytest.raises(Exception, match="what rounding explains"):
        Trial(spec) | Wrong()


def test_double_reference_is_the_double_module() -> None:
    """fp64 by interpretation is the module in fp64."""
    spec = Spec((Step("norm", option=3), Step("attention", option=3), Step("gated", option=1), Step("special", option=1)), head="pad")
    trial = Trial(spec)
    found = verify.values(trial.program, trial.inputs[0], trial.state, double=True)
    model: nn.Module = build(spec, torch.float64)
    wanted = model(**inputs(spec, *SIZES[0], dtype=torch.float64))
    for i, out in enumerate(wanted.values()):
        torch.testing.assert_close(found[f"output {i}"], out)
