"""`train`: a snapshot becomes a model bundle, by data-parallel workers of Ray Train.

OUT/NAME/args.toml        the options, resolved, as a recipe; the same command resumes, another one is refused
         lr_find.json     the sweep, with --lr auto; drawn in lr_find.png at the end
         train_batch0.jpg images of the first step as the network sees them, with --no-precompute
         checkpoints/     latest.pt, to go on from; best.pt, the weights of the best epoch
         results.csv      one row an epoch, and steps.csv, of their steps; drawn in results.png at the end
         model/           the bundle, at the end
         report.html, confusion_matrix.png   last, of the validation images; evaluation/ has what they were made from
OUT/features/...          features of frozen backbones, shared by the runs under OUT (`train/features.py`)
"""

import contextlib
import hashlib
import json
import logging
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, Field
from torch import nn

from dragonclf import session, storage, tracking
from dragonclf.config import RayConfig, ReadingConfig, TrainConfig, recipes
from dragonclf.data.snapshot import Snapshot, open_snapshot, read_rows
from dragonclf.engine.inference import Views
from dragonclf.model import bundle, canaries, zoo
from dragonclf.model.execution import Execution, resolve_execution
from dragonclf.train import checkpoint, features, head, lr_find, thresholds, worker
from dragonclf.train.recipe import Recipe, layers_from
from dragonclf.verbs import run_pictures
from dragonclf.verbs.train_workers import cpus_per_worker, recipe, regularization, run_workers

log = logging.getLogger("dragonclf")

ARGS, SWEEPS = "args.toml", "lr_find"
POLL_S = 1.0
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
    "report",
    "recipe",
    "out",
    "name",
    *RayConfig.model_fields,
    *ReadingConfig.model_fields,
}


class TrainSummary(BaseModel):
    """What a training run came to."""

    run: str = Field(description="URI of the run's folder.")
    model: str = Field(description="URI of the bundle.")
    report: str | None = Field(description="URI of the report on the validation images. None: --no-report.")
    model_version: str
    snapshot: str
    classes: list[str]
    metrics: dict[str, float] = Field(description="Of the epoch whose weights the model has.")


def train(config: TrainConfig) -> TrainSummary:
    """Fine-tune `config.arch` on a snapshot and write a bundle. The same command resumes a killed run from its last checkpoint.

    A finished run is returned as it is. Raises ValueError for options that do not fit the data, the weights or an earlier run of the
    same name, and StorageError.
    """
    run = _open(config, config.out)
    model_uri = storage.join(run.uri, "model")
    if storage.stat(storage.join(model_uri, bundle.INFO)):
        log.info("train: nothing to do: the run at %s is finished", run.uri)
        return _finish(config, run, bundle.load_bundle(model_uri), None)
    _say("train", config, run)
    with session.connect(config.address):
        job = _job(config, run)
        with _followed(config, job.recipe, run.uri, run.name, run.args):
            run_workers(config, job)
        return _finish(config, run, _save_bundle(config, job, run.args), job.features_uri)


def find_lr(config: TrainConfig) -> lr_find.Sweep:
    """Sweep the learning rate as `train` does with lr "auto", and train nothing. The same sweep is made once.

    OUT/lr_find/NAME has it: args.toml, lr_find.json, lr_find.png. Raises what `train` does.
    """
    config = config.model_copy(update={"lr": "auto", "name": None})
    run = _open(config, storage.join(config.out, SWEEPS))
    if not storage.stat(storage.join(run.uri, lr_find.FOUND)):
        _say("lr_find", config, run)
        with session.connect(config.address):
            run_workers(config, _job(config, run, train=False))
        run_pictures.draw_sweep(run.uri)
    return lr_find.kept(run.uri)


@dataclass(frozen=True)
class _Run:
    """A run's folder, and what the options come to."""

    uri: str
    name: str
    args: dict[str, Any]
    snapshot: Snapshot
    execution: Execution  # of the features
    pretrained: str
    backbone: nn.Module


def _say(what: str, config: TrainConfig, run: _Run) -> None:
    log.info(
        "%s: %s with weights from %s on snapshot %s, run %s", what, config.arch, run.pretrained, run.snapshot.info.id, run.uri
    )  # fmt: skip


def _open(config: TrainConfig, out: str) -> _Run:
    """Make the run's folder under `out`, or find it. ValueError if one of that name was started with other options."""
    snapshot = open_snapshot(config.data)
    execution = resolve_execution(config.runtime, config.device, "f32", has_gpu=session.has_gpu(config.address))
    source = zoo.resolve_pretrained(config.arch, config.pretrained)
    backbone = zoo.load_pretrained(config.arch, source, regularization(config))
    args = config.model_dump(exclude=_NOT_RESULTS) | {"snapshot": snapshot.info.id, "pretrained": source}
    name = config.name or f"{config.arch}-{hashlib.sha256(json.dumps(args, sort_keys=True).encode()).hexdigest()[:8]}"
    uri = storage.join(out, name)
    layers_from(backbone, config.freeze_to)  # refuses what is not there
    about = {option: args[option] for option in ("data", "snapshot")}
    kept = recipes.Recipe(about=about, train={option: value for option, value in args.items() if option not in about})
    if not storage.put_if_absent(
        storage.join(uri, ARGS), recipes.as_toml(kept).encode(), atomic=not config.at_least_once
    ):
        raise ValueError(f"the run at {uri} was started with other options: choose another --name")
    return _Run(uri, name, args, snapshot, execution, source, backbone)


def _job(config: TrainConfig, run: _Run, *, train: bool = True) -> worker.TrainJob:
    """What the workers need to know; the features are there then, if they are to be."""
    transform = zoo.transform_for(run.backbone, size=config.size, crop_pct=config.crop_pct)
    digest = zoo.backbone_digest(run.backbone)
    features_uri, views_uri = _compute_features(
        config, run.snapshot, execution=run.execution, pretrained=run.pretrained, digest=digest, transform=transform
    )
    return worker.TrainJob(
        run_uri=run.uri,
        snapshot=run.snapshot,
        features_uri=features_uri,
        views_uri=views_uri,
        arch=config.arch,
        pretrained=run.pretrained,
        backbone_digest=digest,
        transform=transform,
        recipe=recipe(config),
        regularization=regularization(config),
        find_lr=config.lr == "auto",
        train=train,
        num_threads=cpus_per_worker(config),
        cache=config.cache,
        cache_dir=config.cache_dir,
    )


def _compute_features(config: TrainConfig, snapshot: Snapshot, **how: Any) -> tuple[str | None, str | None]:
    """Runs of the features of the images, and of their augmented views; None for what is not asked for."""
    if not config.precompute:
        return None, None
    own = features.compute(config, snapshot, **how)
    if not config.views:
        return own, None
    views = Views(count=config.views, seed=config.seed, augment=recipe(config).augment)
    return own, features.compute(config, snapshot, views=views, **how)


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
    _say_no_better(chosen["valid_accuracy"], job.snapshot)
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


def _say_no_better(accuracy: float, snapshot: Snapshot) -> None:
    """Warn of a model that looks at no image: too high a learning rate ends in one, and nothing else need show it."""
    counts = snapshot.info.splits["valid"]
    name = max(counts, key=lambda name: counts[name])
    share = counts[name] / sum(counts.values())
    if accuracy <= share:
        log.warning(
            "the model is no better than to answer %r always: valid accuracy %.4f, and %.4f of the images are that; a lower --lr, "
            "--clip-grad 1 or, with --no-precompute, --layer-decay 0.9 may help", name, accuracy, share,
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


def _finish(config: TrainConfig, run: _Run, made: bundle.Bundle, features_uri: str | None) -> TrainSummary:
    """Do what a killed run may lack beside its bundle."""
    if config.log_model and not tracking.has_model(run.uri):
        from dragonclf.verbs import pyfunc  # with MLflow: seconds

        with tempfile.TemporaryDirectory(prefix="dragonclf-model-") as temporary:
            folder = Path(temporary, pyfunc.BUNDLE)
            storage.download_all(made.uri, folder)
            tracking.log_model(
                config.mlflow_uri, run.uri, code=Path(pyfunc.__file__), folder=folder, signature=pyfunc.signature(made.info)
            )  # fmt: skip
    shown = run_pictures.complete(config, run.uri, made, run.snapshot, features_uri=features_uri)
    tracking.log_files(config.mlflow_uri, run.uri, shown)
    return TrainSummary(
        run=run.uri, model=made.uri, report=storage.join(run.uri, run_pictures.REPORT) if config.report else None,
        model_version=made.version, snapshot=run.snapshot.uri, classes=made.info.classes, metrics=made.info.metrics
    )  # fmt: skip
