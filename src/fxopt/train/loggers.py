"""Loggers of other programs behind the four methods of `fxopt.train.journal.Logger`. Each takes the object that its program made, so
nothing of them is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoard:
    """TensorBoard event files.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log_metrics(self, row: Mapping[str, float], step: int) -> None:
        """Each value as a scalar."""
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)

    def log_hparams(self, values: Mapping[str, Any]) -> None:
        """As text."""
        self.writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in values.items()))

    def log_artifact(self, path: Path) -> None:
        """Nothing: TensorBoard holds no files."""

    def finish(self) -> None:
        """Close the file."""
        self.writer.close()


class WandB:
    """Weights & Biases.

    Args:
        run: what `wandb.init(...)` gave; with `mode="offline"` it writes to the disk alone.
    """

    def __init__(self, run: Any) -> None:
        self.run = run

    def log_metrics(self, row: Mapping[str, float], step: int) -> None:
        """One row."""
        self.run.log(dict(row), step=step)

    def log_hparams(self, values: Mapping[str, Any]) -> None:
        """The run's configuration."""
        self.run.config.update(dict(values), allow_val_change=True)

    def log_artifact(self, path: Path) -> None:
        """Files; not checkpoints, which stay where they are."""
        if path.is_file():
            self.run.save(str(path), base_path=str(path.parent))

    def finish(self) -> None:
        """End the run."""
        self.run.finish()


class MLflow:
    """MLflow tracking.

    Args:
        client: an `mlflow.MlflowClient`. experiment: its name; made if there is none.
    """

    def __init__(self, client: Any, experiment: str) -> None:
        self.client = client
        found = client.get_experiment_by_name(experiment)
        self.run = client.create_run(client.create_experiment(experiment) if found is None else found.experiment_id).info.run_id

    def log_metrics(self, row: Mapping[str, float], step: int) -> None:
        """Each value."""
        for name, value in row.items():
            self.client.log_metric(self.run, name, value, step=step)

    def log_hparams(self, values: Mapping[str, Any]) -> None:
        """Each setting, as text of up to 500 characters, which is MLflow's limit."""
        for name, value in values.items():
            self.client.log_param(self.run, name, str(value)[:500])

    def log_artifact(self, path: Path) -> None:
        """Files; not checkpoints."""
        if path.is_file():
            self.client.log_artifact(self.run, str(path))

    def finish(self) -> None:
        """End the run."""
        self.client.set_terminated(self.run)
