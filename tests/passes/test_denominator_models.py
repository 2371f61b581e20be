"""Denominators of whole models and of random programs: the parts of a batch have the gradient of the whole."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings, strategies as st
import models
import pytest
from splits import CLASSES, QUICK, WIDTH, assert_split_is_whole, batch, fact, in_fp64, reason, split, state_of
from strategies import Spec, build, inputs, specs
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import MixtralConfig, MixtralForCausalLM

from fxopt.ir.capture import Call, capture
from fxopt.ir.denominator import Underivable, derive, find_loss
from fxopt.ir.edit import Edit, random
from fxopt.passes.pipeline import run


class Router(nn.Module):
    """A mixture of experts, all of them computed, with a penalty on the router's logits of each token."""

    def __init__(self, per_token: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.per_token = per_token
        self.router, self.head = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, CLASSES)
        self.experts = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.router(x)
        weights, chosen = logits.softmax(-1).topk(2, dim=-1)
        gates = torch.zeros_like(logits).scatter(-1, chosen, weights)
        y = torch.einsum("bse,bsw,ewv->bsv", gates, x, self.experts)
        loss = F.cross_entropy(self.head(y).flatten(0, 1), labels.flatten())
        if self.per_token:
            kept = labels.ne(-100)
            auxiliary = (logits.logsumexp(-1).square() * kept).sum() / kept.sum()
        else:
            auxiliary = (gates.mean((0, 1)) * logits.softmax(-1).mean((0, 1))).sum()
        return {"loss": loss + 1e-2 * auxiliary, "auxiliary": auxiliary}


def test_experts_with_an_auxiliary_loss() -> None:
    whole = batch(3)
    model = Router(per_token=True).double()
    program = run("canonicalize | denominator", capture(model, Call.of((), whole)))
    assert_split_is_whole(model, fact(program), lambda part: model(**part)["loss"], whole, [1, 3, 2])
    found = reason(Router(per_token=False).double(), **whole)
    assert "no longer a sum" in found.reason and found.where.startswith("mul"), found


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "handwritten"])
def test_language_models(name: str) -> None:
    """Fused and not, the program's own gradients; padding and labels differ between the samples."""
    make, inputs = models.MODELS[name]
    model = (make(dropout=0.0) if name in ("gpt2", "bert") else make()).double()
    whole = inputs(batch=4)
    program = run("canonicalize", capture(model, Call.of((), whole)))
    if "attention_mask" in whole:
        whole["attention_mask"][1, -3:] = 0
        whole["labels"][1, -3:] = -100
    whole["labels"][2] = -100
    state = state_of(model)
    for passes in ("denominator", "fuse | loss | denominator | dead_code"):
        made = run(passes, program)
        at = next(i for i, out in enumerate(made.outputs) if isinstance(out, torch.fx.Node) and out.meta["val"].dim() == 0)
        by, made = fact(made), in_fp64(made)
        assert by.measure(list(whole.values()), state) == [int((whole["labels"][:, 0 if name == "bert" else 1:] != -100).sum())]
        assert_split_is_whole(model, by, lambda part, made=made, at=at: made.run(list(part.values()), state)[at], whole, [1, 2, 1])


class Sorted(nn.Module):
    """Tokens sorted by a key, given a weight by it, and put back; `wrong` names a step that is not as it should be."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wrong, self.router, self.scale = wrong, nn.Linear(WIDTH, 4), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, WIDTH)
        gates, chosen = self.router(tokens).softmax(-1).topk(2, dim=-1)
        key, order = chosen.reshape(-1).sort()
        back = torch.empty_like(order).index_put((order,), torch.arange(order.shape[0]))
        y = torch.tanh(self.scale(tokens[order // (1 if self.wrong == "rows" else 2)]) * gates.reshape(-1)[order].unsqueeze(-1))
        if self.wrong == "neighbour":
            y = y - y.cumsum(0)
        y = y[order if self.wrong == "back" else back].view(-1, 2, WIDTH).sum(1).view(x.shape)
        return (y.square().mean(-1) * mask).sum() / mask.sum()


def test_rows_that_are_sorted_and_put_back() -> None:
    model, whole = Sorted().double(), {key: value for key, value in batch(5).items() if key != "labels"}
    program = run("canonicalize | denominator", capture(model, Call.of((), whole)))
    assert_split_is_whole(model, fact(program), lambda part: model(**part), whole, [2, 1, 3])
    for wrong, node in (("rows", "index"), ("neighbour", "cumsum"), ("back", "index")):
        model = Sorted(wrong).double()
        if wrong != "rows":  # its number of rows is wrong too: it cannot be run
            parts = [model(**part) * part["mask"].sum() / whole["mask"].sum() for part in split(whole, [2, 1, 3])]
            assert not torch.allclose(sum(parts), model(**whole))
        found = reason(model, **whole)
        assert "in the order of their keys" in found.reason and found.where.startswith(node), found


def test_experts_whose_tokens_are_sorted() -> None:
    config = MixtralConfig(vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                           num_local_experts=4, use_cache=False, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model, whole = MixtralForCausalLM(config).double().train(), models.tokens(batch=4)
    program = run("canonicalize", capture(model, Call.of((), whole)))
    at = next(i for i, out in enumerate(program.outputs) if isinstance(out, torch.fx.Node) and out.meta["val"].dim() == 0)
    by, exact, state = derive(program), in_fp64(program), state_of(model)
    assert_split_is_whole(model, by, lambda part: exact.run(list(part.values()), state)[at], whole, [1, 2, 1])


# -- random programs -----------------------------------------------------------------------------------------------------


def check_random(spec: Spec, sizes: list[int]) -> None:
    """Where a random program is said to keep its samples apart, it does."""
    spec = dataclasses.replace(spec, dtype=torch.float64, static=False, head="plain" if spec.head == "none" else spec.head)
    model = build(spec)
    whole = {name: value.detach() for name, value in inputs(spec, 4, 6).items()}
    program = run("canonicalize", capture(model, Call.of((), whole)))
    by = derive(program)
    if isinstance(by, Underivable) or any(random(node) for node in program.nodes if node.op == "call_function"):
        return
    loss = find_loss(program, Edit(program, by="test"))
    at = next(i for i, out in enumerate(program.outputs) if isinstance(out, torch.fx.Node) and out.name == loss.name)
    exact, state = in_fp64(program), state_of(model)

    def value(part: dict[str, torch.Tensor]) -> torch.Tensor:  # buffers that the program writes are as they were
        return exact.run(list(part.values()), {name: x if x.requires_grad else x.clone() for name, x in state.items()})[at]

    assert_split_is_whole(model, by, value, whole, sizes)


SPLITS = st.sampled_from([[1, 3], [2, 2], [1, 1, 2]])


@settings(QUICK, max_examples=5)
@given(specs(), SPLITS)
def test_random_programs(spec: Spec, sizes: list[int]) -> None:
    check_random(spec, sizes)


@pytest.mark.slow
@settings(QUICK, max_examples=400)
@given(specs(max_steps=25), SPLITS)
def test_random_programs_on_many(spec: Spec, sizes: list[int]) -> None:
    check_random(spec, sizes)
