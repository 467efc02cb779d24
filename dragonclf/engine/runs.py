"""Runs: where an engine job's files lie, who may write them, and the one write that makes them valid.

    OUT/_latest.json                      pointer to the newest published run: a convenience, repaired by the next run
    OUT/runs/SPEC-00001/run.json          the claim: spec and number, written by If-None-Match
                        plan/HASH/        the images of each shard; plan.json, last, names the HASH that counts
                        parts/*.parquet   one file a shard, named after it, written by If-None-Match
                        parts.parquet     one row a part: shard, rows, etag, counts by status
                        _manifest.json    the publication, by If-None-Match, last

SPEC is a hash of everything that changes results. A run with ``_manifest.json`` is whole and never changes; one without it is resumed
by the same command.
"""

import concurrent.futures
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, Field

from dragonclf import storage
from dragonclf.data import tables
from dragonclf.engine import plan

CLAIM, MANIFEST, LATEST, PARTS_TABLE = "run.json", "_manifest.json", "_latest.json", "parts.parquet"
NUM_READERS = 16


class Run(BaseModel):
    """A claimed run and its plan. `published` tells a finished one."""

    uri: str
    verb: str
    spec: dict[str, Any]
    name: str
    plan: plan.PlanSummary
    published: bool

    def part_uri(self, shard: int) -> str:
        return storage.join(self.uri, f"parts/{shard:08d}.parquet")


class Manifest(BaseModel):
    """``_manifest.json``: what a published run holds. Small, whatever the number of images."""

    format: int = 1
    run: str = Field(description="Name of the run, SPEC-NUMBER.")
    verb: str
    spec: dict[str, Any]
    plan_digest: str
    planned_s: float = Field(description="When the plan was claimed, seconds since 1970: orders runs.")
    num_images: int = Field(description="Planned images = rows in all parts together.")
    num_parts: int
    counts: dict[str, int] = Field(description="Rows by status.")
    parts_sha256: str = Field(description="Of parts.parquet, which lists every part with its etag.")


def open_run(out_uri: str, verb: str, spec: dict[str, Any], stage: Callable[[], plan.StagedPlan]) -> Run:
    """Return the run that `spec` asks for: an unpublished one to resume, a published one with nothing left to do, or a new one.

    `stage` lists the input; it is not called if there is a run to resume. A published run stands if the new plan equals its own.
    """
    digest = hashlib.sha256(json.dumps([verb, spec], sort_keys=True).encode()).hexdigest()[:12]
    number = 0
    while storage.stat(storage.join(_run_uri(out_uri, digest, number + 1), CLAIM)):
        number += 1
    last = _read_run(_run_uri(out_uri, digest, number)) if number else None
    if last is not None and not last.published:
        return last
    with stage() as staged:
        if last is not None and last.plan.digest == staged.summary.digest:
            return last
        if number == 0 or last is not None:
            number += 1
        uri = _run_uri(out_uri, digest, number)
        claim = {"run": storage.name(uri), "verb": verb, "spec": spec, "planned_s": time.time()}
        # If another driver claims this number first it runs the same spec: both then work on the one plan that wins.
        storage.put_if_absent(storage.join(uri, CLAIM), json.dumps(claim, indent=2).encode())
        staged.upload(uri)
    run = _read_run(uri)
    assert run is not None
    return run


def missing_shards(run: Run) -> list[int]:
    """Shards that have no part yet."""
    done = {storage.name(found.uri) for found in _list_parts(run)}
    return [shard for shard in range(run.plan.num_shards) if f"{shard:08d}.parquet" not in done]


def write_part(run: Run, shard: int, table: pa.Table) -> dict[str, int]:
    """Store a shard's rows unless its part is there already. Returns the part's counts by status.

    The footer names run, shard and counts; a part of another driver is accepted only if they fit.
    """
    counts = Counter(table["status"].to_pylist())
    metadata = {"dragonclf.run": run.name, "dragonclf.shard": str(shard), "dragonclf.counts": json.dumps(counts)}
    uri = run.part_uri(shard)
    if storage.put_if_absent(uri, tables.encode(table, metadata=metadata)):
        return dict(counts)
    return _check_part(run, shard, table.num_rows)


def publish(run: Run) -> Manifest:
    """Check that every planned image has its row in the store, then make the run valid by one conditional write.

    Raises ValueError naming the part that is missing or does not fit; nothing is published then.
    """
    sizes = plan.shard_sizes(run.uri, run.plan)
    etags = {storage.name(found.uri): found.etag for found in _list_parts(run)}
    for shard in range(len(sizes)):
        if f"{shard:08d}.parquet" not in etags:
            raise ValueError(
                f"{run.part_uri(shard)} is missing: run the command again, it makes the parts that are not there"
            )
    with concurrent.futures.ThreadPoolExecutor(NUM_READERS) as pool:
        counts = list(pool.map(lambda shard: _check_part(run, shard, sizes[shard]), range(len(sizes))))
    parts = pa.table(
        {
            "shard": pa.array(range(len(sizes)), pa.int64()),
            "images": pa.array(sizes, pa.int64()),
            "etag": [etags[f"{shard:08d}.parquet"] for shard in range(len(sizes))],
            "counts": [json.dumps(count) for count in counts],
        }
    )
    encoded = tables.encode(parts)
    storage.put(storage.join(run.uri, PARTS_TABLE), encoded)
    claim = json.loads(storage.get(storage.join(run.uri, CLAIM)))
    manifest = Manifest(
        run=run.name, verb=run.verb, spec=run.spec, plan_digest=run.plan.digest, planned_s=claim["planned_s"],
        num_images=run.plan.num_images, num_parts=len(sizes), counts=dict(sum(map(Counter, counts), Counter())),
        parts_sha256=hashlib.sha256(encoded).hexdigest(),
    )  # fmt: skip
    assert sum(manifest.counts.values()) == manifest.num_images
    if not storage.put_if_absent(storage.join(run.uri, MANIFEST), manifest.model_dump_json(indent=2).encode()):
        manifest = read_manifest(run.uri)
    pointer = {"run": manifest.run, "planned_s": manifest.planned_s}
    advance_pointer(storage.join(run.uri.rpartition("/runs/")[0], LATEST), pointer)
    return manifest


def advance_pointer(uri: str, pointer: dict[str, Any]) -> None:
    """Write a pointer unless what is there was planned later (``planned_s``): it moves forward, never back."""
    data = json.dumps(pointer).encode()
    while True:
        found = storage.get_if_exists(uri)
        if found is None:
            if storage.put_if_absent(uri, data):
                return
        elif json.loads(found[0])["planned_s"] >= pointer["planned_s"] or storage.put_if_match(uri, data, found[1]):
            return


def read_manifest(run_uri: str) -> Manifest:
    """The manifest of a published run. ValueError if the run is not published."""
    found = storage.get_if_exists(storage.join(run_uri, MANIFEST))
    if found is None:
        raise ValueError(
            f"{run_uri} is not a published run: {MANIFEST} is missing; run the command that writes it to its end"
        )
    return Manifest.model_validate_json(found[0])


def read_parts(run_uri: str, *, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield the tables of a published run's parts in plan order, reading a few ahead. Raises ValueError if it is not published."""
    manifest = read_manifest(run_uri)
    uris = [storage.join(run_uri, f"parts/{shard:08d}.parquet") for shard in range(manifest.num_parts)]
    with concurrent.futures.ThreadPoolExecutor(NUM_READERS) as pool:
        for start in range(0, len(uris), NUM_READERS):
            yield from pool.map(lambda uri: tables.read(uri, columns=columns), uris[start : start + NUM_READERS])


def _run_uri(out_uri: str, digest: str, number: int) -> str:
    return storage.join(out_uri, "runs", f"{digest}-{number:05d}")


def _read_run(uri: str) -> Run | None:
    """The run at `uri`, or None if it was claimed and has no plan yet."""
    summary = plan.read_summary(uri)
    if summary is None:
        return None
    claim = json.loads(storage.get(storage.join(uri, CLAIM)))
    published = storage.stat(storage.join(uri, MANIFEST)) is not None
    return Run(uri=uri, verb=claim["verb"], spec=claim["spec"], name=claim["run"], plan=summary, published=published)


def _list_parts(run: Run) -> Iterator[storage.ObjectInfo]:
    try:
        yield from storage.list_objects(storage.join(run.uri, "parts"))
    except storage.ObjectMissingError:
        return  # a local run without parts has no folder for them


def _check_part(run: Run, shard: int, num_rows: int) -> dict[str, int]:
    found_rows, metadata = tables.read_footer(run.part_uri(shard))
    found = (metadata.get("dragonclf.run"), metadata.get("dragonclf.shard"), found_rows)
    if found != (run.name, str(shard), num_rows):
        raise ValueError(
            f"{run.part_uri(shard)} is not this run's part: it says (run, shard, rows) {found}, planned are "
            f"{(run.name, str(shard), num_rows)}: something else writes here; choose another --out"
        )
    return json.loads(metadata["dragonclf.counts"])
