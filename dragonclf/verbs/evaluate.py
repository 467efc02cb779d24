"""`evaluate`: a bundle's probabilities for a split of a snapshot, its metrics, and a report to look at."""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import BaseModel, Field

from dragonclf import storage
from dragonclf.config import EvaluateConfig
from dragonclf.data.snapshot import Snapshot, open_snapshot, read_rows, slice_columns
from dragonclf.engine import published
from dragonclf.engine.layout import Layout
from dragonclf.evaluate.metrics import counted_rows
from dragonclf.evaluate.page import Origin
from dragonclf.evaluate.report import write_evaluation
from dragonclf.evaluate.training import Training
from dragonclf.model import bundle
from dragonclf.verbs.score import ScoreSummary, score_rows


class EvaluateSummary(BaseModel):
    """What an evaluation came to."""

    report: str = Field(description="URI of report.html.")
    predictions: str = Field(description="URI of predictions.parquet.")
    num_images: int = Field(description="Images that the metrics count: readable, with a label.")
    accuracy: float
    accuracy_interval: tuple[float, float] = Field(description="95 %, Wilson.")
    auroc: float | None
    log_loss: float
    ece: float = Field(description="Expected calibration error, 0 to 1.")
    coverage: float | None = Field(
        description="Share of the images whose label is not below the model's threshold. None: it has none."
    )
    accepted_accuracy: float | None = Field(description="Of these images. None: there is none.")
    counts: dict[str, int] = Field(description="Rows of the split by status.")


def evaluate(config: EvaluateConfig) -> EvaluateSummary:
    """Score a split of a snapshot, compare with its labels, and write metrics, galleries and report.html under `config.out`.

    ValueError if the snapshot has classes that the model does not know, or no labelled image in the split.
    """
    loaded, snapshot = bundle.load_bundle(config.model), open_snapshot(config.data)
    summary, frame = predict_split(config, loaded, snapshot)
    return write_report(frame, config, loaded, snapshot, run_by=told_run(summary))


def write_report(
    frame: pd.DataFrame,
    config: EvaluateConfig,
    loaded: bundle.Bundle,
    snapshot: Snapshot,
    *,
    run_by: str,
    training: Training | None = None,
) -> EvaluateSummary:
    """Write what `evaluate` writes of the predictions `frame`, which `predict_split` or another gave. Raises as `write_evaluation` does.

    `training` is the run that made the model, where the report is a part of it.
    """
    coverage, accuracy = _accepted(frame, loaded.info)
    metrics = write_evaluation(
        frame,
        classes=loaded.info.classes,
        out_uri=config.out,
        title=f"{loaded.info.arch} on {storage.name(snapshot.info.source.removesuffix('/'))}",
        origin=Origin(
            facts={
                "Model": f"{loaded.uri} (version {loaded.version})",
                "Architecture": f"{loaded.info.arch}, weights from {loaded.info.pretrained}",
                "Data": f"{snapshot.info.source}, snapshot {snapshot.info.id}",
                "Split": config.split,
                "Run by": run_by,
                **({} if coverage is None else {"Thresholds": _told(coverage, accuracy)}),
                "Trained on": f"{loaded.info.snapshot}, until {loaded.info.created}",
                "Options of the training": {key: str(value) for key, value in loaded.info.config.items()},
                "Versions": loaded.info.versions,
            },
            splits=snapshot.info.splits,
            temperature=loaded.info.temperature,
            thresholds=loaded.info.thresholds,
            training=training,
        ),
        seed=config.seed,
        per_gallery=config.per_gallery,
    )
    counts = dict(sorted(Counter(frame["status"].tolist()).items()))
    return EvaluateSummary(
        report=storage.join(config.out, "report.html"), predictions=storage.join(config.out, "predictions.parquet"),
        counts=counts, coverage=coverage, accepted_accuracy=accuracy,
        **metrics.model_dump(include={"num_images", "accuracy", "accuracy_interval", "auroc", "log_loss", "ece"}),
    )  # fmt: skip


def predict_split(
    config: EvaluateConfig, loaded: bundle.Bundle, snapshot: Snapshot
) -> tuple[ScoreSummary, pd.DataFrame]:
    """Score one split under `config.out`. The frame has the columns of scoring, with the true class as ``input_label``."""
    unknown = sorted(set(snapshot.info.classes) - set(loaded.info.classes))
    if unknown:
        raise ValueError(
            f"the model at {loaded.uri} does not know class {unknown[0]!r}: it knows {', '.join(loaded.info.classes)}"
        )
    if config.split not in snapshot.info.splits:
        raise ValueError(
            f"snapshot {snapshot.info.id} has no split {config.split!r}: it has {', '.join(snapshot.info.splits)}"
        )

    def rows() -> Iterator[pa.Table]:
        for table in read_rows(snapshot, splits=[config.split], usable_only=False):
            yield table.select(["uri", "etag", "size", "label", *slice_columns(table.column_names)])

    input_id = {"snapshot": snapshot.info.id, "split": config.split}
    summary = score_rows(config, loaded, verb="evaluate", input_id=input_id, rows=rows, layout=Layout())
    return summary, frame_of(published.read_parts(summary.run), loaded.info.classes)


def told_run(summary: ScoreSummary) -> str:
    """How the predictions were made, and how fast if they were made now."""
    rate = "" if summary.images_per_s is None else f", {summary.images_per_s:,.0f} images a second"
    return f"{summary.execution}{rate}"


def frame_of(tables: Iterable[pa.Table], classes: list[str]) -> pd.DataFrame:
    """Scored rows together, null where a table lacks a column; a list column of probabilities becomes one column a class."""
    frame = pa.concat_tables(tables, promote_options="default").to_pandas()
    if "probs" in frame:
        nothing = np.full(len(classes), np.nan)
        probs = np.stack([nothing if value is None else value for value in frame.pop("probs")])
        frame = pd.concat([frame, pd.DataFrame(probs, columns=[f"prob_{name}" for name in classes])], axis=1)
    return frame


def _accepted(frame: pd.DataFrame, info: bundle.BundleInfo) -> tuple[float | None, float | None]:
    """Share of the counted images whose label the model's thresholds accept, and of these the share that is right."""
    rows, _, _ = counted_rows(frame, classes=info.classes)
    if not info.thresholds or rows.empty:
        return None, None
    accepted = rows[~rows["abstain"].astype(bool)]
    is_right = accepted["label"] == accepted["input_label"]
    return len(accepted) / len(rows), float(is_right.mean()) if len(accepted) else None


def _told(coverage: float, accuracy: float | None) -> str:
    right = "" if accuracy is None else f", of which {accuracy:.2%} are right"
    return f"labels of {coverage:.2%} of the images are accepted{right}"
