"""From what a user points at to rows to plan: a prefix is listed, a CSV or Parquet manifest or an S3 Inventory is read and sorted.

Every row has ``uri`` (string), ``etag`` (string or null), ``size`` (int64 or null); a manifest's further columns follow.
"""

from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa

from dragonclf import storage
from dragonclf.data import inventory, sorting
from dragonclf.data.sorting import BATCH_ROWS

TEXT_COLUMNS = ("uri", "etag", "label", "split", "group")  # names, whatever they look like: label 01 is not 1
SCHEMA = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("size", pa.int64())])


def list_rows(source: str) -> Iterator[pa.Table]:
    """Yield the rows of a prefix, manifest or inventory in tables of 10,000, in constant memory. ValueError if there is not one row."""
    if is_manifest(source):
        tables, nothing = read_manifest(source), f"the manifest {source} has no row"
    elif inventory.is_inventory(source):
        tables, nothing = inventory.read_inventory(source), f"the inventory {source} has no object"
    else:
        tables, nothing = list_prefix(source), f"there is no object under {source}"
    first = next(tables, None)
    if first is None:
        raise ValueError(f"{nothing}: check the name")
    yield first
    yield from tables


def is_manifest(source: str) -> bool:
    """Whether `source` is a CSV or Parquet file rather than a prefix."""
    return source.lower().endswith((".csv", ".csv.gz", ".parquet")) and storage.stat(source) is not None


def base(source: str) -> str:
    """What the source's keys are relative to: the prefix itself, a manifest's folder, the bucket that an inventory is of."""
    if is_manifest(source):
        return source.rpartition("/")[0]
    return inventory.base(source) if inventory.is_inventory(source) else source


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

    A CSV has commas, double quotes and a header. Raises ValueError for a missing ``uri`` column, an empty uri, one of another scheme, or
    one that stands twice.
    """
    with sorting.database() as (db, folder):
        suffix = next(end for end in (".csv", ".csv.gz", ".parquet") if source.lower().endswith(end))
        path = folder / f"manifest{suffix}"
        storage.download(source, path)
        try:
            yield from _sorted_rows(db, source, path)
        except duckdb.Error as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"cannot read the manifest {source}: {reason}") from error


def _sorted_rows(db: duckdb.DuckDBPyConnection, source: str, path: Path) -> Iterator[pa.Table]:
    _load(db, source, path)
    names = [row[0] for row in db.execute("DESCRIBE given").fetchall()]
    base = source.rpartition("/")[0]
    [(empty,)] = db.execute("SELECT count(*) FROM given WHERE uri IS NULL OR trim(uri) = ''").fetchall()
    if empty:
        raise ValueError(f"the manifest {source} has {empty} rows without a uri: every row names an image")
    db.execute("UPDATE given SET uri = substr(uri, 8) WHERE uri LIKE 'file:///%'")
    other = db.execute(
        "SELECT uri FROM given WHERE regexp_matches(uri, '^[A-Za-z][A-Za-z0-9+.-]*://') "
        "AND NOT regexp_matches(uri, '^s3://[^/]+/.', 's') ORDER BY uri LIMIT 1"
    ).fetchall()
    if other:
        raise ValueError(f"the manifest {source} names {other[0][0]!r}: use local paths or s3://BUCKET/KEY")
    db.execute("UPDATE given SET uri = ? || uri WHERE NOT (uri LIKE 's3://%' OR uri LIKE '/%')", [f"{base}/"])
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
    path.unlink()
    yield from sorting.sorted_tables(db, columns, "given")


def _load(db: duckdb.DuckDBPyConnection, source: str, path: Path) -> None:
    """Make the table `given` of the manifest. Nothing about a CSV but the further columns' types is guessed: a guess can drop rows."""
    csv = "header = true, delim = ',', quote = '\"', escape = '\"', comment = '', skip = 0, sample_size = -1"
    reader = "read_parquet(?)" if path.suffix == ".parquet" else f"read_csv(?, {csv}, types = {{types}})"
    described = db.execute(f"DESCRIBE SELECT * FROM {reader.format(types='{}')}", [str(path)]).fetchall()  # noqa: S608
    names = [row[0] for row in described]
    if "uri" not in names:
        raise ValueError(f"the manifest {source} has no column 'uri': it has {', '.join(names)}")
    for name in names:
        if name not in (*TEXT_COLUMNS, "size") and name.lower() in (*TEXT_COLUMNS, "size"):
            raise ValueError(
                f"the manifest {source} has a column {name!r}: write {name.lower()!r}, or name it otherwise"
            )
    text = [name for name in TEXT_COLUMNS if name in names]
    types = "{" + ", ".join(f"'{name}': 'VARCHAR'" for name in text) + "}"
    columns = ", ".join(f'CAST("{name}" AS VARCHAR) AS "{name}"' for name in text)
    db.execute(f"CREATE TABLE given AS SELECT * REPLACE ({columns}) FROM {reader.format(types=types)}", [str(path)])  # noqa: S608


def _table(rows: list[tuple[str, str, int]]) -> pa.Table:
    return pa.table(list(map(list, zip(*rows, strict=True))), schema=SCHEMA)
