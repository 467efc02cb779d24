"""Turn the planned rows of a shard into result rows: fetch, decode and predict overlap, one row per image whatever happens.

No Ray here: an actor owns one `Pipeline` and feeds it shards, two at a time so that the end of one does not leave the model idle.
Memory is bounded: encoded bytes in flight by a budget, decoded images by the few batches under way.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from dragonclf import storage
from dragonclf.data.images import ImageError

MAX_FETCHES = 64
MAX_BYTES_IN_FLIGHT = 512 * 2**20
MAX_BATCHES = 4  # fetched, decoded or waiting for the model at one time
UNKNOWN_SIZE = 2**20  # bytes counted for an image whose size the plan does not know


class Worker(Protocol):
    """What is done to images, loaded once in each process (a model, say). One instance serves several threads."""

    @property
    def batch_size(self) -> int: ...

    @property
    def max_image_bytes(self) -> int: ...

    @property
    def pixels_shape(self) -> tuple[int, ...] | None:
        """Of one image for `predict`; None if there is no model to run."""
        ...

    def read(self, data: bytes) -> tuple[dict[str, Any], np.ndarray | None]:
        """Decode one image: its values for the row, and the uint8 pixels for `predict`. Raises ImageError. Called in threads."""
        ...

    def predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Run one batch, uint8 (batch_size, *pixels_shape). Returns columns of batch_size rows. Called by one thread at a time."""
        ...

    def table(self, planned: pa.Table, result: "ShardResult") -> pa.Table:
        """Lay out the result: one row per planned row, in order, with a ``status`` column."""
        ...


@dataclass
class ShardResult:
    """What came of the images of a shard, by their position in it."""

    etags: list[str | None]
    statuses: list[str]
    errors: list[str | None]
    values: list[dict[str, Any]]  # empty for an image that was not ok
    outputs: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # column -> (rows, ...); rows of bad images hold no meaning

    @classmethod
    def of_size(cls, count: int) -> "ShardResult":
        return cls([None] * count, ["ok"] * count, [None] * count, [{} for _ in range(count)])

    @property
    def ok(self) -> np.ndarray:
        """Boolean (rows,): which images have values and outputs."""
        return np.array([status == "ok" for status in self.statuses], dtype=bool)


class Pipeline:
    """Threads and an event loop around one worker. `process` may be called from several threads at once."""

    def __init__(self, worker: Worker, *, num_threads: int):
        self._worker = worker
        self._decoders = ThreadPoolExecutor(num_threads, "decode")
        self._model = ThreadPoolExecutor(1, "model")
        self._loop = asyncio.new_event_loop()
        self._fetches = asyncio.Semaphore(MAX_FETCHES)
        self._batches = asyncio.Semaphore(MAX_BATCHES)
        self._budget = _Budget(MAX_BYTES_IN_FLIGHT)
        threading.Thread(target=self._loop.run_forever, daemon=True, name="fetch").start()

    def process(self, planned: pa.Table) -> pa.Table:
        """Return the result rows of one shard. StorageError if the store fails in a way that is not about one image."""
        try:
            return asyncio.run_coroutine_threadsafe(self._process(planned), self._loop).result()
        except BaseExceptionGroup as group:
            raise _first(group) from group

    async def _process(self, planned: pa.Table) -> pa.Table:
        uris, sizes = planned["uri"].to_pylist(), planned["size"].to_pylist()
        result = ShardResult.of_size(len(uris))
        step = self._worker.batch_size
        async with asyncio.TaskGroup() as tasks:
            for start in range(0, len(uris), step):
                batch = range(start, min(start + step, len(uris)))
                tasks.create_task(self._batch(batch, uris, sizes, result))
        return self._worker.table(planned, result)

    async def _batch(self, batch: range, uris: list[str], sizes: list[int | None], result: ShardResult) -> None:
        """Every image has its own slot in the batch, so what a batch holds depends on the plan alone, not on who came first."""
        async with self._batches:
            shape = self._worker.pixels_shape
            pixels = None if shape is None else np.zeros((self._worker.batch_size, *shape), np.uint8)
            async with asyncio.TaskGroup() as tasks:
                for slot, row in enumerate(batch):
                    target = None if pixels is None else pixels[slot]
                    tasks.create_task(self._image(row, uris[row], sizes[row], result, target))
            if pixels is None or not any(result.statuses[row] == "ok" for row in batch):
                return
            outputs = await self._loop.run_in_executor(self._model, self._worker.predict, pixels)
            for name, column in outputs.items():
                if name not in result.outputs:
                    result.outputs[name] = np.zeros((len(uris), *column.shape[1:]), column.dtype)
                result.outputs[name][batch.start : batch.stop] = column[: len(batch)]

    async def _image(
        self, row: int, uri: str, size: int | None, result: ShardResult, target: np.ndarray | None
    ) -> None:
        limit = self._worker.max_image_bytes
        try:
            if size is not None and size > limit:
                raise ImageError("too_large", f"{size:,} bytes, over the limit of {limit:,}")
            async with self._fetches, self._budget.spend(size if size is not None else UNKNOWN_SIZE):
                data, result.etags[row] = await storage.fetch(uri)
                if len(data) > limit:
                    raise ImageError("too_large", f"{len(data):,} bytes, over the limit of {limit:,}")
                result.values[row] = await self._loop.run_in_executor(self._decoders, self._read, data, target)
        except ImageError as error:
            result.statuses[row], result.errors[row] = error.status, error.reason
        except storage.ObjectMissingError:
            result.statuses[row], result.errors[row] = "missing", "the object is no longer there"
        except storage.AccessDeniedError as error:
            result.statuses[row], result.errors[row] = "denied", str(error)

    def _read(self, data: bytes, target: np.ndarray | None) -> dict[str, Any]:
        values, pixels = self._worker.read(data)
        if target is not None:
            target[:] = pixels
        return values


def _first(group: BaseExceptionGroup) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class _Budget:
    """A bound on bytes in flight. A single image over the whole bound waits until it is alone."""

    def __init__(self, num_bytes: int):
        self._total = self._left = num_bytes
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def spend(self, num_bytes: int) -> AsyncIterator[None]:
        num_bytes = min(num_bytes, self._total)
        async with self._changed:
            await self._changed.wait_for(lambda: self._left >= num_bytes)
            self._left -= num_bytes
        try:
            yield
        finally:
            async with self._changed:
                self._left += num_bytes
                self._changed.notify_all()
