"""Trial runs find what they look for, and leave everything as it was, bit for bit."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.errors import DataError
from fxopt.train.loader import Loader
from fxopt.train.quiet import trial, unchanged
from fxopt.train.rate import find_rate
from fxopt.train.task import ModelTask
from fxopt.train.trainer import Trainer
from fxopt.train.tuner import measure_workers
from tests.train.small import Net, batches


class Lit(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.lr = Net(), 1e-9

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.net(*batch)["loss"]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Wide(nn.Module):
    """Its activations are large beside its weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(16, 512), nn.BatchNorm1d(512), nn.Linear(512, 4)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.b(self.norm(self.a(x)).relu().square()), y)}


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.a(x), y)


def samples(number: int = 400) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(number, 16, generator=generator)
    return list(zip(x, x[:, :4].argmax(-1)))


def learnable() -> list[tuple[Tensor, Tensor]]:
    """Batches for `Net`, whose labels follow from them."""
    generator = torch.Generator().manual_seed(1)
    return [(x, x[:, :3].argmax(-1)) for x in torch.randn(20, 32, 4, generator=generator)]


def bits(module: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in (*module.parameters(), *module.buffers())]


@pytest.mark.parametrize("kind", ["plain", "optimized", "lightning"])
def test_the_rate_is_found_and_nothing_stays(kind: str, tmp_path: Path) -> None:
    net = Lit() if kind == "lightning" else Net()
    model = fxopt.optimize(net, inputs=batches(1)[0]) if kind == "optimized" else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(*batches(1)[0])["loss"].backward() if kind != "lightning" else net.training_step(batches(1)[0], 0).backward()
    optimizer.step()
    before, gradients, random, momentum = bits(net), [p.grad for p in net.parameters()], torch.get_rng_state(), [optimizer.state[p]["momentum_buffer"].clone() for p in net.parameters()]
    trainer = Trainer(epochs=1, progress=False, output_dir=tmp_path, **({} if kind == "lightning" else {"optimizer": optimizer}))
    found = find_rate(trainer, model, learnable(), lowest=1e-6, highest=1e4, steps=60)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(net), strict=True)) and torch.equal(random, torch.get_rng_state())
    assert all(p.grad is gradient for p, gradient in zip(net.parameters(), gradients, strict=True)) and all(torch.equal(optimizer.state[p]["momentum_buffer"], m) for p, m in zip(net.parameters(), momentum))
    assert optimizer.param_groups[0]["lr"] == 0.1 and len(found.rates) < 60, "it ends where the loss diverges"
    least = min(range(len(found.smoothed)), key=found.smoothed.__getitem__)
    assert 1e-4 < found.suggestion < found.rates[least] and not list(tmp_path.iterdir())
    found.write(tmp_path)
    assert json.loads((tmp_path / "rate.json").read_text())["suggestion"] == found.suggestion and "<svg" in (tmp_path / "rate.html").read_text()


def test_what_changes_is_put_back_also_after_an_error() -> None:
    model = Wide()
    before = bits(model)
    with pytest.raises(ZeroDivisionError), unchanged(ModelTask(model)):
        model(*map(torch.stack, zip(*samples(8))))["loss"].backward()
        model.a.weight.data.zero_()
        model.a.weight.requires_grad_(False)
        raise ZeroDivisionError
    assert all(torch.equal(a, b) for a, b in zip(before, bits(model), strict=True)) and model.a.weight.requires_grad and model.a.weight.grad is None


@pytest.mark.parametrize("kind", ["plain", pytest.param("optimized", marks=pytest.mark.slow)])
def test_the_batch_size_fits(kind: str) -> None:
    model: nn.Module = Wide()
    if kind == "optimized":
        model = fxopt.optimize(model, "canonicalize", inputs=tuple(map(torch.stack, zip(*samples(4)))))
    before, memory = bits(model), 1 << 20
    tuned = Trainer(epochs=1, batch_size=4, progress=False).tune(model, samples(), workers=False, rate=False, memory=memory)
    found = tuned.batch_size
    assert all(torch.equal(a, b) for a, b in zip(before, bits(model), strict=True))
    assert tuned.trainer.batch_size == found.samples and found.measured <= memory and found.measured > 0.7 * memory, str(tuned)
    assert abs(found.predicted / found.measured - 1) < 0.15
    with pytest.raises(DataError, match="A step of 1 samples takes"):
        Trainer(epochs=1, batch_size=4, progress=False).tune(Deep(), samples(), workers=False, rate=False, memory=1000)


class Slow:
    """Four times as slow as one process makes it with two."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        time.sleep(0.02)
        return torch.zeros(1)


def test_workers_are_measured() -> None:
    slow = measure_workers(Loader(Slow(), 1), most=2, batches=10)
    assert set(slow.seconds) == {0, 1, 2} and slow.seconds[0] > 0.019 and slow.seconds[2] < slow.seconds[0]
    fast = measure_workers(Loader(samples(), 4), most=1, batches=10)
    assert fast.number == 0 and fast.seconds[0] < 0.01


def test_what_is_not_tuned_is_said() -> None:
    tuned = Trainer(epochs=1, progress=False, optimizer="sgd").tune(Net(), learnable())
    assert tuned.batch_size is None and tuned.workers is None and tuned.trainer.lr == tuned.rate.suggestion and str(tuned).count("batches already") == 2
    lit = Lit()
    tuned = Trainer(epochs=1, progress=False).tune(lit, learnable(), batch_size=False, workers=False)
    assert lit.lr == tuned.rate.suggestion
    with pytest.raises(DataError, match="used up"):
        Trainer(epochs=1, progress=False).tune(Net(), iter(batches()))
    with pytest.raises(DataError, match="There is no sweep"):
        find_rate(Trainer(epochs=1, progress=False), Net(), batches(), steps=3)
    flat = nn.Linear(2, 1)
    with pytest.raises(DataError, match="does not fall"):
        find_rate(Trainer(epochs=1, progress=False, loss=lambda model, batch: model(batch).mean() * 0 + 1.0), flat, [torch.ones(3, 2)] * 3, steps=10)
    assert len(trial(Trainer(epochs=5, progress=False), Net(), batches(), 3).state.history) == 3
