"""`diff`: what changed between two published scoring runs: rows, statuses, labels, probabilities."""

import logging
from pathlib import Path

import duckdb
from pydantic import BaseModel, Field

from dragonclf import storage
from dragonclf.config import DiffConfig
from dragonclf.engine import pairs, published
from dragonclf.engine.database import rows_of, temporary_database
from dragonclf.engine.pairs import Side

log = logging.getLogger("dragonclf")

FLIPS = "flips.parquet"
MAX_FLIP_PAIRS = 1_000  # all pairs of up to 32 classes

# Changes are counted in bins that grow by 1 %, from 1e-9 to 1: memory does not grow with rows, unlike that of an exact quantile.
# The bins are those of DDSketch (Masson, Rim, Lee, VLDB 2019, https://arxiv.org/abs/1908.10693).
BIN_GROWTH, LEAST_CHANGE = 1.01, 1e-9


class StatusChange(BaseModel):
    """Images whose status is another one."""

    status_a: str
    status_b: str
    num_images: int


class Flip(BaseModel):
    """Images that changed from one label to another."""

    label_a: str
    label_b: str
    num_images: int
    num_replaced: int = Field(description="Of these, images whose object was replaced between the runs.")


class Change(BaseModel):
    """How far one column moved: |b - a| over the images with a label in both runs, 0 to 1.

    A percentile is the value of one of the images, and at most 1 % above the exact (nearest-rank) one; mean and max are exact.
    """

    column: str = Field(
        description="confidence, or prob_CLASS. prob_#17: a class without a name in the rows, by its place from 0."
    )
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class Mover(BaseModel):
    """An image whose probabilities moved far."""

    uri: str
    label_a: str
    label_b: str
    change: float = Field(description="Largest |prob_b - prob_a| of any class in both runs.")
    replaced: bool = Field(description="Whether its object was replaced between the runs.")


class DiffSummary(BaseModel):
    """What changed from run a to run b."""

    run_a: str = Field(description="URI of the run.")
    run_b: str
    model_a: str | None = Field(description="Version of its model.")
    model_b: str | None
    num_images_a: int
    num_images_b: int
    num_only_a: int = Field(description="Images of a that b has no row for.")
    num_only_b: int
    num_both: int
    num_replaced: int = Field(
        description="Of the images in both, those whose etags differ; an unknown etag differs from none."
    )
    num_labelled: int = Field(description="Images with a label in both runs: what flips and changes are counted over.")
    num_flips: int = Field(description="Images with another label.")
    flip_rate: float | None = Field(description="num_flips / num_labelled; None if that is 0.")
    num_flip_pairs: int = Field(description="Pairs of labels among the flips.")
    num_flips_replaced: int = Field(
        description="Of the flips, images whose object was replaced: not the model's doing alone."
    )
    classes_gone: list[str] = Field(description="Classes of a that b does not have.")
    classes_added: list[str]
    notes: list[str] = Field(description="What could not be compared, and why.")
    flips_uri: str | None = Field(description="Where the rows with another label or status were written.")
    statuses: list[StatusChange] = Field(description="Most frequent first.")
    flips: list[Flip] = Field(description="Most frequent pairs first, the first 1,000.")
    changes: list[Change] = Field(description="Of the confidence, then of each class in both runs.")
    movers: list[Mover] = Field(description="The images that changed most, greatest change first.")


def diff(config: DiffConfig) -> DiffSummary:
    """Compare two published runs of `score` or `evaluate`, joined on uri; out of core, for any number of rows.

    Classes that only one run has are named and left out of every change. With `config.out`, every image in both runs with another
    label or status is a row of flips.parquet (uri, label_a, label_b, status_a, status_b, confidence_a, confidence_b, change,
    replaced; sorted by uri), written whole or not at all, over an earlier one. Nothing else is written.

    Raises:
        ValueError: a run is not published, was changed since, or is no scoring run.
        StorageError: the store does not answer, or the temporary folder is full.
    """
    run_a, run_b = published.find_run(config.run_a), published.find_run(config.run_b)
    with temporary_database("diff") as (db, folder):
        log.info("diff: from %s to %s", run_a, run_b)
        a, b = pairs.load_run(db, "a", run_a), pairs.load_run(db, "b", run_b)
        return _compare(db, a, b, config=config, folder=folder)


def _compare(db: duckdb.DuckDBPyConnection, a: Side, b: Side, *, config: DiffConfig, folder: Path) -> DiffSummary:
    common = pairs.common_classes(a, b)
    pairs.join_runs(db, a, b, common)
    [counts] = rows_of(
        db,
        """SELECT count(*) FILTER (status_b IS NULL) AS num_only_a, count(*) FILTER (status_a IS NULL) AS num_only_b,
             count(*) FILTER (status_a IS NOT NULL AND status_b IS NOT NULL) AS num_both, count(*) FILTER (replaced) AS num_replaced,
             count(*) FILTER (label_a IS NOT NULL AND label_b IS NOT NULL) AS num_labelled,
             count(*) FILTER (label_a <> label_b) AS num_flips,
             count(*) FILTER (label_a <> label_b AND replaced) AS num_flips_replaced,
             count(DISTINCT (label_a, label_b)) FILTER (label_a <> label_b) AS num_flip_pairs FROM pair""",
    )
    is_one_model = a.model is not None and a.model == b.model
    return DiffSummary(
        run_a=a.uri, run_b=b.uri, model_a=a.model, model_b=b.model, num_images_a=a.num_images, num_images_b=b.num_images,
        flip_rate=counts["num_flips"] / counts["num_labelled"] if counts["num_labelled"] else None,
        classes_gone=[] if is_one_model else _only_in(a, b), classes_added=[] if is_one_model else _only_in(b, a),
        notes=_notes(a, b, common, counts), statuses=_statuses(db), flips=_flips(db),
        changes=_changes(db, [name for name, _, _ in common]), movers=_movers(db, config.movers),
        flips_uri=_write_flips(db, config.out, folder), **counts,
    )  # fmt: skip


def _only_in(side: Side, other: Side) -> list[str]:
    """Classes that the other run surely does not have."""
    return [] if other.num_unnamed else [name for name in side.classes if name and name not in other.classes]


def _notes(a: Side, b: Side, common: list[tuple[str, int, int]], counts: dict[str, int]) -> list[str]:
    notes = []
    if not counts["num_both"]:
        notes.append("no image is in both runs: they are joined on uri, so score the same prefix or manifest twice")
    elif not common and counts["num_labelled"]:
        notes.append("no class is known to be in both runs, so probabilities and movers are left out")
    if a.model != b.model:
        notes += [
            f"{side.num_unnamed:,} of {len(side.classes):,} classes of {side.uri} are left out of all changes, of classes_gone and of "
            "classes_added: past 32 classes a run names only those that it predicted, and the models differ, so places cannot be compared"
            for side in (a, b)
            if side.num_unnamed
        ]
    return notes


def _statuses(db: duckdb.DuckDBPyConnection) -> list[StatusChange]:
    found = rows_of(
        db,
        """SELECT status_a, status_b, count(*) AS num_images FROM pair WHERE status_a <> status_b
           GROUP BY ALL ORDER BY num_images DESC, status_a, status_b""",
    )
    return [StatusChange(**row) for row in found]


def _flips(db: duckdb.DuckDBPyConnection) -> list[Flip]:
    found = rows_of(
        db,
        f"""SELECT label_a, label_b, count(*) AS num_images, count(*) FILTER (replaced) AS num_replaced FROM pair
            WHERE label_a <> label_b GROUP BY ALL ORDER BY num_images DESC, label_a, label_b LIMIT {MAX_FLIP_PAIRS}""",  # noqa: S608
    )
    return [Flip(**row) for row in found]


def _changes(db: duckdb.DuckDBPyConnection, classes: list[str]) -> list[Change]:
    found = rows_of(
        db,
        f"""WITH delta AS (
              SELECT unnest(range(-1, {len(classes)})) AS place, unnest(list_prepend(abs(confidence_b - confidence_a), deltas)) AS value
              FROM pair WHERE deltas IS NOT NULL),
            bin AS (
              SELECT place, count(*) AS num, sum(value::DOUBLE) AS total, max(value) AS most,
                     CASE WHEN isnan(value) THEN 1 WHEN value > {LEAST_CHANGE} THEN ceil(ln(value) / ln({BIN_GROWTH})) ELSE -1e9 END AS bin
              FROM delta GROUP BY ALL),
            ranked AS (
              SELECT *, sum(num) OVER (PARTITION BY place ORDER BY bin) AS rank, sum(num) OVER (PARTITION BY place) AS count FROM bin)
            SELECT place, sum(total) / sum(num) AS mean, min(most) FILTER (rank >= 0.5 * count) AS p50,
                   min(most) FILTER (rank >= 0.9 * count) AS p90, min(most) FILTER (rank >= 0.99 * count) AS p99, max(most) AS max
            FROM ranked GROUP BY place ORDER BY place""",  # noqa: S608  only our numbers
    )
    columns = ["confidence", *(f"prob_{name}" for name in classes)]
    return [Change(column=columns[row.pop("place") + 1], **row) for row in found]


def _movers(db: duckdb.DuckDBPyConnection, count: int) -> list[Mover]:
    found = rows_of(
        db,
        f"""SELECT uri, label_a, label_b, change, replaced FROM pair WHERE change > 0
            ORDER BY change DESC, uri LIMIT {count}""",  # noqa: S608
    )
    return [Mover(**row) for row in found]


def _write_flips(db: duckdb.DuckDBPyConnection, out_uri: str | None, folder: Path) -> str | None:
    if out_uri is None:
        return None
    path, uri = folder / FLIPS, storage.join(out_uri, FLIPS)
    db.execute(
        """COPY (SELECT uri, label_a, label_b, status_a, status_b, confidence_a, confidence_b, change, replaced FROM pair
                 WHERE status_a IS NOT NULL AND status_b IS NOT NULL
                   AND (status_a <> status_b OR label_a IS DISTINCT FROM label_b) ORDER BY uri)
           TO $path (FORMAT parquet, COMPRESSION zstd)""",
        {"path": str(path)},
    )
    storage.put_file(uri, path)
    return uri
