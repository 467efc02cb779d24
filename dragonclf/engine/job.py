"""A whole engine job, as every verb runs it: lease, run, shards, publication, pointer."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dragonclf import progress, session, storage
from dragonclf.config import RayConfig, RunConfig
from dragonclf.engine import execute, lease, plan, published, runs
from dragonclf.engine.actor import ShardDone, Task
from dragonclf.engine.budget import Budget
from dragonclf.engine.pipeline import SCORED
from dragonclf.outcomes import TooManyErrorsError

log = logging.getLogger("dragonclf")

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Outcome:
    """A published run."""

    uri: str
    manifest: published.Manifest
    atomic: bool  # whether the output's store keeps conditional writes
    images_per_s: (
        float | None
    )  # of the images that this call read, the start of its actors included; None: nothing was to do
    bottleneck: str | None  # what the workers waited for most, and what would help; None: they read nothing


def run(
    out_uri: str,
    verb: str,
    spec: dict[str, Any],
    stage: Callable[[], plan.StagedPlan],
    task: Task,
    *,
    ray_config: RayConfig,
    run_config: RunConfig,
    retry_errors: bool = False,
    since: str | None = None,
    made_of: str | None = None,
    budget: Budget | None = None,
) -> Outcome:
    """Bring the run that `spec` asks for to its publication, and point to it. `retry_errors`, `since`, `made_of` as in `runs.open_run`.

    Raises:
        BusyError: another driver is at work on it.
        StorageError, ValueError: what stopped it; the same command resumes.
        BudgetSpentError: `budget` is spent; the same command goes on.
        TooManyErrorsError: it is published and not pointed to.
    """
    uri = runs.lease_uri(out_uri, verb, spec)
    with lease.Lease(uri, at_least_once=run_config.at_least_once) as held:
        run = runs.open_run(
            out_uri, verb, spec, stage, held=held, new_run=run_config.new_run, retry_errors=retry_errors,
            since=since, made_of=made_of,
        )  # fmt: skip
        rate, bottleneck = None, None
        if run.published:
            log.info("%s: nothing to do: run %s is published", verb, run.name)
            manifest = published.read_manifest(run.uri)
        else:
            log.info("%s: run %s of %s images", verb, run.uri, f"{run.plan.num_images:,}")
            with session.connect(ray_config.address), progress.images(verb, run.plan.num_images) as tally:

                def note(num_images: int, done: ShardDone | None) -> None:
                    if done is None or done.facts is None:
                        tally.add(num_images)
                    else:
                        facts = done.facts
                        tally.add(num_images, read=num_images - facts.num_kept, counts=facts.counts, busy=done.busy)

                manifest = execute.execute(
                    run, task, note, held, num_actors=ray_config.num_actors,
                    cpus_per_actor=ray_config.cpus_per_actor, max_actor_bytes=run_config.max_actor_bytes,
                    budget=budget,
                )  # fmt: skip
            rate = tally.read / tally.seconds
            if tally.busy.wall_s:
                bottleneck = tally.busy.verdict
                log.info("%s: what it waited for most: %s", verb, bottleneck)
            _write_summary(run.uri, tally, rate)
        _check_errors(run, manifest, run_config.max_error_rate)
        published.point_to(out_uri, manifest, atomic=held.atomic)
        return Outcome(run.uri, manifest, held.atomic, rate, bottleneck)


def _write_summary(run_uri: str, tally: progress.Tally, rate: float) -> None:
    """How the call that published a run fared, for people: nothing relies on it."""
    told = {
        "images": tally.total, "read_by_this_call": tally.read, "seconds": tally.seconds, "images_per_s": rate,
        "counts_of_this_call": dict(tally.counts), "busy": tally.busy.model_dump(), "bottleneck": tally.busy.verdict,
    }  # fmt: skip
    storage.put(storage.join(run_uri, SUMMARY), json.dumps(told, indent=2).encode())


def _check_errors(run: runs.Run, manifest: published.Manifest, max_error_rate: float) -> None:
    bad = manifest.num_images - manifest.num_with(*SCORED)
    if bad > max_error_rate * manifest.num_images:
        statuses = ", ".join(f"{count:,} {status}" for status, count in manifest.counts.items() if status not in SCORED)
        raise TooManyErrorsError(
            f"{bad:,} of {manifest.num_images:,} images have no result ({statuses}), more than --max-error-rate {max_error_rate:g} allows: "
            f"run {run.uri} is complete and its rows stand, but it is not made the latest; look at the column error, then use "
            "--retry-errors, or accept it with a larger --max-error-rate"
        )
