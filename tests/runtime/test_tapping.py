"""Taps give what the module itself computes, and change nothing: through fused, recomputed and adapted programs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxopt
from fxopt.errors import CallError
from fxopt.ir.taps import HIGH, LOW, REDUCTIONS, Tap, measure
from tests.models import llama, tokens


@pytest.mark.parametrize("passes", [pytest.param("fuse | loss | remat", marks=pytest.mark.slow), "lora(rank=2) | quantize(int8) | fuse | loss | memory(1GiB)"])
def test_values_and_gradients_are_those_of_the_model(passes: str) -> None:
    model, batch = llama(layers=2).train(), tokens(2, 8)
    opt = fxopt.optimize(model, passes, inputs=batch)
    seen: list[torch.Tensor] = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: (output.retain_grad(), seen.append(output))[0])
    model(**batch)["loss"].backward()  # the original code, with the same weights
    handle.remove()
    model.zero_grad()
    plain = opt(**batch)["loss"]
    plain.backward()
    gradients = {name: p.grad.clone() for name, p in opt.named_parameters() if p.grad is not None}
    opt.zero_grad()
    program, runners = opt.program, dict(opt.dispatcher.runners)
    place = "model.layers.1.mlp*"
    with opt.tap({"value": Tap(place, "value"), "norm": Tap(place, "norm"), "slope": Tap(place, "norm", gradient=True), "most": Tap(place, gradient=True)}) as tapping:
        loss = opt(**batch)["loss"]
        loss.backward()
    found = tapping.values()
    torch.testing.assert_close(found["value"], seen[0].detach())
    torch.testing.assert_close(found["norm"], seen[0].detach().norm())
    torch.testing.assert_close(found["slope"], seen[0].grad.norm())
    torch.testing.assert_close(found["most"], seen[0].grad.abs().max())
    assert torch.equal(loss, plain) and all(torch.equal(p.grad, gradients[name]) for name, p in opt.named_parameters() if p.grad is not None)
    assert opt.program is program and opt.dispatcher.runners == runners and opt.dispatcher.tapping is None
    with pytest.raises(CallError, match="`fuse` took it away") as told, opt.tap({"x": "silu*"}):
        opt(**batch)
    assert "mlp" in str(told.value) and "nearest that is left" in str(told.value)


@given(st.lists(st.floats(width=32, allow_infinity=False), max_size=20), st.sampled_from(REDUCTIONS))
@settings(max_examples=60, deadline=None)
def test_measures(numbers: list[float], kind: str) -> None:
    x = torch.tensor(numbers)
    found = measure(x, kind)
    if kind == "histogram":
        expected = [0] * (HIGH - LOW)
        for number in x[~x.isnan()].abs().tolist():
            expected[max(0, min(HIGH - LOW - 1, int(torch.tensor(number).log2().floor()) - LOW if number else 0))] += 1
        assert found.tolist() == expected
    else:
        reference = {"max": lambda: x.abs().max() if numbers else torch.zeros(()), "norm": x.norm, "mean": x.mean, "value": lambda: x}[kind]()
        torch.testing.assert_close(found, reference, equal_nan=True)


def test_what_cannot_be_tapped_is_said() -> None:
    class Sizes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.gt(0).sum()

    opt = fxopt.optimize(Sizes(), inputs=(torch.randn(3, requires_grad=True),))
    with pytest.raises(CallError, match="no floating point"), opt.tap({"x": Tap("gt*", gradient=True)}):
        opt(torch.randn(3, requires_grad=True))
    for kind, gradient in (("mode", False), ("value", True)):
        with pytest.raises(CallError, match="a tap reduces"):
            Tap("x", kind, gradient)
