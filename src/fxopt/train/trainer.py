"""`Trainer`: the settings of a run, and the four things it can do with a model."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxopt.errors import DataError
from fxopt.runtime.counting import Counter
from fxopt.runtime.memory import peak_bytes, reset_peak
from fxopt.runtime.scaler import Scaler
from fxopt.train import evaluate as evaluation
from fxopt.train import loop, optimizers, randomness, snapshot
from fxopt.train.batch import Batch
from fxopt.train.callbacks import Callback, Events, State
from fxopt.train.folder import sweep
from fxopt.train.foreign import adopted
from fxopt.train.guard import Guard, Spikes
from fxopt.train.journal import TIMES, Journal, Logger
from fxopt.train.loader import Source, source_of
from fxopt.train.metrics import Means, Metric, Values
from fxopt.train.module_task import ModuleTask, is_lightning_shaped
from fxopt.train.optimizers import Group, Scheduled
from fxopt.train.progress import Progress
from fxopt.train.report import write_report
from fxopt.train.result import Result
from fxopt.train.run import Plan, Run
from fxopt.train.saver import Checkpoints, Saver
from fxopt.train.schedule import Plateau, Schedule, make_schedule
from fxopt.train.settings import accumulation, check, described, differing, known, pieces, planned_steps
from fxopt.train.signals import Signals
from fxopt.train.strategies import Strategy, strategy_of
from fxopt.train.summary import summary
from fxopt.train.task import Loss, ModelTask, Task, check_trainable, device_of
from fxopt.train.timing import timed
from fxopt.train.tuner import Tuned, tune

log = logging.getLogger("fxopt")


@dataclass(kw_only=True)
class Trainer:
    """Trains, validates, tests and predicts. The loop itself is `fxopt.train.loop.train`.

    It takes an `Optimized`, any `nn.Module` that returns its loss, any module beside a loss function, and an object of the shape of a
    LightningModule (`training_step`, `validation_step`, `configure_optimizers`) as it is.

    Accumulated batches count by the number of items that their loss is the mean of, so a group of batches (the last, shorter one of a
    pass included) gives the gradient of one large batch. For an optimized model the number is derived from the graph (see
    `fxopt.ir.denominator`); for any other it is that of the labels, or without labels of the samples. A batch with no such item is left
    out and counted.

    Args:
        steps, epochs: give one: optimizer steps, or passes over the data, which must then have a length. max_seconds: no step begins later.
        optimizer: a name (adamw, adamw_8bit, torch_adamw, sgd, momentum), an optimizer, several, or a function from parameter groups to one.
        lr, weight_decay, groups: for an optimizer made by name or function. Rate 2e-4; groups have rates of their own (`lora_plus()`).
        schedule: a name (constant, linear, cosine, wsd, exponential), a function from finished steps to a factor, a `Plateau`, or
            several, which multiply. warmup: steps over which a named schedule rises from 0.
        accumulate: batches per optimizer step: a number, {epoch: number} from that epoch on, or a function from the step to a number.
        clip: largest norm of all gradients together; clip_value: largest absolute value of each. None leaves them.
        loss: from (model, batch) to the mean loss; None: the model returns it. count: how many items that mean is over; None takes what
            the graph, the labels or the samples say. metrics: of evaluations, by name.
        callbacks: their events fire in this order; Lightning's and Hugging Face's are taken as they are. loggers: beside the files.
        seed: of Python, numpy, torch, workers and shuffling. deterministic: only algorithms of torch that give equal bits each time.
        precision: None or "fp32": as the model is; "bf16" or "fp16": autocast (fp16 with a loss scaler). A program's own precision pass
            needs nothing here: its loss scaler is made by itself.
        validate_every: steps between validations; None: after each epoch, and at the end of a run of so many steps.
        limit_train, limit_validate, limit_test, limit_predict: batches of a pass. overfit_batches: train on the first so many, always the
            same. fast_dev_run: so many batches of everything (True: one), nothing is written.
        not_finite: "raise" or "skip" a step whose loss or gradient is not finite. spikes: leave out steps far above those before.
        batch_size, shuffle: for data that are samples. workers: processes that load them.
        output_dir: the run's folder: metrics.jsonl, metrics.csv, times.jsonl, report.html, checkpoints/, and the adapter in adapter/.
        checkpoints: when to save, what to keep; False: never. log_every: steps between rows in the log.
        strategy: "auto" (ddp under a launcher that started several processes, else single), "single", "ddp", "fsdp", or an object. progress: show a line on stderr.
        profile: time the parts of the run: `result.times`, and profile.json in the run's folder.
    """

    steps: int | None = None
    epochs: int | None = None
    max_seconds: float | None = None
    optimizer: optimizers.Spec = "adamw"
    lr: float | None = None
    weight_decay: float = 0.0
    groups: Sequence[Group] = ()
    schedule: str | Schedule | Plateau | Sequence[str | Schedule | Plateau] = "cosine"
    warmup: int = 0
    accumulate: int | Mapping[int, int] | Callable[[int], int] = 1
    clip: float | None = 1.0
    clip_value: float | None = None
    loss: Loss | None = None
    count: Callable[[Batch], int] | None = None
    metrics: Mapping[str, Metric | Values] = field(default_factory=dict)
    callbacks: Sequence[Any] = ()
    loggers: Sequence[Logger] = ()
    seed: int | None = None
    deterministic: bool = False
    precision: str | None = None
    validate_every: int | None = None
    limit_train: int | None = None
    limit_validate: int | None = None
    limit_test: int | None = None
    limit_predict: int | None = None
    overfit_batches: int | None = None
    fast_dev_run: bool | int = False
    not_finite: str = "raise"
    spikes: Spikes | None = None
    batch_size: int | None = None
    shuffle: bool = True
    workers: int = 0
    output_dir: str | Path | None = None
    checkpoints: Checkpoints | bool = True
    log_every: int = 1
    strategy: Strategy | str = "auto"
    progress: bool = True
    profile: bool = False

    def __post_init__(self) -> None:
        check(self)

    # -- the four things ------------------------------------------------------------------------------------------------

    def fit(self, model: Any, train: Any = None, val: Any = None, *, resume: bool | str | Path = False) -> Result:
        """Trains the parameters of `model` that require gradients, in place.

        Args:
            model: see the class. train: batches; passed over again for each epoch, so more than one epoch needs more than an iterator. Or
                samples, with `batch_size`; or a data module (`prepare_data`, `setup`, `train_dataloader`, `val_dataloader`). val: as train.
            resume: True: go on from the newest good checkpoint of `output_dir`, if there is one; or a checkpoint's folder. The run is then
                the one that was interrupted, bit by bit.

        Raises:
            DataError: settings that contradict each other, a model with nothing to train, data that ends too early, a checkpoint of another
                run; or several batches a step and an optimized model whose loss is no mean over items that its inputs say (a contrastive
                loss, batch norm in training mode): give `count`.
            CheckError: a loss or a gradient is not finite. The weights are those of the last finished step.
            Stopped: SIGTERM or SIGINT came; the run is saved. A SystemExit, of code 143 or 130.
        """
        task = self._task(model)
        with self._processes(task) as strategy:
            return self._fit(task, strategy, train, val, resume)

    def _fit(self, task: Task, strategy: Strategy, train: Any, val: Any, resume: bool | str | Path) -> Result:
        folder = self._folder(resume, strategy.rank)
        if self.seed is not None:
            randomness.seed_all(self.seed)
        data, validation = self._sources(train, val, strategy)
        with randomness.deterministic(self.deterministic), contextlib.ExitStack() as stack, (Signals() if folder is not None and self.checkpoints else contextlib.nullcontext(Signals())) as signals:
            stack.callback(task.end)
            run = self._run(task, strategy, data, validation, folder, signals)
            try:
                return self._fitted(run, folder, resume)
            finally:
                run.journal.finish()

    def validate(self, model: Any, data: Any) -> dict[str, float]:
        """The mean loss (`val_loss`) and the metrics over data; every sample counts once.

        Raises:
            DataError: the data is empty, or gives no loss.
        """
        return self._evaluate(model, data, "validate", self.limit_validate)

    def test(self, model: Any, data: Any) -> dict[str, float]:
        """As `validate`; names begin with `test_`."""
        return self._evaluate(model, data, "test", self.limit_test)

    def predict(self, model: Any, data: Any) -> list[Any]:
        """What the model returns for each batch, in order."""
        outputs: list[Any] = []
        self._evaluate(model, data, "predict", self.limit_predict, outputs)
        return outputs

    def tune(self, model: Any, train: Any, *, batch_size: bool = True, rate: bool = True, workers: bool = True, memory: int | None = None) -> Tuned:
        """Finds batch size, learning rate and number of workers by trial runs, which leave no trace; see `fxopt.train.tuner.tune`."""
        return tune(self, model, train, batch_size=batch_size, rate=rate, workers=workers, memory=memory)

    # -- making a run ---------------------------------------------------------------------------------------------------

    def _task(self, model: Any) -> Task:
        if is_lightning_shaped(model):
            if self.loss is not None:
                raise DataError("`loss` is for a model; this one has a training_step.", where=type(model).__name__, do="Leave `loss` out.")
            return ModuleTask(model, self.count)
        if not isinstance(model, nn.Module):
            raise DataError(f"A {type(model).__name__} cannot be trained.", where="the trainer", do="Give a module; a function (model, batch) -> loss goes into `loss`.")
        return ModelTask(model, self.loss, self.count, self.metrics)

    @contextlib.contextmanager
    def _processes(self, task: Task) -> Iterator[Strategy]:
        """The strategy of one run; the other processes hear of an error."""
        strategy = strategy_of(self.strategy) if isinstance(self.strategy, str) else self.strategy
        if strategy.world > 1 and task.manual:
            raise DataError(f"Manual optimization steps when it likes; {strategy.world} processes must step together.", where=type(task.module).__name__, do="Use automatic optimization, or strategy=\"single\".")
        try:
            yield strategy
        except BaseException as error:
            strategy.failed(error)
            raise
        finally:
            strategy.close(task.module)

    def _folder(self, resume: bool | str | Path, rank: int) -> Path | None:
        """The run's folder, made and swept."""
        if self.output_dir is None or self.fast_dev_run:
            if resume is True and not self.fast_dev_run:
                raise DataError("There is no folder to resume from.", where="the trainer", do="Give `output_dir`, or the checkpoint as `resume`.")
            return None
        folder = Path(self.output_dir)
        try:
            (folder / "checkpoints" if self.checkpoints else folder).mkdir(parents=True, exist_ok=True)
            if not rank:
                sweep(folder / "checkpoints")
        except OSError as error:
            raise DataError(f"The folder could not be made: {error.strerror or error}.", where=str(folder)) from error
        if resume is False and self.checkpoints and snapshot.checkpoints(folder / "checkpoints"):
            raise DataError("The folder holds the checkpoints of a run.", where=str(folder), do="Go on with it (resume=True), or take another folder.")
        return folder

    def _sources(self, train: Any, val: Any, strategy: Strategy) -> tuple[Source, Source | None]:
        shared = {"batch_size": self.batch_size, "seed": self.seed or 0, "workers": self.workers, "rank": strategy.rank, "world": strategy.world}
        train, val = pieces(train, val, strategy)
        if self.overfit_batches is not None:
            val = train if val is not None else None
        data = source_of(train, shuffle=self.shuffle and self.overfit_batches is None, **shared)
        return data, None if val is None else source_of(val, **shared)

    def _run(self, task: Task, strategy: Strategy, data: Source, validation: Source | None, folder: Path | None, signals: Signals) -> Run:
        module = task.module
        limits = [limit for limit in (self.limit_train, self.overfit_batches, int(self.fast_dev_run) or None) if limit is not None]
        limit = min(limits, default=None)
        batches_of = accumulation(self.accumulate)
        steps = planned_steps(data, None if self.fast_dev_run else self.steps, 1 if self.fast_dev_run else self.epochs, batches_of, limit)
        state, means = State(module, _NO_OPTIMIZER, steps, rank=strategy.rank, world=strategy.world, folder=folder, batches=known(data, limit)), Means()
        task.begin(state, means, self)
        parameters = check_trainable(module)
        model = strategy.setup(module)
        own = task.optimizers()
        made = own[0] if own is not None else optimizers.make(self.optimizer, module, self.lr, self.weight_decay, self.groups)
        rates = own[1] if own is not None and own[1] is not None else Scheduled(made, self._schedules(steps))
        state.optimizer, state.optimizers = made[0], made
        plan = Plan(steps, 1 if self.fast_dev_run else self.epochs, batches_of, self.clip, self.clip_value, limit,
                    int(self.fast_dev_run) or (self.limit_validate if self.overfit_batches is None else limit), self.validate_every, self.log_every, _DTYPES[self.precision],
                    None if self.max_seconds is None else time.monotonic() + self.max_seconds)
        optimized = callable(getattr(type(module), "prepare", None))
        saver = None
        if folder is not None and self.checkpoints:
            policy = self.checkpoints if isinstance(self.checkpoints, Checkpoints) else Checkpoints()
            saver = Saver(folder / "checkpoints", policy, described(self), signals, _adapter_of(module))
        callbacks = [*(adopted(callback, self, task) for callback in (*self.callbacks, *task.callbacks())), *task.hooks, *([Progress(shown=not strategy.rank, saves=saver and saver.policy)] if self.progress else [])]
        run = Run(plan, task, model, state, Events(callbacks), data, validation, made, rates, parameters,
                   Counter(module, self.count, graph=self.loss is None, needed=not self.accumulate == 1), Guard(self.not_finite, self.spikes and replace(self.spikes)), strategy,
                   Journal(folder if not strategy.rank else None, self.loggers if not self.fast_dev_run and not strategy.rank else ()), saver,
                   Scaler() if self.precision == "fp16" else None, optimized and self.loss is None, means)
        state.times = timed(run) if self.profile else None
        return run

    def _schedules(self, steps: int) -> list[Schedule]:
        given = self.schedule
        several = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        return [make_schedule(one, steps, self.warmup) if isinstance(one, str) else replace(one) if isinstance(one, Plateau) else one for one in several]

    def _fitted(self, run: Run, folder: Path | None, resume: bool | str | Path) -> Result:
        """Begin or resume, train, and leave everything as it was found but for the weights."""
        state, module = run.state, run.task.module
        modes = [(part, part.training) for part in module.modules()]
        kept = None
        try:
            run.events(Callback.on_setup, state, "fit")
            if resume and not self.fast_dev_run:
                kept = self._restored(run, folder, resume)
            same = kept is not None and (resume is True or folder is not None and Path(resume).resolve().parent.parent == folder.resolve())
            run.journal.start(described(self) | ({"hyperparameters": held} if (held := run.task.hyperparameters()) else {}), None if kept is None or not same else {**kept.shared["journal"], TIMES: kept.config["times"]})
            reset_peak(run.device)
            module.train()
            run.events(Callback.on_fit_start, state)
            if kept is not None:
                snapshot.restore_random_states(run, kept)
            elif self.seed is not None and state.rank:
                randomness.seed_all(randomness.mixed(self.seed, state.rank))  # until here all ranks drew alike; now each drops out its own
            loop.train(run)
            if run.validation is not None and run.validated_at != state.step and self.steps is not None and not state.stop:
                run.validate()
            run.events(Callback.on_fit_end, state)
            for plateau in run.rates.plateaus if isinstance(run.rates, Scheduled) else ():
                if plateau.best is None:
                    log.warning("fxopt: Plateau saw no %r in the whole run: the rate followed the other schedules alone", plateau.monitor)
            if run.saver is not None:
                run.saver.save(run, wait=True)
            run.strategy.end(module)
        except BaseException as error:
            run.strategy.failed(error)
            run.events(Callback.on_exception, state, error)
            if run.saver is not None:
                run.saver.settle(error)
            if folder is not None and state.history and not run.strategy.lockstep:
                self._save_adapter(run, folder)  # the weights are those of the last finished step
            if run.saver is not None and isinstance(error, Exception):
                error.add_note(f"The last good checkpoint is {run.saver.last_good}." if run.saver.last_good else "No checkpoint was written yet.")
            raise
        finally:
            run.journal.close()
            for optimizer in run.optimizers:
                optimizer.zero_grad(set_to_none=True)
            run.rates.restore()
            for part, training in modes:
                part.training = training
            run.events(Callback.on_teardown, state, "fit")
        result = self._result(run, folder)
        if folder is not None and not state.rank:
            facts = {"steps": state.step, "epochs": state.epoch, "batches left out": state.skipped, "peak bytes": f"{result.peak_memory:,}", "ended": result.why or "as planned",
                     **{name: value for name, value in state.metrics.items() if name in ("loss", "val_loss")}}
            run.journal.artifact(write_report(folder, described(self), facts, summary(module, predict=False)))
        return result

    def _restored(self, run: Run, folder: Path | None, resume: bool | str | Path) -> snapshot.Snapshot | None:
        if resume is True:
            assert folder is not None
            found = snapshot.newest_good(folder / "checkpoints")
        else:
            found = Path(resume), snapshot.read(Path(resume))
        if found is None:
            return None
        path, kept = found
        changed = differing(kept.config["settings"], described(self))
        if changed:
            log.warning("fxopt: going on with other settings than those of the checkpoint: %s", "; ".join(changed))
        snapshot.restore(run, kept, run.saver.fingerprint(run) if run.saver is not None else snapshot.fingerprint(run))
        if run.saver is not None and resume is True:
            run.saver.last_good, run.saver.last = path, (run.state.step, run.state.epoch, run.state.micro)
        log.info("fxopt: going on from %s", path)
        return kept

    def _result(self, run: Run, folder: Path | None) -> Result:
        state = run.state
        adapter = self._save_adapter(run, folder) if folder is not None else None
        return Result(tuple(state.history), state.epoch, state.skipped, peak_bytes(run.device), adapter, dict(state.metrics),
                      run.saver.last_good if run.saver is not None else None, run.saver.best() if run.saver is not None and run.saver.policy.best else None,
                      state.first_step, state.why or ("a callback stopped it" if state.stop else ""), state.times)

    def _save_adapter(self, run: Run, folder: Path) -> Path | None:
        """Write the model's adapter, if it has one, for other programs."""
        save = _adapter_of(run.task.module)
        if save is None or run.state.rank:
            return None
        save(folder / "adapter")
        return folder / "adapter"

    def _evaluate(self, model: Any, data: Any, stage: str, limit: int | None, outputs: list[Any] | None = None) -> dict[str, float]:
        task = self._task(model)
        with self._processes(task) as strategy:
            return self._evaluated(task, strategy, data, stage, limit, outputs)

    def _evaluated(self, task: Task, strategy: Strategy, data: Any, stage: str, limit: int | None, outputs: list[Any] | None) -> dict[str, float]:
        source = source_of(pieces(data, None, strategy, stage)[0], batch_size=self.batch_size, seed=self.seed or 0, workers=self.workers, rank=strategy.rank, world=strategy.world)
        state = State(task.module, _NO_OPTIMIZER, 0, stage=stage, rank=strategy.rank, world=strategy.world)
        device = device_of(task.module).type
        dtype = _DTYPES[self.precision]
        with contextlib.ExitStack() as stack, randomness.deterministic(self.deterministic):
            stack.callback(task.end)
            task.begin(state, Means(), self)
            events = Events([*(adopted(callback, self, task) for callback in (*self.callbacks, *task.callbacks())), *task.hooks])
            events(Callback.on_setup, state, stage)
            stack.callback(events, Callback.on_teardown, state, stage)
            return evaluation.evaluate(task, task.module, source, stage, state, events, 1 if self.fast_dev_run else limit,
                                       lambda: torch.autocast(device, dtype) if dtype is not None else contextlib.nullcontext(), strategy, outputs)


_NO_OPTIMIZER = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.0)  # of a run before it has one
_DTYPES: dict[str | None, torch.dtype | None] = {None: None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def _adapter_of(module: nn.Module) -> Callable[[Path], None] | None:
    """What writes the model's adapter, if it has one."""
    if callable(getattr(module, "save_adapter", None)) and getattr(module, "adapters", True):
        return module.save_adapter  # type: ignore[return-value]
    return None


def fit(model: Any, train: Any, val: Any = None, *, resume: bool | str | Path = False, **settings: Any) -> Result:
    """`Trainer(**settings).fit(model, train, val)`: see `Trainer` for the settings and `Trainer.fit` for the rest.

    Raises:
        DataError: no such setting; and what `Trainer.fit` raises.
    """
    known = [setting.name for setting in fields(Trainer)]
    if wrong := [name for name in settings if name not in known]:
        raise DataError(f"There is no setting {wrong[0]!r}.", where="fit", do=f"The settings are {', '.join(known)}.")
    return Trainer(**settings).fit(model, train, val, resume=resume)
