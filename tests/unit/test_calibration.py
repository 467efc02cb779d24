"""Temperature scaling against scipy's minimum, and the calibration error against torchmetrics'."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from dragonclf.train import calibration, loop
from dragonclf.train.calibration import HOTTEST, MIN_IMAGES, calibrate
from dragonclf.train.data import Batch
from dragonclf.train.recipe import Recipe
from tests.processes import run_in_processes


def too_sure(count: int, *, num_classes: int, by: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are `by` times those from which the classes were drawn."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(scale=2, size=(count, num_classes)))
    targets = torch.from_numpy((logits.softmax(1).numpy().cumsum(1) < rng.random((count, 1))).sum(1))
    return by * logits, targets


def alone(sums: torch.Tensor) -> torch.Tensor:
    return sums


@pytest.mark.parametrize("num_classes", [2, 7])
@pytest.mark.parametrize("by", [0.6, 1.0, 2.5])
def test_the_temperature_has_the_least_cross_entropy(num_classes: int, by: float):
    logits, targets = too_sure(3000, num_classes=num_classes, by=by)
    found = calibrate(logits.float(), targets, alone)
    best: Any = scipy.optimize.minimize_scalar(
        lambda t: float(F.cross_entropy(logits / t, targets)), bounds=(0.2, 5), options={"xatol": 1e-9}
    )
    assert found["temperature"] == pytest.approx(best.x, rel=1e-4)
    assert found["temperature"] == pytest.approx(by, rel=0.1)
    for name, temperature in (("valid_ece", 1.0), ("valid_ece_calibrated", found["temperature"])):
        reference = multiclass_calibration_error((logits / temperature).softmax(1), targets, num_classes, n_bins=15)
        assert found[name] == pytest.approx(float(reference), abs=1e-4)  # which adds in float32
    if by > 2:
        assert found["valid_ece_calibrated"] < found["valid_ece"] / 2


def test_workers_find_together_what_one_finds(tmp_path: Path):
    """Three processes; the last has no image."""
    run_in_processes(_share, str(tmp_path / "meeting"), str(tmp_path), count=3)
    alone_found = calibrate(*too_sure(500, num_classes=3, by=2.0), alone)
    for rank in range(3):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == pytest.approx(alone_found, rel=1e-6)


def _share(rank: int, meeting: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=3)

    def summed(sums: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(sums)
        return sums

    logits, targets = too_sure(500, num_classes=3, by=2.0)
    own = (logits[rank::2], targets[rank::2]) if rank < 2 else (torch.zeros(0, 1), targets[:0])
    Path(folder, f"{rank}.json").write_text(json.dumps(calibrate(*own, summed)))
    dist.destroy_process_group()


def test_of_many_images_those_that_are_kept_are_of_all_classes(monkeypatch: pytest.MonkeyPatch):
    """Images come class by class: the first 60 of these are of one class."""
    logits, targets = too_sure(160, num_classes=2, by=2.0)
    order = targets.argsort(stable=True)
    samples = Samples(logits[order].float(), targets[order])
    monkeypatch.setattr(calibration, "MAX_IMAGES", 60)
    recipe = Recipe(epochs=1, lr=1, weight_decay=0, global_batch_size=1, seed=0)
    found, _ = loop._validate(torch.nn.Identity(), samples, recipe, 0, 0, 1, torch.device("cpu"))
    wanted = calibrate(samples.logits[::3], samples.targets[::3], alone)
    assert {key: found[key] for key in wanted} == wanted
    assert found["valid_accuracy"] == float((logits.argmax(1) == targets).double().mean())


class Samples:
    """Logits in place of images."""

    def __init__(self, logits: torch.Tensor, targets: torch.Tensor):
        self.logits, self.targets = logits, targets

    def __len__(self) -> int:
        return len(self.targets)

    def batches(self, indices: Iterable[np.ndarray], *, epoch: int) -> Iterator[Batch]:
        for batch in indices:
            yield self.logits[torch.from_numpy(batch)], self.targets[torch.from_numpy(batch)]


def test_few_images_say_nothing():
    logits, targets = too_sure(MIN_IMAGES - 1, num_classes=2, by=3.0)
    found = calibrate(logits, targets, alone)
    assert found["temperature"] == 1
    assert found["valid_ece_calibrated"] == found["valid_ece"]


def test_images_that_are_all_right_do_not_make_it_certain():
    targets = torch.arange(200) % 2
    found = calibrate(F.one_hot(targets, 2).double(), targets, alone)
    assert found["temperature"] == pytest.approx(1 / HOTTEST)
