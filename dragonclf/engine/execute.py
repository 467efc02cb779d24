"""Run an image job's missing shards on Ray Data: one row per shard, one fused actor per GPU or per few CPUs.

Ray moves shard numbers and counts; images and results go between the actors and storage alone, and the driver sees one small row
a shard, whatever the number of images.
"""

import contextlib
import warnings
from collections.abc import Callable, Generator
from typing import Any, cast

import ray
import ray.data
import ray.exceptions
from ray.util.annotations import RayDeprecationWarning

from dragonclf import storage
from dragonclf.engine import lease, plan, reuse, runs
from dragonclf.engine.actor import ShardActor, ShardDone, Task
from dragonclf.engine.budget import Budget
from dragonclf.engine.published import Manifest

MAX_CPUS_PER_ACTOR = 8
MAX_PASSES = 3  # over the shards that have no part
MAX_TASK_RETRIES = 2  # of a shard in one pass, each in another process
SHARDS_PER_ACTOR = 2  # at one time, so that no shard boundary leaves the model idle

Progress = Callable[[int, ShardDone | None], None]


def execute(
    run: runs.Run,
    task: Task,
    progress: Progress,
    held: lease.Lease,
    *,
    num_actors: int | None = None,
    cpus_per_actor: int | None = None,
    max_actor_bytes: int | None = None,
    budget: Budget | None = None,
) -> Manifest:
    """Bring a run to its publication: do the shards that have no part, in passes, check them all, publish.

    `progress` is called with (images of a shard just done, what its actor answered), first with None for the parts that are there already.
    Raises StorageError or ValueError as met in an actor, StorageError for a shard that ends every process which does it, BusyError
    if the lease is lost, and BudgetSpentError, looking at the budget whenever a shard is done. The run then stays, to be resumed by
    the same command.
    """
    sizes = plan.shard_sizes(run.uri, run.plan)
    missing = runs.missing_shards(run)
    progress(sum(sizes) - sum(sizes[shard] for shard in missing), None)
    reason = ""
    for tries_left in reversed(range(MAX_PASSES)):
        if not missing:
            break
        # In the last pass one at a time, so that a shard which ends every process takes no other with it.
        at_once = SHARDS_PER_ACTOR if tries_left else 1
        try:
            shards = _run_shards(run, task, missing, at_once, num_actors, cpus_per_actor, max_actor_bytes, budget)
            with contextlib.closing(shards):
                for done in shards:
                    progress(sizes[done.shard], done)
        except ray.exceptions.RayError as error:
            reason = f": {str(error).strip().splitlines()[-1]}"
        missing = runs.missing_shards(run)
    if missing:
        raise storage.StorageError(
            f"{len(missing)} shards of {run.uri} (the first: {missing[0]}) ended every worker process that did them{reason}; "
            "the same command tries them again"
        )
    num_deleted = reuse.write_deleted(run.uri, run.plan, run.base) if run.base and not run.same_plan else 0
    held.ensure()
    return runs.publish(run, fence=held.fence, num_deleted=num_deleted)


def _run_shards(
    run: runs.Run,
    task: Task,
    shards: list[int],
    at_once: int,
    num_actors: int | None,
    cpus_per_actor: int | None,
    max_actor_bytes: int | None,
    budget: Budget | None,
) -> Generator[ShardDone, None, None]:
    """Yield the actors' answers as parts are written. A shard whose process ended `MAX_TASK_RETRIES` + 1 times is left out."""
    most, cpus = fit(task, num_actors, cpus_per_actor, len(shards))
    if budget:
        budget.hire(most)
    items = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    items.context.max_errored_blocks = -1  # a lost shard is for the next pass, not the end of all others
    with warnings.catch_warnings():
        # Ray Data retries a task whose actor died for ever; in 2.60 only a form that it deprecates sets a bound.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        results = items.map_batches(
            ShardActor,
            fn_constructor_args=(run, task, cpus, max_actor_bytes or _memory_share(cpus)),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=most,
                initial_size=most,
                max_tasks_in_flight_per_actor=2 * at_once if at_once > 1 else 1,
                max_concurrent_calls_per_actor=at_once,
                enable_true_multi_threading=at_once > 1,
            ),
            num_cpus=cpus,
            num_gpus=1 if task.uses_gpu else None,
            max_task_retries=MAX_TASK_RETRIES,
        )
    # Closed, not left to the garbage collector: an exception keeps this frame, and the actors would go on in their Ray.
    with contextlib.closing(cast(Generator[dict[str, Any], None, None], iter(results.iter_rows()))) as rows:
        for number, row in enumerate(rows, 1):
            done = ShardDone.model_validate_json(row["done"])
            if done.kind:
                raise _FAILURES[done.kind](done.failure)
            yield done
            if budget and number < len(shards):
                budget.ensure()


def fit(task: Task, num_actors: int | None, cpus_per_actor: int | None, num_shards: int) -> tuple[int, int]:
    """How many actors the cluster that is joined gets for so many shards, and the CPUs of each."""
    cpus = cpus_per_actor or min(MAX_CPUS_PER_ACTOR, _largest_node())
    resources = ray.cluster_resources()
    there = int(resources.get("GPU", 0)) if task.uses_gpu else int(resources.get("CPU", 0) // cpus)
    return max(1, min(num_actors or max(there, 1), num_shards)), cpus


def _largest_node() -> int:
    return max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=1) or 1


def _memory_share(cpus: int) -> int:
    """An actor's part, by its CPUs, of the memory of a node, on the node where that is least."""
    shares = [
        node["Resources"]["memory"] * cpus / node["Resources"]["CPU"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) >= cpus
    ]
    return int(min(shares)) if shares else 2**62


_FAILURES: dict[str, type[Exception]] = {"storage": storage.StorageError, "value": ValueError, "bug": RuntimeError}
