"""Training with weights in pieces: as on one process, in an n-th of the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fxopt
from fxopt.kernels.tolerance import same
from fxopt.train.callbacks import Callback, State
from tests.train.processes import together

QLORA = "lora(rank=4) | quantize(nf4) | fuse | loss | remat"


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(nn.functional.silu(self.up(self.norm(x))))


class Model(nn.Module):
    """Tied weights, biases, norms, a scalar, sizes that no number of processes divides."""

    def __init__(self, width: int = 64, words: int = 51) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers, self.head = nn.Embedding(words, width), nn.ModuleList(Block(width) for _ in range(3)), nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.head(self.blocks(self.embed(x) / 8))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100), "logits": logits}

    def blocks(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def samples(number: int = 15, length: int = 7) -> list[dict[str, Tensor]]:
    """Batches of 2 with unequal numbers of labels."""
    random = torch.Generator().manual_seed(1)
    made = []
    for i in range(number):
        x, labels = torch.randint(51, (2, length), generator=random), torch.randint(51, (2, length), generator=random)
        labels[0, : i % 4] = -100
        made.append({"x": x, "labels": labels})
    return made


def supervised(batch: dict[str, Tensor]) -> int:
    return int(batch["labels"].ne(-100).sum())


class Watch(Callback):
    """What a rank holds after the first step, in bytes: parameters, codes, gradients, states of the optimizer."""

    def __init__(self) -> None:
        self.bytes = 0

    def on_before_optimizer_step(self, state: State, optimizer: Any) -> None:
        model = state.model
        held = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None), *(b for b in model.buffers())]
        held += [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor) and v.dim()]
        self.bytes = max(self.bytes, sum(t.numel() * t.element_size() for t in held))


def trained(passes: str | None, strategy: str, folder: Path | None = None, **more: Any) -> dict[str, Any]:
    """A run, as what goes through a pipe."""
    model: Any = Model()
    data = samples()
    if passes is not None:
        model = fxopt.optimize(model, passes, inputs=data[0])
    watch = Watch()
    settings = {"steps": 4, "epochs": None, "lr": 1e-2, "clip": 0.5, "weight_decay": 0.1, "seed": 0, "progress": False, "count": supervised, "strategy": strategy,
                "output_dir": folder, "checkpoints": False} | more
    result = fxopt.Trainer(callbacks=[watch], **settings).fit(model, data, samples(3, 5))
    found = {"losses": result.losses, "norms": [step.grad_norm for step in result.steps], "val_loss": result.metrics["val_loss"], "bytes": watch.bytes, "files": {}, "weights": _arrays(model)}
    if folder is not None and result.adapter is not None:
        found["files"] = {name: value.numpy().copy() for name, value in load_file(result.adapter / "adapter_model.safetensors").items()}
        found["weights"] |= {f"merged {name}": value for name, value in _arrays(model.merge("stored", certify=False)).items()}
    return found


def _arrays(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in model.named_parameters()}


def alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Up to the order of sums."""
    for what in ("losses", "norms"):
        assert same(torch.tensor(found[what]), torch.tensor(expected[what])), what
    assert same(torch.tensor(found["val_loss"]), torch.tensor(expected["val_loss"]))
    for what in ("weights", "files"):
        assert found[what].keys() == expected[what].keys()
        for name, value in expected[what].items():
            assert same(torch.from_numpy(found[what][name]), torch.from_numpy(value)), name


CASES = [(None, 2), (QLORA, 2)]
MORE = [(None, 4), ("canonicalize | fuse | loss", 2), ("canonicalize | fuse | loss", 4), (QLORA, 4), ("lora(rank=4) | fuse", 2), ("lora(rank=4, variant=dora) | quantize(int8) | siblings | fuse | remat", 2)]


@pytest.mark.parametrize("passes, world", CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE])
def test_training_is_that_of_one_process(passes: str | None, world: int, tmp_path: Path) -> None:
    """Accumulated steps, clipped by the norm, of batches with unequal numbers of labels, at the end of which some ranks have none: losses,
    norms, weights, a validation whose kind of call is new; what is exported; and an n-th of the memory."""
    expected = trained(passes, "single", tmp_path / "one", accumulate=4)
    assert bool(expected["files"]) == (passes is not None and "lora" in passes)
    found = together(world, lambda rank: trained(passes, "fsdp", tmp_path / "several" if not rank else tmp_path / f"rank {rank}", accumulate=4 // world))
    for rank, each in enumerate(found):
        if rank:  # rank 0 alone writes
            each["files"], each["weights"] = expected["files"], each["weights"] | {name: value for name, value in expected["weights"].items() if name.startswith("merged")}
        alike(each, expected)
        assert each["bytes"] < 1.1 / world * expected["bytes"]


class Stepped(nn.Module):
    """A LightningModule's shape, around an optimized model: its steps do not call the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.factor = fxopt.optimize(Model(), "canonicalize | fuse"), nn.Parameter(torch.ones(3))

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.net(**batch)["loss"] * self.factor.mean()

    def validation_step(self, batch: Any, index: int) -> Tensor:
        loss = self.net(**batch)["loss"] * self.factor.mean()
        self.log("val_loss", loss)  # type: ignore[operator]
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def stepped(strategy: str, **more: Any) -> dict[str, Any]:
    module = Stepped()
    result = fxopt.Trainer(steps=3, seed=0, progress=False, count=supervised, strategy=strategy, **more).fit(module, samples(), samples(4))
    return {"losses": result.losses, "norms": [step.grad_norm for step in result.steps], "val_loss": result.metrics["val_loss"], "files": {}, "weights": _arrays(module)}


@pytest.mark.slow
def test_a_module_with_steps_of_its_own() -> None:
    """The optimized model is a part of it, and is captured when its weights are in pieces already."""
    expected = stepped("single", accumulate=2)
    for found in together(2, lambda rank: stepped("fsdp")):
        alike(found, expected)


def normalized(strategy: str) -> dict[str, np.ndarray]:
    """Three batches on two ranks, one of which has none in the second step: the running means, and what is drawn next."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 1))
    data = [(torch.randn(5, 4),) for _ in range(3)]
    fxopt.Trainer(loss=lambda net, batch: net(*batch).square().mean(), steps=2, seed=0, progress=False, strategy=strategy).fit(model, data)
    return {name: value.detach().numpy().copy() for name, value in model.named_buffers()} | {"drawn": torch.rand(3).numpy()}


def test_a_turn_without_a_batch_leaves_no_trace() -> None:
    """What stands in for it changes neither buffers nor random states: both are those of ddp, where such a rank does nothing."""
    for found, expected in zip(together(2, lambda rank: normalized("fsdp")), together(2, lambda rank: normalized("ddp")), strict=True):
        assert all(same(torch.from_numpy(found[name]), torch.from_numpy(value)) if value.ndim else found[name] == value for name, value in expected.items())
