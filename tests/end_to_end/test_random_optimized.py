"""`optimize` on random programs: what the self-check compares, at every size, against the original module."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings, strategies as st
from strategies import SIZE, Spec, Step, build, inputs, specs

import fxopt
from fxopt.ir.capture import Call
from fxopt.runtime import selfcheck

QUICK = settings(max_examples=3, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])
LONG = settings(QUICK, max_examples=400, phases=list(Phase))
PIPELINES = ("", "remat", str(fxopt.presets.exact()), "canonicalize | fuse | loss", "canonicalize | fuse | loss | memory(least)")
STRIDES = Spec((Step("special", option=1), Step("norm", 3, 2, 9), Step("linear", 3, 2, 1), Step("attention", 3, 0, 7), Step("attention", 1, 3, 3)),
               head="none", outputs="value", seed=70)
UNTRAINED = Spec((Step("broadcast", 3, 0, 3),), ids=False, head="pad cap", outputs="dict", seed=27)


def check(spec: Spec, passes: str) -> None:
    # in bf16 the rounding of these small programs is as large as their smallest gradients; tests/passes measures it there
    spec = dataclasses.replace(spec, dtype=torch.float32)
    model = build(spec)
    opt = fxopt.optimize(model, passes, inputs=inputs(spec))
    for size in (SIZE,) if spec.static else (SIZE, (2, 7), (1, 4)):
        kwargs = inputs(spec, *size)
        tensors = Call.of((), kwargs).tensors
        call = Call.of((), kwargs)

        def original(given: Sequence[torch.Tensor]) -> Any:
            return model(**call.rebuild(given)[1])

        expected = selfcheck.step(model, original, tensors, 1)
        selfcheck.compare(model, expected, selfcheck.step(model, lambda given: opt(**call.rebuild(given)[1]), tensors, 1), "the optimized model",
                          lambda: selfcheck.rounded(model, original, tensors, 1))
    assert sum(map(len, opt.dispatcher.entries.values())) == 1


@QUICK
@example(STRIDES, "")
@example(UNTRAINED, "")
@example(UNTRAINED, str(fxopt.presets.exact()))
@example(STRIDES, "canonicalize | fuse | loss | memory(least)")
@given(specs(), st.sampled_from(PIPELINES))
def test_random_programs(spec: Spec, passes: str) -> None:
    check(spec, passes)


@pytest.mark.slow
@LONG
@given(specs(), st.sampled_from(PIPELINES))
def test_many_random_programs(spec: Spec, passes: str) -> None:
    check(spec, passes)
