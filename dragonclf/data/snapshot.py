"""Snapshots: an immutable, content-addressed list of labelled images, with splits that are functions of content.

OUT/snapshots/ID/images-00000.parquet ...   uri, etag, size, label, split, group, width, height, sha256, phash, brightness, sharpness,
                                            status, error, own columns, corrected_from where labels were corrected
                 snapshot.json              written last; ID is the hash of the rows but for what `measures` gives
OUT/snapshots/_latest.json                  pointer to the newest
"""

import hashlib
import itertools
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import duckdb
import pyarrow as pa
from pydantic import BaseModel, Field

from dragonclf import storage
from dragonclf.data import corrections, tables
from dragonclf.data.corrections import AppliedCorrections, Corrections
from dragonclf.data.measures import Measures

log = logging.getLogger("dragonclf")

MAX_NAMED = 5  # classes in a warning
INFO, FOLDER, LATEST = "snapshot.json", "snapshots", "_latest.json"
# They follow from the content, and another processor may round them otherwise: no part of the ID.
MEASURES = Measures._fields
COLUMNS = (
    "uri", "etag", "size", "label", "split", "group", "width", "height", "sha256", *MEASURES, "status", "error",
)  # fmt: skip
SLICED = "brightness"  # the measure that evaluations slice by, beside the source's own columns
SPLITS = ("train", "valid", "test")
BATCH_ROWS, FILE_BATCHES = 2_048, 200  # a file holds 409,600 rows


class SnapshotInfo(BaseModel):
    """``snapshot.json``."""

    format: int = 1
    id: str = Field(
        description="First twelve hex digits of the SHA-256 of all rows, their measures left out, and of the files of corrections."
    )
    source: str = Field(description="What was indexed.")
    classes: list[str] = Field(description="Labels of usable images, sorted; a class's index is its place here.")
    num_images: int = Field(description="All rows, usable or not.")
    num_files: int
    counts: dict[str, int] = Field(description="Rows by status.")
    splits: dict[str, dict[str, int]] = Field(description="Split -> class -> usable images.")
    unlabelled: int = Field(description="Readable images that lie in no class folder: listed, never trained on.")
    corrections: list[AppliedCorrections] = Field(
        default=[], description="Files that changed the labels, in this order."
    )


class Snapshot(BaseModel):
    """An opened snapshot."""

    uri: str
    info: SnapshotInfo


def write_snapshot(
    out_uri: str,
    rows: Iterable[pa.Table],
    *,
    source: str,
    valid_fraction: float,
    seed: int,
    corrected_by: Sequence[Corrections] = (),
) -> Snapshot:
    """Assign splits, correct labels, check that the classes can be trained on, and write the snapshot; out of core, for any number of rows.

    `rows` come sorted by uri. A row that says its split keeps it. Any other image's split is a hash of `seed` and its group (its content
    where it has none): it never depends on other images or on a label, and copies of an image lie in one split. Files of corrections are
    applied one after the other, each to what those before it made.

    Raises ValueError, with nothing written: corrections that do not hold, one class only, a class without a usable image, or without one
    for training or validation.
    """
    with (
        tempfile.TemporaryDirectory(prefix="dragonclf-snapshot-") as folder,
        duckdb.connect(str(Path(folder) / "rows.db")) as db,
    ):
        for table in rows:
            db.register("batch", table)
            db.execute(
                "INSERT INTO image BY NAME SELECT * FROM batch"
                if _has_rows(db)
                else "CREATE TABLE image AS SELECT * FROM batch"
            )
            db.unregister("batch")
        db.execute(
            """UPDATE image SET split =
                 CASE WHEN ('0x' || left(sha256(? || ':' || coalesce(nullif("group", ''), sha256, uri)), 8))::BIGINT / 4294967296.0 < ?
                      THEN 'valid' ELSE 'train' END
               WHERE split IS NULL""",
            [str(seed), valid_fraction],
        )
        if corrected_by:
            db.execute(f"ALTER TABLE image ADD COLUMN {corrections.FROM} VARCHAR")
        applied = [corrections.apply_corrections(db, given) for given in corrected_by]
        counts = dict(db.execute("SELECT status, count(*) FROM image GROUP BY status ORDER BY status").fetchall())
        usable = db.execute(
            """SELECT label, split, count(*) FILTER (status = 'ok') FROM image WHERE label IS NOT NULL AND status <> ?
               GROUP BY ALL ORDER BY ALL""",
            [corrections.DELETED],
        ).fetchall()
        classes = sorted({label for label, _, _ in usable})
        splits = {split: dict.fromkeys(classes, 0) for split in SPLITS}
        for label, split, count in usable:
            splits[split][label] = count
        _check_classes(source, classes, splits)
        unlabelled = db.execute("SELECT count(*) FROM image WHERE label IS NULL AND status = 'ok'").fetchall()
        return _write(
            out_uri, db, Path(folder),
            {"source": source, "classes": classes, "num_images": sum(counts.values()), "counts": counts,
             "splits": {split: count for split, count in splits.items() if sum(count.values())}, "unlabelled": unlabelled[0][0],
             "corrections": applied},
        )  # fmt: skip


def open_snapshot(uri: str) -> Snapshot:
    """Open a snapshot by its folder, or the newest one under the folder that `index` wrote. ValueError if there is none."""
    found = storage.get_if_exists(storage.join(uri, INFO))
    if found is None:
        pointer = storage.get_if_exists(storage.join(uri, FOLDER, LATEST))
        if pointer is None:
            raise ValueError(f"there is no snapshot at {uri}: make one with `dragonclf index SOURCE --out {uri}`")
        uri = storage.join(uri, FOLDER, json.loads(pointer[0])["snapshot"])
        found = storage.get(storage.join(uri, INFO)), ""
    return Snapshot(uri=uri, info=SnapshotInfo.model_validate_json(found[0]))


def read_rows(
    snapshot: Snapshot, *, splits: Iterable[str], columns: list[str] | None = None, usable_only: bool = True
) -> Iterator[pa.Table]:
    """Yield the labelled rows of some splits in the snapshot's order, by default those of readable images only.

    Rows that corrections left out are never among them.
    """
    wanted = set(splits)
    for index in range(snapshot.info.num_files):
        table = tables.read(storage.join(snapshot.uri, f"images-{index:05d}.parquet"))
        cells = zip(*(table[name].to_pylist() for name in ("split", "label", "status")), strict=True)
        keep = [
            split in wanted
            and label is not None
            and (status == "ok" or not (usable_only or status == corrections.DELETED))
            for split, label, status in cells
        ]
        table = table.filter(pa.array(keep, pa.bool_()))
        yield table.select(columns) if columns else table


def slice_columns(names: Iterable[str]) -> list[str]:
    """Of a snapshot's columns those to slice an evaluation by: the source's own, and `SLICED`."""
    return [name for name in names if name == SLICED or name not in (*COLUMNS, corrections.FROM)]


def _has_rows(db: duckdb.DuckDBPyConnection) -> bool:
    return bool(db.execute("SELECT 1 FROM duckdb_tables() WHERE table_name = 'image'").fetchall())


def _check_classes(source: str, classes: list[str], splits: dict[str, dict[str, int]]) -> None:
    if len(classes) < 2:
        what = f"only one class, {classes[0]!r}" if classes else "no labelled image"
        raise ValueError(f"{source} has {what}: a classifier needs two or more, one folder each (or a column label)")
    for label in classes:
        counts = {split: splits[split][label] for split in SPLITS}
        if not any(counts.values()):
            raise ValueError(
                f"class {label!r} has no image that can be read: see the statuses above, or remove the class"
            )
        if not counts["train"]:
            raise ValueError(
                f"class {label!r} has no training image ({sum(counts.values())} in all): add images, lower --valid-fraction, or put some "
                "in train/"
            )
    unseen = [label for label in classes if not splits["valid"][label]]
    if len(unseen) == len(classes):
        raise ValueError(
            f"{source} has no validation image: add images, raise --valid-fraction, or change --seed, or put some in valid/"
        )
    if unseen:
        log.warning(
            "no validation image tells how well %d of %d classes are learnt (%s): add images, raise --valid-fraction, or put some in "
            "valid/",
            len(unseen), len(classes), ", ".join(map(repr, unseen[:MAX_NAMED])) + (", ..." if len(unseen) > MAX_NAMED else ""),
        )  # fmt: skip


def _write(out_uri: str, db: duckdb.DuckDBPyConnection, folder: Path, facts: dict) -> Snapshot:
    files: list[Path] = []
    order = ", ".join(f'"{name}"' for name in COLUMNS)
    reader = db.sql(f"SELECT {order}, * EXCLUDE ({order}) FROM image ORDER BY uri").to_arrow_reader(BATCH_ROWS)  # noqa: S608
    named = [name for name in reader.schema.names if name not in MEASURES]
    digest = hashlib.sha256(repr(named).encode())
    for applied in facts["corrections"]:
        digest.update(applied.sha256.encode())
    while batches := list(itertools.islice(reader, FILE_BATCHES)):
        table = pa.Table.from_batches(batches)
        for row in zip(*(column.to_pylist() for column in table.select(named).columns), strict=True):
            digest.update(repr(row).encode())
        files.append(folder / f"images-{len(files):05d}.parquet")
        files[-1].write_bytes(tables.encode(table))
    info = SnapshotInfo(id=digest.hexdigest()[:12], num_files=len(files), **facts)
    uri = storage.join(out_uri, FOLDER, info.id)
    for path in files:
        storage.put(storage.join(uri, path.name), path.read_bytes())
    storage.put(storage.join(uri, INFO), info.model_dump_json(indent=2).encode())
    return Snapshot(uri=uri, info=info)
