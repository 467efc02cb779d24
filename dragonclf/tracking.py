"""MLflow: where runs and their metrics are looked up later. Embedded (SQLite) by default, a server by URI."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

from dragonclf import storage

EXPERIMENT = "dragonclf"
RUN_ID = "mlflow_run_id"


@contextlib.contextmanager
def run(
    uri: str | None, run_uri: str, name: str, params: dict[str, Any]
) -> Iterator[Callable[[dict[str, float]], None]]:
    """Open the MLflow run of a training run, the same one when that is resumed; yield a function that logs an epoch's metrics.

    ValueError if the tracking server or database cannot be used.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow  # half a second; only training needs it
    import mlflow.exceptions

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    known = storage.get_if_exists(storage.join(run_uri, RUN_ID))
    try:
        mlflow.set_tracking_uri(uri)
        experiment = mlflow.set_experiment(EXPERIMENT)
        active = mlflow.start_run(
            run_id=known[0].decode() if known else None,
            experiment_id=None if known else experiment.experiment_id,
            run_name=name,
            tags={"dragonclf.run": run_uri},
        )
    except (mlflow.exceptions.MlflowException, OSError) as error:
        raise ValueError(
            f"MLflow cannot be used at {uri}: {str(error).splitlines()[0]}: give another --mlflow-uri"
        ) from error
    if not known:
        storage.put(storage.join(run_uri, RUN_ID), active.info.run_id.encode())
        mlflow.log_params(params)

    def log_metrics(row: dict[str, float]) -> None:
        mlflow.log_metrics({key: value for key, value in row.items() if key != "epoch"}, step=int(row["epoch"]))

    with active:
        yield log_metrics
