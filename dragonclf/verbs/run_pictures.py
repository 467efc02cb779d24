"""What a person looks at: the images before training, the curves and the report in the run's folder after it."""

import functools
import os
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
from matplotlib.figure import Figure

from dragonclf import storage
from dragonclf.config import EvaluateConfig, ExecutionConfig, RayConfig, TrainConfig
from dragonclf.data.snapshot import Snapshot, open_snapshot, read_rows, slice_columns
from dragonclf.engine import published
from dragonclf.engine.layout import ALWAYS, Layout
from dragonclf.evaluate.galleries import image_bytes
from dragonclf.evaluate.training import Sweep, Training
from dragonclf.model import bundle, zoo
from dragonclf.model.predictor import Head, softmax
from dragonclf.train import checkpoint, lr_find, pictures
from dragonclf.train.data import Images
from dragonclf.train.order import Order
from dragonclf.verbs.evaluate import frame_of, predict_split, told_run, write_report
from dragonclf.verbs.train_workers import recipe

EVALUATION, MATRIX, REPORT = "evaluation", "confusion_matrix.png", "report.html"
# Options of `train` that its evaluation has too.
SHARED = {*RayConfig.model_fields, *ExecutionConfig.model_fields, "at_least_once", "max_actor_bytes"}


def complete(
    config: TrainConfig, run_uri: str, model: bundle.Bundle, snapshot: Snapshot, *, features_uri: str | None
) -> list[str]:
    """Make results.png, lr_find.png of a sweep and, with `config.report`, confusion_matrix.png and report.html, as far as they are missing.

    Returns the names of what is new: these, and the pictures made while it trained. The report is what `evaluate` writes under
    RUN/evaluation, made of the run of features at `features_uri` if there is one: then no image is read but those that are shown. It names
    the images that cannot be read, and is made however many.
    """
    new: list[str] = []
    results = storage.join(run_uri, pictures.RESULTS)
    if not storage.stat(results):
        storage.put(results, image_bytes(results_figure(run_uri)))
        draw_sweep(run_uri)
        earlier = (pictures.BATCH, pictures.SWEEP)
        new += [pictures.RESULTS, *(name for name in earlier if storage.stat(storage.join(run_uri, name)))]
    if not config.report or storage.stat(storage.join(run_uri, REPORT)):
        return new
    out = storage.join(run_uri, EVALUATION)
    what = {"model": model.uri, "data": snapshot.uri, "out": out, "max_error_rate": 1}
    evaluation = EvaluateConfig.model_validate(config.model_dump(include=SHARED) | what)
    if features_uri is None:
        summary, frame = predict_split(evaluation, model, snapshot)
        run_by = told_run(summary)
    else:
        frame = predict_features(features_uri, model, snapshot, split=evaluation.split)
        run_by = "the head, on the features that it was trained on"
    write_report(frame, evaluation, model, snapshot, run_by=run_by, training=training_of(run_uri))
    for name in (MATRIX, REPORT):
        storage.put(storage.join(run_uri, name), storage.get(storage.join(out, name)))
    return [*new, MATRIX, REPORT]


def draw_sweep(run_uri: str) -> None:
    """lr_find.png of a run that swept the learning rate."""
    if storage.stat(storage.join(run_uri, lr_find.FOUND)):
        storage.put(storage.join(run_uri, pictures.SWEEP), image_bytes(pictures.plot_sweep(lr_find.kept(run_uri))))


def results_figure(run_uri: str) -> Figure:
    """The curves of a run that trained for an epoch or more."""
    rows, curve = (checkpoint.read_results(run_uri, name) for name in (checkpoint.RESULTS, checkpoint.STEPS))
    return pictures.plot_results(rows, curve)


def training_of(run_uri: str) -> Training:
    """What such a run wrote down, for its report."""
    rows, curve = (checkpoint.read_results(run_uri, name) for name in (checkpoint.RESULTS, checkpoint.STEPS))
    sweep = None
    if storage.stat(storage.join(run_uri, lr_find.FOUND)):
        found = lr_find.kept(run_uri)
        sweep = Sweep(found.lrs, found.losses, found.smoothed, {"valley": found.valley, "steep": found.steep})
    return Training(rows, curve, sweep)


def predict_features(features_uri: str, model: bundle.Bundle, snapshot: Snapshot, *, split: str) -> pd.DataFrame:
    """The rows that `predict_split` gives, within rounding: of features that were computed, and of what cannot be read."""
    head, classes = Head(model.model), model.info.classes
    facts: list[pd.DataFrame] = []

    def tables() -> Iterator[pa.Table]:
        for table in published.read_parts(features_uri):
            rows = table.filter(pc.field("split") == split)
            features = rows["features"].combine_chunks().flatten().to_numpy().reshape(-1, head.num_features)
            none = np.zeros(len(rows), bool)
            answers = Layout().answers(classes, softmax(head(features)), none, thresholds=model.info.thresholds)
            yield pa.table({name: rows[name] for name in ALWAYS} | answers | {"input_label": rows["label"]})
        for table in read_rows(snapshot, splits=[split], usable_only=False):
            rows = table.filter(pc.field("status") != "ok")
            yield pa.table({name: rows[name] for name in ALWAYS} | {"input_label": rows["label"]})
            facts.append(table.select(["uri", "width", "height", *slice_columns(table.column_names)]).to_pandas())

    frame = frame_of(tables(), classes)
    taken = {*frame.columns} - {"uri"}
    known = pd.concat(facts).rename(columns=lambda name: f"input_{name}" if name in taken else name)
    return frame.merge(known, on="uri", how="left", validate="one_to_one")


def first_images(config: TrainConfig, count: int) -> tuple[torch.Tensor, list[str]]:
    """Images of the first step as the network sees them, uint8 (N, 3, S, S), and their labels; N is `count` or the batch, if less.

    They are varied with no-precompute. Raises as `train` does.
    """
    snapshot = open_snapshot(config.data)
    backbone = zoo.load_pretrained(config.arch, zoo.resolve_pretrained(config.arch, config.pretrained))
    transform = zoo.transform_for(backbone, size=config.size, crop_pct=config.crop_pct)
    made = recipe(config)
    samples = Images.of_split(
        snapshot, "train", transform, num_threads=os.cpu_count() or 1, seed=None if config.precompute else made.seed, augment=made.augment,
        size_at=functools.partial(made.size_at, size=transform.size),
    )  # fmt: skip
    first = Order(len(samples), made.global_batch_size, made.seed).batches(0, rank=0, world_size=1)[0]
    pixels, targets = next(samples.batches([first[:count]], epoch=0))
    return pixels, [snapshot.info.classes[target] for target in targets.tolist()]
