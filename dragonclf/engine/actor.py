"""The process that does shards: opens a task's worker once, then turns planned shards into parts.

A shard that was begun before and has no part ended a process, or was under way when one was ended. It is done isolated, each image
decoded in a process of its own, so that an image which kills or starves its decoder becomes a row and not the end of the next process.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from dragonclf import storage
from dragonclf.engine import plan, published, reuse, runs
from dragonclf.engine.pipeline import Limits, Pipeline, SuspectError, Worker
from dragonclf.engine.published import PartFacts

NUM_ELSEWHERE = 8  # images of other shards to ask for when none of one's own can be read
GUARD_S = 0.05
STUCK = 2  # times the seconds for an image, with no thread running, after which a process ends itself
MIN_DECODE_BYTES = 1024 * 2**20  # for isolated decoding; half of it is for one image alone


class Task(Protocol):
    """A small picklable description of a job, from which each actor opens its worker."""

    @property
    def uses_gpu(self) -> bool: ...

    @property
    def limits(self) -> Limits: ...

    def open(self, num_threads: int) -> Worker: ...


class ShardActor:
    """Processes shards. Never raises for an image, nor in its constructor (Ray would restart it for ever)."""

    def __init__(self, run: runs.Run, task: Task, num_threads: int, max_bytes: int):
        """`max_bytes` is the memory that the process may take before it is ended, isolated decoders not counted."""
        self._run, self._task, self._num_threads, self._max_bytes = run, task, num_threads, max_bytes
        self._opening = threading.Lock()
        self._pipeline: Pipeline | None = None
        self._earlier: reuse.EarlierRows | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Do the one shard in the batch: read its plan, process, write its part. A failure is an answer that stops the driver."""
        shard = int(batch["shard"][0])
        facts: PartFacts | None = None
        kind, failure = "", ""
        try:
            facts = self._do(shard)
        except storage.StorageError as error:
            kind, failure = "storage", str(error)
        except ValueError as error:
            kind, failure = "value", str(error)
        except OSError as error:  # the local disk, sockets, file descriptors: of this machine, not of an image
            kind, failure = "storage", f"a worker process failed on shard {shard}: {error}"
        except Exception:  # noqa: BLE001  a bug of ours: Ray Data would log it, drop the shard and go on
            kind, failure = "bug", traceback.format_exc()
        done = facts.model_dump_json() if facts else ""
        return {"shard": [shard], "facts": [done], "kind": [kind], "failure": [failure]}

    def _do(self, shard: int) -> PartFacts:
        run = self._run
        planned = plan.read_shard(run.uri, run.plan, shard)
        is_again = runs.begin_shard(run, shard) > 1
        if is_again and storage.stat(run.part_uri(shard)) is not None:  # its process ended before it could say so
            return published.check_part(run.part_uri(shard), run.name, shard, planned.num_rows)
        if run.base is None:
            return runs.write_part(run, shard, self._process(planned, isolate=is_again))
        with self._opening:
            if self._earlier is None:
                self._earlier = reuse.EarlierRows(run.base, same_plan=run.same_plan)
        # An image that failed before may be one that kills or hangs its decoder.
        isolate = is_again or run.same_plan
        table, num_kept = self._earlier.complete(shard, planned, lambda rows: self._process(rows, isolate=isolate))
        return runs.write_part(run, shard, table, num_kept=num_kept)

    def _process(self, planned: pa.Table, *, isolate: bool) -> pa.Table:
        if not isolate:
            try:
                return reuse.with_input(self._opened().process(planned), planned)
            except SuspectError:
                pass
        return reuse.with_input(self._opened().process(planned, isolate=True), planned)

    def _opened(self) -> Pipeline:
        with self._opening:
            if self._pipeline is None:
                worker = self._task.open(self._num_threads)
                left = max(MIN_DECODE_BYTES, self._max_bytes - _private_bytes())
                limits = self._task.limits.of_decode(left)
                self._pipeline = Pipeline(
                    worker, num_threads=self._num_threads, limits=limits, elsewhere=self._elsewhere
                )
                threading.Thread(target=_guard, args=(self._max_bytes, limits.max_s), daemon=True, name="guard").start()
            return self._pipeline

    def _elsewhere(self) -> list[str]:
        return plan.sample_uris(self._run.uri, self._run.plan, count=NUM_ELSEWHERE)


def _guard(max_bytes: int, max_s: float) -> None:
    """End the process when its memory passes the limit, before the kernel ends one of its own choice, or when a decoder blocks it.

    A decoder that hangs while it holds the interpreter's lock stops every thread, this one too; faulthandler's own needs no lock.
    """
    while True:
        faulthandler.dump_traceback_later(STUCK * max_s, exit=True)
        if (taken := _private_bytes()) > max_bytes:
            print(
                f"dragonclf: this worker takes {taken:,} bytes, over its limit of {max_bytes:,}: ended",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
        time.sleep(GUARD_S)


def _private_bytes() -> int:
    """Resident memory of this process without what it shares (the object store, libraries)."""
    with open("/proc/self/statm") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
