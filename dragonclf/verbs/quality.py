"""`quality`: what is wrong with a snapshot's images and labels, ranked.

OUT/quality.html          the worst of each issue, to look at
    quality.parquet       a row an issue and image: issue, rank (from 1, the worst), uri, label, split, score, other, detail
    predictions.parquet   of the images whose labels were judged, the held-out probabilities, as `evaluate` writes them: `review OUT` shows
                          the pictures
"""

import logging
from collections.abc import Iterator

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import BaseModel, Field

from dragonclf import storage
from dragonclf.config import QualityConfig
from dragonclf.data import sorting, tables
from dragonclf.data.quality import COLUMNS, ISSUES, find_issues
from dragonclf.data.snapshot import SPLITS, Snapshot, open_snapshot, read_rows
from dragonclf.engine import published
from dragonclf.evaluate.label_errors import suspects
from dragonclf.evaluate.quality_page import Finding, Section, quality_page
from dragonclf.train.held_out import held_out_probs

log = logging.getLogger("dragonclf")

PAGE, FOUND, PREDICTIONS = "quality.html", "quality.parquet", "predictions.parquet"
MOST_SHOWN = 12  # of an issue
# Labels that another class confidently contradicts, and those that another class is just likelier than; ranked in each split.
LABEL_ISSUES = ("label_error", "label_doubt")


class IssueCount(BaseModel):
    """One issue."""

    issue: str
    num_images: int
    worst: str = Field(description="URI of the image that has it most.")


class QualitySummary(BaseModel):
    """What is wrong with a snapshot."""

    snapshot: str = Field(description="URI of the snapshot.")
    num_images: int = Field(description="Labelled images that were looked at.")
    num_judged: int = Field(description="Images whose labels were compared with what a model says of them.")
    page: str = Field(description="URI of quality.html.")
    found: str = Field(description="URI of quality.parquet.")
    predictions: str | None = Field(description="URI of predictions.parquet. None: no label was judged.")
    issues: list[IssueCount] = Field(description="Those that some image has.")


def quality(config: QualityConfig) -> QualitySummary:
    """Look for bad images, copies and, with `config.features`, label errors in a snapshot, and write OUT/quality.parquet and quality.html.

    No image is read but those that the page shows.

    Training labels are judged by cross-validation within the training images, validation labels by all of these; no other label counts.
    ValueError for a snapshot without measures, or features that are of other images.
    """
    snapshot = open_snapshot(config.data)
    with sorting.database() as (db, folder):
        find_issues(db, _rows(snapshot))
        num_judged, predictions = 0, None
        if config.features is None:
            log.info("quality: labels are not judged: --features with the --out of a `train` whose backbone was frozen")
        else:
            predicted = _find_label_errors(db, snapshot, find_features(config.features))
            num_judged, predictions = len(predicted), storage.join(config.out, PREDICTIONS)
            storage.put(predictions, tables.encode(predicted))
        path, uri = folder / FOUND, storage.join(config.out, FOUND)
        order = ", ".join(f"'{name}'" for name in (LABEL_ISSUES[0], *ISSUES, LABEL_ISSUES[1]))
        db.execute(
            f"COPY (FROM issue ORDER BY list_position([{order}], issue), rank, uri) TO '{path}' (FORMAT parquet, COMPRESSION zstd)"
        )
        storage.put_file(uri, path)
        [(num_images,)] = db.execute("SELECT count(*) FROM image").fetchall()
        counts = db.execute(
            f"""SELECT issue, count(*), min({{'rank': rank, 'score': score, 'uri': uri}}).uri FROM issue
                GROUP BY issue ORDER BY list_position([{order}], issue)"""  # noqa: S608
        ).fetchall()
        sections = [Section(name, count, _worst(db, name)) for name, count, _ in counts]
    page = storage.join(config.out, PAGE)
    title = f"Quality of {storage.name(snapshot.info.source.removesuffix('/'))}"
    storage.put(page, quality_page(sections, title=title, num_images=num_images, num_judged=num_judged))
    return QualitySummary(
        snapshot=snapshot.uri, num_images=num_images, num_judged=num_judged, page=page, found=uri, predictions=predictions,
        issues=[IssueCount(issue=name, num_images=count, worst=worst) for name, count, worst in counts],
    )  # fmt: skip


def _worst(db: duckdb.DuckDBPyConnection, issue: str) -> list[Finding]:
    """The first of an issue; of two images that it pairs, one."""
    rows = db.execute(
        f"""SELECT uri, label, split, detail, other FROM issue AS one WHERE issue = ? AND NOT EXISTS
              (FROM issue AS earlier WHERE earlier.issue = one.issue AND earlier.uri = one.other AND earlier.other = one.uri AND
               earlier.rank < one.rank)
            ORDER BY rank, split, uri LIMIT {MOST_SHOWN}""",  # noqa: S608
        [issue],
    )
    return [Finding(*row) for row in rows.fetchall()]


def find_features(uri: str) -> str:
    """URI of the run of features that a user means: a run, the folder of its runs, or the --out of a `train` with one such folder."""
    if uri.rpartition("/")[0].endswith("/runs") or published.find_latest(uri):
        return published.find_run(uri)
    try:
        names = [found.uri for found in storage.list_objects(storage.join(uri, "features"))]
    except storage.ObjectMissingError:  # no such folder
        names = []
    pointers = [name for name in names if storage.name(name) == published.LATEST]
    runs = [published.read_latest(pointer.removesuffix(f"/{published.LATEST}")) for pointer in pointers]
    plain = [run for run in runs if "views" not in published.read_manifest(run).spec]
    if len(plain) != 1:
        raise ValueError(
            f"{uri} has {', '.join(plain) or 'no'} features under it: name a run, as `train` with a frozen backbone writes under its --out"
        )
    return plain[0]


def _rows(snapshot: Snapshot) -> Iterator[pa.Table]:
    for table in read_rows(snapshot, splits=SPLITS, usable_only=False):
        missing = [name for name in COLUMNS if name not in table.column_names]
        if missing:
            raise ValueError(
                f"snapshot {snapshot.info.id} has no column {missing[0]!r}: an earlier version made it; index its source again"
            )
        yield table


def _find_label_errors(db: duckdb.DuckDBPyConnection, snapshot: Snapshot, features_uri: str) -> pa.Table:
    """Add the suspects of each split to ``issue``. Returns the predictions of the images whose labels were judged."""
    features, rows = _features_of(snapshot, features_uri)
    classes = snapshot.info.classes
    labels = torch.tensor([classes.index(label) for label in rows["label"].to_pylist()], dtype=torch.int64)
    splits = np.array(rows["split"].to_pylist())
    is_train = splits == "train"
    groups = [
        group or digest for group, digest in zip(rows["group"].to_pylist(), rows["sha256"].to_pylist(), strict=True)
    ]
    held_out, others = held_out_probs(
        features[is_train], labels[is_train], [group for group, own in zip(groups, is_train, strict=True) if own],
        features[~is_train], num_classes=len(classes),
    )  # fmt: skip
    probs = np.empty((len(rows), len(classes)), np.float32)
    probs[is_train], probs[~is_train] = held_out, others
    is_judged = np.isfinite(probs).all(axis=1)
    for split in SPLITS:
        chosen = np.flatnonzero(is_judged & (splits == split))
        if not len(chosen):
            continue
        found = suspects(probs[chosen], labels.numpy()[chosen])
        worst = found.order[found.margin[found.order] < 0]
        batch = rows.select(["uri", "label", "split"]).take(pa.array(chosen[worst]))
        batch = batch.append_column("issue", pa.array(np.where(found.is_suspect[worst], *LABEL_ISSUES)))
        batch = batch.append_column("score", pa.array(found.margin[worst]))
        suggested = [f"rather {classes[label]}" for label in found.suggested[worst]]
        batch = batch.append_column("detail", pa.array(suggested, pa.string()))
        db.register("batch", batch)
        db.execute(
            """INSERT INTO issue SELECT issue, row_number() OVER (PARTITION BY issue ORDER BY score, uri), uri, label, split, score, NULL,
                                        detail FROM batch"""
        )
        db.unregister("batch")
    return _predicted(rows.filter(pa.array(is_judged)), probs[is_judged], classes)


def _predicted(rows: pa.Table, probs: np.ndarray, classes: list[str]) -> pa.Table:
    """Rows as `evaluate` writes them, of probabilities float32 (N, K)."""
    known = {
        "uri": rows["uri"],
        "etag": rows["etag"],
        "status": pa.repeat("ok", len(rows)),
        "error": pa.nulls(len(rows), pa.string()),
    }
    answers = {"label": [classes[place] for place in probs.argmax(axis=1)], "confidence": probs.max(axis=1)}
    of_classes = {f"prob_{name}": probs[:, place] for place, name in enumerate(classes)}
    return pa.table(known | answers | of_classes | {"input_label": rows["label"], "split": rows["split"]})


def _features_of(snapshot: Snapshot, features_uri: str) -> tuple[torch.Tensor, pa.Table]:
    """Features float32 (N, F) of the snapshot's usable images that the run has with the same etag, and their rows."""
    if published.read_manifest(features_uri).verb != "features":
        raise ValueError(f"{features_uri} is no run of features: name one that `train` wrote under its --out")
    tables = [
        table.select(["uri", "etag", "label", "split", "group", "sha256"])
        for table in read_rows(snapshot, splits=SPLITS)
    ]
    rows = pa.concat_tables(tables)
    place_of = {key: place for place, key in enumerate(_keys(rows))}
    found: list[np.ndarray] = []
    places: list[int] = []
    for part in published.read_parts(features_uri, columns=["uri", "etag", "status", "features"]):
        part = part.filter(pc.field("status") == "ok")
        own = [place_of.get(key) for key in _keys(part)]
        column = part["features"].combine_chunks()
        values = column.flatten().to_numpy().reshape(-1, column.type.list_size)
        found.append(values[[place is not None for place in own]])
        places += [place for place in own if place is not None]
    if not places:
        raise ValueError(
            f"the features at {features_uri} are of no image of snapshot {snapshot.info.id}: name another run"
        )
    if len(places) < len(rows):
        log.info(
            "quality: %s of %s labels are judged: the others have no features", f"{len(places):,}", f"{len(rows):,}"
        )
    return torch.from_numpy(np.concatenate(found)), rows.take(pa.array(places))


def _keys(rows: pa.Table) -> Iterator[tuple[str, str | None]]:
    """uri and etag, which tell an object as it was."""
    for uri, etag in zip(rows["uri"].to_pylist(), rows["etag"].to_pylist(), strict=True):
        yield uri, etag and etag.strip('"')
