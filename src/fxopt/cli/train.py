"""`fxopt train`: a run from a file."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import Any

from fxopt.cli.models import UsageError, model_and_inputs
from fxopt.errors import DataError


def add(commands: Any) -> None:
    """The command's arguments."""
    train = commands.add_parser("train", help="train a model as a YAML file says", description="Train a model as a YAML file says. `fxopt train config.yaml --print-config` shows all settings.")
    train.add_argument("config", help="the file: model, passes, data, trainer, resume, processes")
    train.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="settings that win over the file, such as trainer.lr=1e-4")
    train.add_argument("--print-config", action="store_true", help="print the whole configuration, defaults included, and stop")
    train.add_argument("--resume", action="store_true", help="go on with the newest checkpoint, if there is one")
    train.add_argument("--tune", action="store_true", help="first find batch size, learning rate and number of workers by trial runs, and train with them")
    train.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> str:
    from fxopt.train import config as configs
    from fxopt.train.launcher import launch
    from fxopt.train.strategies.environment import place
    from fxopt.train.summary import summary

    try:
        config = configs.load(arguments.config, arguments.overrides)
    except DataError as error:
        raise UsageError(error.what, where=error.where, do=error.do) from error
    if arguments.print_config:
        return configs.text(config)
    if arguments.tune and (arguments.resume or config.resume or config.processes != 1):
        raise UsageError("--tune is for a run of one process that begins anew", do="leave out --resume and `processes`, or tune first and write what it finds into the file")
    found = place()
    if config.processes != 1 and found is None:
        again = [sys.executable, "-m", "fxopt", "train", arguments.config, *arguments.overrides, *(["--resume"] if arguments.resume else [])]
        if code := launch(again, config.processes):
            sys.exit(code)
        return ""
    if config.data.path is not None:
        train, val, dataset = config.data.loaders(config.model, config.trainer)
        print(dataset.text, file=sys.stderr)
        model, args, kwargs = model_and_inputs(config.model, [])[0], (), next(iter(train))
    else:
        model, args, kwargs = model_and_inputs(config.model, None)
        train, val = _made(config.data.train), _made(config.data.val) if config.data.val is not None else None
    if config.passes != "none":
        from fxopt.api import optimize

        model = optimize(model.train(), config.passes, inputs=kwargs if kwargs and not args else args)
    config.trainer.loggers = [_logger(entry, config.trainer.output_dir) for entry in config.trainer.loggers]
    trainer = config.trainer
    if arguments.tune:
        tuned = trainer.tune(model, train)
        print(tuned, file=sys.stderr)
        trainer = tuned.trainer
    result = trainer.fit(model, train, val, resume=(config.resume or arguments.resume) and config.trainer.output_dir is not None)
    if found is not None and found.rank:
        return ""  # rank 0 says it
    lines = [summary(model, measured=result.peak_memory), "", f"steps {result.first_step + len(result.steps)}, epochs {result.epochs}" + (f"; {result.why}" if result.why else "")]
    lines += [f"{name} {value:.6g}" for name, value in result.metrics.items() if name in ("loss", "val_loss") or name.startswith("val_")]
    lines += [f"{what}: {path}" for what, path in (("adapter", result.adapter), ("checkpoint", result.checkpoint), ("best", result.best)) if path is not None]
    return "\n".join(lines) + "\n"


def _made(name: str) -> Any:
    """What `package.module:function` gives."""
    module, _, attribute = name.partition(":")
    if not attribute:
        raise UsageError(f"{name!r} names no data", where="data", do="write package.module:function")
    sys.path.insert(0, os.getcwd())  # a console script does not look there by itself
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(f"there is no module {error.name!r}", where=name, do="run the command where Python can import it") from error
    if not hasattr(found, attribute):
        raise UsageError(f"{module} has no {attribute!r}", where=name)
    made = getattr(found, attribute)
    if not callable(made):
        raise UsageError(f"{name} is a {type(made).__name__}", where="data", do="name a function that gives the data")
    return made()


def _logger(entry: Any, folder: Any) -> Any:
    """A logger from `kind: TensorBoard | WandB | MLflow` and its settings."""
    from fxopt.train import loggers

    kind = entry.get("kind") if isinstance(entry, dict) else entry
    settings = {name: value for name, value in entry.items() if name != "kind"} if isinstance(entry, dict) else {}
    package = {"TensorBoard": "tensorboard", "WandB": "wandb", "MLflow": "mlflow"}.get(kind)
    if package is None:
        raise UsageError(f"there is no logger {kind!r}", where="trainer.loggers", do="write kind: TensorBoard, WandB or MLflow")
    try:
        if kind == "TensorBoard":
            from torch.utils.tensorboard import SummaryWriter

            return loggers.TensorBoard(SummaryWriter(**({"log_dir": str(folder)} | settings)))
        if kind == "WandB":
            return loggers.WandB(importlib.import_module("wandb").init(**({"mode": "offline", "dir": folder} | settings)))
        client = importlib.import_module("mlflow").MlflowClient(tracking_uri=settings.pop("uri", None))
        return loggers.MLflow(client, settings.pop("experiment", "fxopt"))
    except ImportError as error:
        raise UsageError(f"the package {package} is not installed", where="trainer.loggers", do=f"pip install {package}, or leave the logger out") from error
