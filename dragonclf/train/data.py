"""What a training worker iterates over: features from memory, or images from storage with augmentation, by sample index.

Both give, for a list of sample indices, an input tensor and the class indices; the training split and the validation split have an
instance each.
"""

import asyncio
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
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="fetch").start()

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
            ahead.append((batch, [self._pool.submit(self._read, int(sample), epoch) for sample in batch]))
            if len(ahead) > PREFETCH_BATCHES:
                yield self._collect(*ahead.pop(0))
        for waiting in ahead:
            yield self._collect(*waiting)

    def _collect(self, batch: np.ndarray, pending: list[Future[torch.Tensor]]) -> Batch:
        return torch.stack([image.result() for image in pending]), self.targets[torch.from_numpy(batch)]

    def _read(self, sample: int, epoch: int) -> torch.Tensor:
        uri = self._uris[sample]
        try:
            if self._seed is None:
                return self._for_eval(sample)
            image = self._for_crops(sample)
        except (images.ImageError, storage.ObjectMissingError) as error:
            raise _lost(uri, str(error)) from error
        size = self._size_at(epoch) if self._size_at else None
        return self._transform.for_train(
            image, seed=self._seed, epoch=epoch, sample=sample, augment=self._augment, size=size
        )

    def _for_eval(self, sample: int) -> torch.Tensor:
        """What scoring sees; cached as pixels."""
        shape = (3, self._transform.size, self._transform.size)

        def made() -> bytes:
            image = images.decode(self._get(sample), min_side=self._transform.min_side)
            return self._transform.for_eval(image).contiguous().numpy().tobytes()

        def opened(pixels: bytes) -> torch.Tensor:
            return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).reshape(shape)

        return self._cached(sample, f"eval-{self._transform.digest}", made, opened)

    def _for_crops(self, sample: int) -> torch.Tensor:
        """The image, no larger than crops need; cached as it came, or smaller."""
        side = self._transform.min_side
        made = partial(images.reduced, min_side=side) if side else bytes
        return self._cached(sample, f"crops-{side}", lambda: made(self._get(sample)), images.decode)

    def _cached(self, sample: int, kind: str, made: Callable[[], bytes], opened: Callable[[bytes], T]) -> T:
        if self._cache is None or self._digests is None or not storage.is_s3(self._uris[sample]):
            return opened(made())
        name = f"{self._digests[sample]}-{kind}"
        data = self._cache.get(name)
        if data is not None:
            try:
                return opened(data)
            except (images.ImageError, ValueError, RuntimeError):  # damaged on this disk
                self._cache.drop(name)
        data = made()
        found = opened(data)
        self._cache.put(name, data)
        return found

    def _get(self, sample: int) -> bytes:
        uri = self._uris[sample]
        # `fetch` costs a third of what `get` does, and wants an event loop.
        data = asyncio.run_coroutine_threadsafe(storage.fetch(uri), self._loop).result()[0]
        if self._digests and hashlib.sha256(data).hexdigest() != self._digests[sample]:
            raise images.ImageError("changed", "another image is there now")
        return data


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
