"""S3 Inventories as S3 writes them: CSV with encoded keys and no header, Parquet with S3's names, versions, checksums."""

import csv
import gzip
import hashlib
import io
import json
from typing import Any
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dragonclf import storage
from dragonclf.config import IndexConfig
from dragonclf.data import inventory, listing
from dragonclf.demo.local_s3 import LocalS3
from dragonclf.verbs import index

FOLDER = "inventory/photos/daily/2026-11-01T01-00Z"
SCHEMA = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, LastModifiedDate, ETag, StorageClass"
KEYS = [
    "cats/a b.jpg",
    "cats/plus+and&=.jpg",
    "dogs/é 日本 😀.jpg",
    'dogs/q"u,ote%2F.jpg',
    "dogs/",
    "a//b.jpg",
    "new\nline.jpg",
]


@pytest.fixture
def root(s3_env: LocalS3, request: pytest.FixtureRequest) -> str:
    return f"s3://work/{request.node.name}/{FOLDER}"


def csv_gz(rows: list[list[object]]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return gzip.compress(buffer.getvalue().encode())


def csv_row(
    key: str, size: int | str, *, latest: str = "true", deleted: str = "false", etag: str = "e1"
) -> list[object]:
    return [
        "photos",
        quote_plus(key, safe="/"),
        "v1",
        latest,
        deleted,
        size,
        "2026-10-31T10:00:00.000Z",
        etag,
        "STANDARD",
    ]


def write(root: str, files: list[bytes], /, *, form: str = "CSV", schema: str = SCHEMA, **changed: Any) -> str:
    """Write an inventory; URI of its manifest."""
    described = []
    for number, data in enumerate(files):
        uri = f"{root}/../data/{number}.{form.lower()}".replace(f"{FOLDER}/../", "inventory/photos/daily/")
        storage.put(uri, data)
        described.append(
            {"key": uri.removeprefix("s3://work/"), "size": len(data), "MD5checksum": hashlib.md5(data).hexdigest()}
        )
    manifest = {
        "sourceBucket": "photos", "destinationBucket": "arn:aws:s3:::work", "version": "2016-11-30", "creationTimestamp": "1793494800000",
        "fileFormat": form, "fileSchema": schema, "files": described,
    } | changed  # fmt: skip
    data = json.dumps(manifest).encode()
    storage.put(f"{root}/manifest.json", data)
    storage.put(f"{root}/manifest.checksum", hashlib.md5(data).hexdigest().encode() + b"\n")
    return f"{root}/manifest.json"


def rows(source: str) -> pa.Table:
    return pa.concat_tables(listing.list_rows(source))


def expected() -> list[dict[str, object]]:
    found = [{"uri": f"s3://photos/{key}", "etag": "e1", "size": 10 + number} for number, key in enumerate(KEYS)]
    return sorted(found, key=lambda row: str(row["uri"]).encode())


def test_csv_files_become_rows_in_the_order_of_their_uris(root: str):
    given = [csv_row(key, 10 + number) for number, key in enumerate(KEYS)]
    table = rows(write(root, [csv_gz(given[::2]), csv_gz(given[1::2])]))
    assert table.schema == listing.SCHEMA
    assert table.to_pylist() == expected()


def test_only_latest_versions_and_no_delete_markers_count(root: str):
    given = [csv_row(key, 10 + number) for number, key in enumerate(KEYS)]
    older = [csv_row(KEYS[0], 5, latest="false", etag="old"), csv_row("gone.jpg", 5, latest="false")]
    marker = [csv_row("gone.jpg", "", deleted="true", etag="")]
    assert rows(write(root, [csv_gz(older + given + marker)])).to_pylist() == expected()


def test_parquet_files_have_keys_as_they_are(root: str):
    table = pa.table(
        {
            "bucket": ["photos"] * len(KEYS), "key": KEYS, "version_id": [None] * len(KEYS), "is_latest": [True] * len(KEYS),
            "is_delete_marker": [False] * len(KEYS), "size": range(10, 10 + len(KEYS)), "e_tag": ["e1"] * len(KEYS),
        }
    )  # fmt: skip
    old = pa.table({**{name: table[name][:1] for name in table.column_names}, "is_latest": [False]})
    files = []
    for part in (table, old):
        buffer = io.BytesIO()
        pq.write_table(part, buffer)
        files.append(buffer.getvalue())
    assert rows(write(root, files, form="Parquet", schema="message s3.inventory {}")).to_pylist() == expected()


def test_an_inventory_without_etag_and_size_has_none(root: str):
    table = rows(write(root, [csv_gz([["photos", "a+b.jpg"]])], schema="Bucket, Key"))
    assert table.to_pylist() == [{"uri": "s3://photos/a b.jpg", "etag": None, "size": None}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fileFormat": "ORC"}, "fileFormat: ORC is not supported: set the inventory's output format to CSV or Apache Parquet"),
        ({"files": [{"key": "no"}]}, "files.0.MD5checksum: Field required"),
        ({"fileSchema": "Bucket, Size"}, "no column Key: they have bucket, size"),
        ({"files": []}, "has no object: check the name"),
    ],
)  # fmt: skip
def test_an_inventory_that_cannot_be_read_says_why(root: str, change: dict[str, Any], message: str):
    source = write(root, [csv_gz([["photos", "1"]])], **change)
    with pytest.raises(ValueError, match=message):
        rows(source)


def test_damage_is_found(root: str):
    source = write(root, [csv_gz([csv_row("a.jpg", 1)])])
    [file] = inventory.open_inventory(source).files
    storage.put(f"s3://work/{file.key}", csv_gz([csv_row("b.jpg", 1)]))
    with pytest.raises(
        ValueError, match=rf"s3://work/{file.key} has the MD5 .* says {file.md5}: copy the inventory again"
    ):
        rows(source)
    storage.put(f"{root}/manifest.checksum", b"0" * 32)
    with pytest.raises(ValueError, match=r"manifest.json does not have the MD5 that manifest.checksum beside it tells"):
        rows(source)
    storage.put(f"{root}/manifest.json", b"[")
    storage.put(f"{root}/manifest.checksum", hashlib.md5(b"[").hexdigest().encode())
    with pytest.raises(ValueError, match=r"is not the manifest.json of an S3 Inventory: it is no JSON"):
        rows(source)


def test_a_key_that_stands_twice_is_refused(root: str):
    with pytest.raises(ValueError, match=r"names s3://photos/a.jpg more than once"):
        rows(write(root, [csv_gz([csv_row("a.jpg", 1), csv_row("b.jpg", 1)]), csv_gz([csv_row("a.jpg", 2)])]))


def test_a_missing_file_is_storages_error(root: str):
    source = write(root, [], files=[{"key": "no/such.csv.gz", "MD5checksum": "0"}])
    with pytest.raises(storage.ObjectMissingError, match=r"cannot read s3://work/no/such.csv.gz: it does not exist"):
        rows(source)


def test_classes_are_the_folders_of_the_source_bucket_and_patterns_match_there(root: str):
    keys = [f"{name}/{i}.jpg" for name in ("cats", "dogs") for i in range(3)] + ["tmp/1.jpg"]
    source = write(root, [csv_gz([csv_row(key, 1) for key in keys])])
    config = IndexConfig(source=source, out="s3://work/x", exclude=["tmp/"])
    with index._stage(config) as staged:
        table = pq.read_table(next(path for path in staged.folder.iterdir() if path.name[:8].isdigit()))
    assert table["label"].to_pylist() == ["cats"] * 3 + ["dogs"] * 3
    assert table["uri"].to_pylist() == [f"s3://photos/{key}" for key in keys[:6]]
