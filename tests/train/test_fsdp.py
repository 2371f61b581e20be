"""Training with weights in pieces: as on one process, in an n-th of the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
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
        hidden = self.embed(x) / 8
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.head(hidden)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100), "logits": logits}


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


def trained(passes: str | None, strategy: str, **more: Any) -> dict[str, Any]:
    model: Any = Model()
    data = samples()
    if passes is not None:
        model = fxopt.optimize(model, passes, inputs=data[0])
    watch = Watch()
    settings = {"steps": 4, "epochs": None, "accumulate": 2, "lr": 1e-2, "clip": 0.5, "weight_decay": 0.1, "seed": 0, "progress": False, "count": supervised, "strategy": strategy} | more
    result = fxopt.Trainer(callbacks=[watch], **settings).fit(model, data, samples(3, 5))
    # `list` of floats and numpy arrays: what goes through a pipe without torch's shared memory
    return {"losses": [step.loss for step in result.steps], "norms": [step.grad_norm for step in result.steps], "metrics": dict(result.metrics), "bytes": watch.bytes,
            "weights": {name: value.detach().numpy().copy() for name, value in model.named_parameters()}}


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Up to the order of sums."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert found["metrics"]["val_loss"] == pytest.approx(expected["metrics"]["val_loss"], rel=1e-5)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        assert abs(found["weights"][name] - value).max() < 2e-4, name


@pytest.mark.parametrize("world", [2])
@pytest.mark.parametrize("passes", [None, "canonicalize | fuse | loss", QLORA])
def test_training_is_that_of_one_process(passes: str | None, world: int) -> None:
    accumulate = {1: 4, 2: 2, 4: 1}[world]
    expected = trained(passes, "single", accumulate=4)
    for found in together(world, lambda rank: trained(passes, "fsdp", accumulate=accumulate)):
        same(found, expected)
        assert found["bytes"] < 1.1 / world * expected["bytes"]
