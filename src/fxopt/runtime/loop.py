"""The training loop, all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
import math
from pathlib import Path
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import CheckError, DataError
from fxopt.runtime.callbacks import Callback, State, Step
from fxopt.runtime.counting import Counter, Items, shares, supervised_items
from fxopt.runtime.memory import peak_bytes, reset_peak
from fxopt.runtime.progress import Progress
from fxopt.runtime.schedule import Schedule, make_schedule

Batch = Any
"""A mapping of keyword arguments, a tuple of arguments, or one argument of the model."""

DEFAULT_LR = 2e-4


@dataclass(frozen=True)
class Result:
    """What a run did."""

    steps: tuple[Step, ...]
    epochs: int
    skipped: int
    """Batches that were left out because they supervise nothing."""
    peak_memory: int
    """Bytes, see `fxopt.runtime.memory.peak_bytes`."""
    adapter: Path | None
    """Folder of the saved adapter, when `output_dir` was given."""

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [step.loss for step in self.steps]

    @property
    def tokens_per_second(self) -> float:
        """Median over the steps of real (non-padding) tokens per second, without the first step of several."""
        return statistics.median(step.tokens / step.seconds for step in self.steps[1:] or self.steps)


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Calls `model` on `batch` and gives its loss: the output's `loss`, or the output itself if it is one number."""
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise DataError(
            "The model gave no loss: neither `output.loss` nor one number.",
            where=type(model).__name__,
            do="Put `labels` into the batches, or give fit a function as `loss`.",
        )
    return loss


def real_tokens(batch: Batch) -> int:
    """Tokens of `batch` that are not padding; 0 if it has neither `attention_mask` nor `input_ids`."""
    if not isinstance(batch, Mapping):
        return 0
    if (mask := batch.get("attention_mask")) is not None:
        return int(mask.ne(0).sum())
    return batch["input_ids"].numel() if "input_ids" in batch else 0


def fit(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    steps: int | None = None,
    epochs: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float | None = None,
    schedule: str | Schedule = "cosine",
    warmup: int = 0,
    accumulate: int = 1,
    clip: float | None = 1.0,
    loss: Callable[[nn.Module, Batch], Tensor] = model_loss,
    count: Callable[[Batch], int] | None = None,
    callbacks: Sequence[Callback] = (),
    seed: int | None = None,
    progress: bool = True,
    output_dir: str | Path | None = None,
) -> Result:
    """Trains the parameters of `model` that require gradients, in place.

    Accumulated batches count by the number of items that their loss is the mean of, so a group of batches (the last, shorter
    one of a pass included) gives the gradient of one large batch. For an optimized model the number is derived from the graph
    (see `fxopt.ir.denominator`); for any other it is that of the labels, see `supervised_items`. A batch with no such item is
    left out and counted.

    Args:
        data: batches; passed over again for each epoch, so more than one epoch needs more than an iterator.
        steps: optimizer steps to run. Give this or `epochs`.
        epochs: passes over `data`, which must then have a length.
        optimizer: default AdamW without weight decay, with `lr`. Any of torch's, or `fxopt.runtime.optim.AdamW` for averages
            of 8 bits. Its groups' rates are what `schedule` multiplies.
        lr: learning rate of the default optimizer, 2e-4.
        schedule: `constant`, `linear`, `cosine`, or a function from finished steps to a factor.
        warmup: steps over which a named schedule rises from 0.
        accumulate: batches per optimizer step.
        clip: largest norm of all gradients together; None leaves them.
        loss: the mean loss of a batch.
        count: how many items that mean is over; None takes what the graph or the labels say.
        callbacks: run in order at each point.
        seed: seeds torch's generators before the first batch.
        progress: show a line on stderr.
        output_dir: where `model.save_adapter` writes at the end, and when the run is broken off after a step.

    Raises:
        DataError: settings that contradict each other, a model with nothing to train, data that ends too early; or several
            batches a step and an optimized model whose loss is no mean over items that its inputs say (a contrastive loss, batch
            norm in training mode): give `count`.
        CheckError: a loss or a gradient is not finite. The weights are those of the last finished step.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _check_settings(model, parameters, optimizer, lr, schedule, warmup, accumulate, clip, output_dir)
    total = _planned_steps(data, steps, epochs, accumulate)
    factor = schedule if callable(schedule) else make_schedule(schedule, total, warmup)
    if optimizer is None:
        optimizer = torch.optim.AdamW(parameters, lr=DEFAULT_LR if lr is None else lr, weight_decay=0.0)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    device = parameters[0].device
    hooks = [*callbacks, *([Progress()] if progress else [])]
    state = State(model, optimizer, total)
    counter = Counter(model, count, graph=loss is model_loss, needed=accumulate > 1)
    modes = [(module, module.training) for module in model.modules()]
    if seed is not None:
        torch.manual_seed(seed)
    reset_peak(device)
    model.train()
    try:
        for hook in hooks:
            hook.on_fit_start(state)
        started = time.perf_counter()
        for group in _groups(data, accumulate, epochs, lambda batch: counter(_to(batch, device)), state, hooks):
            for settings, rate in zip(optimizer.param_groups, base_rates, strict=True):
                settings["lr"] = rate * factor(state.step)
            optimizer.zero_grad(set_to_none=True)
            for hook in hooks:
                hook.on_step_start(state)

            weights, items = shares([items for _, items in group])
            losses = []
            for (batch, _), weight in zip(group, weights, strict=True):
                value = loss(model, _to(batch, device)) * weight
                value.backward()
                losses.append(value.detach())
            for hook in hooks:
                hook.on_backward_end(state)

            step_loss = _finite_loss(losses, state)
            norm = _finite_norm(model, parameters, clip, state)
            optimizer.step()

            now = time.perf_counter()
            tokens = sum(real_tokens(batch) for batch, _ in group)
            rate = optimizer.param_groups[0]["lr"]
            state.history.append(Step(step_loss, rate, norm, tokens, int(items) if items == int(items) else items, now - started))
            for hook in hooks:
                hook.on_step_end(state)
            started = time.perf_counter()
        for hook in hooks:
            hook.on_fit_end(state)
    except BaseException as error:
        for hook in hooks:
            hook.on_exception(state, error)
        if output_dir is not None and state.history:
            model.save_adapter(output_dir)
        raise
    finally:
        optimizer.zero_grad(set_to_none=True)
        for settings, rate in zip(optimizer.param_groups, base_rates, strict=True):
            settings["lr"] = rate
        for module, training in modes:
            module.training = training
    if output_dir is not None:
        model.save_adapter(output_dir)
    folder = Path(output_dir) if output_dir is not None else None
    return Result(tuple(state.history), state.epoch, state.skipped, peak_bytes(device), folder)


def _groups(
    data: Iterable[Batch],
    accumulate: int,
    epochs: int | None,
    count: Callable[[Batch], Items],
    state: State,
    hooks: Sequence[Callback],
) -> Iterator[list[tuple[Batch, Items]]]:
    """Groups of up to `accumulate` batches with their item counts, until the planned steps or epochs are done."""
    while state.step < state.steps and not state.stop and state.epoch != epochs:
        step_before, group = state.step, []
        for batch in data:
            if state.step >= state.steps or state.stop:
                return
            items = count(batch)
            state.skipped += not items.number
            group += [(batch, items)] if items.number else []
            if len(group) == accumulate:
                yield group
                group = []
        if group and not state.stop:
            yield group
        if state.step == step_before and not state.stop:
            raise DataError(
                f"The data gave no batch to train on after step {state.step} of {state.steps}.",
                do="Give data that can be passed over again (a list or a DataLoader, no iterator), with labels.",
            )
        state.epoch += 1
        for hook in hooks:
            hook.on_epoch_end(state)


def _finite_loss(losses: Sequence[Tensor], state: State) -> float:
    values = torch.stack(losses).double().tolist()
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise CheckError(
                f"The loss of step {state.step + 1} is {value}.",
                where=f"batch {index + 1} of {len(values)} in this step",
                do="Lower the learning rate or look at that batch. The weights are those of the last finished step.",
            )
    return math.fsum(values)


def _finite_norm(model: nn.Module, parameters: Sequence[nn.Parameter], clip: float | None, state: State) -> float:
    """The norm of all gradients, which are scaled down to `clip` if it is larger."""
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if not torch.isfinite(norm):
        bad = (name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all())
        raise CheckError(
            f"The gradient of step {state.step + 1} is not finite, though the loss is.",
            where=next(bad, "the norm of all gradients overflows"),
            do="Lower the learning rate. The weights are those of the last finished step.",
        )
    if clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return float(norm)


def _planned_steps(data: Iterable[Batch], steps: int | None, epochs: int | None, accumulate: int) -> int:
    for name, value in (("steps", steps), ("epochs", epochs), ("accumulate", accumulate)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise DataError(f"`{name}` is {value!r}, which is not a whole number.", where="fit")
    if (steps is None) == (epochs is None):
        raise DataError("Give either `steps` or `epochs`.", where="fit")
    if steps is None:
        if not hasattr(data, "__len__"):
            raise DataError("The data has no length, so `epochs` cannot be planned.", where="fit", do="Give `steps`.")
        steps = epochs * math.ceil(len(data) / accumulate)
    if steps < 1:
        raise DataError(f"There are {steps} steps to run.", where="fit", do="Is the data empty?")
    return steps


def _check_settings(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    lr: float | None,
    schedule: str | Schedule,
    warmup: int,
    accumulate: int,
    clip: float | None,
    output_dir: str | Path | None,
) -> None:
    if not parameters:
        raise DataError("No parameter of the model requires a gradient.", where=type(model).__name__)
    if optimizer is not None and lr is not None:
        raise DataError("`lr` is for the default optimizer.", where="fit", do="Set the rate in your optimizer.")
    if callable(schedule) and warmup:
        raise DataError("`warmup` is for a named schedule.", where="fit", do="Put the warm-up into your function.")
    if accumulate < 1 or (clip is not None and not clip > 0):
        raise DataError(f"`accumulate` ({accumulate}) and `clip` ({clip}) must be above 0.", where="fit")
    if output_dir is not None:
        if not callable(getattr(model, "save_adapter", None)):
            raise DataError(
                f"`output_dir` needs a model with `save_adapter`, which {type(model).__name__} has not.",
                where="fit",
                do="Optimize the model with a `lora` pass, or save it yourself.",
            )
        try:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"The folder could not be made: {error.strerror or error}.", where=str(output_dir)
            ) from error


def _to(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_to(value, device) for value in batch)
    return batch
