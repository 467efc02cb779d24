"""From what a user points at to rows to plan: a prefix is listed, a CSV or Parquet manifest is read and sorted.

Every row has ``uri`` (string), ``etag`` (string or null), ``size`` (int64 or null); a manifest's further columns follow.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa

from dragonclf import storage

BATCH_ROWS = 10_000
SCHEMA = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("size", pa.int64())])


def list_rows(source: str) -> Iterator[pa.Table]:
    """Yield the rows of a prefix or manifest in tables of 10,000, in constant memory. ValueError if there is not one row."""
    tables = read_manifest(source) if is_manifest(source) else list_prefix(source)
    first = next(tables, None)
    if first is None:
        raise ValueError(f"there is no object under {source}: check the prefix")
    yield first
    yield from tables


def is_manifest(source: str) -> bool:
    """Whether `source` is a CSV or Parquet file rather than a prefix."""
    return source.lower().endswith((".csv", ".csv.gz", ".parquet")) and storage.stat(source) is not None


def list_prefix(source: str) -> Iterator[pa.Table]:
    """Yield every object under a prefix, in the store's order."""
    batch: list[tuple[str, str, int]] = []
    for found in storage.list_objects(source):
        batch.append((found.uri, found.etag, found.size))
        if len(batch) == BATCH_ROWS:
            yield _table(batch)
            batch = []
    if batch:
        yield _table(batch)


def read_manifest(source: str) -> Iterator[pa.Table]:
    """Yield a manifest's rows sorted by uri; relative ones are relative to the manifest. Larger than memory is fine.

    Raises ValueError for a missing ``uri`` column, an empty uri, or one that stands twice.
    """
    with tempfile.TemporaryDirectory(prefix="dragonclf-manifest-") as folder:
        path = Path(folder) / storage.name(source)
        path.write_bytes(storage.get(source))
        with duckdb.connect(str(Path(folder) / "sort.db")) as db:
            yield from _sorted_rows(db, source, path)


def _sorted_rows(db: duckdb.DuckDBPyConnection, source: str, path: Path) -> Iterator[pa.Table]:
    reader = "read_parquet" if path.suffix == ".parquet" else "read_csv"
    try:
        db.execute(f"CREATE TABLE given AS SELECT * FROM {reader}(?)", [str(path)])  # noqa: S608  one of two constants
    except duckdb.Error as error:
        raise ValueError(f"cannot read the manifest {source}: {str(error).splitlines()[0]}") from error
    names = [row[0] for row in db.execute("DESCRIBE given").fetchall()]
    if "uri" not in names:
        raise ValueError(f"the manifest {source} has no column 'uri': it has {', '.join(names)}")
    base = source.rpartition("/")[0]
    db.execute("UPDATE given SET uri = ? || uri WHERE NOT (uri LIKE 's3://%' OR uri LIKE '/%')", [f"{base}/"])
    [(empty,)] = db.execute("SELECT count(*) FROM given WHERE uri IS NULL OR uri = ?", [f"{base}/"]).fetchall()
    if empty:
        raise ValueError(f"the manifest {source} has {empty} rows without a uri: every row names an image")
    twice = db.execute(
        "SELECT uri, count(*) FROM given GROUP BY uri HAVING count(*) > 1 ORDER BY uri LIMIT 1"
    ).fetchall()
    if twice:
        raise ValueError(f"the manifest {source} names {twice[0][0]} {twice[0][1]} times: every image has one row")
    known = [
        f'"{name}"' if name in names else f"NULL::{kind}" for name, kind in (("etag", "VARCHAR"), ("size", "BIGINT"))
    ]
    further = [f'"{name.replace(chr(34), chr(34) * 2)}"' for name in names if name not in SCHEMA.names]
    columns = ", ".join(
        ["uri", f"CAST({known[0]} AS VARCHAR) AS etag", f"CAST({known[1]} AS BIGINT) AS size", *further]
    )
    for batch in db.sql(f"SELECT {columns} FROM given ORDER BY uri").to_arrow_reader(BATCH_ROWS):  # noqa: S608  quoted names
        if batch.num_rows:
            yield pa.Table.from_batches([batch])


def _table(rows: list[tuple[str, str, int]]) -> pa.Table:
    return pa.table(list(map(list, zip(*rows, strict=True))), schema=SCHEMA)
