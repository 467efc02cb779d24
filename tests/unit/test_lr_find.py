"""The learning-rate finder: the suggestions for known curves, and what a sweep leaves behind."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dragonclf.train import lr_find
from tests.processes import run_in_processes
from tests.unit.test_loop import ALL_LAYERS, PICTURES, RECIPE, TRAIN, Points, network

ALONE: dict[str, Any] = {"rank": 0, "world_size": 1, "device": torch.device("cpu"), "wrap": lambda model: model}


def head() -> nn.Module:
    from dragonclf.train.head import Head

    return Head(TRAIN.features, 2)


def test_rates_grow_by_one_factor():
    rates = [lr_find.lr_at(number) for number in range(lr_find.NUM_STEPS)]
    assert rates[0] == 1e-7
    assert rates[-1] == pytest.approx(10)
    assert {round(b / a, 9) for a, b in itertools.pairwise(rates)} == {round(10 ** (8 / 99), 9)}


def test_valley_is_half_way_down_the_longest_fall():
    """By hand: 11, 10, ..., 0 at places 1 to 12 is the longest fall; its middle third begins at 4 and has its middle at 6."""
    assert lr_find.valley([10.0, 11, 10, *range(9, -1, -1), 5, 6]) == 4 + 2
    assert lr_find.valley([1.0, 2, 3, 4]) == 0
    assert lr_find.valley([5.0, 4, 3, 2, 1, 0]) == 2


def test_steep_is_where_the_next_fall_is_greatest():
    assert lr_find.steep([10.0, 9, 9.5, 4, 3, 20]) == 2


def test_a_sweep_finds_a_rate_that_learns_and_leaves_the_model_alone():
    model = head()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = lr_find.sweep(model, TRAIN, RECIPE, **ALONE)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert 1e-4 < found.valley < 1
    assert found.valley in found.lrs
    assert found.losses[0] == pytest.approx(math.log(2))
    assert found.smoothed[0] == pytest.approx(found.losses[0])
    assert min(found.smoothed) < 0.9 * math.log(2)
    assert all(smooth <= 4 * min(found.smoothed[: i + 1]) for i, smooth in enumerate(found.smoothed))


def test_what_diverges_at_once_is_said():
    broken = Points(101, seed=1)
    broken.features[TRAIN.targets == 1] = float("nan")
    with pytest.raises(ValueError, match=r"diverges after 0 steps of the learning-rate sweep: give --lr a number"):
        lr_find.sweep(head(), broken, RECIPE, **ALONE)


def test_a_run_keeps_the_rate_that_it_began_with(tmp_path: Path):
    found = lr_find.find(head(), TRAIN, RECIPE, run_uri=str(tmp_path), **ALONE)
    kept = json.loads((tmp_path / "lr_find.json").read_text())
    assert kept["valley"] == found
    (tmp_path / "lr_find.json").write_text(json.dumps(kept | {"valley": 0.125}))
    assert lr_find.find(head(), TRAIN, RECIPE, run_uri=str(tmp_path), **ALONE) == 0.125


SWEPT = ALL_LAYERS.model_copy(update={"accumulate": 1})


def _swept(rank: int, folder: str, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        found = lr_find.sweep(
            network(drop_rate=0.0), PICTURES, SWEPT, rank=rank, world_size=2, device=torch.device("cpu"),
            wrap=nn.parallel.DistributedDataParallel,
        )  # fmt: skip
        Path(folder, f"{rank}.json").write_text(found.model_dump_json())
    finally:
        dist.destroy_process_group()


def test_two_workers_find_what_one_does(tmp_path: Path):
    run_in_processes(_swept, str(tmp_path), str(tmp_path / "meeting"), count=2)
    first, second = (lr_find.Sweep.model_validate_json((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    alone = lr_find.sweep(network(drop_rate=0.0), PICTURES, SWEPT, **ALONE)
    assert alone.losses[:40] == pytest.approx(first.losses[:40], rel=1e-4)
