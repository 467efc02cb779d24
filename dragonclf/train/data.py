"""What a training worker iterates over: features from memory, or images from storage with augmentation, by sample index.

Both give, for a list of sample indices, an input tensor and the class indices; the training split and the validation split have an
instance each.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from dragonclf import storage
from dragonclf.data import images
from dragonclf.data.snapshot import Snapshot, read_rows
from dragonclf.data.transforms import Transform
from dragonclf.engine import published

PREFETCH_BATCHES = 3

Batch = tuple[torch.Tensor, torch.Tensor]


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
    """Precomputed features of one split, all in memory: float32 (N, F)."""

    def __init__(self, run_uri: str, classes: list[str], split: str):
        features, targets = [], []
        for table in published.read_parts(run_uri):
            _refuse_lost(table)
            table = table.filter(pc.field("split") == split)
            column = table["features"].combine_chunks()
            features.append(torch.from_numpy(column.flatten().to_numpy().reshape(len(column), -1).copy()))
            targets.append(_targets(table["label"].to_pylist(), classes))
        self.features, self.targets = torch.cat(features), torch.cat(targets)

    def __len__(self) -> int:
        return len(self.targets)

    def batches(self, indices: Iterable[np.ndarray], *, epoch: int) -> Iterator[Batch]:
        for batch in indices:
            index = torch.from_numpy(batch)
            yield self.features[index], self.targets[index]


class Images:
    """Images read from storage when their turn comes, decoded and augmented in threads: uint8 (N, 3, S, S).

    `seed` draws the augmentation of training images; None means the evaluation transform.
    """

    def __init__(
        self,
        uris: list[str],
        labels: list[str],
        classes: list[str],
        transform: Transform,
        *,
        seed: int | None,
        num_threads: int,
    ):
        self._uris, self.targets = uris, _targets(labels, classes)
        self._transform, self._seed = transform, seed
        self._pool = ThreadPoolExecutor(num_threads, "decode")

    @classmethod
    def of_split(
        cls, snapshot: Snapshot, split: str, transform: Transform, *, seed: int | None, num_threads: int
    ) -> "Images":
        """All of a snapshot's split."""
        table = pa.concat_tables(read_rows(snapshot, splits=[split], columns=["uri", "label"]))
        uris, labels = (table[name].to_pylist() for name in ("uri", "label"))
        return cls(uris, labels, snapshot.info.classes, transform, seed=seed, num_threads=num_threads)

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
            image = images.decode(storage.get(uri), min_side=self._transform.min_side)
        except (images.ImageError, storage.ObjectMissingError) as error:
            raise _lost(uri, str(error)) from error
        if self._seed is None:
            return self._transform.for_eval(image).clone()  # a view would keep the whole image
        return self._transform.for_train(image, seed=self._seed, epoch=epoch, sample=sample)


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
