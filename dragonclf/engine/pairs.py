"""Two published runs side by side: their rows joined on uri in DuckDB, out of core, with how far each probability moved.

    a, b    uri, etag, status, label, confidence, probs    the rows of each run; probs is a list in either layout of the Parquet
    pair    uri, status_a, status_b, label_a, label_b, confidence_a, confidence_b, replaced, deltas, change

A status is null where the run has no such row. `replaced`: both runs know the object's etag, and it differs. `deltas` has
|prob_b - prob_a| of each class that can be compared, `change` is its largest; both are null unless both rows have a label.
"""

from dataclasses import dataclass
from typing import Literal

import duckdb

from dragonclf.engine import published, scored


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

    Raises:
        ValueError: it is not published, its parts changed since, or it is no run of `score` or `evaluate`.
        StorageError: a part cannot be read.
    """
    manifest = published.read_manifest(run_uri)
    rows = published.open_rows(run_uri, manifest)
    prob_columns = scored.find_prob_columns(run_uri, manifest.verb, rows.schema.names)
    classes = scored.load_rows(db, table, rows, run_uri, prob_columns=prob_columns)
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
