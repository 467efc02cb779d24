"""Shards of images to be read: through a `Pipeline`, isolated where that is needed, and only those whose rows do not hold any more.

A shard that was begun before and has no part ended a process, or was under way when one was ended. It is done isolated, each image
decoded in a process of its own, so that an image which kills or starves its decoder becomes a row and not the end of the next process.
"""

import faulthandler
import os
import sys
import threading
import time
from typing import Protocol

import pyarrow as pa

from dragonclf.busy import Busy
from dragonclf.engine import plan, reuse, runs
from dragonclf.engine.pipeline import Limits, Pipeline, SuspectError, Worker

NUM_ELSEWHERE = 8  # images of other shards to ask for when none of one's own can be read
GUARD_S = 0.05
STUCK = 2  # times the seconds for an image, with no thread running, after which a process ends itself
MIN_DECODE_BYTES = 1024 * 2**20  # for isolated decoding; half of it is for one image alone


class ImageTask(Protocol):
    """A small picklable description of what is done to images."""

    @property
    def limits(self) -> Limits: ...

    def open(self, num_threads: int) -> Worker: ...


class ImageWork:
    """What one process needs to do shards of a run. The worker (a model, say) is opened by the first image that must be read."""

    def __init__(self, run: runs.Run, task: ImageTask, num_threads: int, max_bytes: int):
        """`max_bytes` is the memory that the process may take before it is ended, isolated decoders not counted."""
        self._run, self._task, self._num_threads, self._max_bytes = run, task, num_threads, max_bytes
        self._opening = threading.Lock()
        self._pipeline: Pipeline | None = None
        self._earlier = reuse.EarlierRows(run.base, same_plan=run.same_plan) if run.base else None

    def __call__(self, shard: int, planned: pa.Table, is_again: bool) -> tuple[pa.Table, int]:
        if self._earlier is None:
            return self._process(planned, isolate=is_again), 0
        # An image that failed before may be one that kills or hangs its decoder.
        isolate = is_again or self._run.same_plan
        return self._earlier.complete(shard, planned, lambda rows: self._process(rows, isolate=isolate))

    def take_busy(self) -> Busy:
        return self._pipeline.take_busy() if self._pipeline else Busy()

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
