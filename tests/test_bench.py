"""What the bench counts."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from bench import headlines, headlines_ours, headlines_table, peer_hf, report
from bench.headlines_process import Job, allocated_peak
from bench.headlines_process import measure as measure_process
from bench.headlines_workloads import ROWS
from bench.ops import Row, in_region, under_autograd
from bench.peers import PEERS
from bench.traffic import Traffic, kept, least
from fxopt.kernels.catalog import CATALOG
from fxopt.kernels.op import Case
from fxopt.kernels.tolerance import same
from fxopt.runtime.store import WEIGHTS_FILE

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


# -- headlines ---------------------------------------------------------------------------------------------------------

TINY_ROWS = {name: row.tiny() for name, row in ROWS.items()}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    return {name: headlines.first_adapter(row, tmp_path_factory.mktemp("adapter")) for name, row in TINY_ROWS.items()}


def ran(row: headlines.Row, name: str, adapter: Path, prepare=None, profiled=False) -> dict:
    """A system's record, made in this process. Starting the profiler takes most of a second."""
    system = row.systems[name]
    prepare = prepare or (headlines_ours if system.peer == "fxopt" else peer_hf).prepare
    phases = [dataclasses.replace(phase, profiled=phase.profiled and profiled) for phase in row.phases(system, 0)]
    record = measure_process(Job(row, system, row.warmup(), None), adapter, prepare, phases)
    return {"row": row.name, "system": name, "round": 0, "budget": None, **record}


def uncompiled(row: headlines.Row) -> list[str]:
    return [name for name, system in row.systems.items() if system.peer == "hf" and system.compile is None]


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ROWS])
def test_the_uncompiled_peers_of_a_row_agree(name, adapters):
    row = TINY_ROWS[name]
    records = [ran(row, system, adapters[name]) for system in uncompiled(row)]
    assert headlines.check(row, records) == []
    assert all(record["compared_steps"] > 1 for record in records) and {r["adapters"] for r in records} == {2 * 7 * 2}
    losses = headlines.losses(records[0])
    assert row.name != "C3" or losses[-1] < losses[-2] < losses[0]  # one batch again and again: the adapters learn it
    assert set(headlines_table.figures(records)) == set(uncompiled(row))


def test_ours_agrees_and_the_table_is_made(adapters, tmp_path):
    row = TINY_ROWS["C2"]
    records = [ran(row, "eager", adapters["C2"]), ran(row, "fxopt", adapters["C2"])]
    assert headlines.check(row, records) == []
    assert records[1]["passes"].startswith("canonicalize | causal | lora(rank=16, alpha=32) | siblings")
    file, machine = tmp_path / "headlines.jsonl", headlines.describe()
    headlines.write(file, machine, TINY_ROWS["C1"], [{"row": "C1", "system": "eager", "round": 0, "failed": "why\nnot"}], quick=True)
    for _ in range(2):  # the second replaces the first
        headlines.write(file, machine, row, records, quick=False)
    assert [json.loads(line)["row"] for line in file.read_text().splitlines()] == ["C1"] * 2 + ["C2"] * 3
    text = headlines_table.section(file, report.table, report.machine_line)
    assert "- `eager` did not run: not" in text and "Quick run" in text and "more real tokens/s than eager. Goal 5x: m" in text
    with Console(width=180, quiet=True) as console:
        headlines_table.show(console, row, records, quick=False)


@pytest.fixture(scope="module")
def eager(adapters) -> dict:
    record = ran(TINY_ROWS["C3"], "eager", adapters["C3"], profiled=True)
    (phase,) = record["phases"]
    assert phase["allocator"] > 4 * 16 * 97 * 4  # the logits of 4 x 16 tokens at least
    assert 0 < sum(share for _, share, _ in phase["operators"]) <= 1 and any(name == "aten::mm" for name, *_ in phase["operators"])
    return record


def test_a_changed_loss_is_caught(eager, adapters):
    row = TINY_ROWS["C3"]

    def prepare(model, job):
        prepared = peer_hf.prepare(model, job)
        return dataclasses.replace(prepared, loss=lambda batch: prepared.loss(batch) * 1.001)

    (wrong,) = headlines.check(row, [eager, ran(row, "checkpointing", adapters["C3"], prepare, profiled=True)])
    assert "checkpointing, round 0: a loss differs from eager by 1.0e-03" in wrong


def test_an_adapter_without_gradient_is_caught(eager, tmp_path):
    """With the usual start, B = 0, no A has one in the first step."""
    row = TINY_ROWS["C3"]
    folder = headlines.first_adapter(row, tmp_path)
    state = load_file(folder / WEIGHTS_FILE)
    save_file({key: value * ("lora_B" not in key) for key, value in state.items()}, folder / WEIGHTS_FILE)
    record = ran(row, "eager", folder)
    assert record["smallest_gradient_norm"] == 0 and "lora_A" in record["weakest"]
    assert any("gets no gradient" in line for line in headlines.check(row, [record]))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda r: r["phases"][0]["steps"][1].update(loss=float("nan")), "differs from eager"),
        (lambda r: r["phases"][0]["steps"][1].update(tokens=1), "counts other tokens"),
        (lambda r: r.update(adapters=27), "27 adapter tensors"),
        (lambda r: r.update(failed="killed"), "killed"),
        (lambda r: r.update(smallest_gradient_norm=float("nan")), "gets no gradient"),
    ],
)
def test_what_is_wrong_in_a_record_is_said(eager, change, complaint):
    other = json.loads(json.dumps(eager)) | {"system": "checkpointing"}
    assert headlines.check(TINY_ROWS["C3"], [eager, other]) == []
    change(other)
    assert any(complaint in line for line in headlines.check(TINY_ROWS["C3"], [eager, other]))
    assert any("no eager losses" in line for line in headlines.check(TINY_ROWS["C3"], [dict(other)])) or "failed" in other


def test_short_data_counts_only_real_tokens():
    row = ROWS["C2"]
    for system in ("eager", "eager-grouped"):
        batches = [batch for index in range(row.rounds) for batch in row.phases(row.systems[system], index)[0].batches]
        assert len(batches) == row.rounds * row.steps >= 7
        real = sum(int(batch["attention_mask"].sum()) for batch in batches)
        lengths = [int(mask.sum()) for batch in batches for mask in batch["attention_mask"]]
        assert 80 < real / len(lengths) < 115 and 8 <= min(lengths) and max(lengths) <= 400
        assert sum(int((batch["labels"] >= 0).sum()) for batch in batches) == sum(-(-length // 4) for length in lengths)
        waste = sum(batch["input_ids"].numel() for batch in batches) / real
        assert waste < 1.1 if system == "eager-grouped" else waste > 2
        assert all(batch["input_ids"][batch["attention_mask"] == 0].eq(0).all() for batch in batches)
    assert not torch.equal(row.phases(row.systems["eager"], 0)[0].batches[0]["input_ids"], row.phases(row.systems["eager"], 1)[0].batches[0]["input_ids"])


def test_the_slope_and_the_allocators_peak():
    slope, above = headlines_table.fit([512, 1024, 2048], [100 + 3 * 512, 100 + 3 * 1024, 100 + 3 * 2048])
    assert (slope, above) == pytest.approx((3, 100))

    def event(at, size):
        return SimpleNamespace(name=lambda: "[memory]", start_ns=lambda: at, nbytes=lambda: size, device_type=lambda: "DeviceType.CPU")

    assert allocated_peak([event(3, 5), event(1, 10), event(2, -10), event(4, 7), event(5, -12)]) == 12
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        x = torch.empty(2**20)
        del x
        torch.empty(2**18)
    assert allocated_peak(profile.profiler.kineto_results.events()) == 4 * 2**20


def figure(**values) -> dict:
    shared = {"step": 1.0, "speed": 1.0, "above": 1.0, "slope": None, "allocator": None, "cold": 1.0, "held": None}
    return shared | {"step_bytes": values.get("above", 1.0)} | values


@pytest.mark.parametrize(
    ("name", "of", "expected"),
    [
        ("C1", {"eager": figure(slope=100), "checkpointing": figure(slope=30, step=2.0), "fxopt": figure(slope=4)},
         ["than eager: met", "than checkpointing: missed: 1.07x short", "than checkpointing: met"]),
        ("C2", {"eager": figure(), "compile-grouped": figure(speed=4.0), "fxopt": figure(speed=6.0)},
         ["than eager: met", "than the best peer, compile-grouped: missed: 1.07x short"]),
        ("C3", {"checkpointing": figure(step=4.0), "compile-budget-0.3": figure(step=3.0), "compile-budget-0.5": figure(step=1.0, above=2.0),
                "fxopt": figure(step=2.0)},
         ["than checkpointing: met", "than the budget allows: met", "than the best peer, compile-budget-0.3: met"]),
        ("C3", {"checkpointing": figure(step=4.0), "compile-budget-0.5": figure(step=2.0, above=2.0), "fxopt": figure(step=2.0, above=1.1)},
         ["than checkpointing: met", "than the budget allows: missed: 1.10x short", "than the best peer, compile-budget-0.5: missed: 1.15x short"]),
        ("C3", {"checkpointing": figure(step=4.0, held=3), "fxopt": figure(step=2.0), "fxopt-tight": figure(step=4.0, held=4)},
         ["than checkpointing: met", "than the budget allows: met", "holds at the allocator: missed: 1.60x short", "(fxopt-tight): missed: 1.33x short"]),
        ("C5", {"eager": figure(cold=2.0), "compile": figure(cold=99.0), "fxopt": figure(cold=10.0)},
         ["than compile: missed: 1.01x short", "than eager: missed: 2.50x short"]),
    ],
)  # fmt: skip
def test_goals(name, of, expected):
    found = [f"{goal.text}: {goal.verdict}" for goal in headlines_table.goals(ROWS[name], of) if goal.least is not None]
    assert len(found) == len(expected) and all(line.endswith(end) for line, end in zip(found, expected, strict=True)), found


def test_pipelines_and_reasons():
    assert " | loss | pack | compact | siblings | remat | " in headlines_ours.passes(ROWS["C2"], None)
    assert " | memory(least) | " in headlines_ours.passes(ROWS["C1"], None) and " | memory(5) | " in headlines_ours.passes(ROWS["C3"], 5)
    with pytest.raises(SystemExit, match="--budget"):
        headlines_ours.passes(ROWS["C3"], None)
    assert headlines.reason("a\n  x.y.SomeError: in a frame\nfxopt.errors.PassError: why\n  do: this\nsee\n").splitlines()[-1] == "fxopt.errors.PassError: why"
    assert headlines.reason("this row needs --budget\n") == "this row needs --budget" and headlines.reason("") == ""


def test_the_budget_is_the_checkpointed_peers_peak(eager):
    (phase,), trained = eager["phases"], eager["trained"]
    assert trained == sum(4 * 2 * 16 * (into + out) for into, out in [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)])
    tight = eager["weights"] + 3 * trained + phase["allocator"]
    assert headlines.budgets_of(eager) == {False: eager["weights"] + trained + phase["above"], True: tight}


def test_systems_bring_what_they_are_compared_with():
    assert headlines.wanted(ROWS["C3"], ["fxopt"]) == ["eager", "checkpointing", "fxopt"]
    assert headlines.wanted(ROWS["C2"], ["compile-grouped"]) == ["eager-grouped", "compile-grouped"]
    assert headlines.wanted(ROWS["C5"], None) == headlines.wanted(ROWS["C5"], None, every=True) == list(ROWS["C5"].systems)
    assert "compile-blocks" in set(ROWS["C1"].systems) - set(headlines.wanted(ROWS["C1"], None))


def test_the_page_shows_the_records():
    assert report.PAGE.read_text() == report.page()
