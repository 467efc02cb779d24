"""Published runs, as readers see them: the manifest that makes one valid, its parts, and the pointer to the newest.

Nothing here needs more than a run's URI, or changes anything but the pointer.
"""

import concurrent.futures
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pydantic import BaseModel, Field

from dragonclf import storage
from dragonclf.data import tables

MANIFEST, LATEST = "_manifest.json", "_latest.json"
NUM_READERS = 16
BATCH_ROWS = 8_192


class Manifest(BaseModel):
    """``_manifest.json``: what a published run holds. Small, whatever the number of images."""

    format: int = 1
    run: str = Field(description="Name of the run, SPEC-NUMBER.")
    uri: str = Field(description="Where it was published. A copy lies elsewhere.")
    verb: str
    spec: dict[str, Any]
    plan_digest: str
    planned_s: float = Field(description="When the listing of its images began, seconds since 1970: orders runs.")
    num_images: int = Field(description="Planned images = rows in all parts together.")
    num_parts: int
    counts: dict[str, int] = Field(description="Rows by status.")
    base: str | None = Field(default=None, description="Name of the earlier run that rows were kept of.")
    num_kept: int = Field(default=0, description="Rows kept of that run, whose images were not read.")
    num_deleted: int = Field(
        default=0, description="Images of that run that are no longer there: `deleted.parquet` of this one."
    )
    parts_table: str = Field(description="Name of the Parquet file that lists every part with its etag.")
    parts_sha256: str = Field(description="Of that file.")

    def num_with(self, *statuses: str) -> int:
        return sum(self.counts.get(status, 0) for status in statuses)


def point_to(out_uri: str, manifest: Manifest, *, atomic: bool = True) -> None:
    """Make a published run the one that readers take by default, unless a later planned one is that already."""
    advance_pointer(
        storage.join(out_uri, LATEST), {"run": manifest.run, "planned_s": manifest.planned_s}, atomic=atomic
    )


def advance_pointer(uri: str, pointer: dict[str, Any], *, atomic: bool = True) -> None:
    """Write a pointer unless what is there was planned later (``planned_s``): it moves forward, never back.

    Of two that were planned at one time the one that is written last stays.
    """
    data = json.dumps(pointer).encode()
    while True:
        found = storage.get_if_exists(uri)
        if found is None:
            if storage.put_if_absent(uri, data, atomic=atomic):
                return
        elif (
            found[0] == data
            or json.loads(found[0])["planned_s"] > pointer["planned_s"]
            or storage.put_if_match(uri, data, found[1], atomic=atomic)
        ):
            return


def read_manifest(run_uri: str) -> Manifest:
    """The manifest of a published run. ValueError if the run is not published."""
    found = storage.get_if_exists(storage.join(run_uri, MANIFEST))
    if found is None:
        raise ValueError(
            f"{run_uri} is not a published run: {MANIFEST} is missing; run the command that writes it to its end"
        )
    return Manifest.model_validate_json(found[0])


def read_latest(out_uri: str) -> str:
    """URI of the newest published run under `out_uri`. ValueError if there is none."""
    found = find_latest(out_uri)
    if found is None:
        raise ValueError(
            f"there is no published run under {out_uri}: {LATEST} is missing; name the folder given as --out"
        )
    return found


def find_latest(out_uri: str) -> str | None:
    """URI of the newest published run under `out_uri`, or None if there is none."""
    found = storage.get_if_exists(storage.join(out_uri, LATEST))
    return storage.join(out_uri, "runs", json.loads(found[0])["run"]) if found else None


def find_run(uri: str) -> str:
    """URI of the run that a user means: `uri` itself if it is a run's, else the newest published one under it."""
    uri = storage.resolve(uri).removesuffix("/")
    return uri if uri.rpartition("/")[0].endswith("/runs") else read_latest(uri)


def open_rows(run_uri: str, manifest: Manifest) -> ds.Dataset:
    """The rows of a published run, read lazily, of parts that `check_parts` has seen. ValueError as there."""
    filesystem, paths = storage.arrow_files(check_parts(run_uri, manifest))
    return ds.dataset(paths, format="parquet", filesystem=filesystem)


def read_batches(rows: ds.Dataset, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of `open_rows` in small batches, in constant memory.

    Part by part: the dataset's own scanner reads hundreds of MiB ahead of a slower consumer, whatever its readahead says.
    """
    for fragment in rows.get_fragments():
        assert isinstance(fragment, ds.ParquetFileFragment)
        with pq.ParquetFile(fragment.path, filesystem=fragment.filesystem, pre_buffer=True) as part:
            for batch in part.iter_batches(BATCH_ROWS, columns=columns):
                yield batch.select(columns)  # of columns x and x.y the reader takes both for x


def read_parts(run_uri: str, *, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield the tables of a published run's parts in plan order, reading one ahead. Raises ValueError if it is not published."""
    manifest = read_manifest(run_uri)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ahead: concurrent.futures.Future[pa.Table] | None = None
        for shard in range(manifest.num_parts):
            uri = storage.join(run_uri, f"parts/{shard:08d}.parquet")
            waiting, ahead = ahead, pool.submit(tables.read, uri, columns=columns)
            if waiting is not None:
                yield waiting.result()
        if ahead is not None:
            yield ahead.result()


def check_parts(run_uri: str, manifest: Manifest) -> list[str]:
    """URIs of a published run's parts. ValueError if one is not as it was when the run was published.

    That is told by its etag, and in a copy of the run, which has other etags, by what its footer says.
    """
    table = read_parts_table(run_uri, manifest)
    shards, sizes, etags = (table[name].to_pylist() for name in ("shard", "images", "etag"))
    found = {storage.name(part.uri): part.etag for part in list_parts(run_uri)}
    uris = [storage.join(run_uri, f"parts/{shard:08d}.parquet") for shard in shards]
    for uri, etag in zip(uris, etags, strict=True):
        if storage.name(uri) not in found or (run_uri == manifest.uri and found[storage.name(uri)] != etag):
            what = "was changed since" if storage.name(uri) in found else "is missing"
            raise ValueError(f"{uri} {what}, though the run is published: score again with --new-run")
    if run_uri != manifest.uri:
        with concurrent.futures.ThreadPoolExecutor(NUM_READERS) as pool:
            list(
                pool.map(
                    lambda part: check_part(part[0], manifest.run, *part[1:]), zip(uris, shards, sizes, strict=True)
                )
            )
    return uris


def read_parts_table(run_uri: str, manifest: Manifest) -> pa.Table:
    """One row a part: shard, images, etag, counts (JSON), first_uri, last_uri, num_kept. ValueError if it was changed since."""
    encoded = storage.get(storage.join(run_uri, manifest.parts_table))
    if hashlib.sha256(encoded).hexdigest() != manifest.parts_sha256:
        raise ValueError(
            f"{run_uri}/{manifest.parts_table} is not what {MANIFEST} says: it was changed since; score again with --new-run"
        )
    return tables.decode(encoded, manifest.parts_table)


def part_times(run_uri: str, manifest: Manifest) -> list[tuple[float, int]]:
    """(seconds since 1970, images that were read for it) of each part as it was written, in the order of time. A copy has other times."""
    table = read_parts_table(run_uri, manifest)
    shards, images, kept = (table[name].to_pylist() for name in ("shard", "images", "num_kept"))
    filesystem, paths = storage.arrow_files([storage.join(run_uri, f"parts/{shard:08d}.parquet") for shard in shards])
    times = [found.mtime_ns / 1e9 for found in filesystem.get_file_info(paths)]
    return sorted(zip(times, (all_ - few for all_, few in zip(images, kept, strict=True)), strict=True))


class PartFacts(BaseModel):
    """What the footer of a part tells beside its origin: a JSON object under the key ``dragonclf.facts``."""

    counts: dict[str, int] = Field(description="Rows by status.")
    first_uri: str = Field(description="The smallest, by code points.")
    last_uri: str = Field(description="The largest.")
    num_kept: int = Field(description="Rows kept of an earlier run.")


def check_part(uri: str, run: str, shard: int, num_rows: int) -> PartFacts:
    """What a part's footer tells. ValueError unless it is whole and that run's, that shard's, and of so many rows."""
    found_rows, metadata = tables.read_footer(uri)
    found = (metadata.get("dragonclf.run"), metadata.get("dragonclf.shard"), found_rows)
    if found != (run, str(shard), num_rows):
        raise ValueError(
            f"{uri} is not this run's part: it says (run, shard, rows) {found}, planned are {(run, str(shard), num_rows)}: "
            "something else writes here; choose another --out"
        )
    return PartFacts.model_validate_json(metadata["dragonclf.facts"])


def list_parts(run_uri: str) -> Iterator[storage.ObjectInfo]:
    try:
        yield from storage.list_objects(storage.join(run_uri, "parts"))
    except storage.ObjectMissingError:
        return  # a local run without parts has no folder for them
