"""What a captured program takes for granted of the Python side is seen to change, and only then."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn

from fxopt.runtime.watched import Snapshot, Watched


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Dropout(0.1), nn.Linear(4, 2))
    made[2].weight.requires_grad_(False)
    return made


def cast(m: nn.Module) -> None:
    m.to(torch.float64)


def replace(m: nn.Module) -> None:
    m[0].weight = nn.Parameter(torch.zeros(5, 3))


def rebind(m: nn.Module) -> None:
    m[0].weight.data = torch.zeros(4, 7)


def remove(m: nn.Module) -> None:
    del m[2].bias


def leave_out(m: nn.Module) -> None:
    m[2].bias = None


def fill(m: nn.Module) -> None:
    m[0].bias = nn.Parameter(torch.zeros(4))


def add(m: nn.Module) -> None:
    m[1].register_parameter("scale", nn.Parameter(torch.ones(1)))


def unfreeze(m: nn.Module) -> None:
    m[2].weight.requires_grad_(True)


@pytest.mark.parametrize("change", [cast, replace, rebind, remove, leave_out, fill, add, unfreeze], ids=lambda change: change.__name__)
def test_a_change_of_parameters_is_seen(change: Callable[[nn.Module], None]) -> None:
    made = model()
    watched = Watched(made)
    before = watched.parameters()
    assert watched.parameters() is before
    change(made)
    after = watched.parameters()
    assert after != before and watched.parameters() is after
    assert after.values == [(p.requires_grad, p.dtype, p.shape) for p in made.parameters()]
    assert Watched(made).parameters() == after and hash(Watched(made).parameters()) == hash(after)


def tied() -> nn.Module:
    made = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Dropout(0.1), nn.Linear(3, 3))
    made[2].weight = made[0].weight
    return made


def test_tied_parameters_are_one_until_they_are_not() -> None:
    made = tied()
    watched = Watched(made)
    before = watched.parameters()
    assert watched.parameters() is before
    made[2].weight = nn.Parameter(made[0].weight.detach().clone())
    assert watched.parameters() is before  # of the same kind
    made[2].weight.requires_grad_(False)
    assert watched.parameters() != before and watched.parameters().values == [(p.requires_grad, p.dtype, p.shape) for p in made.parameters()]
    made[2].weight = made[0].weight
    assert watched.parameters() == before
    made[0].weight.requires_grad_(False)
    assert [kind[0] for kind in watched.parameters().values] == [False, False, True]


@pytest.mark.parametrize("state", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["no_grad", "inference", "autocast"])
def test_what_a_call_is_inside_of_is_no_change_of_parameters(state: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
    made = model()
    watched = Watched(made)
    before = watched.parameters()
    with state():
        assert watched.parameters() is before
        made[0].weight.requires_grad_(False)
        assert watched.parameters() != before
        made[0].weight.requires_grad_(True)
        assert watched.parameters() == before


def test_a_replaced_module_and_a_hook_are_seen() -> None:
    made = model()
    watched, said = Watched(made, "1"), []
    assert watched.stale() == ""
    watched.hooks(said.append)
    made[2].register_forward_hook(lambda *_: None)
    watched.hooks(said.append)
    assert len(said) == 1 and "hooks of 2" in said[0]
    made[2] = nn.Linear(4, 2)
    assert watched.stale() == "2"


def test_values_do_not_matter_but_attributes_do() -> None:
    made = model()
    watched = Watched(made)
    parameters, attributes = watched.parameters(), watched.attributes()
    with torch.no_grad():
        made[0].weight.fill_(1.0)
    made[0].weight = nn.Parameter(torch.zeros(4, 3))
    assert watched.parameters() is parameters and watched.attributes() is attributes
    made[1].p = 0.2
    assert watched.attributes() != attributes
    made[1].p = 0.1
    assert watched.attributes() == attributes
    made.eval()
    assert watched.attributes() != attributes


def test_equal_snapshots_are_one_key() -> None:
    a, b, c = Snapshot([1, "x"]), Snapshot([1, "x"]), Snapshot([1, "y"])
    assert {a: 1}[b] == 1 and c not in {a: 1} and a != [1, "x"]
