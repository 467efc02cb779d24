"""The process that does shards: turns planned shards into parts, by the work that its task describes."""

import threading
import traceback
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import ray.util.metrics
from pydantic import BaseModel, Field

from dragonclf import storage
from dragonclf.busy import Busy
from dragonclf.engine import plan, published, runs
from dragonclf.engine.published import PartFacts


class ShardWork(Protocol):
    """Does shards, in several threads at once."""

    def __call__(self, shard: int, planned: pa.Table, is_again: bool) -> tuple[pa.Table, int]:
        """Return a shard's rows in the plan's order, and how many were kept of an earlier run.

        `is_again` tells that it was begun before and not finished.
        """
        ...

    def take_busy(self) -> Busy:
        """What the time since the last call was spent on."""
        ...


class ShardDone(BaseModel):
    """What an actor answers about a shard."""

    shard: int
    facts: PartFacts | None = Field(default=None, description="Of the part that is there now. None: it failed.")
    busy: Busy = Busy()
    kind: Literal["", "storage", "value", "bug"] = ""
    failure: str = ""


class Task(Protocol):
    """A small picklable description of a job, from which each actor makes its work."""

    @property
    def uses_gpu(self) -> bool: ...

    def work(self, run: runs.Run, num_threads: int, max_bytes: int) -> ShardWork:
        """Open what the work needs. `max_bytes` is the memory that the process may take."""
        ...


class ShardActor:
    """Does shards. Never raises for an image, nor in its constructor (Ray would restart it for ever)."""

    def __init__(self, run: runs.Run, task: Task, num_threads: int, max_bytes: int):
        self._run, self._task, self._num_threads, self._max_bytes = run, task, num_threads, max_bytes
        self._opening = threading.Lock()
        self._work: ShardWork | None = None
        self._num_images = ray.util.metrics.Counter("dragonclf_images", "Rows written.", ("verb", "status"))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Do the one shard in the batch: read its plan, process, write its part. A failure is an answer that stops the driver."""
        shard = int(batch["shard"][0])
        done = ShardDone(shard=shard)
        try:
            done.facts = self._do(shard)
        except storage.StorageError as error:
            done.kind, done.failure = "storage", str(error)
        except ValueError as error:
            done.kind, done.failure = "value", str(error)
        except OSError as error:  # the local disk, sockets, file descriptors: of this machine, not of an image
            done.kind, done.failure = "storage", f"a worker process failed on shard {shard}: {error}"
        except Exception:  # noqa: BLE001  a bug of ours: Ray Data would log it, drop the shard and go on
            done.kind, done.failure = "bug", traceback.format_exc()
        if done.facts is not None:
            done.busy = self._work.take_busy() if self._work else Busy()
            for status, count in done.facts.counts.items():
                self._num_images.inc(count, {"verb": self._run.verb, "status": status})
        return {"done": [done.model_dump_json()]}

    def _do(self, shard: int) -> PartFacts:
        run = self._run
        planned = plan.read_shard(run.uri, run.plan, shard)
        is_again = runs.begin_shard(run, shard) > 1
        if is_again and storage.stat(run.part_uri(shard)) is not None:  # its process ended before it could say so
            return published.check_part(run.part_uri(shard), run.name, shard, planned.num_rows)
        with self._opening:
            if self._work is None:
                self._work = self._task.work(run, self._num_threads, self._max_bytes)
        table, num_kept = self._work(shard, planned, is_again)
        return runs.write_part(run, shard, table, num_kept=num_kept)
