"""Models of images, graphs, tables and points in plain PyTorch: batch norm, skips, scatters, embedding bags, buffers that change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations

WIDTH = 16


def conv(into: int, out: int, kernel: int = 3, **more: Any) -> nn.Conv2d:
    """A convolution that keeps the size of its input."""
    return nn.Conv2d(into, out, kernel, padding=kernel // 2, **more)


class Norming(nn.Sequential):
    """Convolution, batch norm, activation."""

    def __init__(self, into: int, out: int, act: type[nn.Module] = nn.ReLU, **more: Any) -> None:
        super().__init__(conv(into, out, bias=False, **more), nn.BatchNorm2d(out), act())


class Classifier(nn.Module):
    """A body, pooled, with a linear head and a loss."""

    def __init__(self, body: nn.Module, width: int = WIDTH, classes: int = 5) -> None:
        super().__init__()
        self.body, self.head = body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(width, classes))

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.body(x))
        return {"loss": F.cross_entropy(logits, target), "logits": logits}


class Skip(nn.Module):
    """x + f(x), with an activation that writes in place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.inner(x), inplace=True)


class Squeeze(nn.Module):
    """Channels scaled by what is seen of the whole image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * F.hardsigmoid(self.up(F.hardswish(self.down(x.mean((2, 3), keepdim=True)))))


class Dense(nn.Module):
    """Every layer reads all those before it."""

    def __init__(self, into: int, grow: int = 8, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Norming(into + i * grow, grow) for i in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


def residual() -> nn.Module:
    """Residual blocks with batch norm."""
    block = lambda: Skip(nn.Sequential(Norming(WIDTH, WIDTH), conv(WIDTH, WIDTH), nn.BatchNorm2d(WIDTH)))  # noqa: E731
    return Classifier(nn.Sequential(Norming(3, WIDTH), block(), block()))


def separable() -> nn.Module:
    """Depthwise convolutions with squeeze and excitation."""
    block = lambda: nn.Sequential(Norming(WIDTH, WIDTH, nn.SiLU, groups=WIDTH), Squeeze(WIDTH), nn.Conv2d(WIDTH, WIDTH, 1))  # noqa: E731
    return Classifier(nn.Sequential(Norming(3, WIDTH, nn.Hardswish), block(), nn.MaxPool2d(2), block()))


def densely() -> nn.Module:
    """A densely connected network."""
    return Classifier(nn.Sequential(Norming(3, WIDTH), Dense(WIDTH), nn.AvgPool2d(2), Dense(WIDTH + 24)), WIDTH + 48)


def spectral() -> nn.Module:
    """Convolutions whose spectral norm is kept by a power iteration in buffers."""
    return Classifier(nn.Sequential(parametrizations.spectral_norm(conv(3, WIDTH)), nn.LeakyReLU(0.2), parametrizations.spectral_norm(conv(WIDTH, WIDTH))))


class UNet(nn.Module):
    """Down and up with skips, for a class of each pixel."""

    def __init__(self) -> None:
        super().__init__()
        act = lambda into, out: nn.Sequential(conv(into, out), nn.GroupNorm(4, out), nn.SiLU())  # noqa: E731
        self.down1, self.down2, self.middle = act(3, WIDTH), act(WIDTH, 2 * WIDTH), act(2 * WIDTH, 2 * WIDTH)
        self.up2, self.up1 = nn.ConvTranspose2d(4 * WIDTH, WIDTH, 2, stride=2), act(2 * WIDTH, WIDTH)
        self.head = nn.Conv2d(WIDTH, 3, 1)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = F.interpolate(self.middle(F.max_pool2d(b, 2)), scale_factor=2, mode="nearest")
        return F.cross_entropy(self.head(self.up1(torch.cat([a, self.up2(torch.cat([b, c], 1))], 1))), target)


class Denoiser(nn.Module):
    """Predicts the noise that was added at a time, which is embedded by sines."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.inner, self.middle, self.out = nn.Linear(WIDTH, WIDTH), conv(3, WIDTH), conv(WIDTH, WIDTH), conv(WIDTH, 3)
        self.norm = nn.GroupNorm(4, WIDTH)
        self.register_buffer("kept", torch.linspace(0.99, 0.1, 10).cumprod(0))

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        noise, kept = torch.randn_like(x), self.kept[step][:, None, None, None]
        angles = step[:, None] / 100.0 ** (torch.arange(WIDTH // 2, device=x.device) / (WIDTH // 2))
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1).to(x.dtype))
        hidden = F.silu(self.norm(self.inner(kept.sqrt() * x + (1 - kept).sqrt() * noise)) + time[:, :, None, None])
        return F.mse_loss(self.out(F.silu(self.middle(hidden))), noise)


class Mixer(nn.Module):
    """Linears over patches and over channels in turns."""

    def __init__(self, places: int = 16, width: int = WIDTH) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        mlp = lambda size: nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))  # noqa: E731
        self.places, self.channels = nn.ModuleList(mlp(places) for _ in range(2)), nn.ModuleList(mlp(width) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).mT
        for i, (places, channels) in enumerate(zip(self.places, self.channels)):
            x = x + places(self.norms[2 * i](x).mT).mT
            x = x + channels(self.norms[2 * i + 1](x))
        return F.cross_entropy(self.head(x.mean(1)), target)


class Variational(nn.Module):
    """An autoencoder with noise in the middle; returns several things."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mean, self.spread = Norming(3, WIDTH, nn.ELU, stride=2), conv(WIDTH, 4), conv(WIDTH, 4)
        self.decoder = nn.Sequential(conv(4, WIDTH), nn.ELU(), conv(WIDTH, 12), nn.PixelShuffle(2))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        hidden = self.encoder(x)
        mean, spread = self.mean(hidden), self.spread(hidden)
        found = self.decoder(mean + torch.randn_like(mean) * (0.5 * spread).exp())
        divergence = -0.5 * (1 + spread - mean.square() - spread.exp()).mean()
        return {"loss": F.mse_loss(found, x) + 0.1 * divergence, "parts": (divergence, {"mean": mean}), "images": [found]}


class Codebook(nn.Module):
    """Nearest vectors of a codebook, which follows what it is given by running means in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(12, 8), nn.Linear(8, 12)
        self.register_buffer("codes", torch.randn(10, 8))
        self.register_buffer("counts", torch.ones(10))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        z = self.encoder(x)
        nearest = torch.cdist(z.float(), self.codes.float()).argmin(-1)
        chosen = F.one_hot(nearest, 10).to(z.dtype)
        code = (chosen @ self.codes).detach()
        with torch.no_grad():
            self.counts.mul_(0.9).add_(0.1 * chosen.sum(0))
            self.codes.lerp_((chosen.T @ z) / self.counts.clamp_min(1e-3)[:, None], 0.1)
            self.steps += 1
        return {"loss": F.mse_loss(self.decoder(z + (code - z).detach()), x) + 0.25 * F.mse_loss(z, code), "nearest": nearest}


class Warped(nn.Module):
    """Turns each image as a small network says."""

    def __init__(self) -> None:
        super().__init__()
        self.where, self.body = nn.Linear(3, 6), Norming(3, WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        grid = F.affine_grid(self.where(x.mean((2, 3))).view(-1, 2, 3), list(x.shape), align_corners=False)
        return F.cross_entropy(self.head(self.body(F.grid_sample(x, grid, align_corners=False)).amax((2, 3))), target)


class Frozen(nn.Module):
    """A head on a body that runs without gradients, and a teacher that is never trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.teacher = nn.Sequential(nn.Linear(12, 16), nn.ReLU()), nn.Linear(16, 5), nn.Linear(12, 5).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            hidden, wanted = self.body(x), self.teacher(x)
        return F.kl_div(self.head(hidden).log_softmax(-1), wanted.softmax(-1), reduction="batchmean")


class Messages(nn.Module):
    """A graph network: messages along edges are added where they arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update, self.head = nn.Linear(2 * 8, WIDTH), nn.GRUCell(WIDTH, 8), nn.Linear(8, 3)

    def forward(self, nodes: torch.Tensor, edges: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            source, aim = edges
            sent = F.relu(self.message(torch.cat([nodes[source], nodes[aim]], -1)))
            arrived = torch.zeros(nodes.shape[0], WIDTH, dtype=sent.dtype, device=sent.device).index_add(0, aim, sent)
            nodes = self.update(arrived, nodes)
        return F.cross_entropy(self.head(nodes), target)


class Attending(nn.Module):
    """A graph network with a softmax over the edges that arrive at a node."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.score, self.head = nn.Linear(8, WIDTH), nn.Linear(2 * WIDTH, 1), nn.Linear(WIDTH, 3)

    def forward(self, nodes: torch.Tensor, edges: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        value, (source, aim) = self.value(nodes), edges
        score = F.leaky_relu(self.score(torch.cat([value[source], value[aim]], -1))).squeeze(-1)
        largest = torch.full(nodes.shape[:1], -1e9, dtype=score.dtype).scatter_reduce(0, aim, score, "amax")
        weight = (score - largest[aim].detach()).exp()
        total = torch.zeros_like(largest).scatter_add(0, aim, weight)
        out = torch.zeros_like(value).index_add(0, aim, value[source] * (weight / total[aim])[:, None])
        return F.cross_entropy(self.head(F.elu(out)), target)


class Points(nn.Module):
    """Sets of points: the same network for each, the largest of all."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.head = nn.Sequential(nn.Conv1d(3, WIDTH, 1), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Conv1d(WIDTH, WIDTH, 1)), nn.Linear(WIDTH, 5)

    def forward(self, points: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.each(points.mT).amax(-1)), target)


class Recommender(nn.Module):
    """Bags of categories, numbers, and products of all pairs."""

    def __init__(self, bags: int = 3) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(20, 8, mode="mean") for _ in range(bags))
        self.bottom, self.top = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8)), nn.Sequential(nn.Linear(8 + 6, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, *, numbers: torch.Tensor, categories: Sequence[torch.Tensor], clicked: torch.Tensor) -> torch.Tensor:
        dense = self.bottom(numbers)
        each = torch.stack([dense, *(bag(ids) for bag, ids in zip(self.bags, categories))], 1)
        rows, columns = torch.tril_indices(each.shape[1], each.shape[1], -1)
        products = (each @ each.mT)[:, rows, columns]
        return F.binary_cross_entropy_with_logits(self.top(torch.cat([dense, products], 1)).squeeze(1), clicked)


class Offsets(nn.Module):
    """Bags of different lengths, one after the other, with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(20, 8, mode="sum"), nn.Linear(8, 2)

    def forward(self, ids: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.bag(ids, starts, per_sample_weights=weights)), target)


class Factors(nn.Module):
    """Products of all pairs of fields by the square of a sum, beside a deep part."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.factors = nn.Embedding(30, 1), nn.Embedding(30, 8)
        self.deep = nn.Sequential(nn.Linear(4 * 8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))

    def forward(self, fields: torch.Tensor, clicked: torch.Tensor) -> torch.Tensor:
        v = self.factors(fields)
        pairs = 0.5 * (v.sum(1).square() - v.square().sum(1)).sum(1)
        return F.binary_cross_entropy_with_logits(self.linear(fields).sum((1, 2)) + pairs + self.deep(v.flatten(1)).squeeze(1), clicked)


class Towers(nn.Module):
    """Two towers and the loss of pairs, from nested inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = (nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(2))

    def forward(self, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        a, b = F.normalize(self.user(batch["user"]["features"]), dim=-1), F.normalize(self.item(batch["items"][0]), dim=-1)
        scores = a @ b.T * 5
        return F.cross_entropy(scores, torch.arange(a.shape[0], device=a.device)), {"scores": scores}
