"""Sequence models in plain PyTorch, each with something that captures get wrong: loops, checkpoints, user gradients, ties, complex numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.zoo.batches import VOCABULARY

WIDTH, HEADS = 32, 4


def next_token(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of predicting each next token. logits [batch, length, vocabulary], labels [batch, length]."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def split(x: torch.Tensor, heads: int = HEADS) -> torch.Tensor:
    """[batch, length, width] to [batch, heads, length, width of a head]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Causal self-attention over one projection of queries, keys and values."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """Positions in queries and keys [batch, heads, length, width of a head]: none here."""
        return x

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[batch, heads, length, width of a head] three times to one."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (split(part) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(self.attend(self.turned(q), self.turned(k), v).transpose(1, 2).flatten(2))


class ComplexRotary(Attention):
    """Positions as rotations of complex numbers."""

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        rates = 1.0 / 100.0 ** (torch.arange(pairs.shape[-1], device=x.device) / pairs.shape[-1])
        angles = torch.outer(torch.arange(x.shape[-2], device=x.device), rates)
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).to(x.dtype)


class Slopes(Attention):
    """Attention by hand, with a bias that grows with distance."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        at = torch.arange(q.shape[-2], device=q.device)
        distance = at[None, :] - at[:, None]
        slopes = 2.0 ** -torch.arange(1, HEADS + 1, device=q.device)
        scores = q @ k.mT / q.shape[-1] ** 0.5 + slopes[:, None, None] * distance
        return scores.masked_fill(distance > 0, float("-inf")).softmax(-1) @ v


class Linearized(Attention):
    """Attention without a softmax: running sums of outer products of keys and values."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        states = torch.einsum("bhld,bhle->bhlde", k, v).cumsum(2)
        return torch.einsum("bhld,bhlde->bhle", q, states) / torch.einsum("bhld,bhld->bhl", q, k.cumsum(2)).unsqueeze(-1)


class Differential(Attention):
    """The difference of two softmaxes, with a learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).tril()
        first, second = (((a @ b.mT) / a.shape[-1] ** 0.5).masked_fill(~mask, float("-inf")).softmax(-1) for a, b in zip(q.chunk(2, -1), k.chunk(2, -1)))
        return (first - self.factor * second) @ v


class Mlp(nn.Module):
    """Two linears."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, attention: type[nn.Module] = Attention, mlp: type[nn.Module] = Mlp, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention, self.mlp, self.drop = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), attention(), mlp(), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class Decoder(nn.Module):
    """A language model of blocks with tied embeddings; `run` goes through the blocks."""

    def __init__(self, attention: type[nn.Module] = Attention, mlp: type[nn.Module] = Mlp, dropout: float = 0.0, tied: bool = True, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block(attention, mlp, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """All blocks."""
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> Any:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        logits = self.head(self.norm(self.run(x)))
        return logits, next_token(logits, labels)


class Checkpointed(Decoder):
    """Blocks behind `torch.utils.checkpoint`."""

    reentrant = False

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class Reentrant(Checkpointed):
    """The older kind of checkpoint."""

    reentrant = True


class Casting(Decoder):
    """Blocks under an autocast of the model's own."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            x = super().run(x)
        return x.float()


class Universal(Decoder):
    """One block, three times."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = self.blocks[0](x)
        return x


class Halting(Decoder):
    """Leaves when the mean of the activations is small: a branch on a value."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            if x.abs().mean() < 1e-4:
                break
            x = block(x)
        return x


class Dropped(Decoder):
    """Leaves out blocks at random: a branch on a random value."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            if torch.rand(()) > 0.1:
                x = block(x)
        return x


class Equilibrium(Decoder):
    """A fixed point by iteration without gradients, then one step with them."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(3):
                z = self.blocks[0](z + x)
        return self.blocks[0](z.detach() + x)


class Experts(nn.Module):
    """A soft choice of the two best of four experts, all computed."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.router = nn.Linear(width, 4, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(4, width, 2 * width) * 0.1), nn.Parameter(torch.randn(4, 2 * width, width) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        weights = torch.zeros_like(x[..., :4]).scatter(-1, chosen, scores / scores.sum(-1, keepdim=True))
        hidden = F.silu(torch.einsum("blw,ewh->bleh", x, self.up))
        return torch.einsum("bleh,ehw,ble->blw", hidden, self.down, weights)


class Routed(nn.Module):
    """A loop over experts that skips those without tokens: a branch on values."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(width, 4, bias=False), nn.ModuleList(Mlp(width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        score, chosen = self.router(rows).softmax(-1).max(-1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero().squeeze(-1)
            if mine.numel() == 0:
                continue
            out = out.index_add(0, mine, expert(rows[mine]) * score[mine, None])
        return out.view_as(x)


class Rounding(torch.autograd.Function):
    """Rounds forward, passes gradients straight through."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return (x * 16).round() / 16

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad


class Reversal(torch.autograd.Function):
    """The identity, with gradients turned around and scaled."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:  # type: ignore[override]
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return -ctx.scale * grad, None


class Rounded(Mlp):
    """Weights rounded by a user's autograd.Function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(x, Rounding.apply(self.up.weight), self.up.bias)
        return F.linear(F.relu(hidden), Rounding.apply(self.down.weight), self.down.bias)


class Adversary(nn.Module):
    """Two heads, one behind a reversed gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.task, self.domain = Mlp(), nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor, target: torch.Tensor, domain: torch.Tensor) -> torch.Tensor:
        hidden = self.body(x)
        return F.cross_entropy(self.task(hidden), target) + F.cross_entropy(self.domain(Reversal.apply(hidden, 0.5)), domain)


class Recurrent(nn.Module):
    """A language model on one of torch's recurrent modules."""

    def __init__(self, kind: type[nn.Module] = nn.LSTM, **settings: Any) -> None:
        super().__init__()
        self.embed, self.cells = nn.Embedding(VOCABULARY, WIDTH), kind(WIDTH, WIDTH, batch_first=True, **settings)
        self.head = nn.Linear(WIDTH * (2 if settings.get("bidirectional") else 1), VOCABULARY)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.cells(self.embed(ids))[0])
        return {"loss": next_token(logits, labels), "logits": logits}


class CellLoop(nn.Module):
    """A Python loop over time around a cell."""

    def __init__(self, kind: type[nn.Module] = nn.GRUCell) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(VOCABULARY, WIDTH), kind(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        state, states = None, []
        for x in self.embed(ids).unbind(1):
            state = self.cell(x, state)
            states.append(state[0] if isinstance(state, tuple) else state)
        return next_token(self.head(torch.stack(states, 1)), labels)


class Translator(nn.Module):
    """A recurrent encoder and decoder with attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder, self.decoder = nn.Embedding(VOCABULARY, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.key, self.head = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(2 * WIDTH, VOCABULARY)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        memory, last = self.encoder(self.embed(ids))
        states, _ = self.decoder(self.embed(labels), last)
        found = (states @ self.key(memory).mT).softmax(-1) @ memory
        return next_token(self.head(torch.cat([states, found], -1)), labels)


class Scan(nn.Module):
    """A selective state space, as running sums in log space."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.inner, self.rate, self.gate, self.out = (nn.Linear(width, width) for _ in range(4))
        self.decay = nn.Parameter(torch.rand(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = F.softplus(self.rate(x))
        decay = (-step * self.decay.exp()).cumsum(1)
        state = (decay.exp() * (step * self.inner(x) * (-decay).exp()).cumsum(1))
        return self.out(state * F.silu(self.gate(x)))


class LongFilter(nn.Module):
    """A convolution as long as the sequence, by Fourier transforms."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.inner, self.out, self.decay = nn.Linear(width, width), nn.Linear(width, width), nn.Parameter(torch.rand(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        kernel = (-self.decay.exp() * torch.arange(length, device=x.device)[:, None]).exp()
        spectrum = torch.fft.rfft(self.inner(x).float(), n=2 * length, dim=1) * torch.fft.rfft(kernel.float(), n=2 * length, dim=0)
        return self.out(torch.fft.irfft(spectrum, n=2 * length, dim=1)[:, :length].to(x.dtype))


class Temporal(nn.Module):
    """Dilated causal convolutions with normalized weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.layers = nn.ModuleList(parametrizations.weight_norm(nn.Conv1d(WIDTH, WIDTH, 3, dilation=d)) for d in (1, 2))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids).mT
        for conv in self.layers:
            x = x + F.relu(conv(F.pad(x, (2 * conv.dilation[0], 0))))
        return next_token(self.head(x.mT), labels)


class Library(nn.Module):
    """torch's own encoder and decoder layers, with masks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.body = nn.Transformer(WIDTH, HEADS, 2, 2, 2 * WIDTH, dropout=0.0, batch_first=True)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(labels.shape[1], device=ids.device, dtype=self.head.weight.dtype)
        return next_token(self.head(self.body(self.embed(ids), self.embed(labels), tgt_mask=mask)), labels)


class EncoderStack(nn.Module):
    """torch's encoder, with a mask of padding and dropout."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.1, batch_first=True, norm_first=True)
        self.embed, self.body, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(WIDTH, 5)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.body(self.embed(ids), src_key_padding_mask=labels < 0)
        return self.head(hidden.mean(1)).logsumexp(-1).mean()
