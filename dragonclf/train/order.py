"""In which order images are trained on: a function of the seed and the epoch, never of the number of workers.

Sample i lies in partition ``i % global_batch_size`` for ever. Each epoch shuffles every partition by itself, and step s takes the
s-th sample of each. A worker owns whole partitions, so any number of workers sees the same global batches, and a worker meets the same
samples every epoch (which lets a node cache its own).
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """The batches of a training run over `num_samples` samples."""

    num_samples: int
    global_batch_size: int
    seed: int

    @property
    def num_steps(self) -> int:
        """Steps of an epoch; the last may be short."""
        return math.ceil(self.num_samples / self.global_batch_size)

    def global_count(self, step: int) -> int:
        """Samples of a step over all workers together."""
        return min(self.global_batch_size, self.num_samples - step * self.global_batch_size)

    def batches(self, epoch: int, *, rank: int, world_size: int) -> list[np.ndarray]:
        """One array of sample indices (int64) per step for one worker. In the last step a worker may have none."""
        columns = [self._partition(epoch, p) for p in range(rank, self.global_batch_size, world_size)]
        return [
            np.array([column[step] for column in columns if step < len(column)], dtype=np.int64)
            for step in range(self.num_steps)
        ]  # fmt: skip

    def own(self, *, rank: int, world_size: int) -> np.ndarray:
        """Every sample that one worker will ever see, sorted (int64)."""
        samples = np.arange(self.num_samples)
        return samples[samples % self.global_batch_size % world_size == rank]

    def _partition(self, epoch: int, partition: int) -> np.ndarray:
        members = np.arange(partition, self.num_samples, self.global_batch_size)
        return np.random.default_rng((self.seed, epoch, partition)).permutation(members)
