"""A DuckDB of one command's own, out of core: what is more than its memory goes to a temporary folder."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb

from dragonclf import storage
from dragonclf.storage.errors import first_line

MEMORY_LIMIT, MAX_THREADS = "512MB", 4  # each thread wants its share of the memory


@contextlib.contextmanager
def temporary_database(verb: str) -> Iterator[tuple[duckdb.DuckDBPyConnection, Path]]:
    """Open a database in a folder that is deleted at the end, and yield both.

    Raises StorageError where the folder is full, and KeyboardInterrupt where a query is interrupted.
    """
    with tempfile.TemporaryDirectory(prefix=f"dragonclf-{verb}-") as folder:
        settings: dict[str, Any] = {
            "memory_limit": MEMORY_LIMIT,
            "threads": min(MAX_THREADS, os.cpu_count() or 1),
            "temp_directory": str(Path(folder) / "spill"),
            "preserve_insertion_order": False,
        }
        try:
            with duckdb.connect(str(Path(folder) / "rows.db"), config=settings) as db:
                yield db, Path(folder)
        except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
            raise storage.StorageError(
                f"cannot {verb} in {folder}: {first_line(error)}: set TMPDIR to a folder with more room"
            ) from error
        except RuntimeError as error:  # what DuckDB makes of Ctrl-C and SIGTERM in a query
            if "interrupted" in str(error):
                raise KeyboardInterrupt from error
            raise


def rows_of(db: duckdb.DuckDBPyConnection, query: str, *parameters: Any) -> list[dict[str, Any]]:
    """What a query gives, a dict a row."""
    names = [column[0] for column in db.execute(query, list(parameters)).description or []]
    return [dict(zip(names, row, strict=True)) for row in db.fetchall()]
