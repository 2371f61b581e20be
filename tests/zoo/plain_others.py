"""Models of other kinds in plain PyTorch: flows, mixtures, dynamic programs, equations, weights that are computed, references that are frozen."""

from __future__ import annotations

import copy
import math
from collections import namedtuple
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.zoo.plain_sequences import WIDTH, Decoder

Heads = namedtuple("Heads", ("policy", "value", "loss"))


class Actor(nn.Module):
    """One body, two heads; returns a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.policy, self.value = nn.Sequential(nn.Linear(12, 16), nn.Tanh()), nn.Linear(16, 4), nn.Linear(16, 1)

    def forward(self, state: torch.Tensor, action: torch.Tensor, gain: torch.Tensor) -> Heads:
        hidden = self.body(state)
        policy, value = self.policy(hidden), self.value(hidden).squeeze(-1)
        chosen = torch.distributions.Categorical(logits=policy, validate_args=False).log_prob(action)
        return Heads(policy, value, F.smooth_l1_loss(value, gain) - (chosen * (gain - value).detach()).mean())


class Flow(nn.Module):
    """Couplings that are undone exactly; the loss is a likelihood."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        volume = torch.zeros_like(x[:, 0])
        for layer in self.layers:
            a, b = x.chunk(2, -1)
            scale, shift = layer(a).chunk(2, -1)
            scale = scale.tanh()
            x, volume = torch.cat([b * scale.exp() + shift, a], -1), volume + scale.sum(-1)
        return (0.5 * x.square().sum(-1) + 4 * math.log(2 * math.pi) - volume).mean()


class Mixture(nn.Module):
    """The parameters of a mixture of normal distributions."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Sequential(nn.Linear(6, 16), nn.Softplus()), nn.Linear(16, 9)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weight, mean, spread = self.out(self.body(x)).chunk(3, -1)
        density = -0.5 * ((y[:, None] - mean) / spread.exp()).square() - spread
        return -(weight.log_softmax(-1) + density).logsumexp(-1).mean()


class Chain(nn.Module):
    """A linear chain of labels: the sum over all ways by a loop over time."""

    def __init__(self, labels: int = 4) -> None:
        super().__init__()
        self.score, self.step = nn.Linear(8, labels), nn.Parameter(torch.randn(labels, labels))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        score = self.score(x)
        found = score.gather(-1, labels[..., None]).sum((1, 2)) + self.step[labels[:, :-1], labels[:, 1:]].sum(1)
        total = score[:, 0]
        for t in range(1, x.shape[1]):
            total = (total[:, :, None] + self.step).logsumexp(1) + score[:, t]
        return (total.logsumexp(-1) - found).mean()


class Aligned(nn.Module):
    """Connectionist temporal classification on convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(8, WIDTH, 3, padding=1), nn.Linear(WIDTH, 12)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scores = self.head(F.gelu(self.conv(x.mT)).mT).log_softmax(-1).transpose(0, 1)
        lengths = torch.full((x.shape[0],), scores.shape[0], dtype=torch.long), torch.full((x.shape[0],), labels.shape[1], dtype=torch.long)
        return F.ctc_loss(scores, labels, *lengths, zero_infinity=True)


class Equation(nn.Module):
    """An ordinary differential equation, solved by four steps of Runge and Kutta."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 6))

    def slope(self, time: float, y: torch.Tensor) -> torch.Tensor:
        """dy/dt. y [batch, 6]."""
        return self.rate(torch.cat([y, torch.full_like(y[:, :1], time)], -1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = 0.25
        for i in range(4):
            a = self.slope(i * h, x)
            b = self.slope((i + 0.5) * h, x + h / 2 * a)
            c = self.slope((i + 0.5) * h, x + h / 2 * b)
            x = x + h / 6 * (a + 2 * b + 2 * c + self.slope((i + 1) * h, x + h * c))
        return F.mse_loss(x, y)


class Field(nn.Module):
    """Colours of points in space, from sines of many rates, with a skip; rays are summed by transmittance."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(24, 32), nn.Linear(32 + 24, 32), nn.Linear(32, 4)

    def forward(self, points: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
        angles = points[..., None] * 2.0 ** torch.arange(4, device=points.device)
        seen = torch.stack([angles.sin(), angles.cos()], -1).flatten(-3).to(points.dtype)
        found = self.out(F.relu(self.second(torch.cat([F.relu(self.first(seen)), seen], -1))))
        opaque = 1 - (-F.softplus(found[..., 3])).exp()
        through = torch.cat([torch.ones_like(opaque[:, :1]), (1 - opaque + 1e-6).cumprod(-1)[:, :-1]], -1)
        return F.mse_loss(((opaque * through)[..., None] * found[..., :3].sigmoid()).sum(1), colour)


class Hyper(nn.Module):
    """A network that computes the weights of another, one for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.bias = nn.Linear(4, 6 * 5), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor, context: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        weights = self.weights(context).view(-1, 5, 6)
        return F.cross_entropy(torch.einsum("boi,bi->bo", weights, x) + self.bias(context), target)


class Capsules(nn.Module):
    """Votes that agree are routed together, in three rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.votes = nn.Parameter(torch.randn(6, 5, 4, 8) * 0.3)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        votes = torch.einsum("bin,ionm->biom", x, self.votes)
        logits = torch.zeros_like(votes[..., 0])
        for _ in range(3):
            out = (logits.softmax(-1)[..., None] * votes).sum(1)
            size = out.square().sum(-1, keepdim=True)
            out = out * size / (1 + size) / (size + 1e-6).sqrt()
            logits = logits + (votes * out[:, None]).sum(-1)
        return F.multi_margin_loss(out.norm(dim=-1), target)


class Splines(nn.Module):
    """A sum of splines in place of a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients, self.base = nn.Parameter(torch.randn(5, 6, 8) * 0.1), nn.Linear(6, 5)
        self.register_buffer("grid", torch.linspace(-2, 2, 8))

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        basis = (1 - (x[..., None] - self.grid).abs() * 1.75).clamp_min(0)
        return F.cross_entropy(self.base(F.silu(x)) + torch.einsum("big,oig->bo", basis, self.coefficients), target)


class Preferences(nn.Module):
    """Direct preference optimization: a policy and its frozen copy on two answers each."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = Decoder(tied=False)
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)

    def score(self, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """The log probability of each text. [batch]."""
        logits = model(ids, ids)[0][:, :-1]
        return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))

    def forward(self, better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
        margin = self.score(self.policy, better) - self.score(self.policy, worse)
        with torch.no_grad():
            before = self.score(self.reference, better) - self.score(self.reference, worse)
        return -F.logsigmoid(0.1 * (margin - before)).mean()


class Averaged(nn.Module):
    """A teacher whose parameters follow the student's by running means, as buffers that are written in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(12, 8)
        self.register_buffer("teacher", self.student.weight.detach().clone())
        self.register_buffer("centre", torch.zeros(8))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.teacher.lerp_(self.student.weight, 0.01)
            wanted = b @ self.teacher.T
            target = ((wanted - self.centre) / 0.1).softmax(-1)
            self.centre.copy_(self.centre * 0.9 + wanted.mean(0) * 0.1)
        return -(target * self.student(a).log_softmax(-1)).sum(-1).mean()


class Slots(nn.Module):
    """Slots that compete for the inputs, updated by a recurrent cell, with torch's multi-head attention around them."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.key, self.value = nn.Parameter(torch.randn(3, 8)), nn.Linear(8, 8), nn.Linear(8, 8)
        self.cell, self.attention, self.head = nn.GRUCell(8, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        slots = self.start.expand(x.shape[0], -1, -1)
        for _ in range(2):
            weight = (slots @ self.key(x).mT).softmax(1)
            weight = weight / weight.sum(-1, keepdim=True)
            slots = self.cell((weight @ self.value(x)).flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        found, weights = self.attention(slots, slots, slots, need_weights=True)
        return {"slots": self.head(found), "weights": weights}


class Checked(nn.Module):
    """Refuses what is not finite: a branch on values that never is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 16)), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        hidden = self.body(x)
        if not torch.isfinite(hidden).all():
            raise ValueError("not finite")
        return F.cross_entropy(self.head(hidden), target)


class Physics(nn.Module):
    """The residual of an equation, with derivatives taken by autograd inside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        x = places.detach().requires_grad_(True)
        u = self.body(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (slope.square().sum(-1) + u.squeeze(-1)).square().mean()


class Matched(nn.Module):
    """A set of predictions matched with a set of targets by sorting, with losses of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.place, self.kind = nn.Linear(6, 16), nn.Linear(16, 2), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, place: torch.Tensor, kind: torch.Tensor) -> dict[str, Any]:
        hidden = F.mish(self.body(x))
        found, order = self.place(hidden), kind.argsort(-1)
        cost = torch.cdist(found, place).min(-1).values
        losses = {"place": cost.mean(), "kind": F.cross_entropy(self.kind(hidden).mT, kind.gather(1, order), label_smoothing=0.1)}
        return {"loss": losses["place"] + losses["kind"], "losses": {k: v.detach() for k, v in losses.items()}, "count": x.shape[-1]}


class Mixed(nn.Module):
    """Layers in several dtypes, with casts between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm, self.head = nn.Linear(12, 16), nn.Linear(16, 16).to(torch.bfloat16), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.first(x)).to(torch.bfloat16)
        return F.cross_entropy(self.head(self.norm(self.second(hidden).float())), target)
