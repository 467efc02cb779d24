"""An S3 Inventory as a source: the ``manifest.json`` of a daily or weekly list of a bucket that S3 writes by itself.

For buckets that take too long, or cost too many requests, to list. It is as old as it is: what was deleted since is `missing`, what was
replaced is `changed`, what is new is not in it.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import duckdb
import pyarrow as pa
from pydantic import BaseModel, Field, ValidationError, field_validator

from dragonclf import storage
from dragonclf.data import sorting

NAME, CHECKSUM = "manifest.json", "manifest.checksum"


class DataFile(BaseModel):
    """A file of the inventory."""

    key: str
    md5: str = Field(alias="MD5checksum")


class InventoryManifest(BaseModel):
    """What dragonclf reads of S3's ``manifest.json``."""

    source_bucket: str = Field(alias="sourceBucket")
    destination_bucket: str = Field(alias="destinationBucket", description="ARN of the bucket with the files.")
    file_format: Literal["CSV", "Parquet"] = Field(alias="fileFormat")
    file_schema: str = Field(alias="fileSchema", description="CSV: the names of the columns; the files have no header.")
    files: list[DataFile]

    @field_validator("file_format", mode="before")
    @classmethod
    def _refuse_orc(cls, value: str) -> str:
        if value == "ORC":
            raise ValueError("ORC is not supported: set the inventory's output format to CSV or Apache Parquet")
        return value


def is_inventory(source: str) -> bool:
    """Whether `source` is a file ``manifest.json`` rather than a prefix."""
    return storage.name(source) == NAME and storage.stat(source) is not None


def open_inventory(source: str) -> InventoryManifest:
    """Read the manifest. ValueError if it is not S3's, is damaged, or its files are ORC."""
    data = storage.get(source)
    beside = storage.get_if_exists(f"{source.removesuffix(NAME)}{CHECKSUM}")
    if beside is not None and beside[0].split()[:1] != [_md5(data).encode()]:
        raise ValueError(f"{source} does not have the MD5 that {CHECKSUM} beside it tells: copy the inventory again")
    try:
        return InventoryManifest.model_validate(json.loads(data))
    except ValidationError as error:
        [first, *_] = error.errors()
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}"
        raise ValueError(f"{source} is not an S3 Inventory that can be read: {what}") from error
    except ValueError as error:
        raise ValueError(f"{source} is not the manifest.json of an S3 Inventory: it is no JSON ({error})") from error


def base(source: str) -> str:
    """The bucket that the inventory is of, which its keys are relative to."""
    return f"s3://{open_inventory(source).source_bucket}"


def read_inventory(source: str) -> Iterator[pa.Table]:
    """Yield uri, etag (null if the inventory has none), size of every object, sorted by uri. Larger than memory is fine.

    Of a versioned inventory only the latest versions count, and no delete markers. Raises ValueError for a file whose MD5 is not the
    manifest's, a column that is missing, or a key that stands twice; StorageError for a file that cannot be read.
    """
    manifest = open_inventory(source)
    bucket = manifest.destination_bucket.rpartition(":")[2]
    with sorting.database() as (db, folder):
        db.execute("CREATE TABLE objects (uri VARCHAR, etag VARCHAR, size BIGINT)")
        suffix = "csv.gz" if manifest.file_format == "CSV" else "parquet"
        for file in manifest.files:
            path, uri = folder / f"data.{suffix}", f"s3://{bucket}/{file.key}"
            storage.download(uri, path)
            if (found := _md5_of(path)) != file.md5:
                raise ValueError(f"{uri} has the MD5 {found}, and {source} says {file.md5}: copy the inventory again")
            try:
                _load(db, manifest, path)
            except duckdb.Error as error:
                reason = " ".join(str(error).split())[:300]
                raise ValueError(f"cannot read {uri} of the inventory {source}: {reason}") from error
            path.unlink()
        last = None
        for table in sorting.sorted_tables(db, "uri, etag, size", "objects"):
            uris = table["uri"].to_pylist()
            twice = next((uri for before, uri in zip([last, *uris], uris, strict=False) if before == uri), None)
            if twice is not None:
                raise ValueError(f"the inventory {source} names {twice} more than once: every object has one row")
            last = uris[-1]
            yield table


def _load(db: duckdb.DuckDBPyConnection, manifest: InventoryManifest, path: Path) -> None:
    if manifest.file_format == "CSV":
        names = [name.strip() for name in manifest.file_schema.split(",")]
        columns = "{" + ", ".join(f"'{_snake(name)}': 'VARCHAR'" for name in names) + "}"
        reader = f"read_csv(?, header = false, auto_detect = false, delim = ',', quote = '\"', escape = '\"', columns = {columns})"
        key = "url_decode(replace(key, '+', ' '))"
        found = {_snake(name) for name in names}
    else:
        reader, key = "read_parquet(?)", "key"
        found = {row[0] for row in db.execute(f"DESCRIBE SELECT * FROM {reader}", [str(path)]).fetchall()}  # noqa: S608
    if "key" not in found:
        raise ValueError(f"the inventory's files have no column Key: they have {', '.join(sorted(found))}")
    etag = "nullif(trim(e_tag, '\"'), '')" if "e_tag" in found else "NULL"
    size = "TRY_CAST(nullif(CAST(size AS VARCHAR), '') AS BIGINT)" if "size" in found else "NULL"
    latest = [
        condition
        for name, condition in (
            ("is_latest", "coalesce(CAST(is_latest AS VARCHAR), '') <> 'false'"),
            ("is_delete_marker", "coalesce(CAST(is_delete_marker AS VARCHAR), '') <> 'true'"),
        )
        if name in found
    ]
    where = " AND ".join(latest) or "true"
    db.execute(
        f"INSERT INTO objects SELECT ? || {key}, {etag}, {size} FROM {reader} WHERE {where}",  # noqa: S608  our own words
        [f"s3://{manifest.source_bucket}/", str(path)],
    )


def _snake(name: str) -> str:
    """The name that Parquet inventories use for a CSV's column: ETag is e_tag, IsLatest is is_latest."""
    found = "".join(f"_{c.lower()}" if c.isupper() else c for c in name if c.isalnum() or c == "_")
    return found.removeprefix("_")


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
