"""What `Optimized` promises of a call: signature, structure, state, modes, sizes, copies."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils import _pytree as pytree

import fxopt
from fxopt.errors import CallError, CaptureError, FxoptError
from fxopt.kernels.tolerance import same
from tests.models import MODELS, convnet, gpt2, handwritten, images, llama, pairs, tokens


def captures(opt: fxopt.Optimized) -> int:
    return sum(map(len, opt.dispatcher.entries.values()))


def test_signature_type_and_attributes_are_the_originals() -> None:
    model = llama()
    opt = fxopt.optimize(model)
    assert isinstance(opt, nn.Module)
    assert inspect.signature(opt.forward) == inspect.signature(model.forward)
    out = opt(**tokens())
    assert type(out) is type(model(**tokens()))
    assert opt.config is model.config and opt.num_parameters() == model.num_parameters()
    assert list(opt.state_dict()) == list(model.state_dict())
    assert [id(p) for p in opt.parameters()] == [id(p) for p in model.parameters()]
    with pytest.raises(AttributeError):
        opt.no_such_attribute


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_optimizer_built_before_or_after_trains_it(when: str) -> None:
    model = handwritten()
    if when == "before":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = fxopt.optimize(model, inputs=pairs())
    if when == "after":
        optimizer = torch.optim.SGD(opt.parameters(), lr=0.1)
    first = opt(**pairs())[1]
    first.backward()
    optimizer.step()
    assert opt(**pairs())[1] < first


def test_args_kwargs_and_nested_inputs() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, pair: tuple[torch.Tensor, dict[str, torch.Tensor]], *, scale: float = 1.0, flag: bool = False) -> dict[str, Any]:
            x, more = pair
            y = self.layer(x) * scale + more["bias"]
            return {"y": y, "list": [y * 2, None], "flag": flag, "n": 3}

    model = Nested()
    opt = fxopt.optimize(model)
    x, bias = torch.randn(3, 4), torch.randn(4)
    for kwargs in ({}, {"scale": 2.0}, {"scale": 3.0, "flag": True}):
        mine, theirs = opt((x, {"bias": bias}), **kwargs), model((x, {"bias": bias}), **kwargs)
        assert pytree.tree_structure(mine) == pytree.tree_structure(theirs)
        for a, b in zip(pytree.tree_leaves(mine), pytree.tree_leaves(theirs), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert captures(opt) == 3  # a constant is part of the program
    other = fxopt.optimize(Nested(), inputs=((x, {"bias": bias}),))
    assert captures(other) == 1


def test_inputs_that_alias_are_not_tied_together() -> None:
    ids = tokens()["input_ids"]
    model = llama()
    opt = fxopt.optimize(model, inputs={"input_ids": ids, "labels": ids})
    other = tokens(seed=3)["labels"]
    assert torch.equal(opt(input_ids=ids, labels=other).loss, model(input_ids=ids, labels=other).loss)
    assert captures(opt) == 1

    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a * 2 + b

    x, y = torch.ones(3), torch.zeros(3)
    two = fxopt.optimize(Two(), inputs=(x, x))
    assert torch.equal(two(x, y), x * 2)


def test_sizes_are_dynamic_also_from_a_batch_of_one() -> None:
    model = llama()
    opt = fxopt.optimize(model, inputs=tokens(1, 10))
    for batch, length in ((1, 10), (4, 7), (2, 33), (1, 5)):
        made = tokens(batch, length, seed=batch)
        assert same(opt(**made).loss, model(**made).loss)
    assert captures(opt) == 1


def test_a_size_of_one_after_larger_ones_is_proven_first() -> None:
    model = convnet()
    opt = fxopt.optimize(model.eval(), inputs=images(4))
    assert same(opt(**images(1))['logits'], model(**images(1))['logits'])
    assert any("sizes of 0 or 1" in line for line in opt.report.splitlines())


def test_train_and_eval_are_two_programs_over_one_state() -> None:
    model, eager = convnet(), convnet()
    opt = fxopt.optimize(model)
    torch.manual_seed(0)
    opt(**images())
    torch.manual_seed(0)
    eager(**images())
    assert opt.training and model.training
    opt.eval()
    assert not opt.training and not model.training and not model.body[0].training
    assert same(opt(**images())['logits'], eager.eval()(**images())['logits'])
    assert captures(opt) == 2
    opt.train()
    opt(**images())
    assert captures(opt) == 2


def test_another_dtype_or_rank_is_captured_on_its_own() -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten().sum() * 2

    opt = fxopt.optimize(Sum())
    for x in (torch.randn(3), torch.randn(3, 2), torch.randn(3).double(), torch.ones(3, dtype=torch.int64)):
        found = opt(x)
        assert found.dtype == Sum()(x).dtype and same(found, Sum()(x))
    assert captures(opt) == 4


def test_fixed_sizes_are_captured_again_and_then_refused_by_name() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x[:, 0]
            for t in range(1, x.shape[1]):
                h = torch.tanh(self.cell(h) + x[:, t])
            return h

    model = Loop()
    opt = fxopt.optimize(model)
    for length in (3, 5):
        x = torch.randn(2, length, 4)
        assert torch.equal(opt(x), model(x))
    assert captures(opt) == 2
    with pytest.raises(CallError, match="captures of this kind of call"):
        for length in range(6, 20):
            opt(torch.randn(2, length, 4))


def test_an_unsupported_argument_is_refused_by_name() -> None:
    class Box:
        pass

    class Takes(nn.Module):
        def forward(self, x: torch.Tensor, box: Any = None) -> torch.Tensor:
            return x * 2

    with pytest.raises(CallError, match="Box"):
        fxopt.optimize(Takes())(torch.ones(2), Box())


@dataclass
class Output:
    loss: torch.Tensor
    hidden: torch.Tensor


def test_objects_that_hold_tensors_come_back() -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> Output:
            hidden = self.layer(x)
            return Output(hidden.pow(2).mean(), hidden)

    model = Returns()
    opt, x = fxopt.optimize(model), torch.randn(3, 4)
    out = opt(x)
    assert type(out) is Output and same(out.hidden, model(x).hidden) and same(out.loss, model(x).loss)
    out.loss.backward()
    assert model.layer.weight.grad is not None


def test_a_key_value_cache_comes_back() -> None:
    model = llama(use_cache=True)
    opt = fxopt.optimize(model, str(fxopt.presets.exact()), inputs=tokens())
    mine, theirs = opt(**tokens()), model(**tokens())
    assert type(mine.past_key_values) is type(theirs.past_key_values)
    for a, b in zip(mine.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        assert same(a.keys, b.keys) and same(a.values, b.values)
    assert mine.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()
    mine.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    theirs.loss.backward()
    assert all(same(grads[n], p.grad) for n, p in model.named_parameters())


def test_tied_weights_stay_one_tensor() -> None:
    model = handwritten()
    opt = fxopt.optimize(model, inputs=pairs())
    assert model.head.weight is model.embed.weight
    other = copy.deepcopy(opt)
    assert other.model.head.weight is other.model.embed.weight
    opt(**pairs())[1].backward()
    eager = handwritten()
    eager(**pairs())[1].backward()
    assert same(model.embed.weight.grad, eager.embed.weight.grad)


def test_load_state_dict_with_assign_is_seen() -> None:
    model, other = llama(), llama()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    opt = fxopt.optimize(model, inputs=tokens())
    opt.load_state_dict(other.state_dict(), assign=True)
    assert same(opt(**tokens()).loss, other(**tokens()).loss)


def test_a_replaced_submodule_is_seen() -> None:
    model = convnet().eval()
    opt = fxopt.optimize(model, inputs=images())
    with torch.no_grad():
        model.head[5] = nn.Linear(16, 5)
    assert same(opt(**images())['logits'], model(**images())['logits'])


def test_block_hooks_fire_and_inner_hooks_are_named() -> None:
    model = llama()
    seen: list[str] = []
    model.model.layers[1].register_forward_hook(lambda *_: seen.append("block"))
    model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append("inner"))
    opt = fxopt.optimize(model, inputs=tokens())
    seen.clear()
    opt(**tokens())
    assert seen == ["block"]
    assert "model.layers.1.mlp" in opt.report


def test_generate_uses_the_adapter_and_the_quantized_weights() -> None:
    model = llama()
    opt = fxopt.optimize(model, fxopt.presets.finetune(rank=4, quantize="nf4"), inputs=tokens())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in opt.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    opt.eval()
    ids = tokens(1, 6)["input_ids"]
    made = opt.generate(ids, max_new_tokens=6, do_sample=False)
    with opt.dense():
        assert torch.equal(made, opt.generate(ids, max_new_tokens=6, do_sample=False))
    assert torch.equal(made, opt.merge("stored").eval().generate(ids, max_new_tokens=6, do_sample=False))
    assert not torch.equal(made, llama().eval().generate(ids, max_new_tokens=6, do_sample=False))
    with torch.no_grad():  # the graph and generate mean the same weights
        logits = opt(input_ids=made, attention_mask=torch.ones_like(made)).logits
    assert torch.equal(logits[0, 5:-1].argmax(-1), made[0, 6:])


def test_logits_beside_a_fused_loss_are_there_when_asked_for() -> None:
    model = llama()
    opt = fxopt.optimize(model, "canonicalize | loss", inputs=tokens())
    out, eager = opt(**tokens()), model(**tokens())
    assert out.logits.shape == eager.logits.shape and out.logits.dtype == eager.logits.dtype
    assert same(out.logits, eager.logits)
    assert torch.equal(out["logits"].argmax(-1), eager.logits.argmax(-1)) and out.logits.detach().numpy().shape == eager.logits.shape
    weight = torch.randn(eager.logits.shape)
    (out.loss + (out.logits * weight).mean()).backward()
    mine = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    (eager.loss + (eager.logits * weight).mean()).backward()
    for name, parameter in model.named_parameters():
        assert same(mine[name], parameter.grad), name


def test_lazy_logits_refuse_to_be_wrong_after_a_step() -> None:
    opt = fxopt.optimize(llama(), "canonicalize | loss", inputs=tokens())
    out = opt(**tokens())
    with torch.no_grad():
        opt.model.lm_head.weight.mul_(2)
    with pytest.raises(CallError, match="changed since"):
        out.logits.sum()


def test_a_gradient_of_an_output_beside_the_loss_is_right_at_the_first_time() -> None:
    model = handwritten()
    opt = fxopt.optimize(model, "dead_code", inputs=pairs())
    for _ in range(2):  # first by the region's second way, then planned
        logits, loss = opt(**pairs())
        (loss + logits.pow(2).mean()).backward()
        mine = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        logits, loss = model(**pairs())
        (loss + logits.pow(2).mean()).backward()
        for name, parameter in model.named_parameters():
            assert same(mine[name], parameter.grad), name
        model.zero_grad()


def test_gradients_of_inputs_and_accumulation() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.silu(self.layer(x)).sum()

    model = Net()
    opt = fxopt.optimize(model)
    x, y = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    for _ in range(2):
        opt(x).backward()
    twice = x.grad.clone()
    x.grad, total = None, model.layer.weight.grad.clone()
    model.zero_grad()
    for _ in range(2):
        model(x).backward()
    assert same(twice, x.grad) and same(total, model.layer.weight.grad)


def test_no_grad_and_unfreezing_are_kinds_of_call() -> None:
    model = llama()
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    opt = fxopt.optimize(model, "dead_code", inputs=tokens())
    opt(**tokens()).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["lm_head.weight"]
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    opt(**tokens()).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    with torch.no_grad():
        assert opt(**tokens()).loss.grad_fn is None


def test_autocast_around_the_call() -> None:
    model = handwritten()
    opt = fxopt.optimize(model, "remat")
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            mine, theirs = opt(**pairs()), model(**pairs())
        assert mine[0].dtype == theirs[0].dtype
        assert same(mine[1], theirs[1])
    assert captures(opt) == 2


def test_pickle_revives_a_working_model() -> None:
    opt = fxopt.optimize(handwritten(), "dead_code", inputs=pairs())
    again = pickle.loads(pickle.dumps(opt))
    assert torch.equal(again(**pairs())[1], opt(**pairs())[1])
    assert str(again.passes) == "dead_code"


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(FxoptError, match="nn.Module"):
        fxopt.optimize(lambda x: x)  # type: ignore[arg-type]
    opt = fxopt.optimize(handwritten())
    with pytest.raises(FxoptError, match="already"):
        fxopt.optimize(opt)
    with pytest.raises(FxoptError, match="captured"):
        opt.program
    with pytest.raises(CaptureError):
        opt(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(7, dtype=torch.int64))


@pytest.mark.parametrize("name", MODELS)
def test_report_and_text_are_readable(name: str) -> None:
    make, data = MODELS[name]
    opt = fxopt.optimize(make(), inputs=data())
    assert "check: program against the model" in opt.report
    assert "def " in opt.program.text() or "=" in opt.program.text()


def test_gpt2_dropout_is_the_same_stream() -> None:
    model = gpt2(0.2)
    opt = fxopt.optimize(model, "remat", inputs=tokens())
    torch.manual_seed(7)
    mine = opt(**tokens())
    after = torch.random.get_rng_state()
    torch.manual_seed(7)
    theirs = model(**tokens())
    assert torch.equal(mine.loss, theirs.loss) and torch.equal(after, torch.random.get_rng_state())
