"""What the self-check runs on, and which gradients it compares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fxopt
from fxopt.errors import CaptureError
from fxopt.ir.capture import Call, capture, guards
from fxopt.passes.lora import Lora
from fxopt.runtime import adapted, selfcheck
from fxopt.runtime.selfcheck import chosen
from fxopt.runtime.smaller import smaller


class Windowed(nn.Module):
    """A token model whose tokens see `window` positions back."""

    def __init__(self, window: int = 4) -> None:
        super().__init__()
        self.embed, self.head, self.window = nn.Embedding(11, 8), nn.Linear(8, 11), window

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x, at = self.embed(ids), torch.arange(ids.shape[1])
        near = (at[:, None] >= at[None, :]) & (at[:, None] - at[None, :] < self.window)
        x = (x @ x.transpose(1, 2)).masked_fill(~near, 0.0) @ x
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def sizes(model: nn.Module, *tensors: torch.Tensor, sequences: bool = True) -> list[list[tuple[int, ...]]]:
    call = Call.of(tensors, {})
    program = capture(model, call)
    return [[tuple(t.shape) for t in part.tensors] for part in smaller(program, guards(program), call, sequences)]


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(0))


def test_samples_and_positions_are_cut() -> None:
    ids = tokens(5, 40)
    assert sizes(Windowed(), ids, ids.clone()) == [[(2, 16)] * 2, [(2, 16)] * 2, [(2, 40)] * 2]
    assert sizes(Windowed(), ids, ids.clone(), sequences=False) == [[(2, 40)] * 2]
    assert sizes(Windowed(), ids[:1], ids[:1].clone()) == [[(1, 16)] * 2] * 2
    assert sizes(Windowed(), ids[:2, :20], ids[:2, :20].clone()) == []


def test_a_piece_reaches_beyond_a_window() -> None:
    ids = tokens(2, 80)
    assert sizes(Windowed(17), ids, ids.clone())[0][0] == (2, 19)
    assert sizes(Windowed(60), ids, ids.clone()) == []  # more than half of it
    assert sizes(Windowed(500), ids, ids.clone())[0][0] == (2, 16)  # beyond the call too


def test_floating_point_inputs_keep_their_length() -> None:
    assert sizes(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(5, 40, 4)) == [[(2, 40, 4)]]


def test_the_piece_has_a_loss_and_the_report_says_its_sizes() -> None:
    torch.manual_seed(0)
    ids, labels = tokens(2, 40), tokens(2, 40)
    labels[:, :30] = -100  # the mean over the first positions is that of nothing
    opt = fxopt.optimize(Windowed(), "dead_code", inputs=(ids, labels))
    assert "on sizes (2, 16), (2, 16)" in opt.report
    labels[:] = -100
    labels[:, 20] = 1
    assert "on sizes" not in fxopt.optimize(Windowed(), "dead_code", inputs=(ids, labels)).report


def named(layers: int, numel: int = 1) -> list[tuple[str, torch.Tensor]]:
    return [(f"layers.{i}.{leaf}", torch.zeros(numel)) for i in range(layers) for leaf in ("a", "b", "c")] + [("head", torch.zeros(numel))]


@pytest.mark.parametrize(("limit", "layers"), [(40 * 8, range(8)), (0, [0]), (4 * 7, [0, 7]), (4 * 10, [0, 6, 7])])
def test_gradients_of_every_kind_are_compared(limit: int, layers: Any) -> None:
    assert [name for name, _ in chosen(named(8), limit)] == [f"layers.{i}.{leaf}" for i in layers for leaf in ("a", "b", "c")] + ["head"]


def test_only_what_training_uses_is_compared_and_what_adapters_stand_beside() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    opt = fxopt.optimize(model, "lora(rank=2)", inputs=(torch.randn(3, 8),))
    assert "1 of 6 gradients compared" in opt.report and "2 of 2 gradients compared" in opt.report


def test_a_batch_of_one_is_proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    count, step = [], selfcheck.step
    monkeypatch.setattr(selfcheck, "step", lambda *args: count.append(0) or step(*args))
    ids = tokens(1, 40)
    model = Windowed()
    opt = fxopt.optimize(model, "lora(rank=2)", inputs=(ids, ids.clone()))
    before = len(count)
    torch.testing.assert_close(opt(ids, ids.clone()), model(ids, ids.clone()))
    assert before == 3 and len(count) == before  # of the model, its graph, and the program with adapters
    assert "program against the model" in opt.report and "2 of 2 gradients compared" in opt.report


def test_adapters_that_add_nothing_are_left_out_of_all_weights_but_the_named() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), torch.randn(3, 8)
    opt = fxopt.optimize(model, Lora(rank=2, targets=("0", "1")), inputs=(x,))
    expected = opt(x)
    with adapted.only(model, {"1.lora_B.default"}):
        assert [weight.active for _, _, weight in adapted.weights_of(model)] == [None, "default"]
        torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        model[0].lora_B["default"].fill_(1.0)
    with adapted.only(model, set()):
        assert [weight.active for _, _, weight in adapted.weights_of(model)] == ["default", None]
    assert [weight.active for _, _, weight in adapted.weights_of(model)] == ["default"] * 2


def test_a_gradient_that_is_wrong_in_one_layer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    step = selfcheck.step

    def wrong(model: nn.Module, run: Any, *args: Any) -> Any:
        found = step(model, run, *args)
        if wrong.calls == 1:
            found.gradients["2.weight"].mul_(1.01)
        wrong.calls += 1
        return found

    wrong.calls = 0
    monkeypatch.setattr(selfcheck, "step", wrong)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    with pytest.raises(CaptureError, match=r"2\.weight"):
        fxopt.optimize(model, "dead_code", inputs=(torch.randn(3, 8),))


class Kinds(nn.Module):
    """A linear, a convolution, an embedding, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.norm, self.head = nn.Embedding(11, 8), nn.Conv1d(8, 6, 3, padding=1), nn.LayerNorm(6), nn.Linear(6, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.norm(self.conv(self.embed(ids).mT).mT).tanh()).flatten(0, 1), ids.flatten())


def test_gradients_of_adapters_follow_from_those_of_the_weights_that_they_stand_beside() -> None:
    torch.manual_seed(0)
    model, ids = Kinds().double(), torch.randint(11, (3, 5))

    def step() -> selfcheck.Step:
        return selfcheck.step(model, lambda given: type(model).forward(model, *given), [ids], 0)

    before = step()
    opt = fxopt.optimize(model, Lora(rank=2, targets=("embed", "conv", "head"), modules_to_save=("norm",)), inputs=(ids,))
    found, now = adapted.pulled_back(model, before.gradients), step().gradients
    assert found is not None and found.keys() == now.keys() and len(now) == 8
    assert sum(bool(grad.any()) for grad in found.values()) == 5  # each B or, of the embedding, A; and the norm's two
    for name, grad in now.items():
        torch.testing.assert_close(found[name], grad)
    assert "8 of 8 gradients compared" in opt.report
    with torch.no_grad():
        model.head.lora_B["default"].fill_(1.0)
    assert adapted.pulled_back(model, before.gradients) is None


def test_an_adapter_whose_gradient_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    count, step = [], selfcheck.step

    def wrong(*args: Any) -> Any:
        found = step(*args)
        count.append(0)
        if len(count) == 3:
            found.gradients["0.lora_B.default"].mul_(1.01)
        return found

    monkeypatch.setattr(selfcheck, "step", wrong)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    with pytest.raises(CaptureError, match=r"0\.lora_B\.default differs by 1\.0e-02"):
        fxopt.optimize(model, "lora(rank=2)", inputs=(torch.randn(3, 8),))
