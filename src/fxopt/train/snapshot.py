"""Everything that a run is, as data, and a run made from it again."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import DataError
from fxopt.runtime.scaler import Scaler
from fxopt.train import folder as folders
from fxopt.train.callbacks import Callback
from fxopt.train.folder import Writer
from fxopt.train.journal import TIMES
from fxopt.train.plain import cloned, decode, encode
from fxopt.train.randomness import restore as restore_random
from fxopt.train.randomness import mixed, seed_all, states
from fxopt.train.run import Run
from fxopt.train.sampler import Position
from fxopt.train.sharded import Piece, filled_in, index, taken_out
from fxopt.train.task import changing_buffers

log = logging.getLogger("fxopt")

WEIGHTS, STATE, CONFIG = "weights.safetensors", "state", "config.json"


@dataclass(frozen=True)
class Snapshot:
    """A run between two batches.

    Attributes:
        weights: the parameters that train and the buffers, by name; of a read one perhaps `Spread`. shared: what is the same on all ranks. ranks: what is each rank's
            own: random states, position, gradients and buffers of an unfinished step. config: settings, pipeline, hash of the graph.
        pieces: of this rank, of what lies in pieces; `shared` has marks in their place.
    """

    weights: dict[str, Any]
    shared: dict[str, Any]
    ranks: list[dict[str, Any]]
    config: dict[str, Any]
    pieces: dict[str, Piece] = field(default_factory=dict)


def changing(run: Run) -> list[str]:
    """The names of the state that training changes: parameters of the optimizers, and buffers. The codes of stored weights do not change."""
    trained = {id(parameter) for parameter in run.parameters}
    names = [name for name, parameter in run.task.module.named_parameters() if id(parameter) in trained]
    return names + list(changing_buffers(run.task.module))


def fingerprint(run: Run) -> str:
    """The sha256 of the state that training does not change: names, dtypes, shapes and bytes. On all ranks."""
    kept, found = set(changing(run)), {}
    for name, tensor in run.strategy.each(run.task.module):
        if name not in kept:
            sha = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            sha.update(memoryview(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b"")
            found[name] = sha.hexdigest()
    return hashlib.sha256("\n".join(found[name] for name in sorted(found)).encode()).hexdigest()


def pipeline_of(module: nn.Module) -> str | None:
    """The pipeline's text of an optimized module; None for another."""
    return str(module.passes) if callable(getattr(type(module), "prepare", None)) else None


def capture(run: Run, settings: Mapping[str, Any], frozen: str, copy: bool) -> Snapshot | None:
    """The run as it stands; None on other ranks than the first, unless they have pieces of it.

    Args:
        settings: of the trainer, plain. frozen: the fingerprint. copy: tensors are copied, so that the run may go on.
    """
    state = run.state
    extra: dict[str, Any] = {"extra": {}}
    sizes = run.journal.sizes()
    times = sizes.pop(TIMES, 0)  # as long as the clock's numbers are: no part of what a resumed run repeats
    run.events(Callback.on_save, state, extra)
    shared = {
        "position": {"step": state.step, "epoch": state.epoch, "batch": state.batch, "micro": state.micro, "step_before": run.step_before,
                     "skipped": state.skipped, "validated_at": run.validated_at, "world": state.world, "over": bool(state.batch) and run.epoch_is_over(),
                     "length": run.data.length(state.epoch)},
        "stop": [state.stop, state.why], "metrics": state.metrics,
        "optimizers": [run.strategy.optimizer_state(optimizer) for optimizer in run.optimizers], "rates": run.rates.state_dict(),
        "scaler": None if run.scaler is None else run.scaler.state_dict(), "guard": run.guard.state_dict(), "means": run.means.state_dict(),
        "callbacks": [[type(callback).__name__, run.strategy.pieces(run.task.module, callback.state_dict())] for callback in run.events.callbacks],
        "journal": sizes, "frozen": frozen, **extra,
    }
    gradients = {}
    if state.micro or run.task.manual:
        gradients = {name: parameter.grad for name, parameter in run.task.module.named_parameters() if parameter.grad is not None}
    own = {"random": states(), "data": run.data.state_dict(), "gradients": gradients, "losses": run.known_losses() if state.micro else [], "logged": state.logged,
           "buffers": run.strategy.changed_buffers(run.task.module) if state.world > 1 else {}}
    ranks = run.strategy.gather(cloned(own) if copy else own)
    weights: dict[str, Any] = run.strategy.state(run.task.module, changing(run))
    shared["weights"] = {name: value for name, value in weights.items() if isinstance(value, Piece)}
    pieces: dict[str, Piece] = {}
    shared = taken_out(shared, "state", pieces)
    if ranks is None and not run.strategy.lockstep:
        return None
    weights = {name: value for name, value in weights.items() if not isinstance(value, Piece)}
    config = {"settings": dict(settings), "passes": pipeline_of(run.task.module), "graphs": sorted(run.graphs), "torch": torch.__version__, "times": times}
    return Snapshot(cloned(weights), cloned(shared), ranks or [], config) if copy else Snapshot(weights, shared, ranks or [], config, pieces)


def fill(snapshot: Snapshot, writer: Writer, adapter: Any = None) -> None:
    """Write a snapshot's files.

    Args:
        adapter: writes a folder of an adapter's files, for other programs; None: there is none.
    """
    writer.tensors(WEIGHTS, snapshot.weights)
    for name, value in ((STATE, snapshot.shared), *((f"rank-{i}", own) for i, own in enumerate(snapshot.ranks))):
        tensors: dict[str, Tensor] = {}
        writer.json(f"{name}.json", encode(value, name, tensors))
        writer.tensors(f"{name}.safetensors", tensors)
    writer.json(CONFIG, encode(snapshot.config, "config", {}))
    if adapter is not None:
        (writer.folder / "adapter").mkdir()
        adapter(writer.folder / "adapter")
        for file in sorted((writer.folder / "adapter").rglob("*")):
            if file.is_file():
                writer.adopt(file.relative_to(writer.folder).as_posix())


def read(path: Path) -> Snapshot:
    """A checkpoint whose every byte is as it was written.

    Raises:
        DataError: it is damaged or no checkpoint.
    """
    files = folders.verify(path)["files"]
    ranks = sum(name.startswith("rank-") and name.endswith(".json") for name in files)
    parts = [decode(folders.read_state(path / f"{name}.json"), folders.read_tensors(path / f"{name}.safetensors")) for name in (STATE, *(f"rank-{i}" for i in range(ranks)))]
    shared = filled_in(parts[0], index(path, files))
    weights = {**folders.read_tensors(path / WEIGHTS), **shared.pop("weights")}
    return Snapshot(weights, shared, parts[1:], folders.read_state(path / CONFIG))


def newest_good(folder: Path) -> tuple[Path, Snapshot] | None:
    """The newest checkpoint of a folder that is whole; None if there is none at all. Damaged ones are named, aloud.

    Raises:
        DataError: all of them are damaged.
    """
    paths = checkpoints(folder)
    for path in reversed(paths):
        try:
            return path, read(path)
        except DataError as error:
            log.warning("fxopt: the checkpoint %s is damaged (%s); taking the one before it", path, error.what)
    if paths:
        raise DataError(f"All {len(paths)} checkpoints are damaged.", where=str(folder), do="Begin anew in another folder.")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


@torch.no_grad()
def restore(run: Run, snapshot: Snapshot, frozen: str) -> None:
    """Make a run go on where the snapshot was taken. Random states are the last thing, in `restore_random_states`.

    Raises:
        DataError: the snapshot is of another model, pipeline, optimizer or data.
    """
    state, shared = run.state, snapshot.shared
    _same(run, snapshot, frozen)
    run.strategy.load(run.task.module, snapshot.weights)
    for optimizer, saved in zip(run.optimizers, shared["optimizers"], strict=True):
        run.strategy.load_optimizer(optimizer, saved)
    run.rates.load_state_dict(shared["rates"])
    if shared["scaler"] is not None:
        run.scaler = run.scaler or Scaler()
        run.scaler.load_state_dict(shared["scaler"])
    run.guard.load_state_dict(shared["guard"])
    run.means.load_state_dict(shared["means"])
    for callback, (_, saved) in zip(run.events.callbacks, shared["callbacks"], strict=True):
        callback.load_state_dict(run.strategy.localized(run.task.module, saved))
    position = shared["position"]
    state.first_step, state.epoch, state.batch, state.micro = position["step"], position["epoch"], position["batch"], position["micro"]
    state.skipped, run.step_before, run.validated_at = position["skipped"], position["step_before"], position["validated_at"]
    length = run.data.length(position["epoch"])
    if position["world"] == state.world and position.get("length", length) != length:
        log.warning("fxopt: an epoch of this data has %s batches, one of the saved run's %s: the place in it, counted in batches, is not where the saved run was", length, position["length"])
    if position["world"] != state.world:
        state.batch = _batch_of(run, position)
    (state.stop, state.why), state.metrics = shared["stop"], dict(shared["metrics"])
    own = snapshot.ranks[state.rank if state.rank < len(snapshot.ranks) else 0]
    run.data.load_state_dict(own["data"])
    parameters = dict(run.task.module.named_parameters())
    for name, gradient in own["gradients"].items():
        parameters[name].grad = gradient.to(parameters[name].device)
    held = dict(run.task.module.named_buffers())
    for name, buffer in own.get("buffers", {}).items():
        held[name].copy_(buffer)
    run.losses, state.logged = list(own["losses"]), dict(own["logged"])
    run.known_graphs = set(snapshot.config["graphs"])
    run.resumed = bool(state.micro or state.batch)
    run.events(Callback.on_load, state, shared)


def restore_random_states(run: Run, snapshot: Snapshot) -> None:
    """Put back the random states of this rank. One that the saved run did not have begins with a number that rank 0's would draw next."""
    rank = run.state.rank
    restore_random(snapshot.ranks[rank if rank < len(snapshot.ranks) else 0]["random"])
    if rank >= len(snapshot.ranks):
        seed_all(mixed(int(torch.randint(1 << 31, ())), rank))


def _batch_of(run: Run, position: Mapping[str, Any]) -> int:
    """How many turns of an epoch are over, for another number of ranks than the saved.

    Raises:
        DataError: the saved run was in the middle of a step; or so many batches do not divide among the ranks.
    """
    if position["micro"]:
        raise DataError(f"The checkpoint is of the middle of a step of {position['world']} processes, this run has {run.state.world}.", do="Resume with as many processes, or from a checkpoint between two steps.")
    if position["over"] and (length := run.data.length(position["epoch"])) is not None:
        return length
    return Position(0, position["epoch"], position["batch"], 0, position["world"]).on(run.state.rank, run.state.world).cursor


def _same(run: Run, snapshot: Snapshot, frozen: str) -> None:
    shared, mine = snapshot.shared, changing(run)
    do = "Resume with the same model, passes and optimizer, or begin anew in another folder."
    if odd := sorted(set(mine) ^ set(snapshot.weights)):
        raise DataError(f"The checkpoint {'lacks' if odd[0] in mine else 'has'} {odd[0]}, which this model {'trains' if odd[0] in mine else 'does not train'}"
                        f"{f' (and {len(odd) - 1} more)' if len(odd) > 1 else ''}.", where=type(run.task.module).__name__, do=do)
    held = {**dict(run.task.module.named_parameters()), **dict(run.task.module.named_buffers())}
    for name, value in snapshot.weights.items():
        if not run.strategy.lockstep and (tuple(held[name].shape) != tuple(value.shape) or isinstance(value, Tensor) and held[name].dtype != value.dtype):
            raise DataError(f"{name} is {list(value.shape)}, {getattr(value, 'dtype', 'in pieces')} in the checkpoint and {list(held[name].shape)}, {held[name].dtype} in the model.", do=do)
    if shared["frozen"] != frozen:
        raise DataError("The weights that are not trained are not those of the checkpoint.", where=type(run.task.module).__name__, do="Load the model that the run began with.")
    present = pipeline_of(run.task.module)
    if snapshot.config["passes"] != present:
        raise DataError(f"The checkpoint was trained through the passes {snapshot.config['passes']}, this model through {present}.", do=do)
    if len(run.optimizers) != len(shared["optimizers"]):
        raise DataError(f"The checkpoint has {len(shared['optimizers'])} optimizers, this run {len(run.optimizers)}.", do=do)
    for optimizer, saved in zip(run.optimizers, shared["optimizers"], strict=True):
        before, now = ([sorted(group) for group in groups] for groups in (saved["param_groups"], optimizer.param_groups))
        if before != now:
            odd = sorted({key for keys in before for key in keys} ^ {key for keys in now for key in keys})
            raise DataError(f"The checkpoint's optimizer has other settings than {type(optimizer).__name__}: {', '.join(odd) or f'{len(before)} groups, not {len(now)}'}.", where="optimizer", do=do)
    names = [type(callback).__name__ for callback in run.events.callbacks]
    if names != [name for name, _ in shared["callbacks"]]:
        raise DataError(f"The checkpoint's callbacks are {_list(name for name, _ in shared['callbacks'])}, this run's {_list(names)}.", do="Resume with the same callbacks in the same order.")


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def total_bytes(values: Sequence[Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(value.numel() * value.element_size() for value in values)
