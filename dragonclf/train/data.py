"""What a training worker iterates over: features from memory, or images from storage with augmentation, by sample index.

Both give, for a list of sample indices, an input tensor and the class indices; the training split and the validation split have an
instance each.
"""

import asyncio
import contextlib
import functools
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from dragonclf import storage
from dragonclf.data import images
from dragonclf.data.augment import USUAL, Augment
from dragonclf.data.snapshot import Snapshot, read_rows
from dragonclf.data.transforms import Transform
from dragonclf.engine import published
from dragonclf.train.cache import ImageCache

PREFETCH_BATCHES = 3
MAX_FETCHES = 32  # images that are read from S3, or wait to be decoded, at one time

Batch = tuple[torch.Tensor, torch.Tensor]
T = TypeVar("T")


class Samples(Protocol):
    """A split's samples, 0 to len - 1 in the snapshot's order."""

    def __len__(self) -> int: ...

    @property
    def targets(self) -> torch.Tensor:
        """Classes of all samples, int64 (N,)."""
        ...

    def batches(self, indices: Iterable[np.ndarray], *, epoch: int) -> Iterator[Batch]:
        """Yield (inputs, targets int64) for each array of sample indices, in order. `epoch` varies the augmentation."""
        ...


class Features:
    """Precomputed features of one split, all in memory: float32 (V, N, F), of the images as scoring sees them, then of each view.

    Epochs take them in turn.
    """

    def __init__(self, run_uri: str, classes: list[str], split: str, *, views_uri: str | None = None):
        """`views_uri` is the run with the views of the same images."""
        own, targets = [], []
        for table in _parts_of(run_uri, split):
            own.append(_rows_of(table))
            targets.append(_targets(table["label"].to_pylist(), classes))
        self.targets = torch.cat(targets)
        self.features = torch.cat(own)[None]
        if views_uri is not None:
            views = torch.cat([_rows_of(table) for table in _parts_of(views_uri, split)])  # (N, views * F)
            views = views.unflatten(1, (-1, self.features.shape[2])).transpose(0, 1)
            self.features = torch.cat([self.features, views])

    def __len__(self) -> int:
        return len(self.targets)

    def batches(self, indices: Iterable[np.ndarray], *, epoch: int) -> Iterator[Batch]:
        features = self.features[epoch % len(self.features)]
        for batch in indices:
            index = torch.from_numpy(batch)
            yield features[index], self.targets[index]


class Images:
    """Images read when their turn comes, decoded and varied in threads: uint8 (N, 3, S, S).

    `seed` draws how training images are varied, by `augment`; None means the evaluation transform, as scoring applies it. `size_at` tells
    their side in an epoch, None: the transform's. `table` has the columns uri and label, and perhaps sha256: then no other content is taken
    for the image. What is in the `cache` is not read from S3.
    """

    def __init__(
        self,
        table: pa.Table,
        classes: list[str],
        transform: Transform,
        *,
        num_threads: int,
        seed: int | None = None,
        augment: Augment = USUAL,
        size_at: Callable[[int], int] | None = None,
        cache: ImageCache | None = None,
    ):
        self._uris, self.targets = table["uri"].to_pylist(), _targets(table["label"].to_pylist(), classes)
        self._transform, self._seed, self._augment = transform, seed, augment
        self._size_at, self._cache = size_at, cache
        self._digests = table["sha256"].to_pylist() if "sha256" in table.column_names else None
        self._pool = ThreadPoolExecutor(num_threads, "decode")
        self._fetches = asyncio.Semaphore(MAX_FETCHES)

    @classmethod
    def of_split(
        cls, snapshot: Snapshot, split: str, transform: Transform, *, num_threads: int, **options: Any
    ) -> "Images":
        """All of a snapshot's split. `options` are the further ones above."""
        table = pa.concat_tables(read_rows(snapshot, splits=[split], columns=["uri", "label", "sha256"]))
        return cls(table, snapshot.info.classes, transform, num_threads=num_threads, **options)

    def __len__(self) -> int:
        return len(self._uris)

    def batches(self, indices: Iterable[np.ndarray], *, epoch: int) -> Iterator[Batch]:
        ahead: list[tuple[np.ndarray, list[Future[torch.Tensor]]]] = []
        for batch in indices:
            ahead.append((batch, [self._begin(int(sample), epoch) for sample in batch]))
            if len(ahead) > PREFETCH_BATCHES:
                yield self._collect(*ahead.pop(0))
        for waiting in ahead:
            yield self._collect(*waiting)

    def _collect(self, batch: np.ndarray, pending: list[Future[torch.Tensor]]) -> Batch:
        return torch.stack([image.result() for image in pending]), self.targets[torch.from_numpy(batch)]

    def _begin(self, sample: int, epoch: int) -> Future[torch.Tensor]:
        """An image to come. What is on this node is read by the thread that decodes it, the rest while others are decoded."""
        uri = self._uris[sample]
        if not storage.is_s3(uri) or (self._cache and self._digests and self._cache.has(self._entry(sample))):
            return self._pool.submit(self._read, sample, epoch)
        return asyncio.run_coroutine_threadsafe(self._fetch(sample, epoch), _fetch_loop())

    async def _fetch(self, sample: int, epoch: int) -> torch.Tensor:
        async with self._fetches:  # until it is decoded, so that encoded images are few
            with _loss_told(self._uris[sample]):
                data = (await storage.fetch(self._uris[sample]))[0]
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._read, sample, epoch, data)

    def _read(self, sample: int, epoch: int, data: bytes | None = None) -> torch.Tensor:
        """`data` is the object, if it was read."""
        with _loss_told(self._uris[sample]):
            image = (self._for_eval if self._seed is None else self._for_crops)(sample, data)
        if self._seed is None:
            return image
        size = self._size_at(epoch) if self._size_at else None
        return self._transform.for_train(
            image, seed=self._seed, epoch=epoch, sample=sample, augment=self._augment, size=size
        )

    def _for_eval(self, sample: int, data: bytes | None) -> torch.Tensor:
        """What scoring sees; cached as pixels."""
        shape = (3, self._transform.size, self._transform.size)

        def made() -> bytes:
            image = images.decode(self._get(sample, data), min_side=self._transform.min_side)
            return self._transform.for_eval(image).contiguous().numpy().tobytes()

        def opened(pixels: bytes) -> torch.Tensor:
            return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).reshape(shape)

        return self._cached(sample, made, opened, look=data is None)

    def _for_crops(self, sample: int, data: bytes | None) -> torch.Tensor:
        """The image, no larger than crops need; cached as it came, or smaller."""
        side = self._transform.min_side
        made = partial(images.reduced, min_side=side) if side else bytes
        return self._cached(sample, lambda: made(self._get(sample, data)), images.decode, look=data is None)

    def _entry(self, sample: int) -> str:
        """The name in the cache of what `_for_eval` or `_for_crops` keep."""
        assert self._digests
        kind = f"eval-{self._transform.digest}" if self._seed is None else f"crops-{self._transform.min_side}"
        return f"{self._digests[sample]}-{kind}"

    def _cached(self, sample: int, made: Callable[[], bytes], opened: Callable[[bytes], T], *, look: bool) -> T:
        """What is `opened` of the cache's entry, which is `made` first if it is not there, or not looked for."""
        if self._cache is None or self._digests is None or not storage.is_s3(self._uris[sample]):
            return opened(made())
        name = self._entry(sample)
        data = self._cache.get(name) if look else None
        if data is not None:
            try:
                return opened(data)
            except (images.ImageError, ValueError, RuntimeError):  # damaged on this disk
                self._cache.drop(name)
        data = made()
        found = opened(data)
        self._cache.put(name, data)
        return found

    def _get(self, sample: int, data: bytes | None) -> bytes:
        data = storage.get(self._uris[sample]) if data is None else data
        if self._digests and hashlib.sha256(data).hexdigest() != self._digests[sample]:
            raise images.ImageError("changed", "another image is there now")
        return data


@functools.cache
def _fetch_loop() -> asyncio.AbstractEventLoop:
    """Where this process reads from S3: `fetch` costs a third of what `get` does, and wants an event loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="fetch").start()
    return loop


@contextlib.contextmanager
def _loss_told(uri: str) -> Iterator[None]:
    try:
        yield
    except (images.ImageError, storage.ObjectMissingError) as error:
        raise _lost(uri, str(error)) from error


def _parts_of(run_uri: str, split: str) -> Iterator[pa.Table]:
    """Rows of a run of features, part by part. ValueError if an image was lost."""
    for table in published.read_parts(run_uri):
        _refuse_lost(table)
        yield table.filter(pc.field("split") == split)


def _rows_of(table: pa.Table) -> torch.Tensor:
    column = table["features"].combine_chunks()
    return torch.from_numpy(column.flatten().to_numpy().reshape(-1, column.type.list_size).copy())


def _targets(labels: list[str], classes: list[str]) -> torch.Tensor:
    index = {name: i for i, name in enumerate(classes)}
    return torch.tensor([index[label] for label in labels], dtype=torch.int64)


def _refuse_lost(table: pa.Table) -> None:
    lost = table.filter(pc.field("status") != "ok")
    if lost.num_rows:
        raise _lost(lost["uri"][0].as_py(), lost["error"][0].as_py())


def _lost(uri: str, reason: str) -> ValueError:
    return ValueError(
        f"{uri} was usable when it was indexed and is not now ({reason}): index the images again, or use --retry-errors if that has passed"
    )
