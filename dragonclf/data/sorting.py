"""Sort more rows than memory holds: DuckDB in a temporary folder, with a memory limit past which it spills to that folder."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa

BATCH_ROWS = 10_000
MEMORY = "1GB"  # of DuckDB's, whatever the number of rows; the rest of the process comes on top


@contextlib.contextmanager
def database() -> Iterator[tuple[duckdb.DuckDBPyConnection, Path]]:
    """A database that spills to disk, and its folder, which may hold files to load and is deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="dragonclf-sort-") as name:
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": MEMORY,
            "temp_directory": f"{name}/spill",
            "preserve_insertion_order": "false",
        }
        with duckdb.connect(f"{name}/rows.db", config=settings) as db:
            yield db, Path(name)


def sorted_tables(db: duckdb.DuckDBPyConnection, columns: str, table: str) -> Iterator[pa.Table]:
    """Yield `columns` of a table in tables of at most 10,000 rows, in the order of the bytes of its column uri."""
    for batch in db.sql(f"SELECT {columns} FROM {table} ORDER BY uri").to_arrow_reader(BATCH_ROWS):  # noqa: S608  not a user's words
        if batch.num_rows:
            yield pa.Table.from_batches([batch])
