"""The rows of a scoring run in a table of DuckDB, out of core, whichever layout their Parquet has.

    uri, etag, status, label, confidence, probs, further columns

probs is a list in the order of the model's classes, null unless the row has a label.
"""

from collections.abc import Sequence

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds

from dragonclf.engine import published
from dragonclf.storage import StorageError
from dragonclf.storage.errors import first_line

COLUMNS = ["uri", "etag", "status", "label", "confidence"]


def load_rows(
    db: duckdb.DuckDBPyConnection,
    table: str,
    rows: ds.Dataset,
    uri: str,
    *,
    prob_columns: list[str],
    further: Sequence[str] = (),
) -> list[str | None]:
    """Make `table` of the rows in constant memory, and return the classes by place in probs; None: no row tells the name.

    `further` are columns to load too, as text; null if there is no such column. Where the rows have a list of probabilities, they do not
    hold the names of the classes, but each row's label is the name of its largest probability: that names every class that was predicted
    at least once.

    Raises:
        ValueError: labels and lists contradict each other.
        StorageError: a part cannot be read.
    """
    there = [name for name in further if name in rows.schema.names]
    own = "".join(f", {name} VARCHAR" for name in further)
    db.execute(
        f"CREATE TABLE {table} (uri VARCHAR, etag VARCHAR, status VARCHAR, label VARCHAR, confidence FLOAT, probs FLOAT[]{own})"
    )
    is_list = prob_columns == ["probs"]
    places = [f"p{place}" for place in range(len(prob_columns))]  # class names are not fit for SQL
    probs = "p0" if is_list else f"[{', '.join(places)}]"
    try:
        for batch in published.read_batches(rows, [*COLUMNS, *there, *prob_columns]):
            db.register("batch", pa.Table.from_batches([batch]).rename_columns([*COLUMNS, *there, *places]))
            db.execute(
                f"""INSERT INTO {table} BY NAME SELECT {", ".join([*COLUMNS, *there])},
                      CASE WHEN label IS NOT NULL THEN {probs} END AS probs FROM batch"""  # noqa: S608
            )
            db.unregister("batch")
    except OSError as error:
        raise StorageError(f"cannot read the parts of {uri}: {first_line(error)}: run the command again") from error
    if is_list:
        return _named_by_rows(db, table, uri)
    return [name.removeprefix("prob_") for name in prob_columns]


def find_prob_columns(run_uri: str, verb: str, names: list[str]) -> list[str]:
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
