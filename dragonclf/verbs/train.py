"""`train`: a snapshot becomes a model bundle, by data-parallel workers of Ray Train.

OUT/NAME/args.json        the options, resolved; the same command resumes, another one is refused
         checkpoints/     latest.pt, to go on from; best.pt, the weights of the best epoch
         results.csv      one row an epoch
         model/           the bundle, at the end
OUT/features/...          features of frozen backbones, shared by the runs under OUT (`train/features.py`)
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.exceptions
import ray.train
import ray.train.torch
from pydantic import BaseModel, Field

from dragonclf import session, storage, tracking
from dragonclf.config import RayConfig, ReadingConfig, TrainConfig
from dragonclf.data.augment import Augment
from dragonclf.data.snapshot import Snapshot, open_snapshot, read_rows
from dragonclf.engine.inference import Views
from dragonclf.model import bundle, canaries, zoo
from dragonclf.model.execution import resolve_execution
from dragonclf.train import checkpoint, features, head, thresholds, worker
from dragonclf.train.recipe import Recipe

log = logging.getLogger("dragonclf")

MAX_CPUS_PER_WORKER = 8
# A step on a CPU asks for gigabytes and gives them back. glibc would return them to the kernel each time, and zero and map them again at
# the next: for tf_efficientnet_lite0 that is 60 % of the step. So it keeps them, in one arena.
# Threads of a step that wait for each other sleep: by default they spin, and keep the cores from those that decode.
ON_CPUS = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "OMP_WAIT_POLICY": "PASSIVE",
}  # fmt: skip
POLL_S = 1.0
NO_MEMORY = "due to the node running low on memory"  # Ray's words
RESIZE_POLL_S = 30.0  # each resizing starts the workers anew
# How often Ray Train asks its workers how they fare, for which each waits at an epoch's end. Its own 2 s are longer than an epoch on
# features takes; so one worker is asked each tenth of a second where they are few.
WORKER_POLL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
WORKER_POLL_S, MOST_WORKER_POLL_S = 0.1, 2.0
# A process more, seconds to start, that looks out for nodes which a cluster takes away.
PREEMPTION_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
# Options that change where, how fast or whether a run gets done, and not what it comes to.
_NOT_RESULTS = {
    "batch_size",
    "cache",
    "cache_dir",
    "num_workers",
    "checkpoint_every",
    "max_failures",
    "min_workers",
    "mlflow_uri",
    "log_model",
    "out",
    "name",
    *RayConfig.model_fields,
    *ReadingConfig.model_fields,
}


class TrainSummary(BaseModel):
    """What a training run came to."""

    run: str = Field(description="URI of the run's folder.")
    model: str = Field(description="URI of the bundle.")
    model_version: str
    snapshot: str
    classes: list[str]
    metrics: dict[str, float] = Field(description="Of the epoch whose weights the model has.")


def train(config: TrainConfig) -> TrainSummary:
    """Fine-tune `config.arch` on a snapshot and write a bundle. The same command resumes a killed run from its last checkpoint.

    A finished run is returned as it is. Raises ValueError for options that do not fit the data, the weights or an earlier run of the
    same name, and StorageError.
    """
    snapshot = open_snapshot(config.data)
    execution = resolve_execution(config.runtime, config.device, "f32", has_gpu=session.has_gpu(config.address))
    source = zoo.resolve_pretrained(config.arch, config.pretrained)
    backbone = zoo.load_pretrained(config.arch, source, _regularization(config))
    args = config.model_dump(exclude=_NOT_RESULTS) | {"snapshot": snapshot.info.id, "pretrained": source}
    name = config.name or f"{config.arch}-{hashlib.sha256(json.dumps(args, sort_keys=True).encode()).hexdigest()[:8]}"
    run_uri = storage.join(config.out, name)
    if not storage.put_if_absent(
        storage.join(run_uri, "args.json"),
        json.dumps(args, indent=2, sort_keys=True).encode(),
        atomic=not config.at_least_once,
    ):
        raise ValueError(f"the run at {run_uri} was started with other options: choose another --name")
    model_uri = storage.join(run_uri, "model")
    if storage.stat(storage.join(model_uri, bundle.INFO)):
        log.info("train: nothing to do: the run at %s is finished", run_uri)
        return _finish(config, run_uri, bundle.load_bundle(model_uri), snapshot)
    log.info("train: %s with weights from %s on snapshot %s, run %s", config.arch, source, snapshot.info.id, run_uri)
    transform = zoo.transform_for(backbone, size=config.size, crop_pct=config.crop_pct)
    digest = zoo.backbone_digest(backbone)
    with session.connect(config.address):
        features_uri, views_uri = _compute_features(
            config, snapshot, execution=execution, pretrained=source, digest=digest, transform=transform
        )
        job = worker.TrainJob(
            run_uri=run_uri,
            snapshot=snapshot,
            features_uri=features_uri,
            views_uri=views_uri,
            arch=config.arch,
            pretrained=source,
            backbone_digest=digest,
            transform=transform,
            recipe=recipe(config),
            regularization=_regularization(config),
            find_lr=config.lr == "auto",
            num_threads=_cpus_per_worker(config),
            cache=config.cache,
            cache_dir=config.cache_dir,
        )
        with _followed(config, job.recipe, run_uri, name, args):
            _run_workers(config, job)
    return _finish(config, run_uri, _save_bundle(config, job, args), snapshot)


def _compute_features(config: TrainConfig, snapshot: Snapshot, **how: Any) -> tuple[str | None, str | None]:
    """Runs of the features of the images, and of their augmented views; None for what is not asked for."""
    if not config.precompute:
        return None, None
    own = features.compute(config, snapshot, **how)
    if not config.views:
        return own, None
    views = Views(count=config.views, seed=config.seed, augment=recipe(config).augment)
    return own, features.compute(config, snapshot, views=views, **how)


def recipe(config: TrainConfig) -> Recipe:
    """What the options come to for the loop."""
    given = config.model_dump(include=set(Recipe.model_fields))
    given["augment"] = config.model_dump(include=set(Augment.model_fields))
    given["lr"] = 1.0 if config.lr == "auto" else config.lr  # auto: the workers find it
    return Recipe.model_validate(given | ({"freeze_epochs": 0} if config.precompute else {}))


def _regularization(config: TrainConfig) -> dict[str, float]:
    return {"drop_rate": config.drop, "drop_path_rate": config.drop_path}


def _cpus_per_worker(config: TrainConfig) -> int:
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if config.address == session.LOCAL and config.num_workers > cpus:
        raise ValueError(
            f"{config.num_workers} workers do not fit this machine's {cpus} CPUs: lower --num-workers, or join a cluster"
        )
    return max(1, min(MAX_CPUS_PER_WORKER, cpus // config.num_workers))


def _run_workers(config: TrainConfig, job: worker.TrainJob) -> None:
    use_gpu = session.has_gpu(config.address) and config.device != "cpu"
    if config.batch_norm == "sync" and not use_gpu:
        raise ValueError("--batch-norm sync needs GPUs, as torch's SyncBatchNorm does: use train or frozen")
    with tempfile.TemporaryDirectory(prefix="dragonclf-train-") as folder:
        trainer = _Trainer(
            worker.train_worker,
            train_loop_config={"job": job.model_dump_json()},
            scaling_config=ray.train.ScalingConfig(
                num_workers=(config.min_workers, config.num_workers) if config.min_workers else config.num_workers,
                use_gpu=use_gpu,
                elastic_resize_monitor_interval_s=RESIZE_POLL_S,
                resources_per_worker={"CPU": job.num_threads} | ({"GPU": 1} if use_gpu else {}),
            ),
            # Ray Train keeps nothing that matters: checkpoints are our own. A name of its own each time, since it resumes by name.
            run_config=ray.train.RunConfig(
                name=f"dragonclf-{uuid.uuid4().hex}",
                storage_path=folder,
                failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
                worker_runtime_env={"env_vars": {} if use_gpu else ON_CPUS},
            ),
        )
        try:
            with _settings_of_ray_train(config):
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _cause(error) from error


@contextlib.contextmanager
def _settings_of_ray_train(config: TrainConfig) -> Iterator[None]:
    """Those that it reads from the environment, unless they are there."""
    ours = {WORKER_POLL: str(min(MOST_WORKER_POLL_S, WORKER_POLL_S * config.num_workers))}
    if config.address == session.LOCAL:
        ours[PREEMPTION_WATCHER] = "0"
    ours = {name: value for name, value in ours.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


class _Trainer(ray.train.torch.TorchTrainer):
    """Leaves Ctrl-C to us: Ray's own handler ends the process with 0 or 1 and no word, and stays when training is over."""

    def _register_sigint_handler(self, controller: object) -> None:
        pass


def _cause(error: BaseException) -> Exception:
    """The error of a worker as what it was there, if a user can act on it."""
    text = str(error)
    for kind, name in ((ValueError, "ValueError: "), (storage.StorageError, "Error: ")):
        lines = [line for line in text.splitlines() if name in line]
        if lines:
            return kind(lines[-1].rpartition(name)[2])
    if NO_MEMORY in text:
        return storage.StorageError(
            "training failed: a machine ran out of memory, and Ray ended its workers: end what else takes memory there, and the same "
            "command resumes; or begin another run with a larger --accumulate or a smaller --global-batch-size"
        )
    return storage.StorageError(
        f"training failed: {(text.strip().splitlines() or ['no reason given'])[-1]}; the same command resumes"
    )


@contextlib.contextmanager
def _followed(config: TrainConfig, recipe: Recipe, run_uri: str, name: str, args: dict[str, Any]) -> Iterator[None]:
    """Say each epoch's metrics as they appear in results.csv, and send them and those of steps to MLflow."""
    with tracking.run(config.mlflow_uri, run_uri, name, args) as log_metrics:
        seen, stop = len(checkpoint.read_results(run_uri)), threading.Event()

        def follow() -> None:
            nonlocal seen
            for row in checkpoint.read_results(run_uri)[seen:]:
                seen += 1
                steps = [step for step in checkpoint.read_results(run_uri, checkpoint.STEPS) if step["epoch"] == seen]
                log_metrics([(int(step["step"]), {"step_loss": step["loss"], "step_lr": step["lr"]}) for step in steps])
                log_metrics([(seen, {key: value for key, value in row.items() if key != "epoch"})])
                log.info(
                    "epoch %d of %d%s: train loss %.4f, valid loss %.4f, valid accuracy %.4f, %.0f%% of the time waiting for data",
                    row["epoch"], recipe.total_epochs, " (head)" if recipe.frozen(int(row["epoch"]) - 1) else "", row["train_loss"],
                    row["valid_loss"], row["valid_accuracy"], 100 * row["waited"],
                )  # fmt: skip

        def poll() -> None:
            while not stop.wait(POLL_S):
                follow()

        poller = threading.Thread(target=poll, daemon=True, name="follow")
        poller.start()
        try:
            yield
        finally:
            stop.set()
            poller.join()
        follow()


def _save_bundle(config: TrainConfig, job: worker.TrainJob, args: dict[str, Any]) -> bundle.Bundle:
    """Put the weights of the epoch that `config.weights` chooses into the architecture and write the bundle."""
    state = checkpoint.load(job.run_uri, checkpoint.BEST if config.weights == "best" else checkpoint.LATEST)
    assert state is not None
    model = worker.load_backbone(job)
    weights = checkpoint.weights_of(state)
    if job.features_uri is None:
        prefix = "model."
        model.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    else:
        weight, bias = head.folded(weights)
        zoo.classifier(model).load_state_dict({"weight": weight, "bias": bias})
    chosen = state["history"][-1]
    temperature = chosen["temperature"] if config.calibrate else 1.0
    classifier = zoo.classifier(model)
    classifier.load_state_dict({name: tensor / temperature for name, tensor in classifier.state_dict().items()})
    figures = {key: chosen[key] for key in ("train_loss", "valid_loss", "valid_accuracy", "valid_ece")}
    if config.calibrate:
        figures["valid_ece_calibrated"] = chosen["valid_ece_calibrated"]
        log.info(
            "calibrated: temperature %.3f, expected calibration error on the validation images %.4f before, %.4f after",
            temperature, chosen["valid_ece"], chosen["valid_ece_calibrated"],
        )  # fmt: skip
    chosen_thresholds = _thresholds(state["thresholds"], job)
    if chosen_thresholds:
        figures["valid_coverage"] = chosen["valid_coverage"]
    encoded = canaries.synthetic() if config.synthetic_canaries else _validation_images(job.snapshot)
    return bundle.save_bundle(
        storage.join(job.run_uri, "model"), model, arch=config.arch, classes=job.snapshot.info.classes, transform=job.transform,
        canaries=encoded, pretrained=job.pretrained, snapshot=job.snapshot.uri, config=args,
        temperature=temperature, thresholds=chosen_thresholds, metrics=figures, atomic=not config.at_least_once,
    )  # fmt: skip


def _thresholds(choices: list[thresholds.Choice], job: worker.TrainJob) -> dict[str, float]:
    """Thresholds by class, none if none were asked for, and the log what they come to."""
    if not choices:
        return {}
    classes = job.snapshot.info.classes
    log.info("thresholds: labels of %.2f%% of the validation images are accepted", 100 * thresholds.coverage(choices))
    short = thresholds.short_of(choices, classes, job.recipe)
    if short:
        log.warning("thresholds: %s", short)
    return {name: choice["threshold"] for name, choice in zip(classes, choices, strict=True)}


def _validation_images(snapshot: Snapshot) -> list[bytes]:
    """Up to four, spread over the validation split."""
    uris: list[str] = pa.concat_tables(read_rows(snapshot, splits=["valid"], columns=["uri"]))["uri"].to_pylist()
    step = max(1, len(uris) // canaries.COUNT)
    return [storage.get(uri) for uri in uris[::step][: canaries.COUNT]]


def _finish(config: TrainConfig, run_uri: str, made: bundle.Bundle, snapshot: Snapshot) -> TrainSummary:
    if config.log_model and not tracking.has_model(run_uri):
        from dragonclf.verbs import pyfunc  # with MLflow: seconds

        with tempfile.TemporaryDirectory(prefix="dragonclf-model-") as temporary:
            folder = Path(temporary, pyfunc.BUNDLE)
            storage.download_all(made.uri, folder)
            tracking.log_model(
                config.mlflow_uri, run_uri, code=Path(pyfunc.__file__), folder=folder, signature=pyfunc.signature(made.info)
            )  # fmt: skip
    return TrainSummary(
        run=run_uri, model=made.uri, model_version=made.version, snapshot=snapshot.uri, classes=made.info.classes, metrics=made.info.metrics
    )  # fmt: skip
