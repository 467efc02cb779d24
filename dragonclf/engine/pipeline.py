"""Turn the planned rows of a shard into result rows: fetch, decode and predict overlap, one row per image whatever happens.

An image that hangs its decoder, or leaves it without memory, ends the pass over its shard (SuspectError): the shard is then processed
`isolated`, each image decoded in a process of its own, so that the culprit alone pays.

No Ray here: an actor owns one `Pipeline` and feeds it shards, two at a time so that the end of one does not leave the model idle.
Memory is bounded: encoded bytes in flight by a budget, decoded images by the few batches under way.
"""

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from dragonclf.busy import Busy
from dragonclf.data import images, isolated
from dragonclf.data.images import ImageError, Picture
from dragonclf.engine.fetch import ImageReader

MAX_FETCHES = 64
MAX_BYTES_IN_FLIGHT = 512 * 2**20
MAX_BATCHES = 4  # fetched, decoded or waiting for the model at one time
UNKNOWN_SIZE = MAX_BYTES_IN_FLIGHT // MAX_FETCHES  # counted for an image whose size the plan does not know
SCORED = ("ok", "changed")  # statuses of images that were read, decoded and predicted


class SuspectError(Exception):
    """Some image of the shard hung its decoder or used up the memory; which one, only isolation tells."""


@dataclass(frozen=True)
class Limits:
    """What is too much of an image. Past `max_bytes` and `max_pixels` it is not decoded; past the others its decoder is ended."""

    max_bytes: int  # encoded
    max_pixels: int
    max_s: float  # to decode and transform it
    max_decode_bytes: int = 4 * 2**30  # of memory, for all images that are decoded isolated at one time

    def of_decode(self, max_decode_bytes: int) -> "Limits":
        return replace(self, max_decode_bytes=max_decode_bytes)


class Worker(Protocol):
    """What is done to images, loaded once in each process (a model, say). One instance serves several threads."""

    @property
    def batch_size(self) -> int: ...

    def new_batch(self) -> np.ndarray | None:
        """Room for what `read` gives of `batch_size` images, zeros of uint8 (batch_size, ...); None if there is no model to run."""
        ...

    @property
    def min_side(self) -> int | None:
        """Pixels of the shorter side that are enough of an image (`images.read`); None: it is decoded whole."""
        ...

    def read(self, data: bytes, picture: Picture) -> tuple[dict[str, Any], np.ndarray | None]:
        """Look at one image, encoded and decoded: its values for the row, and the uint8 pixels for `predict`.

        Called in threads.
        """
        ...

    def predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Run one batch, a filled `new_batch`. Returns columns of batch_size rows. Called by one thread at a time."""
        ...

    def table(self, planned: pa.Table, result: "ShardResult") -> pa.Table:
        """Lay out the result: one row per planned row, in order, with the columns ``uri``, ``etag``, ``status`` and ``error``.

        The input's further columns (those of `planned` past uri, etag and size) are left out: they are appended to every job's rows.
        """
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
    def scored(self) -> np.ndarray:
        """Boolean (rows,): which images have values and outputs."""
        return np.array([status in SCORED for status in self.statuses], dtype=bool)


class Pipeline:
    """Threads and an event loop around one worker. `process` may be called from several threads at once."""

    def __init__(self, worker: Worker, *, num_threads: int, limits: Limits, elsewhere: Callable[[], list[str]] = list):
        """`elsewhere` names images of the same store, to ask for when one cannot be read and none has been yet."""
        self._worker, self._num_threads, self._limits = worker, num_threads, limits
        self._decoders = ThreadPoolExecutor(num_threads, "decode")
        self._model = ThreadPoolExecutor(1, "model")
        self._loop = asyncio.new_event_loop()
        self._reader = ImageReader(elsewhere)
        self._fetches = asyncio.Semaphore(MAX_FETCHES)
        self._decodes = asyncio.Semaphore(num_threads)
        self._batches = asyncio.Semaphore(MAX_BATCHES)
        self._budget = _Budget(MAX_BYTES_IN_FLIGHT)
        self._isolation = _Isolation(limits, num_threads)
        self._spent: Counter[str] = Counter()
        self._spending, self._since_s = threading.Lock(), time.monotonic()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="fetch").start()

    def process(self, planned: pa.Table, *, isolate: bool = False) -> pa.Table:
        """Return the result rows of one shard; with `isolate`, decoding each image in a process of its own.

        Raises:
            StorageError: the store fails in a way that is not about one image.
            SuspectError: process it again, with `isolate`. Not raised then.
        """
        with self._isolation.entered() if isolate else contextlib.nullcontext():
            try:
                return asyncio.run_coroutine_threadsafe(self._process(planned, isolate), self._loop).result()
            except BaseExceptionGroup as group:
                raise _first(group) from group

    def take_busy(self) -> Busy:
        """What the time since the last call was spent on."""
        now = time.monotonic()
        with self._spending:
            wall_s, self._since_s = now - self._since_s, now
            spent, self._spent = self._spent, Counter()
        return Busy.model_validate(dict(spent) | {"wall_s": wall_s, "threads_s": wall_s * self._num_threads})

    def _note(self, **spent: float) -> None:
        with self._spending:
            self._spent.update(spent)

    async def _process(self, planned: pa.Table, isolate: bool) -> pa.Table:
        rows = [planned[name].to_pylist() for name in ("uri", "etag", "size")]
        result = ShardResult.of_size(planned.num_rows)
        step = self._worker.batch_size
        async with asyncio.TaskGroup() as tasks:
            for start in range(0, planned.num_rows, step):
                batch = range(start, min(start + step, planned.num_rows))
                tasks.create_task(self._batch(batch, rows, result, isolate))
        return self._worker.table(planned, result)

    async def _batch(self, batch: range, rows: list[list[Any]], result: ShardResult, isolate: bool) -> None:
        """Every image has its own slot in the batch, so what a batch holds depends on the plan alone, not on who came first."""
        async with self._batches:
            pixels = self._worker.new_batch()
            async with asyncio.TaskGroup() as tasks:
                for slot, row in enumerate(batch):
                    target = None if pixels is None else pixels[slot]
                    uri, etag, size = (column[row] for column in rows)
                    tasks.create_task(self._image(row, uri, etag, size, result, target, isolate))
            if pixels is None or not any(result.statuses[row] in SCORED for row in batch):
                return
            outputs = await self._loop.run_in_executor(self._model, self._predict, pixels)
            for name, column in outputs.items():
                if name not in result.outputs:
                    result.outputs[name] = np.zeros((len(rows[0]), *column.shape[1:]), column.dtype)
                result.outputs[name][batch.start : batch.stop] = column[: len(batch)]

    async def _image(
        self, row: int, uri: str, etag: str | None, size: int | None, result: ShardResult, target: np.ndarray | None,
        isolate: bool,
    ) -> None:  # fmt: skip
        try:
            self._check_size(size)
            async with self._budget.spend(size if size is not None else UNKNOWN_SIZE):
                async with self._fetches:
                    started_s = time.monotonic()
                    data, found = await self._reader.read(uri)
                    self._note(fetch_s=time.monotonic() - started_s, num_bytes=len(data))
                result.etags[row] = found
                self._check_size(len(data))
                result.values[row] = await self._decode(data, target, isolate)
        except ImageError as error:
            result.statuses[row], result.errors[row] = error.status, error.reason
        else:
            if etag is not None and found != etag.strip('"'):
                result.statuses[row] = "changed"
                result.errors[row] = (
                    f"the object was replaced after it was listed (then etag {etag}): this is what it is now"
                )

    def _check_size(self, size: int | None) -> None:
        if size is not None and size > self._limits.max_bytes:
            raise ImageError("too_large", f"{size:,} bytes, over the limit of {self._limits.max_bytes:,}")

    async def _decode(self, data: bytes, target: np.ndarray | None, isolate: bool) -> dict[str, Any]:
        async with self._decodes:
            work = self._loop.run_in_executor(self._decoders, self._read, data, target, isolate)
            if isolate:
                return await work
            try:
                return await asyncio.wait_for(work, self._limits.max_s)
            except TimeoutError:
                # Its thread may never come back: leave it alone with its pool. Other shards' images in it at worst are suspects too.
                self._decoders.shutdown(wait=False)
                self._decoders = ThreadPoolExecutor(self._num_threads, "decode")
                raise SuspectError(f"an image was not decoded in {self._limits.max_s:g} s") from None
            except MemoryError as error:
                raise SuspectError("there was not enough memory to decode an image") from error

    def _predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        started_s = time.monotonic()
        outputs = self._worker.predict(pixels)
        self._note(model_s=time.monotonic() - started_s)
        return outputs

    def _read(self, data: bytes, target: np.ndarray | None, isolate: bool) -> dict[str, Any]:
        started_s = time.monotonic()
        enough = self._worker.min_side
        picture = (
            self._isolation.read(data, enough)
            if isolate
            else images.read(data, max_pixels=self._limits.max_pixels, min_side=enough)
        )
        values, pixels = self._worker.read(data, picture)
        if target is not None:
            target[:] = pixels
        self._note(decode_s=time.monotonic() - started_s)
        return values


class _Isolation:
    """The isolated decoders of the decoding threads, one each, alive while some shard is processed isolated."""

    def __init__(self, limits: Limits, share: int):
        self._limits, self._share = limits, share
        self._lock = threading.Lock()
        self._num_shards = 0
        self._decoders: dict[int, isolated.Decoder] = {}

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with self._lock:
            self._num_shards += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_shards -= 1
                if not self._num_shards:
                    for decoder in self._decoders.values():
                        decoder.close()
                    self._decoders = {}

    def read(self, data: bytes, min_side: int | None) -> Picture:
        with self._lock:
            decoder = self._decoders.get(threading.get_ident())
            if decoder is None:
                limits = self._limits
                decoder = isolated.Decoder(
                    max_pixels=limits.max_pixels,
                    max_bytes=limits.max_decode_bytes,
                    max_s=limits.max_s,
                    share=self._share,
                )
                self._decoders[threading.get_ident()] = decoder
        return decoder.read(data, min_side=min_side)


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
