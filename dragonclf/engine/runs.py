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
from dragonclf.engine import lease, plan, published, reuse
from dragonclf.engine.published import MANIFEST, Manifest, PartFacts

log = logging.getLogger("dragonclf")

CLAIM = "run.json"
LATEST_RUN = "latest"  # as a value of `since`
INPUT = "input"  # key of a spec: what was listed; the other keys tell what was done to it


class Run(BaseModel):
    """A claimed run and its plan. `published` tells a finished one."""

    uri: str
    verb: str
    spec: dict[str, Any]
    name: str
    base: str | None = Field(
        description="URI of the earlier run whose rows are kept where they hold. None: every image is read."
    )
    same_plan: bool = Field(description="Whether its plan is this run's too: only its errors are tried again.")
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
    base: str | None = Field(
        description="Name of the earlier run whose rows are used; a URI if it lies under another output."
    )
    same_plan: bool = Field(description="Whether its plan is this run's too: only its errors are tried again.")


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
    since: str | None = None,
    made_of: str | None = None,
) -> Run:
    """Return the run that `spec` asks for: an unpublished one to resume, a published one with nothing left to do, or a new one.

    `held` is acquired, before the input is listed if there was a run before, else after: a listing that fails leaves nothing.
    `stage` lists the input; it is not called if there is a run to resume. A published run stands if the new plan equals its own, unless
    `new_run`. With `retry_errors` a new run keeps the newest published one's plan and rows, but for those whose status is in `RETRIED`.
    With `since` ("latest", or a run's name) it keeps the rows of that published run for objects that have not changed. With `made_of`, the
    URI of a published run that `spec` names, it has that run's plan, and nothing is listed.
    """
    digest = _digest(verb, spec)
    with contextlib.ExitStack() as stack:
        staged = None
        if not retry_errors and made_of is None and _last_number(out_uri, digest) == 0:
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
        same_plan = retry_errors or made_of is not None
        if number and last is None:
            base, same_plan = _kept_of(uri)  # claimed by a driver that came no further
        elif made_of is not None:
            if last is not None and not new_run:
                return last  # what it is made of never changes
            base = made_of
        elif retry_errors:
            if last is None:
                raise ValueError(f"there is no run of this model and input under {out_uri}: leave --retry-errors out")
            if not published.read_manifest(last.uri).num_with(*reuse.RETRIED):
                log.info("%s: run %s has no row to try again (%s)", verb, last.name, ", ".join(reuse.RETRIED))
                return last
            base = last.name
        elif since is not None:
            base = _since(since, out_uri, verb, spec, last)
        if not same_plan:
            staged = staged or stack.enter_context(stage())
            if last is not None and last.plan.digest == staged.summary.digest and not new_run:
                return last
        if last is not None or not number:
            number += 1
        uri = _run_uri(out_uri, digest, number)
        claim = Claim(run=storage.name(uri), verb=verb, spec=spec, base=base, same_plan=same_plan)
        storage.put_if_absent(storage.join(uri, CLAIM), claim.model_dump_json(indent=2).encode(), atomic=held.atomic)
        # If another driver claimed this number first it runs the same spec, and its claim says whose plan the run has.
        base, same_plan = _kept_of(uri)
        if base is not None and same_plan:
            plan.copy(_sibling(uri, base), uri, atomic=held.atomic)
        else:
            staged = staged or stack.enter_context(stage())
            staged.upload(uri, atomic=held.atomic)
    run = _read_run(uri, held.atomic)
    assert run is not None
    return run


def has_run(out_uri: str, verb: str, spec: dict[str, Any]) -> bool:
    """Whether a run of `spec` was begun."""
    return _last_number(out_uri, _digest(verb, spec)) > 0


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


def write_part(run: Run, shard: int, table: pa.Table, *, num_kept: int = 0) -> PartFacts:
    """Store a shard's rows, `num_kept` of them an earlier run's, unless its part is there already. Returns what the part's footer tells.

    The footer names run and shard, and holds the run's spec (model, transform, precision...); a part of another driver is accepted only
    if they fit.
    """
    uris = table["uri"].to_pylist()
    facts = PartFacts(
        counts=Counter(table["status"].to_pylist()), first_uri=min(uris), last_uri=max(uris), num_kept=num_kept
    )
    metadata = {
        "dragonclf.run": run.name, "dragonclf.shard": str(shard), "dragonclf.facts": facts.model_dump_json(),
        "dragonclf.spec": json.dumps(run.spec),
    }  # fmt: skip
    uri = run.part_uri(shard)
    if storage.put_if_absent(uri, tables.encode(table, metadata=metadata), atomic=run.atomic):
        return facts
    return published.check_part(run.part_uri(shard), run.name, shard, table.num_rows)


def publish(run: Run, *, fence: int, num_deleted: int = 0) -> Manifest:
    """Check that every planned image has its row in the store, then make the run valid by one conditional write.

    `fence` tells this driver's table of parts from those of others, `num_deleted` images of the earlier run are no longer there. Raises
    ValueError naming the part that is missing or does not fit; nothing is published then.
    """
    sizes = plan.shard_sizes(run.uri, run.plan)
    etags = {storage.name(found.uri): found.etag for found in published.list_parts(run.uri)}
    for shard in range(len(sizes)):
        if f"{shard:08d}.parquet" not in etags:
            raise ValueError(
                f"{run.part_uri(shard)} is missing: run the command again, it makes the parts that are not there"
            )
    with concurrent.futures.ThreadPoolExecutor(published.NUM_READERS) as pool:
        facts = list(
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
            "counts": [json.dumps(part.counts) for part in facts],
            "first_uri": pa.array([part.first_uri for part in facts], pa.string()),
            "last_uri": pa.array([part.last_uri for part in facts], pa.string()),
            "num_kept": pa.array([part.num_kept for part in facts], pa.int64()),
        }
    )
    encoded, parts_table = tables.encode(parts), f"parts-{fence:05d}.parquet"
    storage.put(storage.join(run.uri, parts_table), encoded)
    manifest = Manifest(
        run=run.name, uri=run.uri, verb=run.verb, spec=run.spec, plan_digest=run.plan.digest, planned_s=run.plan.planned_s,
        num_images=run.plan.num_images, num_parts=len(sizes), counts=dict(sum((Counter(part.counts) for part in facts), Counter())),
        base=storage.name(run.base) if run.base else None, num_kept=sum(part.num_kept for part in facts), num_deleted=num_deleted,
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
    """The run of that name beside `run_uri`; a URI stays what it is."""
    return name if "/" in name else storage.join(run_uri.rpartition("/")[0], name)


def _since(since: str, out_uri: str, verb: str, spec: dict[str, Any], last: Run | None) -> str | None:
    """Name of the published run whose rows may be kept. None for "latest" where there is none yet."""
    if since == LATEST_RUN:
        if last is None:
            log.info("%s: no earlier run of this model and input: every image is read", verb)
        return last.name if last else None
    found = published.read_manifest(storage.join(out_uri, "runs", since))
    now, then = {"verb": verb} | spec, {"verb": found.verb} | found.spec
    for name in dict.fromkeys([*now, *then]):
        if name != INPUT and then.get(name) != now.get(name):
            raise ValueError(
                f"rows of run {since} cannot be kept: its {name} was {then.get(name)!r} and is {now.get(name)!r} now; leave --since out, "
                "which reads every image"
            )
    return since


def _kept_of(uri: str) -> tuple[str | None, bool]:
    claim = _read_claim(uri)
    return claim.base, claim.same_plan


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
        base=_sibling(uri, claim.base) if claim.base else None, same_plan=claim.same_plan,
        published=storage.stat(storage.join(uri, MANIFEST)) is not None,
    )  # fmt: skip
