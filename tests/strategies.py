"""Random programs: modules built from data, with inputs, and other inputs of other sizes.

A `Spec` is a short list of steps on values of shape [batch, seq, WIDTH]; each step reads earlier values and has an
`option` that picks one of its spellings. Specs print small, shrink to few steps, and build the same module every time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import strategies as st

WIDTH = 8
VOCABULARY = 13
IGNORED = -100
SIZE = (3, 5)


@dataclass(frozen=True)
class Step:
    """One step: its kind, the two values it reads (counted from the newest, modulo how many there are), its spelling."""

    kind: str
    a: int = 0
    b: int = 0
    option: int = 0


@dataclass(frozen=True)
class Spec:
    """A random program.

    Attributes:
        steps: of one block.
        blocks: how often the block is repeated.
        ids: whether the input is token ids (embedded) or floats.
        head: "none", or how a cross-entropy loss is spelled.
        outputs: what is returned: "value", "tuple", "dict".
        training: mode.
        seed: of parameters and inputs; every second one wants gradients of float inputs, every third masks nothing.
        static: whether the module fixes batch size and length to SIZE.
        dtype: of parameters and float inputs.
    """

    steps: tuple[Step, ...]
    blocks: int = 1
    ids: bool = True
    head: str = "none"
    outputs: str = "dict"
    training: bool = True
    seed: int = 0
    static: bool = False
    dtype: torch.dtype = torch.float32


@dataclass
class Context:
    """What all steps of a call share."""

    mask: torch.Tensor | None
    previous: nn.Linear | None = None


class Layer(nn.Module):
    """Base of the steps: `layer(a, b, context)` with a, b and the result [batch, seq, WIDTH]."""

    def __init__(self, option: int) -> None:
        super().__init__()
        self.option = option

    def pick(self, count: int) -> int:
        """One of `count` spellings."""
        return self.option % count


class Linear(Layer):
    def __init__(self, option: int) -> None:
        super().__init__(option)
        self.map = nn.Linear(WIDTH, WIDTH, bias=option % 2 == 0)
        self.raw = nn.Parameter(torch.randn(WIDTH, WIDTH) / math.sqrt(WIDTH)) if option % 5 == 4 else None

    def forward(self, a: torch.Tensor, b: torch.Tensor, context: Context) -> torch.Tensor:
        if self.raw is not None:
            return torch.addmm(self.raw[0], a.reshape(-1, WIDTH), self.raw).view(a.shape) if self.option % 2 else a @ self.raw
        return self.map(a)


class Norm(Layer):
    def __init__(self, option: int) -> None:
        super().__init__(option)
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))
        self.bias = nn.Parameter(0.1 * torch.randn(WIDTH))

    def forward(self, a: torch.Tensor, b: torch.Tensor, context: Context) -> torch.Tensor:
        kind = self.pick(7)
        if kind == 0:
            return self.weight * (a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-6))
        if kind == 1:
            return (a / torch.sqrt(torch.mean(a * a, dim=-1, keepdim=True) + 1e-5)) * (1.0 + self.weight)
        if kind == 2:
            return F.layer_norm(a, (WIDTH,), self.weight, self.bias, 1e-5)
        if kind == 3:
            centred = a - a.mean(-1, keepdim=True)
            return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight + self.bias
        if kind == 4:
            return F.rms_norm(a, (WIDTH,), self.weight, 1e-6)
        if kind == 5:
            x = a.to(a.dtype)
            x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)
            return x.type_as(a) * self.weight
        x = a - a.mean(-1, True)
        return x / (a.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


class Activation(Layer):
    def forward(self, a: torch.Tensor, b: torch.Tensor, context: Context) -> torch.Tensor:
        found = (F.silu, F.gelu, F.relu, torch.tanh, torch.sigmoid, lambda x: F.gelu(x, approximate="tanh"), lambda x: x * torch.sigmoid(x),
                 lambda x: torch.softmax(x, -1), lambda x: F.leaky_relu(x, 0.1), lambda x: F.softplus(x))
        return found[self.pick(len(found))](a)


class Gated(Layer):
    def __init__(self, option: int) -> None:
        super().__init__(option)
        self.gate, self.up = nn.Linear(WIDTH, 12, bias=False), nn.Linear(WIDTH, 12, bias=False)
        self.both, self.down = nn.Linear(WIDTH, 24), nn.Linear(12, WIDTH, bias=option % 2 == 0)

    def forward(self, a: torch.Tensor, b: torch.Tensor, context: Context) -> torch.Tensor:
        kind = self.pick(4)
        if kind == 0:
            return self.down(F.silu(self.gate(a)) * self.up(a))
        if kind == 1:
            return self.down(self.up(a) * F.gelu(self.gate(a), approximate="tanh"))
        gate, up = self.both(a).chunk(2, dim=-1)
        return self.down(F.gelu(gate) * up if kind == 2 else up * F.silu(gate))


class Combine(Layer):
    def forward(self, a: torch.Tensor, b: torch.Tensor, context: Context) -> torch.Tensor:
        found = (torch.add, torch.sub, torch.mul, lambda x, y: torch.add(x, y, alpha=0.5), torch.maximum, lambda x, y: torch.where(x > 0, x, y),
                 lambda x, y: x / (1 + y * y), lambda x, y: torch.lerp(x, y, 0.3), lambda x, y: x + x * torch.tanh(y))
        return found[self.pick(len(found))](a, b)


class Broadcast(Layer):
    def __init__(self, option: int) -> None:
        super().__init__(option)
        self.scale = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))
        self.one = nn.Parameter(torch.randn(1))
        self.register_buffer("shift", torch.randn(1, 1, WIDTH))

    def forward(self, a: torch.Tensor, b: torch.Tensor, context: Context) -> torch.Tensor:
        kind = self.pick(8)
        if kind == 0:
            return a * self.scale
        if kind == 1:
            return self.shift + a * self.one
        if kind == 2:
            return a / math.sqrt(WIDTH) * self.scale
        if kind == 3:
            return a * b.mean(1, keepdim=True)
        if kind == 4:
            return a - b[:, :, :1]
        if kind == 5:
            return a + torch.arange(a.shape[1], device=a.device).to(a.dtype)[None, :, None] / a.shape[1]
        if kind == 6:
            return (a * 1 + 0.0) / 1.0 - 0
        return a + b.sum(dim=(0, 1)) / (a.shape[0] * a.shape[1])


class Attention(Layer):
    def __init__(self, option: int) -> None:
        super().__init__(option)
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH // 2)
        self.register_buffer("frequency", 10.0 ** -torch.arange(2), persistent=False)

    def heads(self, x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(*x.shape[:2], count, -1).transpose(1, 2)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        angle = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)[:, None] * self.frequency
        angle = torch.cat([angle, angle], -1)
        half = x.shape[-1] // 2
        return x * angle.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angle.sin()

    def forward(self, a: torch.Tensor, b: torch.Tensor, context: Context) -> torch.Tensor:
        kind = self.pick(5)
        q, k, v = self.heads(self.q(a), 2), self.heads(self.k(b), 1), self.heads(self.v(b), 1)
        if kind in (1, 3):
            q, k = self.rotate(q), self.rotate(k)
        k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for x in (k, v))
        length = a.shape[1]
        mask = None
        if kind in (2, 3):
            mask = torch.ones(length, length, dtype=torch.bool, device=a.device).tril()[None, None]
            if context.mask is not None:
                mask = mask & context.mask.bool()[:, None, None, :]
        if kind == 4:
            weights = torch.softmax((q @ k.transpose(2, 3)) / math.sqrt(q.shape[-1]), -1)
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=kind == 1)
        return self.o(mixed.transpose(1, 2).reshape(*a.shape[:2], -1))


class Shape(Layer):
    def forward(self, a: torch.Tensor, b: torch.Tensor, context: Context) -> torch.Tensor:
        kind = self.pick(8)
        half = WIDTH // 2
        if kind == 0:
            return torch.cat([a[..., half:], b[..., :half]], -1)
        if kind == 1:
            return a.view(*a.shape[:2], 2, half).transpose(2, 3).reshape(a.shape)
        if kind == 2:
            return F.pad(a, (0, 0, 1, 0))[:, :-1] + b
        if kind == 3:
            return a.transpose(0, 1).contiguous().transpose(0, 1)
        if kind == 4:
            first, second = torch.split(a, half, dim=2)
            return torch.cat((first, second), dim=2)
        if kind == 5:
            return a.flip(1).roll(1, -1)
        if kind == 6:
            return a.unsqueeze(1).squeeze(1).flatten(0, 1).reshape_as(a)
        return torch.stack([a, b], -1).mean(-1)


class InPlace(Layer):
    def __init__(self, option: int) -> None:
        super().__init__(option)
        self.register_buffer("average", torch.zeros(WIDTH))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, a: torch.Tensor, b: torch.Tensor, context: Context) -> torch.Tensor:
        kind = self.pick(7)
        y = a * 1.5
        if kind == 0:
            return y.add_(b)
        if kind == 1:
            y.mul_(0.5).add_(b, alpha=2)
            return y
        if kind == 2:
            y[..., 0] = 0
            return y
        if kind == 3:
            self.seen.add_(1)
            self.average.mul_(0.9).add_(a.detach().mean((0, 1)), alpha=0.1)
            return a - self.average
        if kind == 4:
            view = y[:, :, 1:3]
            view.relu_()
            return y + b
        if kind == 5:
            return F.relu(y, inplace=True) + a
        z = y.clone()
        z += b
        return z * y


class Special(Layer):
    def __init__(self, option: int) -> None:
        super().__init__(option)
        self.drop, self.norm = nn.Dropout(0.3), nn.BatchNorm1d(WIDTH)

    def forward(self, a: torch.Tensor, b: torch.Tensor, context: Context) -> torch.Tensor:
        kind = self.pick(7)
        if kind == 0:
            return self.drop(a)
        if kind == 1:
            return self.norm(a.transpose(1, 2)).transpose(1, 2)
        if kind == 2:
            with torch.no_grad():
                level = a.abs().mean()
            return a / (level + 1)
        if kind == 3:
            return a + b.detach()
        if kind == 4:
            return self.drop(a) + F.dropout(b, 0.5, self.training)
        if kind == 5 and context.mask is not None:
            return a.masked_fill(context.mask[..., None] == 0, 0.0)
        return (a.cumsum(1) / (1 + a.shape[1])).clamp(-3, 3)


KINDS: dict[str, type[Layer]] = {"linear": Linear, "norm": Norm, "activation": Activation, "gated": Gated, "combine": Combine, "broadcast": Broadcast,
                                 "attention": Attention, "shape": Shape, "in_place": InPlace, "special": Special}


class Block(nn.Module):
    """The steps of a spec, once."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self.spec = steps
        self.steps = nn.ModuleList(KINDS[step.kind](step.option) for step in steps)

    def forward(self, x: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        values = [x]
        for step, layer in zip(self.spec, self.steps):
            values.append(layer(values[-1 - step.a % len(values)], values[-1 - step.b % len(values)], context))
        return values[-1], values[len(values) // 2]


class Random(nn.Module):
    """The module of a spec. Call: `model(ids or x, mask=..., labels=...)`."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(VOCABULARY, WIDTH) if spec.ids else None
        self.blocks = nn.ModuleList(Block(spec.steps) for _ in range(spec.blocks))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias="bias" in spec.head) if spec.head != "none" else None
        if self.head is not None and self.embed is not None and "tied" in spec.head:
            self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, labels: torch.Tensor | None = None) -> Any:
        if self.embed is not None:
            x = self.embed(x)
        if self.spec.static:
            x = x.view(*SIZE, WIDTH)
        middle = x
        for block in self.blocks:
            x, middle = block(x, Context(mask))
        found: dict[str, torch.Tensor] = {}
        if self.head is not None and labels is not None:
            logits = self.head(x)
            found |= {"loss": self.loss(logits, labels), "logits": logits}
        found |= {"hidden": x, "middle": middle * 1.0}
        if self.spec.outputs == "value":
            return next(iter(found.values()))
        return tuple(found.values()) if self.spec.outputs == "tuple" else found

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        kind = self.spec.head
        if "shift" in kind:
            logits, labels = logits[:, :-1].contiguous(), labels[:, 1:].contiguous()
        elif "pad" in kind:
            labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous()
        if "cap" in kind:
            logits = torch.tanh(logits / 5) * 5
        logits, labels = logits.reshape(-1, VOCABULARY), labels.reshape(-1)
        if "sum" in kind:
            return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / labels.numel()
        return F.cross_entropy(logits, labels, label_smoothing=0.1 if "smooth" in kind else 0.0)


HEADS = ("none", "plain", "tied", "bias", "pad", "shift tied", "pad cap", "sum bias", "smooth", "pad sum")

steps = st.builds(Step, st.sampled_from(sorted(KINDS)), st.integers(0, 3), st.integers(0, 3), st.integers(0, 9))


def specs(min_steps: int = 3, max_steps: int = 12) -> st.SearchStrategy[Spec]:
    """Random programs; the steps of one block times the number of blocks is at most 25."""
    return st.builds(Spec, st.lists(steps, min_size=min_steps, max_size=max_steps).map(tuple), st.integers(1, 2), st.booleans(), st.sampled_from(HEADS),
                     st.sampled_from(("dict", "tuple", "value")), st.sampled_from((True, True, False)), st.integers(0, 99),
                     st.sampled_from((False, False, False, True)), st.sampled_from((torch.float32, torch.float32, torch.bfloat16)))


def build(spec: Spec, dtype: torch.dtype | None = None) -> Random:
    """The module of a spec; in float64, with the values of the float32 one, exactly."""
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        model = Random(spec)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.to(dtype or spec.dtype).train(spec.training)


def inputs(spec: Spec, batch: int = SIZE[0], length: int = SIZE[1], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Keyword arguments for the module of a spec, of any batch size and length."""
    generator = torch.Generator().manual_seed(1000 + spec.seed + 7 * batch + length)
    x = torch.randint(0, VOCABULARY, (batch, length), generator=generator) if spec.ids else torch.randn(batch, length, WIDTH, generator=generator)
    if not spec.ids:
        x = x.to(dtype or spec.dtype).requires_grad_(spec.seed % 2 == 0)
    mask = torch.ones(batch, length, dtype=torch.int64)
    if spec.seed % 3:
        mask[0, length // 2 + 1 :] = 0
    labels = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < 0.3] = IGNORED
    labels.masked_fill_(mask == 0, IGNORED)  # else `pack` refuses the call
    labels[-1, -1] = 1  # a batch without any label has no loss
    return {"x": x, "mask": mask, "labels": labels}
