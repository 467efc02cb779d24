"""Two published runs side by side: their rows joined on uri in DuckDB, out of core, with how far each probability moved.

    a, b    uri, etag, status, label, confidence, probs    the rows of each run; probs is a list in either layout of the Parquet
    pair    uri, status_a, status_b, label_a, label_b, confidence_a, confidence_b, replaced, deltas, change

A status is null where the run has no such row. `replaced`: both runs know the object's etag, and it differs. `deltas` has
|prob_b - prob_a| of each class that can be compared, `change` is its largest; both are null unless both rows have a label.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from dragonclf.engine import published
from dragonclf.storage import StorageError
from dragonclf.storage.errors import first_line

COLUMNS = ["uri", "etag", "status", "label", "confidence"]
BATCH_ROWS = 8_192


@dataclass(frozen=True)
class Side:
    """One of the two runs, its rows loaded."""

    uri: str
    model: str | None  # version
    num_images: int
    classes: list[str | None]  # by place in probs; None: no row tells the name

    @property
    def num_unnamed(self) -> int:
        return self.classes.count(None)


def load_run(db: duckdb.DuckDBPyConnection, table: Literal["a", "b"], run_uri: str) -> Side:
    """Make the table `a` or `b` of a published run, reading only the columns that count, in constant memory.

    Past 32 classes the rows do not hold the names of the classes, but each row's label is the name of its largest probability: that
    names every class that was predicted at least once.

    Raises:
        ValueError: it is not published, its parts changed since, or it is no run of `score` or `evaluate`.
        StorageError: a part cannot be read.
    """
    manifest = published.read_manifest(run_uri)
    rows = published.open_rows(run_uri, manifest)
    prob_columns = _prob_columns(run_uri, manifest.verb, rows.schema.names)
    db.execute(
        f"CREATE TABLE {table} (uri VARCHAR, etag VARCHAR, status VARCHAR, label VARCHAR, confidence FLOAT, probs FLOAT[])"
    )
    is_list = prob_columns == ["probs"]
    places = [f"p{place}" for place in range(len(prob_columns))]  # class names are not fit for SQL
    probs = "p0" if is_list else f"[{', '.join(places)}]"
    try:
        for batch in _read(rows, [*COLUMNS, *prob_columns]):
            db.register("batch", pa.Table.from_batches([batch]).rename_columns([*COLUMNS, *places]))
            db.execute(
                f"INSERT INTO {table} SELECT {', '.join(COLUMNS)}, CASE WHEN label IS NOT NULL THEN {probs} END FROM batch"  # noqa: S608
            )
            db.unregister("batch")
    except OSError as error:
        raise StorageError(f"cannot read the parts of {run_uri}: {first_line(error)}: run the command again") from error
    classes: list[str | None] = [name.removeprefix("prob_") for name in prob_columns]
    if is_list:
        classes = _named_by_rows(db, table, run_uri)
    return Side(run_uri, manifest.spec.get("model"), manifest.num_images, classes)


def common_classes(a: Side, b: Side) -> list[tuple[str, int, int]]:
    """(name, place in a's probs, place in b's) of each class that can be compared, in a's order.

    One model's classes are compared by place, and #17 stands for the name of one that was never predicted. Those of two models are
    compared by name alone: that a place means the same in both is not known.
    """
    if a.model is not None and a.model == b.model and len(a.classes) == len(b.classes):
        named = zip(a.classes, b.classes, strict=True)
        return [(in_a or in_b or f"#{place}", place, place) for place, (in_a, in_b) in enumerate(named)]
    place_in_b = {name: place for place, name in enumerate(b.classes)}
    return [(name, place, place_in_b[name]) for place, name in enumerate(a.classes) if name and name in place_in_b]


def join_runs(db: duckdb.DuckDBPyConnection, a: Side, b: Side, common: list[tuple[str, int, int]]) -> None:
    """Make the table `pair` of `a` and `b`. ValueError if a run has more than one row for an object."""
    places_a = [place + 1 for _, place, _ in common]  # lists count from 1 in SQL
    places_b = [place + 1 for _, _, place in common]
    db.execute(
        f"""CREATE TABLE pair AS SELECT *, list_max(deltas) AS change FROM (
              SELECT uri, a.status AS status_a, b.status AS status_b, a.label AS label_a, b.label AS label_b,
                     a.confidence AS confidence_a, b.confidence AS confidence_b, coalesce(a.etag <> b.etag, false) AS replaced,
                     CASE WHEN a.label IS NOT NULL AND b.label IS NOT NULL
                          THEN [abs(probs[1] - probs[2]) FOR probs IN list_zip(
                            list_select(a.probs, {places_a}::BIGINT[]), list_select(b.probs, {places_b}::BIGINT[]))] END AS deltas
              FROM a FULL JOIN b USING (uri))"""  # noqa: S608  only our numbers
    )
    [joined] = db.execute("SELECT count(status_a), count(status_b) FROM pair").fetchall()
    for side, num_rows in zip((a, b), joined, strict=True):
        if num_rows != side.num_images:
            raise ValueError(
                f"{side.uri} published {side.num_images:,} images and {num_rows:,} rows come of them: a uri stands twice in one "
                "of the runs; score again with --new-run"
            )


def _read(rows: ds.Dataset, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Part by part: the dataset's own scanner reads hundreds of MiB ahead of a slower consumer, whatever its readahead says."""
    for fragment in rows.get_fragments():
        assert isinstance(fragment, ds.ParquetFileFragment)
        with pq.ParquetFile(fragment.path, filesystem=fragment.filesystem, pre_buffer=True) as part:
            for batch in part.iter_batches(BATCH_ROWS, columns=columns):
                yield batch.select(columns)  # of columns x and x.y the reader takes both for x


def _prob_columns(run_uri: str, verb: str, names: list[str]) -> list[str]:
    """The columns of probabilities: those between confidence and width. The input's own may be named like them, and come later."""
    missing = [name for name in (*COLUMNS, "width") if name not in names]
    between = [] if missing else names[names.index("confidence") + 1 : names.index("width")]
    found = [name for name in between if name == "probs" or name.startswith("prob_")]
    if not found:
        what = f"the column {missing[0]!r}" if missing else "probabilities"
        raise ValueError(f"{run_uri} is a run of `{verb}` without {what}: give runs of `score` or `evaluate`")
    return found


def _named_by_rows(db: duckdb.DuckDBPyConnection, table: str, run_uri: str) -> list[str | None]:
    [(num_classes,)] = db.execute(f"SELECT coalesce(max(len(probs)), 0) FROM {table}").fetchall()  # noqa: S608
    classes: list[str | None] = [None] * num_classes
    found = db.execute(
        f"SELECT DISTINCT label, list_position(probs, list_max(probs)) - 1 FROM {table} WHERE label IS NOT NULL"  # noqa: S608
    ).fetchall()
    for name, place in found:
        if name in classes or classes[place] is not None:
            raise ValueError(
                f"{run_uri}: label {name!r} does not go with one place in probs: these are not rows as `score` writes them; score again"
            )
        classes[place] = name
    return classes
