"""The training loop in one process on the CPU: it learns, resumes to the same bits, and stops on nonsense."""

import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from dragonclf.train import checkpoint, loop
from dragonclf.train.data import Batch

RECIPE = loop.Recipe(epochs=4, lr=0.05, weight_decay=0.01, global_batch_size=16, seed=0)


class Points:
    """Samples in memory: two classes around two centres."""

    def __init__(self, count: int, *, seed: int):
        draw = torch.Generator().manual_seed(seed)
        self.targets = torch.arange(count) % 2
        noise = torch.randn(count, 6, generator=draw)
        self.features = (
            noise * torch.tensor([1, 1, 9, 0.1, 1, 1])
            + self.targets[:, None] * torch.tensor([3.0, 0, 0, 0.2, 0, 0])
            + 1
        )

    def __len__(self) -> int:
        return len(self.targets)

    def batches(self, indices: Iterable[np.ndarray], *, epoch: int) -> Iterator[Batch]:
        for batch in indices:
            index = torch.from_numpy(batch)
            yield self.features[index], self.targets[index]


class KilledError(Exception):
    """The process ends here."""


TRAIN, VALID = Points(101, seed=1), Points(37, seed=2)


def fit(
    run_uri: str, *, recipe: loop.Recipe = RECIPE, train: Points = TRAIN, stop_after: int | None = None
) -> list[dict[str, float]]:
    """Train on this process alone, at most to the end of epoch `stop_after`. Returns the reported rows."""
    reported: list[dict[str, float]] = []

    def report(row: dict[str, float]) -> None:
        reported.append(row)
        if row["epoch"] == stop_after:
            raise KilledError

    loop.fit(
        loop.Head(train.features, 2), train, VALID, recipe, run_uri=run_uri, rank=0, world_size=1, device=torch.device("cpu"),
        wrap=lambda model: model, report=report,
    )  # fmt: skip
    return reported


def final_state(run_uri: str) -> dict[str, torch.Tensor]:
    state = checkpoint.load_newest(run_uri, num_epochs=RECIPE.epochs)
    assert state is not None
    assert state["epoch"] == RECIPE.epochs
    return state["model"]


def test_head_folds_into_one_layer_on_raw_features():
    head = loop.Head(TRAIN.features, 3)
    nn.init.normal_(head.linear.weight)
    nn.init.normal_(head.linear.bias)
    weight, bias = loop.folded(head.state_dict())
    assert weight.shape == (3, 6)
    torch.testing.assert_close(VALID.features @ weight.T + bias, head(VALID.features), atol=1e-5, rtol=1e-5)


def test_head_starts_undecided_and_bears_a_constant_feature():
    features = torch.cat([TRAIN.features, torch.full((101, 1), 7.0)], dim=1)
    head = loop.Head(features, 2)
    assert (head(features) == 0).all()
    head.linear.weight.data.normal_()
    assert head(features).isfinite().all()


def test_loss_falls_and_results_say_so(tmp_path: Path):
    reported = fit(str(tmp_path))
    losses = [row["train_loss"] for row in reported]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] < np.log(2) + 0.05
    assert reported[-1]["valid_accuracy"] > 0.8
    assert [row["epoch"] for row in reported] == [1, 2, 3, 4]
    results = checkpoint.read_results(str(tmp_path))
    assert list(results[0]) == ["epoch", "train_loss", "valid_loss", "valid_accuracy", "lr", "seconds"]
    assert [{key: value for key, value in row.items() if key != "seconds"} for row in results] == reported
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [f"epoch-0000{i}.pt" for i in (1, 2, 3, 4)]


def test_the_reported_loss_is_that_of_each_sample_once(tmp_path: Path):
    """At a learning rate of nothing the head stays undecided: log 2, whatever the short last batch."""
    [row] = fit(str(tmp_path), recipe=RECIPE.model_copy(update={"epochs": 1, "lr": 1e-12}))
    assert row["train_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert row["valid_loss"] == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_killed_run_resumes_to_the_same_bits(stop_after: int, tmp_path: Path):
    whole = fit(str(tmp_path / "whole"))
    with pytest.raises(KilledError):
        fit(str(tmp_path / "cut"), stop_after=stop_after)
    rest = fit(str(tmp_path / "cut"))
    assert rest == whole[stop_after:]
    expected, got = final_state(str(tmp_path / "whole")), final_state(str(tmp_path / "cut"))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    results = [checkpoint.read_results(str(tmp_path / name)) for name in ("whole", "cut")]
    drop = [[{**row, "seconds": 0} for row in rows] for rows in results]
    assert drop[0] == drop[1]


def test_a_finished_run_does_nothing_more(tmp_path: Path):
    fit(str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert fit(str(tmp_path)) == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_loss_that_is_not_finite_stops_and_leaves_no_checkpoint(tmp_path: Path):
    broken = Points(40, seed=3)
    broken.features[5] = float("nan")
    with pytest.raises(ValueError, match=r"the loss is nan in epoch 1: lower --lr"):
        fit(str(tmp_path), train=broken)
    assert list(tmp_path.iterdir()) == []


def test_batch_norm_keeps_its_statistics():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    loop._train_mode(model)
    assert [module.training for module in model] == [True, False, True, True]


def test_norms_and_biases_do_not_decay():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    decayed, kept = loop._parameter_groups(model, 0.3)
    assert ([tuple(p.shape) for p in decayed["params"]], decayed["weight_decay"]) == ([(4, 6), (2, 4)], 0.3)
    assert ([tuple(p.shape) for p in kept["params"]], kept["weight_decay"]) == ([(4,), (4,), (4,), (2,)], 0.0)


def _worker(rank: int, world_size: int, run_uri: str, port_file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=world_size)
    try:
        loop.fit(
            loop.Head(TRAIN.features, 2), TRAIN, VALID, RECIPE.model_copy(update={"epochs": 2}), run_uri=run_uri, rank=rank,
            world_size=world_size, device=torch.device("cpu"), wrap=functools.partial(nn.parallel.DistributedDataParallel),
            report=lambda row: None,
        )  # fmt: skip
    finally:
        dist.destroy_process_group()


def test_two_workers_train_as_one(tmp_path: Path):
    mp.spawn(  # pyright: ignore[reportPrivateImportUsage]
        _worker, args=(2, str(tmp_path / "two"), str(tmp_path / "meet")), nprocs=2
    )
    fit(str(tmp_path / "one"), recipe=RECIPE.model_copy(update={"epochs": 2}))
    states = [checkpoint.load_newest(str(tmp_path / name), num_epochs=2) for name in ("one", "two")]
    one, two = (state["model"] for state in states if state is not None)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=1e-5, rtol=1e-5)
    rows = [checkpoint.read_results(str(tmp_path / name)) for name in ("one", "two")]
    for alone, shared in zip(*rows, strict=True):
        assert shared["train_loss"] == pytest.approx(alone["train_loss"], abs=1e-6)
        assert shared["valid_accuracy"] == alone["valid_accuracy"]


@pytest.mark.parametrize("total", [1, 2, 3, 10, 1000])
def test_one_cycle_learns_in_a_run_of_any_length(total: int):
    rates = [loop.one_cycle(step, total_steps=total) for step in range(total)]
    assert max(rates) > 0.7
    assert min(rates) > 0
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
