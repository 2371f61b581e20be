"""The rows of models that are written in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from tests.zoo import plain_images as image
from tests.zoo import plain_others as other
from tests.zoo import plain_sequences as sequence
from tests.zoo.batches import VOCABULARY, ids, ignored
from tests.zoo.entry import Batch, Batches, Written

Shape = tuple[int | str, ...]


def given(**shapes: Any) -> Batches:
    """Random inputs by name: a shape with "B" for the batch and "L" for the length; behind a number n, integers below it."""

    def made(generator: torch.Generator, batch: int, length: int) -> Batch:
        def drawn(shape: Any) -> Any:
            if isinstance(shape, dict):
                return {name: drawn(each) for name, each in shape.items()}
            if isinstance(shape, list):
                return [drawn(each) for each in shape]
            high, *sizes = shape if isinstance(shape[0], tuple) else ((), *shape)
            size = [{"B": batch, "L": length}.get(s, s) for s in sizes]
            return torch.randint(0, high[0], size, generator=generator) if high else torch.randn(size, generator=generator)

        return {name: drawn(shape) for name, shape in shapes.items()}

    return made


def below(high: int, *shape: int | str) -> Any:
    """The shape of integers below a number."""
    return ((high,), *shape)


def text(generator: torch.Generator, batch: int, length: int) -> Batch:
    """Token ids and labels."""
    return {"ids": ids(generator, batch, length), "labels": ignored(generator, ids(generator, batch, length))}


def positional(generator: torch.Generator, batch: int, length: int) -> Batch:
    """Token ids and labels as positional arguments."""
    return {"": tuple(text(generator, batch, length).values())}


def graph(generator: torch.Generator, nodes: int, edges: int) -> Batch:
    """A random graph."""
    return {"nodes": torch.randn(nodes, 8, generator=generator), "edges": torch.randint(0, nodes, (2, edges), generator=generator),
            "target": torch.randint(0, 3, (nodes,), generator=generator)}


def bags(generator: torch.Generator, batch: int, length: int) -> Batch:
    """Numbers, three bags of categories, what was clicked."""
    return {"numbers": torch.randn(batch, 4, generator=generator), "clicked": (torch.arange(batch) % 2).float(),
            "categories": [torch.randint(0, 20, (batch, 3), generator=generator) for _ in range(3)]}


def offsets(generator: torch.Generator, batch: int, length: int) -> Batch:
    """Bags one after the other, and where each starts."""
    return {"ids": torch.randint(0, 20, (length,), generator=generator), "weights": torch.rand(length, generator=generator),
            "starts": torch.arange(batch) * 2, "target": torch.arange(batch) % 2}


def clicks(generator: torch.Generator, batch: int, length: int) -> Batch:
    """Four fields, and what was clicked."""
    return {"fields": torch.randint(0, 30, (batch, 4), generator=generator), "clicked": (torch.arange(batch) % 2).float()}


def labelled(generator: torch.Generator, batch: int, length: int) -> Batch:
    """Frames and labels without blanks."""
    return {"x": torch.randn(batch, length, 8, generator=generator), "labels": torch.randint(1, 12, (batch, 4), generator=generator)}


def pictures(classes: tuple[Any, ...], size: int = 16) -> Batches:
    """Images and a target."""
    return given(x=("B", 3, size, size), target=classes)


def decoder(**settings: Any) -> Callable[[], nn.Module]:
    """A hand-written decoder with other parts."""
    return lambda: sequence.Decoder(**settings)


def mlped(mlp: type[nn.Module]) -> Callable[[], nn.Module]:
    """A decoder with other layers in place of its two linears."""
    return decoder(mlp=mlp)


LOOPS = ((2, 6), (3, 9))
ROWS = ((4, 12), (6, 20))
TWO = given(ids=below(VOCABULARY, "B", "L"), labels=below(VOCABULARY, "B", "L"))
VECTORS = given(x=("B", 12), target=below(5, "B"))

SEQUENCES: dict[str, tuple[Callable[[], nn.Module], Batches, tuple[tuple[int, int], ...]]] = {
    "decoder, tied": (decoder(), positional, ()),
    "decoder, dropout": (decoder(dropout=0.1), text, ()),
    "decoder, complex rotary": (decoder(attention=sequence.ComplexRotary), text, ()),
    "decoder, attention by hand": (decoder(attention=sequence.Slopes), text, ()),
    "decoder, linear attention": (decoder(attention=sequence.Linearized), text, ()),
    "decoder, differential attention": (decoder(attention=sequence.Differential), text, ()),
    "decoder, scan": (decoder(attention=sequence.Scan), text, ()),
    "decoder, long convolution": (decoder(attention=sequence.LongFilter), text, ()),
    "decoder, dense experts": (mlped(sequence.Experts), text, ()),
    "decoder, experts that may be skipped": (mlped(sequence.Routed), text, ()),
    "decoder, rounded weights": (mlped(sequence.Rounded), text, ()),
    "decoder, checkpoint": (sequence.Checkpointed, text, ()),
    "decoder, reentrant checkpoint": (sequence.Reentrant, text, ()),
    "decoder, autocast inside": (sequence.Casting, text, ()),
    "decoder, one block thrice": (sequence.Universal, text, ()),
    "decoder, early exit": (sequence.Halting, text, ()),
    "decoder, random depth": (sequence.Dropped, text, ()),
    "decoder, fixed point": (sequence.Equilibrium, text, ()),
    "decoder, frozen half": (lambda: _half_frozen(sequence.Decoder(tied=False)), text, ()),
    "preferences": (other.Preferences, given(better=below(VOCABULARY, "B", "L"), worse=below(VOCABULARY, "B", "L")), ()),
    "LSTM": (lambda: sequence.Recurrent(nn.LSTM), text, LOOPS),
    "LSTM, two layers, both ways": (lambda: sequence.Recurrent(nn.LSTM, num_layers=2, bidirectional=True), text, LOOPS),
    "GRU": (lambda: sequence.Recurrent(nn.GRU), text, LOOPS),
    "RNN": (lambda: sequence.Recurrent(nn.RNN), text, LOOPS),
    "GRU cell in a loop": (sequence.CellLoop, text, LOOPS),
    "LSTM cell in a loop": (lambda: sequence.CellLoop(nn.LSTMCell), text, LOOPS),
    "recurrent translator": (sequence.Translator, TWO, LOOPS),
    "temporal convolutions": (sequence.Temporal, text, ()),
    "nn.Transformer": (sequence.Library, TWO, ()),
    "nn.TransformerEncoder": (sequence.EncoderStack, text, ()),
    "reversed gradients": (sequence.Adversary, given(x=("B", sequence.WIDTH), target=below(5, "B"), domain=below(2, "B")), ()),
    "linear chain": (other.Chain, given(x=("B", "L", 8), labels=below(4, "B", "L")), LOOPS),
    "alignment": (other.Aligned, labelled, ()),
}
IMAGES: dict[str, tuple[Callable[[], nn.Module], Batches, tuple[tuple[int, int], ...]]] = {
    "residual convolutions": (image.residual, pictures(below(5, "B")), ROWS),
    "separable convolutions": (image.separable, pictures(below(5, "B")), ROWS),
    "dense convolutions": (image.densely, pictures(below(5, "B")), ROWS),
    "spectral norm": (image.spectral, pictures(below(5, "B")), ROWS),
    "U-Net": (image.UNet, pictures(below(3, "B", 16, 16)), ROWS),
    "denoiser": (image.Denoiser, given(x=("B", 3, 16, 16), step=below(10, "B")), ROWS),
    "mixer": (image.Mixer, pictures(below(5, "B")), ROWS),
    "variational autoencoder": (image.Variational, given(x=("B", 3, 16, 16)), ROWS),
    "warped images": (image.Warped, pictures(below(5, "B")), ROWS),
    "points": (image.Points, given(points=("B", "L", 3), target=below(5, "B")), ROWS),
    "radiance field": (other.Field, given(points=("B", "L", 3), colour=("B", 3)), ROWS),
}
OTHERS: dict[str, tuple[Callable[[], nn.Module], Batches, tuple[tuple[int, int], ...]]] = {
    "codebook": (image.Codebook, given(x=("B", 12)), ROWS),
    "frozen body and teacher": (image.Frozen, given(x=("B", 12)), ROWS),
    "averaged teacher": (other.Averaged, given(a=("B", 12), b=("B", 12)), ROWS),
    "messages on a graph": (image.Messages, graph, ROWS),
    "attention on a graph": (image.Attending, graph, ROWS),
    "recommender with bags": (image.Recommender, bags, ROWS),
    "bags by offsets": (image.Offsets, offsets, ROWS),
    "factorization machine": (image.Factors, clicks, ROWS),
    "two towers": (image.Towers, given(batch={"user": {"features": ("B", 12)}, "items": [("B", 12)]}), ROWS),
    "actor and critic": (other.Actor, given(state=("B", 12), action=below(4, "B"), gain=("B",)), ROWS),
    "normalizing flow": (other.Flow, given(x=("B", 8)), ROWS),
    "mixture density": (other.Mixture, given(x=("B", 6), y=("B",)), ROWS),
    "differential equation": (other.Equation, given(x=("B", 6), y=("B", 6)), ROWS),
    "hypernetwork": (other.Hyper, given(x=("B", 6), context=("B", 4), target=below(5, "B")), ROWS),
    "capsules": (other.Capsules, given(x=("B", 6, 4), target=below(5, "B")), ROWS),
    "splines": (other.Splines, given(x=("B", 6), target=below(5, "B")), ROWS),
    "slots": (other.Slots, given(x=("B", "L", 8)), ROWS),
    "matched sets": (other.Matched, given(x=("B", "L", 6), place=("B", "L", 2), kind=below(3, "B", "L")), ROWS),
    "several dtypes": (other.Mixed, VECTORS, ROWS),
    "check for finite values": (other.Checked, VECTORS, ROWS),
    "gradients inside": (other.Physics, given(places=("B", 2)), ROWS),
}


def _half_frozen(model: nn.Module) -> nn.Module:
    """The first half of the parameters does not learn."""
    parameters = list(model.parameters())
    for parameter in parameters[: len(parameters) // 2]:
        parameter.requires_grad_(False)
    return model


PLAIN = tuple(Written(f"{name}", f"plain: {family}", make, batches, sizes or ((2, 12), (3, 20)))
              for family, table in (("sequences", SEQUENCES), ("images, points", IMAGES), ("others", OTHERS)) for name, (make, batches, sizes) in table.items())
