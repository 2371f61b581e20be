"""Checkpoints: whole or absent, every flipped bit is seen, the last good one is taken, and no other run's."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import resource
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from fxopt.errors import CheckError, DataError
from fxopt.train import folder as folders
from fxopt.train.callbacks import Callback, State
from fxopt.train.journal import METRICS, rows
from fxopt.train.plain import decode, encode
from fxopt.train.saver import Checkpoints
from fxopt.train.signals import Stopped
from fxopt.train.snapshot import checkpoints, newest_good, read
from fxopt.train.trainer import Trainer


class Net(nn.Module):
    """Parameters, a buffer that training changes, a frozen weight, random states."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.drop = nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.3)
        self.frozen = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.drop(self.norm(self.a(x))) * self.frozen).square().mean()


def batches(number: int = 6) -> list[tuple[Tensor]]:
    return [(torch.randn(4, 4, generator=torch.Generator().manual_seed(i)),) for i in range(number)]


def trainer(folder: Path | None, **more: Any) -> Trainer:
    given: dict[str, Any] = {"steps": 5, "lr": 0.05, "progress": False, "seed": 1, "output_dir": folder, "checkpoints": Checkpoints(every=1, unit="step", keep=3)}
    return Trainer(**given | more)


class StopAt(Callback):
    def __init__(self, step: int, how: Any, micro: int = 1) -> None:
        self.at, self.how, self.micro = step, how, micro

    def on_batch_end(self, state: State, batch: Any, index: int, loss: Tensor) -> None:
        if state.step == self.at and state.micro == self.micro:
            self.how()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("unit", "background"), [("batch", False), ("step", True), ("batch", True), ("epoch", True)])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, unit: str, background: bool) -> None:
    policy = Checkpoints(every=1, unit=unit, background=background)
    whole = Net()
    trainer(tmp_path / "a", steps=None, epochs=3, accumulate=4, checkpoints=policy).fit(whole, batches())
    cut = Net()
    with pytest.raises(ZeroDivisionError) as caught:
        trainer(tmp_path / "b", steps=None, epochs=3, accumulate=4, checkpoints=policy, callbacks=[StopAt(3, lambda: 1 / 0, micro=2)]).fit(cut, batches())
    assert "last good checkpoint is" in caught.value.__notes__[0]
    other = Net()
    result = trainer(tmp_path / "b", steps=None, epochs=3, accumulate=4, checkpoints=policy, callbacks=[StopAt(99, None)]).fit(other, batches(), resume=True)
    assert result.first_step in (2, 3) and result.first_step + len(result.steps) == 6
    assert equal(weights(other), weights(whole)) and not equal(weights(cut), weights(whole))
    assert (tmp_path / "a" / METRICS).read_bytes() == (tmp_path / "b" / METRICS).read_bytes()


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    trainer(tmp_path).fit(Net(), batches())
    last = checkpoints(tmp_path / "checkpoints")[-1]
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == [f"step-0000000{i}-epoch-0000" for i in (3, 4, 5)]
    assert set(load_file(last / "weights.safetensors")) == {"a.weight", "a.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    for file in (last, *last.iterdir()):
        assert stat.S_IMODE(file.stat().st_mode) == (0o755 if file.is_dir() else 0o644)
        assert file.suffix in ("", ".json", ".safetensors")
    assert json.loads((last / "config.json").read_text())["settings"]["lr"] == 0.05
    assert "0x80" not in (last / "manifest.json").read_text()


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    """2,000 bits of one checkpoint, in every file, the manifest too."""
    trainer(tmp_path).fit(Net(), batches())
    last, chance = checkpoints(tmp_path / "checkpoints")[-1], random.Random(0)
    files = sorted(path for path in last.rglob("*") if path.is_file())
    whole = {path: path.read_bytes() for path in files}
    for number in range(2000):
        path = files[number % len(files)]
        data = bytearray(whole[path])
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        with pytest.raises(DataError):
            folders.verify(last)
        path.write_bytes(whole[path])
    folders.verify(last)


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = Net()
    trainer(tmp_path).fit(whole, batches())
    log = (tmp_path / METRICS).read_bytes()
    paths = checkpoints(tmp_path / "checkpoints")
    (paths[-1] / "weights.safetensors").write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING, "fxopt"):
        model = Net()
        result = trainer(tmp_path).fit(model, batches(), resume=True)
    assert paths[-1].name in caplog.text and "weights.safetensors is damaged" in caplog.text
    assert result.first_step == 4 and equal(weights(model), weights(whole)) and (tmp_path / METRICS).read_bytes() == log
    for path in checkpoints(tmp_path / "checkpoints"):
        (path / "state.json").unlink()
    with pytest.raises(DataError, match="All 3 checkpoints are damaged"):
        newest_good(tmp_path / "checkpoints")


@pytest.mark.parametrize(("change", "message"), [
    (lambda: {"model": Net(5)}, "is \\[3"), (lambda: {"optimizer": "sgd"}, ""), (lambda: {"callbacks": [StopAt(9, None)]}, "callbacks are none"),
    (lambda: {"data": iter(batches())}, "iterator"), (lambda: {"frozen": 2.0}, "not trained are not those"), (lambda: {"trained": True}, "lacks frozen"),
])  # fmt: skip
def test_another_run_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    trainer(tmp_path, steps=2).fit(Net(), batches())
    more = change()
    model, data = more.pop("model", Net()), more.pop("data", batches())
    if "frozen" in more:
        model.frozen.data.fill_(more.pop("frozen"))
    if more.pop("trained", False):
        model.frozen.requires_grad_(True)
    with pytest.raises((DataError, CheckError, ValueError, KeyError), match=message):
        trainer(tmp_path, **more).fit(model, data, resume=True)
    with pytest.raises(DataError, match="holds the checkpoints"):
        trainer(tmp_path).fit(Net(), batches())


def test_other_settings_are_said_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, steps=2).fit(Net(), batches())
    with caplog.at_level(logging.WARNING, "fxopt"):
        trainer(tmp_path, steps=3, clip=0.5).fit(Net(), batches(), resume=True)
    assert "steps was 2, is 3" in caplog.text and "clip was 1.0, is 0.5" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_say_so(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    whole = Net()
    trainer(tmp_path / "a", accumulate=3).fit(whole, batches())
    with pytest.raises(Stopped) as caught:
        trainer(tmp_path / "b", accumulate=3, callbacks=[StopAt(2, lambda: os.kill(os.getpid(), number))]).fit(Net(), batches())
    assert caught.value.code == 128 + number and "-batch-001" in str(caught.value)
    assert signal.getsignal(number) == before
    model = Net()
    trainer(tmp_path / "b", accumulate=3, callbacks=[StopAt(99, None)]).fit(model, batches(), resume=True)
    assert equal(weights(model), weights(whole))


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    """In a fork, for the limit cannot be taken back: files may grow to some size and not beyond."""
    trainer(tmp_path, steps=1).fit(Net(), batches())
    good = checkpoints(tmp_path / "checkpoints")
    largest = max(file.stat().st_size for file in good[-1].iterdir())
    for limit in (0, 100, 700, largest - 1):
        process = os.fork()
        if not process:
            code = 1
            try:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                trainer(None).fit(Net(), batches(1), resume=False)
                path = tmp_path / "checkpoints" / "step-00000009-epoch-0000"
                snapshot = read(good[-1])
                from_here = lambda writer: writer.tensors("weights.safetensors", {**snapshot.weights, "more": torch.zeros(largest)})  # noqa: E731
                try:
                    folders.write(path, from_here, {}, good[-1])
                except DataError as error:
                    code = 0 if good[-1].name in str(error) and "bytes are free" in str(error) and not path.exists() else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        assert checkpoints(tmp_path / "checkpoints") == good and not list((tmp_path / "checkpoints").glob(".*"))
        folders.verify(good[-1])


def test_a_failed_save_ends_the_run_and_names_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, calls = os.fsync, []

    def failing(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 60:
            raise OSError(28, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    for background in (False, True):
        calls.clear()
        with pytest.raises((DataError, OSError)) as caught:
            trainer(tmp_path / str(background), steps=40, checkpoints=Checkpoints(unit="step", background=background)).fit(Net(), batches(40))
        assert "last good checkpoint" in str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
        assert newest_good(tmp_path / str(background) / "checkpoints") is not None


def test_the_best_ones_stay(tmp_path: Path) -> None:
    class Worse(Callback):
        def on_validation_end(self, state: State, metrics: Any) -> None:
            metrics["val_loss"] = {1: 5.0, 2: 1.0, 3: 7.0, 4: 3.0}.get(state.step, 9.0)

    result = trainer(tmp_path, steps=6, validate_every=1, callbacks=[Worse()], checkpoints=Checkpoints(every=100, unit="step", keep=1, best=2)).fit(Net(), batches(), batches(1))
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == [f"step-0000000{i}-epoch-000{i // 6}" for i in (2, 4, 6)]
    assert result.best is not None and result.best.name == "step-00000002-epoch-0000"


def test_litter_is_swept_and_half_removed_ones_are_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".new-step-00000001-epoch-0000").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".old-step-00000001-epoch-0000").mkdir()
    trainer(tmp_path, steps=1).fit(Net(), batches())
    assert not list((tmp_path / "checkpoints").glob(".*"))


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5), st.sampled_from([torch.float32, torch.int8]),
                   st.builds(lambda n: torch.arange(n, dtype=torch.float32), st.integers(0, 4)))
VALUES = st.recursive(LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), inner, max_size=3),
                                                      st.dictionaries(st.sampled_from(["$tensor", "$tuple", "x"]), inner, max_size=2)), max_leaves=12)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, float):
        return isinstance(b, float) and (a == b and math.copysign(1, a) == math.copysign(1, b) or math.isnan(a) and math.isnan(b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_state_as_data_there_and_back(value: Any) -> None:
    tensors: dict[str, Tensor] = {}
    written = json.dumps(encode(value, "v", tensors), allow_nan=False)
    assert same(decode(json.loads(written), tensors), value)


def test_what_is_no_data_is_refused() -> None:
    with pytest.raises(DataError, match="set cannot be saved") as caught:
        encode({"a": [1, {2}]}, "v", {})
    assert caught.value.where == "v/a/1"
    for bad in ({"$tensor": "no"}, {"$float": "1"}, {"$tuple": [], "x": 1}, {"$pairs": 3}):
        with pytest.raises(DataError):
            decode(bad, {})


def test_the_log_is_cut_back(tmp_path: Path) -> None:
    trainer(tmp_path, steps=2).fit(Net(), batches())
    with (tmp_path / METRICS).open("a") as stream:
        stream.write('{"step": 3, "half' + "f" * 5000)
    trainer(tmp_path, steps=4).fit(Net(), batches(), resume=True)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4] and "ffff" not in (tmp_path / METRICS).read_text()
    (tmp_path / METRICS).write_text("")
    with pytest.raises(DataError, match="the checkpoint was written when"):
        trainer(tmp_path, steps=6).fit(Net(), batches(), resume=True)


def test_a_checkpoint_goes_on_in_another_folder(tmp_path: Path) -> None:
    whole = Net()
    trainer(tmp_path / "a").fit(whole, batches())
    model = Net()
    result = trainer(tmp_path / "b").fit(model, batches(), resume=checkpoints(tmp_path / "a" / "checkpoints")[0])
    assert result.first_step == 3 and equal(weights(model), weights(whole)) and [row["step"] for row in rows(tmp_path / "b")] == [4, 5]
    trainer(tmp_path / "a", fast_dev_run=True).fit(Net(), batches(), resume=True)
