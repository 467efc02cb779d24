"""`report`: what a published scoring run came to, on one page."""

import json
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa

from dragonclf import storage
from dragonclf.config import ReportConfig
from dragonclf.data import tables
from dragonclf.data.snapshot import SnapshotInfo, open_snapshot
from dragonclf.engine import published
from dragonclf.engine.database import rows_of, temporary_database
from dragonclf.engine.published import Manifest
from dragonclf.evaluate.charts import HISTOGRAM_BINS
from dragonclf.evaluate.drift import confidence_bins, population_stability
from dragonclf.evaluate.galleries import MAX_GALLERY_CLASSES, Gallery
from dragonclf.evaluate.scoring import PAGE, ClassCount, Evidence, Example, ScoringReport, StatusCount, write_page
from dragonclf.model import bundle
from dragonclf.storage import StorageError
from dragonclf.storage.errors import first_line
from dragonclf.verbs.compare import PREDICTIONS
from dragonclf.verbs.run_pictures import EVALUATION

log = logging.getLogger("dragonclf")

COLUMNS = ["uri", "status", "error", "label", "confidence"]
ABSTAIN = "abstain"
EXAMPLES = 5  # of each status
MAX_CHART_CLASSES = 6  # with more, only the histogram of all is drawn


@dataclass(frozen=True)
class _Reference:
    """What the run's model was made from, as far as it can be read; counts by class in the model's order, int64 (K,)."""

    classes: list[str]
    valid_predicted: np.ndarray | None  # validation images by predicted class
    valid_histogram: np.ndarray | None  # and by confidence
    splits: dict[str, np.ndarray]  # labelled images of the snapshot, by split


def report(config: ReportConfig) -> ScoringReport:
    """Write scoring.html of a published run of `score`, `rescore` or `evaluate`; out of core, for any number of rows.

    It lies under `config.out`, by default OUT/reports/RUN: a published run's own folder never changes. An earlier page is replaced.

    Raises:
        ValueError: the run is not published, was changed since, has no labels, or was not scored by `config.model`.
        StorageError: the store does not answer, or the temporary folder is full.
    """
    run_uri = published.find_run(config.run)
    manifest = published.read_manifest(run_uri)
    notes: list[str] = []
    reference = _reference(config.model, run_uri, manifest, notes) if config.model else None
    if reference is None:
        notes.append(
            "drift is not told: --model names the bundle that scored the run, and with it what it was made from"
        )
    out_uri = config.out or storage.join(run_uri.rpartition("/runs/")[0], "reports", storage.name(run_uri))
    part_times = _part_times(run_uri, manifest, notes)
    with temporary_database("report") as (db, _):
        log.info("report: of %s", run_uri)
        has_abstain = _load(db, run_uri, manifest)
        found = _report(db, run_uri, storage.join(out_uri, PAGE), manifest, notes, has_abstain=has_abstain)
        few = found.classes if len(found.classes) <= MAX_CHART_CLASSES else []
        evidence = Evidence(
            facts=_facts(run_uri, manifest, config.model), class_histograms={one.label: _histogram(db, one.label) for one in few},
            valid_histogram=None if reference is None else reference.valid_histogram,
            galleries=_galleries(db, found, per_gallery=config.per_gallery, seed=config.seed), part_times=part_times,
        )  # fmt: skip
    found.images_per_s = _rate(part_times)
    if reference is not None:
        _add_drift(found, reference)
    write_page(found, evidence)
    return found


def _load(db: duckdb.DuckDBPyConnection, run_uri: str, manifest: Manifest) -> bool:
    """Make the table `scored` of the run's rows. Returns whether the run tells where its model abstains."""
    rows = published.open_rows(run_uri, manifest)
    names = rows.schema.names
    if missing := [name for name in COLUMNS if name not in names]:
        raise ValueError(
            f"{run_uri} is a run of `{manifest.verb}` without the column {missing[0]!r}: give a run of `score` whose --columns, if any, "
            "hold label and confidence"
        )
    # The input may have a column of that name, too: it comes later, and the run's own right after the confidence.
    place = names.index("confidence") + 1
    has_abstain = names[place : place + 1] == [ABSTAIN] and pa.types.is_boolean(rows.schema.field(ABSTAIN).type)
    db.execute(
        "CREATE TABLE scored (uri VARCHAR, status VARCHAR, error VARCHAR, label VARCHAR, confidence FLOAT, abstain BOOLEAN)"
    )
    columns = [*COLUMNS, ABSTAIN] if has_abstain else COLUMNS
    try:
        for batch in published.read_batches(rows, columns):
            db.register("batch", pa.Table.from_batches([batch]))
            db.execute("INSERT INTO scored BY NAME SELECT * FROM batch")
            db.unregister("batch")
    except OSError as error:
        raise StorageError(f"cannot read the parts of {run_uri}: {first_line(error)}: run the command again") from error
    return has_abstain


def _report(
    db: duckdb.DuckDBPyConnection, run_uri: str, page: str, manifest: Manifest, notes: list[str], *, has_abstain: bool
) -> ScoringReport:
    statuses = rows_of(
        db, "SELECT status, count(*) AS num_images FROM scored GROUP BY ALL ORDER BY num_images DESC, status"
    )
    classes = rows_of(
        db,
        """SELECT label, count(*) AS num_images, avg(confidence) FILTER (isfinite(confidence)) AS mean_confidence,
                  sum(abstain::INTEGER) AS num_abstained
           FROM scored WHERE label IS NOT NULL GROUP BY label ORDER BY num_images DESC, label""",
    )
    [(mean,)] = db.execute(
        "SELECT avg(confidence) FROM scored WHERE label IS NOT NULL AND isfinite(confidence)"
    ).fetchall()
    num_images, num_labelled = manifest.num_images, sum(row["num_images"] for row in classes)
    examples = rows_of(
        db,
        f"""SELECT status, unnest(min_by({{'uri': uri, 'error': error}}, uri, {EXAMPLES})) AS row FROM scored WHERE status <> 'ok'
            GROUP BY status""",  # noqa: S608  our number
    )
    return ScoringReport(
        page=page, run=run_uri, notes=notes, num_images=num_images, num_labelled=num_labelled,
        num_abstained=sum(row["num_abstained"] for row in classes) if has_abstain else None,
        mean_confidence=mean, images_per_s=None, confidence_histogram=_histogram(db), drift=[],
        statuses=[StatusCount(**row, share=row["num_images"] / num_images) for row in statuses],
        classes=[
            ClassCount(**row, share=row["num_images"] / num_labelled, valid_share=None, train_share=None) for row in classes
        ],
        examples=sorted((Example(status=row["status"], **row["row"]) for row in examples), key=lambda one: (one.status, one.uri)),
    )  # fmt: skip


def _histogram(db: duckdb.DuckDBPyConnection, label: str | None = None) -> list[int]:
    """Images with a label, or with this one, in equal bins of the confidence; as `confidence_bins` counts them."""
    counts = db.execute(
        f"""SELECT least(floor(confidence::DOUBLE * {HISTOGRAM_BINS})::INTEGER, {HISTOGRAM_BINS - 1}) AS bin, count(*) FROM scored
            WHERE label IS NOT NULL AND ($1 IS NULL OR label = $1) AND isfinite(confidence) GROUP BY bin""",  # noqa: S608  our number
        [label],
    ).fetchall()
    found = dict(counts)
    return [found.get(place, 0) for place in range(HISTOGRAM_BINS)]


def _galleries(db: duckdb.DuckDBPyConnection, found: ScoringReport, *, per_gallery: int, seed: int) -> list[Gallery]:
    """The least confident images, then some of each of the most frequent classes; drawn by a hash of the uri."""
    if not per_gallery:
        return []
    uncertain = rows_of(
        db,
        f"""SELECT uri, label, confidence FROM scored WHERE label IS NOT NULL AND isfinite(confidence)
            ORDER BY confidence, uri LIMIT {per_gallery}""",  # noqa: S608  our number
    )
    described = f"{len(uncertain)} of {found.num_labelled:,} images with a label, the least confident first."
    galleries = [Gallery("most-uncertain", "Most uncertain", "Most uncertain", described, pd.DataFrame(uncertain))]
    shown = {one.label: one for one in found.classes[:MAX_GALLERY_CLASSES]}
    drawn = rows_of(
        db,
        f"""SELECT label, min_by({{'uri': uri, 'confidence': confidence}}, md5($1 || uri), {per_gallery}) AS rows FROM scored
            WHERE list_contains($2, label) GROUP BY label""",  # noqa: S608  our number
        f"{seed}:", list(shown),
    )  # fmt: skip
    rows_by_label = {row["label"]: row["rows"] for row in drawn}
    for place, (label, one) in enumerate(shown.items()):
        rows = pd.DataFrame(rows_by_label[label]).assign(label=label)
        described = f"{len(rows)} of {one.num_images:,} images, drawn at random."
        galleries.append(Gallery(f"random-{place}", "Random", f"Predicted as {label}", described, rows))
    return [gallery for gallery in galleries if len(gallery.rows)]


def _part_times(run_uri: str, manifest: Manifest, notes: list[str]) -> list[tuple[float, int]]:
    """(seconds since the listing began, images read for it) of each part, by time; none of a copy, whose files have other times."""
    if run_uri != manifest.uri:
        notes.append(
            f"throughput is not told: this is a copy of {manifest.uri}, and its parts were written at other times"
        )
        return []
    return [(seconds - manifest.planned_s, count) for seconds, count in published.part_times(run_uri, manifest)]


def _rate(part_times: list[tuple[float, int]]) -> float | None:
    """Images a second from the first part to the last, those of the first left out: when they were begun is not known."""
    if len(part_times) < 2 or part_times[-1][0] <= part_times[0][0]:
        return None
    return sum(count for _, count in part_times[1:]) / (part_times[-1][0] - part_times[0][0])


def _reference(model_uri: str, run_uri: str, manifest: Manifest, notes: list[str]) -> _Reference:
    """What the model was made from; what cannot be read is left out, and noted. ValueError if it is not the model that scored the run."""
    info, version = bundle.read_info(model_uri)
    if version != manifest.spec.get("model"):
        raise ValueError(
            f"{run_uri} was scored by model {manifest.spec.get('model')}, and {model_uri} is {version}: give the bundle that scored it"
        )
    splits: dict[str, np.ndarray] = {}
    snapshot = _snapshot(info.snapshot, notes)
    if snapshot is not None:
        splits = {
            name: np.array([counts.get(label, 0) for label in info.classes]) for name, counts in snapshot.splits.items()
        }
    predicted = _valid_predictions(model_uri, notes)
    if predicted is None:
        return _Reference(info.classes, None, None, splits)
    counts = predicted["label"].value_counts()
    return _Reference(
        info.classes, np.array([int(counts.get(label, 0)) for label in info.classes]),
        confidence_bins(predicted["confidence"].to_numpy(), HISTOGRAM_BINS), splits,
    )  # fmt: skip


def _snapshot(uri: str, notes: list[str]) -> SnapshotInfo | None:
    try:
        return open_snapshot(uri).info
    except (ValueError, StorageError) as error:
        notes.append(
            f"drift against training labels is not told: the model's snapshot cannot be read: {first_line(error)}"
        )
        return None


def _valid_predictions(model_uri: str, notes: list[str]) -> pd.DataFrame | None:
    """Label and confidence of the validation images in the model's run folder, or None if there are none."""
    uri = storage.join(model_uri.removesuffix("/").rpartition("/")[0], EVALUATION, PREDICTIONS)
    found = storage.get_if_exists(uri)
    if found is None:
        notes.append(
            f"drift against validation images is not told: there is no {uri}, which `train` writes beside its model"
        )
        return None
    frame = tables.decode(found[0], uri, columns=["label", "confidence"]).to_pandas()
    return frame[frame["label"].notna()]


def _add_drift(found: ScoringReport, reference: _Reference) -> None:
    """Drift of classes and confidences against each reference that there is, and shares of the classes there."""
    counts = {one.label: one.num_images for one in found.classes}
    scored = np.array([counts.get(label, 0) for label in reference.classes])
    for name, there in (
        ("validation images, as predicted", reference.valid_predicted),
        ("validation images, as labelled", reference.splits.get("valid")),
        ("training images, as labelled", reference.splits.get("train")),
    ):
        if there is not None and there.sum() and scored.sum():
            found.drift.append(population_stability(scored, there, what="predicted classes", name=name))
    histogram = np.array(found.confidence_histogram)
    if reference.valid_histogram is not None and reference.valid_histogram.sum() and histogram.sum():
        found.drift.append(
            population_stability(histogram, reference.valid_histogram, what="confidences", name="validation images")
        )
    for one in found.classes:
        place = reference.classes.index(one.label)
        one.valid_share = _share(reference.valid_predicted, place)
        one.train_share = _share(reference.splits.get("train"), place)


def _share(counts: np.ndarray | None, place: int) -> float | None:
    return None if counts is None or not counts.sum() else float(counts[place] / counts.sum())


def _facts(run_uri: str, manifest: Manifest, model_uri: str | None) -> dict[str, str]:
    spec: dict[str, Any] = dict(manifest.spec)
    version, execution = spec.pop("model", "unknown"), spec.pop("execution", None)
    kept = {"Kept of": f"{manifest.base}: {manifest.num_kept:,} rows"} if manifest.base else {}
    return {
        "Run": f"{run_uri}, by `{manifest.verb}`",
        "Listed": f"{datetime.fromtimestamp(manifest.planned_s, UTC):%Y-%m-%d %H:%M:%S} UTC",
        "Model": f"version {version}" + (f", {model_uri}" if model_uri else ""),
        **({"Execution": ", ".join(f"{name} {value}" for name, value in execution.items())} if execution else {}),
        **{name.replace("_", " ").capitalize(): _told(value) for name, value in spec.items() if value is not None},
        "Parts": f"{manifest.num_parts:,}, plan {manifest.plan_digest[:12]}",
        **kept,
    }


def _told(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
