"""Corrections of labels: a CSV that `review` or a person makes, and what it does to the rows of a snapshot.

Columns, in any order: uri, etag, old (the label now; empty: none), new (a class of the data set; empty: leave the image out),
reason (relabel, or delete where `new` is empty: a cell that was emptied by accident leaves nothing out). RFC 4180, UTF-8.
"""

import csv
import hashlib
import io
from dataclasses import dataclass

import duckdb
import pyarrow as pa
from pydantic import BaseModel, Field

from dragonclf import storage

COLUMNS = ("uri", "etag", "old", "new", "reason")
DELETED = "deleted"  # status of a row that corrections left out
FROM = "corrected_from"  # the snapshot's column: what the source says of a relabelled image ("": nothing), null of all others
NAMED = 3  # rows that a refusal names


class AppliedCorrections(BaseModel):
    """What one file did, as ``snapshot.json`` keeps it."""

    uri: str = Field(description="Where the file was.")
    sha256: str = Field(description="Of the file.")
    num_relabelled: int
    num_deleted: int
    num_test: int = Field(description="Of both, images of the test split.")


@dataclass(frozen=True)
class Corrections:
    """One file: its rows, each checked for itself."""

    uri: str
    sha256: str
    rows: pa.Table  # `COLUMNS` as text, and row: its number in the file, where the header is row 1


def read_corrections(uri: str) -> Corrections:
    """Read a file of corrections.

    Raises:
        ValueError: it is not there, is no such CSV, a row contradicts itself, or a uri stands twice. The row is named.
        StorageError: it cannot be read.
    """
    found = storage.get_if_exists(uri)
    if found is None:
        raise ValueError(f"there is no {uri}: give --corrections the file that review.html saved")
    data, _ = found
    try:
        records = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{uri} is not a CSV in UTF-8: {error}") from error
    header = records[0] if records else []
    if sorted(header) != sorted(COLUMNS):
        raise ValueError(
            f"{uri} has the columns {', '.join(header) or 'none'}: it needs {', '.join(COLUMNS)}, no others"
        )
    seen: dict[str, int] = {}
    for number, record in enumerate(records[1:], 2):
        if len(record) != len(header):
            raise ValueError(f"{uri}, row {number}: {len(record)} cells, and the header has {len(header)}")
        if wrong := _wrong(dict(zip(header, record, strict=True)), number, seen):
            raise ValueError(f"{uri}, row {number}: {wrong}")
    columns = {name: pa.array([record[header.index(name)] for record in records[1:]], pa.string()) for name in COLUMNS}
    rows = pa.table(columns | {"row": pa.array(range(2, len(records) + 1), pa.int64())})
    return Corrections(uri, hashlib.sha256(data).hexdigest(), rows)


def apply_corrections(db: duckdb.DuckDBPyConnection, given: Corrections) -> AppliedCorrections:
    """Relabel and leave out rows of the table `image`, which has a snapshot's columns and `FROM`; all of a file or nothing.

    A row that is left out keeps its label, and gets the status `DELETED`.

    Raises ValueError, with the first rows that do not hold and what is there now: the uri is not in the table, is `DELETED`, or has another
    etag or label; or `new` is no class of the table.
    """
    db.register("given", given.rows)
    db.execute(
        """CREATE OR REPLACE TEMP TABLE correction AS
             SELECT given.*, image.uri IS NOT NULL AS is_there, image.etag AS etag_now, image.label AS label_now, image.status, image.split
             FROM given LEFT JOIN image USING (uri)"""
    )
    db.unregister("given")
    _check(db, given.uri)
    db.execute(
        f"""UPDATE image SET label = new, {FROM} = coalesce({FROM}, image.label, '') FROM correction
            WHERE image.uri = correction.uri AND new <> ''"""  # noqa: S608  our own name
    )
    db.execute(
        """UPDATE image SET status = ?, error = 'left out by a correction' FROM correction
           WHERE image.uri = correction.uri AND new = ''""",
        [DELETED],
    )
    [(num_relabelled, num_deleted, num_test)] = db.execute(
        """SELECT count(*) FILTER (new <> ''), count(*) FILTER (new = ''), count(*) FILTER (split = 'test') FROM correction"""
    ).fetchall()
    return AppliedCorrections(
        uri=given.uri, sha256=given.sha256, num_relabelled=num_relabelled, num_deleted=num_deleted, num_test=num_test
    )


def _wrong(cells: dict[str, str], number: int, seen: dict[str, int]) -> str | None:
    """What a row says that cannot be, if anything."""
    uri, old, new, reason = (cells[name] for name in ("uri", "old", "new", "reason"))
    if not uri:
        return "its uri is empty"
    if seen.setdefault(uri, number) != number:
        return f"{uri!r} stands in row {seen[uri]} too: keep one of them"
    if reason != ("relabel" if new else "delete"):
        return f"reason is {reason!r} and new is {new!r}: relabel goes with a class, delete with an empty cell"
    if new == old and new:
        return f"old and new are both {new!r}: a label that is right needs no row"
    return None


def _check(db: duckdb.DuckDBPyConnection, uri: str) -> None:
    wrong = db.execute(
        """SELECT row, uri, CASE
             WHEN NOT is_there THEN 'is not in the source, or its filters leave it out'
             WHEN status = $deleted THEN 'was left out by an earlier file'
             WHEN coalesce(etag_now, '') <> etag THEN
               'was replaced since: its etag is ' || coalesce(etag_now, 'not known') || ', not ' || etag
             WHEN coalesce(label_now, '') <> old THEN
               'is ' || coalesce('labelled ''' || label_now || '''', 'not labelled') || ' now, not ''' || old || ''''
             WHEN new <> '' AND new NOT IN (SELECT label FROM image WHERE label IS NOT NULL) THEN
               'cannot become ''' || new || ''', which is no class of the source: the classes are those of its folders or its column label'
           END AS what
           FROM correction WHERE what IS NOT NULL ORDER BY row""",
        {"deleted": DELETED},
    )
    first = wrong.fetchmany(NAMED)
    if first:
        others = len(wrong.fetchall())
        told = "; ".join(f"row {row}: {image!r} {what}" for row, image, what in first)
        raise ValueError(
            f"{uri} does not fit what is there now, and nothing was corrected: {told}"
            f"{f'; and {others:,} more' if others else ''}: review again, or take out these rows"
        )
