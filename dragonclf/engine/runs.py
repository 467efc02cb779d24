"""Runs: where an engine job's files lie, who may write them, and the one write that makes them valid.

    OUT/_latest.json                      pointer to the newest published run: a convenience, repaired by the next command
    OUT/runs/SPEC.lease.json              who is at work on this spec
    OUT/runs/SPEC-00001/run.json          the claim: spec and number, written by If-None-Match
                        plan/HASH/        the images of each shard; plan.json, last, names the HASH that counts
                        attempts/*        one empty mark for each time that a shard was begun
                        parts/*.parquet   one file a shard, named after it, written by If-None-Match
                        parts-FENCE.parquet   one row a part: shard, rows, etag, counts by status
                        _manifest.json    the publication, by If-None-Match, last; names the parts table that counts

SPEC is a hash of everything that changes results. A run with ``_manifest.json`` is whole and never changes; one without it is resumed
by the same command. docs/guarantees.md tells why this holds whatever is killed.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, Field

from dragonclf import storage
from dragonclf.data import tables
from dragonclf.engine import lease, plan, published
from dragonclf.engine.published import MANIFEST, Manifest

log = logging.getLogger("dragonclf")

CLAIM = "run.json"
RETRIED = (
    "missing",
    "denied",
    "timeout",
    "decoder_crash",
)  # what may come out otherwise next time; the rest is the image's own


class Run(BaseModel):
    """A claimed run and its plan. `published` tells a finished one."""

    uri: str
    verb: str
    spec: dict[str, Any]
    name: str
    base: str | None = Field(
        description="URI of the run whose rows are kept but for its errors. None: every image is read."
    )
    plan: plan.PlanSummary
    published: bool
    atomic: bool = Field(description="Whether the store keeps conditional writes.")

    def part_uri(self, shard: int) -> str:
        return storage.join(self.uri, f"parts/{shard:08d}.parquet")


class Claim(BaseModel):
    """``run.json``."""

    run: str
    verb: str
    spec: dict[str, Any]
    base: str | None = Field(description="Name of the run whose errors are retried.")


def lease_uri(out_uri: str, verb: str, spec: dict[str, Any]) -> str:
    """Where the lease lies that `open_run` and what follows need."""
    return storage.join(out_uri, "runs", f"{_digest(verb, spec)}.lease.json")


def open_run(
    out_uri: str,
    verb: str,
    spec: dict[str, Any],
    stage: Callable[[], plan.StagedPlan],
    *,
    held: lease.Lease,
    new_run: bool = False,
    retry_errors: bool = False,
) -> Run:
    """Return the run that `spec` asks for: an unpublished one to resume, a published one with nothing left to do, or a new one.

    `held` is acquired, before the input is listed if there was a run before, else after: a listing that fails leaves nothing.
    `stage` lists the input; it is not called if there is a run to resume. A published run stands if the new plan equals its own, unless
    `new_run`. With `retry_errors` a new run keeps the newest published one's plan and rows, but for those whose status is in `RETRIED`.
    """
    digest = _digest(verb, spec)
    with contextlib.ExitStack() as stack:
        staged = None
        if not retry_errors and _last_number(out_uri, digest) == 0:
            staged = stack.enter_context(stage())
        held.acquire()
        number = _last_number(out_uri, digest)
        uri = _run_uri(out_uri, digest, number)
        last = _read_run(uri, held.atomic) if number else None
        if last is not None and not last.published:
            if new_run or retry_errors:
                log.info("run %s is not finished: it is resumed first", last.name)
            return last
        base: str | None = None
        if number and last is None:
            base = _read_claim(uri).base  # claimed by a driver that came no further
        elif retry_errors:
            if last is None:
                raise ValueError(f"there is no run of this model and input under {out_uri}: leave --retry-errors out")
            if not published.read_manifest(last.uri).num_with(*RETRIED):
                log.info("%s: run %s has no row to try again (%s)", verb, last.name, ", ".join(RETRIED))
                return last
            base = last.name
        if base is None:
            staged = staged or stack.enter_context(stage())
            if last is not None and last.plan.digest == staged.summary.digest and not new_run:
                return last
        if last is not None or not number:
            number += 1
        uri = _run_uri(out_uri, digest, number)
        claim = Claim(run=storage.name(uri), verb=verb, spec=spec, base=base)
        storage.put_if_absent(storage.join(uri, CLAIM), claim.model_dump_json(indent=2).encode(), atomic=held.atomic)
        # If another driver claimed this number first it runs the same spec, and its claim says whose plan the run has.
        base = _read_claim(uri).base
        if base is not None:
            plan.copy(_sibling(uri, base), uri, atomic=held.atomic)
        else:
            staged = staged or stack.enter_context(stage())
            staged.upload(uri, atomic=held.atomic)
    run = _read_run(uri, held.atomic)
    assert run is not None
    return run


def missing_shards(run: Run) -> list[int]:
    """Shards that have no part yet."""
    done = {storage.name(found.uri) for found in published.list_parts(run.uri)}
    return [shard for shard in range(run.plan.num_shards) if f"{shard:08d}.parquet" not in done]


def begin_shard(run: Run, shard: int) -> int:
    """Note that a process begins the shard. Returns how often that was so, this time included: from 2 on, something ended one."""
    attempt = 1
    while not storage.put_if_absent(
        storage.join(run.uri, f"attempts/{shard:08d}-{attempt}"), uuid.uuid4().bytes, atomic=run.atomic
    ):
        attempt += 1
    return attempt


def write_part(run: Run, shard: int, table: pa.Table) -> dict[str, int]:
    """Store a shard's rows unless its part is there already. Returns the part's counts by status.

    The footer names run, shard and counts; a part of another driver is accepted only if they fit.
    """
    counts = Counter(table["status"].to_pylist())
    metadata = {"dragonclf.run": run.name, "dragonclf.shard": str(shard), "dragonclf.counts": json.dumps(counts)}
    uri = run.part_uri(shard)
    if storage.put_if_absent(uri, tables.encode(table, metadata=metadata), atomic=run.atomic):
        return dict(counts)
    return published.check_part(run.part_uri(shard), run.name, shard, table.num_rows)


def redo_errors(run: Run, shard: int, planned: pa.Table, process: Callable[[pa.Table], pa.Table]) -> pa.Table:
    """Rows of a shard of a run with a `base`: the base's own, and what `process` makes of the images whose status is in `RETRIED`."""
    assert run.base is not None
    kept = tables.read(storage.join(run.base, f"parts/{shard:08d}.parquet"))
    if kept["uri"] != planned["uri"]:
        raise ValueError(f"{run.uri} and {run.base} do not plan the same images: choose another --out")
    again = [row for row, status in enumerate(kept["status"].to_pylist()) if status in RETRIED]
    if not again:
        return kept
    places = list(range(kept.num_rows))
    for offset, row in enumerate(again):
        places[row] = kept.num_rows + offset
    redone = process(planned.take(again))
    return pa.concat_tables([kept.replace_schema_metadata(None), redone.replace_schema_metadata(None)]).take(places)


def publish(run: Run, *, fence: int) -> Manifest:
    """Check that every planned image has its row in the store, then make the run valid by one conditional write.

    `fence` tells this driver's table of parts from those of others. Raises ValueError naming the part that is missing or does not fit;
    nothing is published then.
    """
    sizes = plan.shard_sizes(run.uri, run.plan)
    etags = {storage.name(found.uri): found.etag for found in published.list_parts(run.uri)}
    for shard in range(len(sizes)):
        if f"{shard:08d}.parquet" not in etags:
            raise ValueError(
                f"{run.part_uri(shard)} is missing: run the command again, it makes the parts that are not there"
            )
    with concurrent.futures.ThreadPoolExecutor(published.NUM_READERS) as pool:
        counts = list(
            pool.map(
                lambda shard: published.check_part(run.part_uri(shard), run.name, shard, sizes[shard]),
                range(len(sizes)),
            )
        )
    parts = pa.table(
        {
            "shard": pa.array(range(len(sizes)), pa.int64()),
            "images": pa.array(sizes, pa.int64()),
            "etag": [etags[f"{shard:08d}.parquet"] for shard in range(len(sizes))],
            "counts": [json.dumps(count) for count in counts],
        }
    )
    encoded, parts_table = tables.encode(parts), f"parts-{fence:05d}.parquet"
    storage.put(storage.join(run.uri, parts_table), encoded)
    manifest = Manifest(
        run=run.name, uri=run.uri, verb=run.verb, spec=run.spec, plan_digest=run.plan.digest, planned_s=run.plan.planned_s,
        num_images=run.plan.num_images, num_parts=len(sizes), counts=dict(sum(map(Counter, counts), Counter())),
        parts_table=parts_table, parts_sha256=hashlib.sha256(encoded).hexdigest(),
    )  # fmt: skip
    assert sum(manifest.counts.values()) == manifest.num_images
    data = manifest.model_dump_json(indent=2).encode()
    if storage.put_if_absent(storage.join(run.uri, MANIFEST), data, atomic=run.atomic):
        return manifest
    return published.read_manifest(run.uri)


def _digest(verb: str, spec: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([verb, spec], sort_keys=True).encode()).hexdigest()[:12]


def _run_uri(out_uri: str, digest: str, number: int) -> str:
    return storage.join(out_uri, "runs", f"{digest}-{number:05d}")


def _last_number(out_uri: str, digest: str) -> int:
    number = 0
    while storage.stat(storage.join(_run_uri(out_uri, digest, number + 1), CLAIM)):
        number += 1
    return number


def _sibling(run_uri: str, name: str) -> str:
    return storage.join(run_uri.rpartition("/")[0], name)


def _read_claim(uri: str) -> Claim:
    return Claim.model_validate_json(storage.get(storage.join(uri, CLAIM)))


def _read_run(uri: str, atomic: bool) -> Run | None:
    """The run at `uri`, or None if it was claimed and has no plan yet."""
    summary = plan.read_summary(uri)
    if summary is None:
        return None
    claim = _read_claim(uri)
    return Run(
        uri=uri, verb=claim.verb, spec=claim.spec, name=claim.run, plan=summary, atomic=atomic,
        base=_sibling(uri, claim.base) if claim.base else None,
        published=storage.stat(storage.join(uri, MANIFEST)) is not None,
    )  # fmt: skip
