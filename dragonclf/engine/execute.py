"""Run an image job's missing shards on Ray Data: one row per shard, one fused actor per GPU or per few CPUs.

Ray moves shard numbers and counts; images and results go between the actors and storage alone, and the driver sees one small row
a shard, whatever the number of images.
"""

import json
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import ray
import ray.data
import ray.exceptions
from ray.util.annotations import RayDeprecationWarning

from dragonclf import storage
from dragonclf.engine import plan, runs
from dragonclf.engine.pipeline import Pipeline, Worker

MAX_CPUS_PER_ACTOR = 8
MAX_RESTARTS = 3  # of an actor whose process died, and of a shard's task
SHARDS_PER_ACTOR = 2  # at one time, so that no shard boundary leaves the model idle

Progress = Callable[[int, dict[str, int]], None]


class Task(Protocol):
    """A small picklable description of a job, from which each actor opens its worker."""

    @property
    def uses_gpu(self) -> bool: ...

    def open(self, num_threads: int) -> Worker: ...


def execute(
    run: runs.Run, task: Task, progress: Progress, *, num_actors: int | None = None, cpus_per_actor: int | None = None
) -> runs.Manifest:
    """Bring a run to its publication: do the shards that have no part, check them all, publish.

    `progress` is called with (images of a shard just done, its counts by status), first for the parts that are there already.
    Raises StorageError or ValueError as met in an actor; the run then stays, to be resumed by the same command.
    """
    missing = runs.missing_shards(run)
    sizes = plan.shard_sizes(run.uri, run.plan)
    progress(sum(sizes) - sum(sizes[shard] for shard in missing), {})
    for shard, counts in _run_shards(run, task, missing, num_actors, cpus_per_actor):
        progress(sizes[shard], counts)
    return runs.publish(run)


def _run_shards(
    run: runs.Run, task: Task, shards: list[int], num_actors: int | None, cpus_per_actor: int | None
) -> Iterator[tuple[int, dict[str, int]]]:
    if not shards:
        return
    cpus = cpus_per_actor or min(MAX_CPUS_PER_ACTOR, _largest_node())
    resources = ray.cluster_resources()
    fit = int(resources.get("GPU", 0)) if task.uses_gpu else int(resources.get("CPU", 0) // cpus)
    most = max(1, min(num_actors or max(fit, 1), len(shards)))
    items = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    with warnings.catch_warnings():
        # Ray Data restarts actors and retries their tasks for ever; in 2.60 only a form that it deprecates sets a bound.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        results = items.map_batches(
            ShardActor,
            fn_constructor_args=(run, task, cpus),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=most,
                initial_size=most,
                max_tasks_in_flight_per_actor=2 * SHARDS_PER_ACTOR,
                max_concurrent_calls_per_actor=SHARDS_PER_ACTOR,
                enable_true_multi_threading=True,
            ),
            num_cpus=cpus,
            num_gpus=1 if task.uses_gpu else None,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
        )
    try:
        for row in results.iter_rows():
            if row["failure"]:
                raise _FAILURES[row["kind"]](row["failure"])
            yield int(row["shard"]), json.loads(row["counts"])
    except ray.exceptions.RayTaskError:
        raise  # a bug of ours, with its traceback
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise storage.StorageError(
            f"a worker process died {MAX_RESTARTS + 1} times on {run.uri}: {reason}; the same command resumes"
        ) from error


def _largest_node() -> int:
    return max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=1) or 1


_FAILURES: dict[str, type[Exception]] = {"storage": storage.StorageError, "value": ValueError}


class ShardActor:
    """Processes shards. Never raises for an image, nor in its constructor (Ray would restart it for ever)."""

    def __init__(self, run: runs.Run, task: Task, num_threads: int):
        self._run, self._task, self._num_threads = run, task, num_threads
        self._opening = threading.Lock()
        self._pipeline: Pipeline | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Do the one shard in the batch: read its plan, process, write its part. A failure is an answer that stops the driver."""
        shard = int(batch["shard"][0])
        counts: dict[str, int] = {}
        kind, failure = "", ""
        try:
            planned = plan.read_shard(self._run.uri, self._run.plan, shard)
            counts = runs.write_part(self._run, shard, self._opened().process(planned))
        except storage.StorageError as error:
            kind, failure = "storage", str(error)
        except ValueError as error:
            kind, failure = "value", str(error)
        return {"shard": [shard], "counts": [json.dumps(counts)], "kind": [kind], "failure": [failure]}

    def _opened(self) -> Pipeline:
        with self._opening:
            if self._pipeline is None:
                self._pipeline = Pipeline(self._task.open(self._num_threads), num_threads=self._num_threads)
            return self._pipeline
