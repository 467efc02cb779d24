"""MLflow: where runs and their metrics are looked up later. Embedded (SQLite) by default, a server by URI."""

import contextlib
import importlib.metadata
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dragonclf import storage

EXPERIMENT = "dragonclf"
RUN_ID, MODEL_ID = "mlflow_run_id", "mlflow_model_id"  # objects in the run's folder
SQLITE = "sqlite:///"
BATCH = 1000  # metrics that MLflow takes in one request
# MLflow reads them when it is imported, here or by verbs/pyfunc.py.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


@contextlib.contextmanager
def run(
    uri: str | None, run_uri: str, name: str, params: dict[str, Any]
) -> Iterator[Callable[[list[tuple[int, dict[str, float]]]], None]]:
    """Open the MLflow run of a training run, the same one when that is resumed; yield a function that logs metrics of steps.

    ValueError if the tracking server or database cannot be used.
    """
    mlflow, uri = _opened(uri)
    known = storage.get_if_exists(storage.join(run_uri, RUN_ID))
    try:
        experiment = mlflow.set_experiment(EXPERIMENT)
        active = mlflow.start_run(
            run_id=known[0].decode() if known else None,
            experiment_id=None if known else experiment.experiment_id,
            run_name=name,
            tags={"dragonclf.run": run_uri},
        )
    except (mlflow.exceptions.MlflowException, OSError) as error:
        raise _unusable(uri, error) from error
    if not known:
        storage.put(storage.join(run_uri, RUN_ID), active.info.run_id.encode())
        mlflow.log_params(params)

    def log_metrics(of_steps: list[tuple[int, dict[str, float]]]) -> None:
        now_ms = int(1000 * time.time())
        metrics = [
            mlflow.entities.Metric(key, value, now_ms, step) for step, row in of_steps for key, value in row.items()
        ]
        client = mlflow.MlflowClient()
        for first in range(0, len(metrics), BATCH):
            # By its id: MLflow's open run is the thread's own, and in any other thread this would open a second one.
            client.log_batch(active.info.run_id, metrics[first : first + BATCH])

    with active:
        yield log_metrics


def has_model(run_uri: str) -> bool:
    """Whether `log_model` has kept the run's model."""
    return storage.stat(storage.join(run_uri, MODEL_ID)) is not None


def log_model(uri: str | None, run_uri: str, *, code: Path, folder: Path, signature: Any) -> None:
    """Keep the bundle in `folder` with a training run, as a model that the Python file `code` defines.

    ValueError if the tracking server or database does not take it.
    """
    import mlflow.pyfunc  # seconds more; only here needed

    mlflow, uri = _opened(uri)
    package = f"dragonclf=={importlib.metadata.version('dragonclf')}"
    try:
        with mlflow.start_run(run_id=storage.get(storage.join(run_uri, RUN_ID)).decode()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no example of an input; the signature says it
            made = mlflow.pyfunc.log_model(
                name="model", python_model=str(code), artifacts={folder.name: str(folder)}, signature=signature, pip_requirements=[package]
            )  # fmt: skip
    except (mlflow.exceptions.MlflowException, OSError) as error:
        raise _unusable(uri, error) from error
    storage.put(storage.join(run_uri, MODEL_ID), str(made.model_id).encode())


def log_files(uri: str | None, run_uri: str, names: list[str]) -> None:
    """Put objects of a training run's folder into its record, as artifacts.

    ValueError if the tracking server or database does not take them.
    """
    if not names:
        return
    mlflow, uri = _opened(uri)
    run_id = storage.get(storage.join(run_uri, RUN_ID)).decode()
    with tempfile.TemporaryDirectory(prefix="dragonclf-files-") as folder:
        try:
            for name in names:
                path = Path(folder, name)
                path.write_bytes(storage.get(storage.join(run_uri, name)))
                mlflow.MlflowClient().log_artifact(run_id, str(path))
        except (mlflow.exceptions.MlflowException, OSError) as error:
            raise _unusable(uri, error) from error


def _opened(uri: str | None) -> tuple[Any, str]:
    """MLflow at `uri` or its default, with our experiment; and that URI."""
    import mlflow  # half a second; only training needs it
    import mlflow.exceptions

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    try:
        mlflow.set_tracking_uri(uri)
        if uri.startswith(SQLITE) and mlflow.get_experiment_by_name(EXPERIMENT) is None:
            # Beside the database; MLflow's own place for models is the folder that the command happens to run in.
            models = Path(uri.removeprefix(SQLITE)).absolute().parent / "mlflow-models"
            with contextlib.suppress(
                mlflow.exceptions.MlflowException
            ):  # another run was faster, or the next call says why
                mlflow.create_experiment(EXPERIMENT, artifact_location=models.as_uri())
    except (mlflow.exceptions.MlflowException, OSError) as error:
        raise _unusable(uri, error) from error
    return mlflow, uri


def _unusable(uri: str, error: Exception) -> ValueError:
    return ValueError(f"MLflow cannot be used at {uri}: {str(error).splitlines()[0]}: give another --mlflow-uri")
