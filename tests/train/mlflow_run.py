"""A run logged by MLflow into a folder, and read back with its own client. Run by `test_loggers.py`: `python -m tests.train.mlflow_run FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlflow

from fxopt.train.loggers import MLflow
from tests.train.small import run


def main(folder: Path) -> None:
    """Prints the losses, and then those that the store holds."""
    uri = (folder / "store").as_uri()
    logger = MLflow(mlflow.MlflowClient(tracking_uri=uri), "fxopt")
    result, _ = run(loggers=[logger], output_dir=folder / "run", checkpoints=False)
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("fxopt")
    (held,) = client.search_runs([experiment.experiment_id])
    found = [(metric.step, metric.value) for metric in client.get_metric_history(held.info.run_id, "loss")]
    print(json.dumps({"losses": result.losses, "found": found, "lr": float(held.data.params["lr"]), "status": held.info.status,
                      "artifacts": [artifact.path for artifact in client.list_artifacts(held.info.run_id)]}))


main(Path(sys.argv[1]))
