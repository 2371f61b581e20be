"""What the bench counts."""

from __future__ import annotations

import importlib

import pytest
import torch

from bench.ops import Row, in_region, under_autograd
from bench.peers import PEERS
from bench.traffic import Traffic, kept, least
from fxopt.kernels.catalog import CATALOG
from fxopt.kernels.op import Case
from fxopt.kernels.tolerance import same

CPU = torch.device("cpu")
OPS = {op.name: op for op in CATALOG}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda x: x + 1, 2 * 400),
        (lambda x: x.add_(1), 2 * 400),
        (lambda x: x.view(10, 10).t().unsqueeze(0), 0),
        (lambda x: torch.add(x, x, out=torch.empty(100)), 2 * 400),
        (lambda x: x * x[:1].expand(100), 2 * 400 + 4),
        (lambda x: x.index_select(0, torch.zeros(3, dtype=torch.int64)), 12 + 12 + 12 + 3 * 8),
        (lambda x: x.to(torch.float64), 400 + 800),
    ],
    ids=["add", "in place", "views", "out", "expanded", "rows", "cast"],
)
def test_each_operand_and_result_counts_once(run, expected):
    x = normal(100)
    with Traffic() as traffic:
        run(x)
    assert traffic.moved == expected


def test_fused_ops_are_opened():
    gate, up = normal(4, 8), normal(4, 8)
    with Traffic() as opened:
        OPS["swiglu"].overload(gate, up)
    with Traffic() as body:
        OPS["swiglu"].forward.body(gate, up)
    assert opened.moved == body.moved > 3 * 128


def test_what_is_kept_and_the_least():
    x, y, saved = normal(10), normal(10), normal(5)
    assert kept([x, x.view(2, 5), saved, saved[:2], None], [x]) == 20
    assert least([x, y], [x], [x, saved], [y], gathers=False) == (40 + 40 + 40 + 20) + (40 + 40 + 20 + 40)
    assert least([normal(1000)], [x], [], [], gathers=True) == 40 + 40


def test_a_region_runs_what_autograd_runs():
    case = Case((normal(6, 8), normal(8), normal(8), 1e-5), (0, 1, 2))
    row = Row(OPS["layer_norm"], "layer_norm", case)
    mine, theirs = in_region(row, CPU)(), under_autograd(OPS["layer_norm"].reference, row, CPU)()
    assert all(map(same, [*mine.outputs, *mine.grads], [*theirs.outputs, *theirs.grads]))
    assert len(mine.seconds) == len(theirs.seconds) == 2
    assert kept(mine.saved, [*case.args[:3], *mine.outputs]) == 2 * 6 * 4  # mean and rstd


def test_peers_do_the_rows_that_they_take():
    found = 0
    for op in ("dequantize", "adamw_"):
        cases = importlib.import_module(f"{OPS[op].folder}.cases")
        for label, case in cases.rows():
            row = Row(OPS[op], label, case)
            for peer in PEERS.values():
                call = peer(op, case, case.packed())
                if call is not None:
                    found += 1
                    mine, theirs = under_autograd(call, row, CPU)(), under_autograd(OPS[op].reference, row, CPU)()
                    assert all(map(same, mine.outputs, theirs.outputs))
    assert found >= 2
