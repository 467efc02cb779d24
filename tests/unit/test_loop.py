"""The training loop in one process on the CPU: it learns, resumes to the same bits, and stops on nonsense."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn

from dragonclf import storage
from dragonclf.data.transforms import Transform
from dragonclf.model.predictor import Network, softmax
from dragonclf.train import checkpoint, group, loop
from dragonclf.train.data import Batch
from dragonclf.train.head import Head, folded
from dragonclf.train.recipe import Recipe
from tests.processes import run_in_processes

RECIPE = Recipe(epochs=4, lr=0.05, weight_decay=0.01, global_batch_size=16, seed=0)


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


TIMES = ("seconds", "waited", "workers")  # columns of results.csv that no two runs share
TRAIN, VALID = Points(101, seed=1), Points(37, seed=2)


def fit(
    run_uri: str,
    *,
    recipe: Recipe = RECIPE,
    train: Points = TRAIN,
    valid: Points = VALID,
    stop_after: int | None = None,
) -> list[dict[str, float]]:
    """Train on this process alone, at most to the end of epoch `stop_after`. Returns the reported rows."""
    reported: list[dict[str, float]] = []

    def report(row: dict[str, float]) -> None:
        reported.append(row)
        if row["epoch"] == stop_after:
            raise KilledError

    loop.fit(
        Head(train.features, 2), train, valid, recipe, run_uri=run_uri, rank=0, world_size=1, device=torch.device("cpu"),
        wrap=lambda model: model, report=report,
    )  # fmt: skip
    return reported


def final_state(run_uri: str) -> dict[str, torch.Tensor]:
    state = checkpoint.load(run_uri)
    assert state is not None
    assert (state["epoch"], state["step"]) == (RECIPE.epochs, 0)
    return state["model"]


def test_head_folds_into_one_layer_on_raw_features():
    head = Head(TRAIN.features, 3)
    nn.init.normal_(head.linear.weight)
    nn.init.normal_(head.linear.bias)
    weight, bias = folded(head.state_dict())
    assert weight.shape == (3, 6)
    torch.testing.assert_close(VALID.features @ weight.T + bias, head(VALID.features), atol=1e-5, rtol=1e-5)


def test_head_starts_undecided_and_bears_a_constant_feature():
    features = torch.cat([TRAIN.features, torch.full((101, 1), 7.0)], dim=1)
    head = Head(features, 2)
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
    assert list(results[0]) == [
        "epoch", "train_loss", "valid_loss", "valid_accuracy", "temperature", "valid_ece", "valid_ece_calibrated", "lr", "seconds",
        "waited", "workers",
    ]  # fmt: skip
    assert [{key: value for key, value in row.items() if key not in TIMES} for row in results] == reported
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["best.pt", "latest.pt"]


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
    drop = [[{**row, **dict.fromkeys(TIMES)} for row in rows] for rows in results]
    assert drop[0] == drop[1]


def test_a_finished_run_does_nothing_more(tmp_path: Path):
    fit(str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert fit(str(tmp_path)) == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_loss_that_is_not_finite_stops_and_leaves_no_checkpoint(tmp_path: Path):
    broken = Points(40, seed=3)
    broken.features[5] = float("nan")
    with pytest.raises(
        ValueError, match=r"the loss is nan at step 1 of epoch 1, at a learning rate of 0\.0\d+: lower --lr"
    ):
        fit(str(tmp_path), train=broken)
    assert list(tmp_path.iterdir()) == []


def test_a_last_step_that_goes_too_far_is_told(tmp_path: Path):
    one_step = RECIPE.model_copy(update={"lr": 1e37, "global_batch_size": 128})
    with pytest.raises(ValueError, match=r"the loss of the validation images is (nan|inf) after epoch \d: lower --lr"):
        fit(str(tmp_path), recipe=one_step)


def test_the_best_epoch_is_kept_beside_the_newest(tmp_path: Path):
    fit(str(tmp_path), recipe=RECIPE.model_copy(update={"lr": 3.0}))  # so high that epochs come out differently
    rows = checkpoint.read_results(str(tmp_path))
    best = checkpoint.load(str(tmp_path), checkpoint.BEST)
    assert best is not None
    wanted = max(rows, key=lambda row: (row["valid_accuracy"], -row["valid_loss"]))
    assert best["history"][-1] == wanted
    head = Head(TRAIN.features, 2)
    head.load_state_dict(best["model"])
    accuracy = (head(VALID.features).argmax(1) == VALID.targets).float().mean()
    assert float(accuracy) == pytest.approx(wanted["valid_accuracy"])


@pytest.mark.parametrize("calibrate", [True, False])
def test_thresholds_are_kept_with_the_weights_that_they_are_of(calibrate: bool, tmp_path: Path):
    """Of the newest epoch and of the best one; and they fit what the model, calibrated or not, will say of each validation image."""
    recipe, valid = (
        RECIPE.model_copy(update={"lr": 3.0, "min_precision": 0.9, "calibrate": calibrate}),
        Points(200, seed=6),
    )
    fit(str(tmp_path), recipe=recipe, valid=valid)
    for name in (checkpoint.LATEST, checkpoint.BEST):
        state = checkpoint.load(str(tmp_path), name)
        assert state is not None
        head = Head(TRAIN.features, 2)
        head.load_state_dict(state["model"])
        row = state["history"][-1]
        assert row["temperature"] != 1
        with torch.no_grad():
            logits = head(valid.features).double() / (row["temperature"] if calibrate else 1)
        probs = softmax(logits.numpy())
        labels, accepted = probs.argmax(1), np.zeros(len(probs), bool)
        for index, choice in enumerate(state["thresholds"]):
            of_class = (labels == index) & (probs.max(1) >= np.float32(choice["threshold"]))
            assert of_class.sum() == choice["accepted"] > 0
            assert (valid.targets.numpy()[of_class] == index).mean() == choice["reached"] >= 0.9
            accepted |= of_class
        assert row["valid_coverage"] == accepted.mean()
    assert "valid_coverage" in checkpoint.read_results(str(tmp_path))[0]


class Pictures:
    """Samples of 32 x 32 pixels whose classes are dark and bright; the process ends after `ends_after` batches, if that is given."""

    def __init__(self, count: int, *, seed: int, ends_after: int | None = None):
        draw = torch.Generator().manual_seed(seed)
        self.targets = torch.arange(count) % 2
        noise = torch.randint(0, 180, (count, 3, 32, 32), generator=draw)
        self._pixels = (noise + 60 * self.targets[:, None, None, None]).to(torch.uint8)
        self._left = ends_after

    def __len__(self) -> int:
        return len(self.targets)

    def batches(self, indices: Iterable[np.ndarray], *, epoch: int) -> Iterator[Batch]:
        for batch in indices:
            if self._left == 0:
                raise KilledError
            self._left = None if self._left is None else self._left - 1
            index = torch.from_numpy(batch)
            yield self._pixels[index], self.targets[index]


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

ALL_LAYERS = Recipe(
    epochs=2, freeze_epochs=1, lr=0.01, weight_decay=0.05, layer_decay=0.8, label_smoothing=0.1, class_weights="balanced", clip_grad=1.0,
    global_batch_size=8, accumulate=2, checkpoint_every=2, seed=3,
)  # fmt: skip
TWENTY_STEPS = ALL_LAYERS.model_copy(update={"epochs": 3})  # 24
NUM_PICTURES = 45  # not a multiple of the batch: five samples in the last step
PICTURES = Pictures(NUM_PICTURES, seed=4)


def network(*, drop_rate: float = 0.3) -> Network:
    torch.manual_seed(11)
    model = timm.create_model("test_efficientnet", num_classes=2, drop_rate=drop_rate)
    transform = Transform(size=32, crop_pct=1, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return Network(model, transform)


def fit_all_layers(
    run_uri: str,
    *,
    recipe: Recipe = ALL_LAYERS,
    train: Pictures = PICTURES,
    drop_rate: float = 0.3,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, torch.Tensor]:
    """Train a network on this process's share, and return its final weights."""
    model = network(drop_rate=drop_rate)
    wrap: Callable[[nn.Module], nn.Module] = (
        nn.parallel.DistributedDataParallel if world_size > 1 else lambda model: model
    )
    loop.fit(
        model, train, Pictures(9, seed=5), recipe, run_uri=run_uri, rank=rank, world_size=world_size, device=torch.device("cpu"),
        wrap=wrap, report=lambda row: None,
    )  # fmt: skip
    return model.state_dict()


def rows_of(run_uri: str) -> list[dict[str, float]]:
    return [{**row, **dict.fromkeys(TIMES, 0.0)} for row in checkpoint.read_results(run_uri)]


@pytest.mark.parametrize(
    "options", [{}, {"amp": True}, {"ema": 0.9, "mixup": 0.4, "cutmix": 1.0, "batch_norm": "train"}], ids=str
)
def test_a_run_killed_ten_times_at_any_step_comes_to_the_same_bits(options: dict[str, object], tmp_path: Path):
    recipe = ALL_LAYERS.model_copy(update={"epochs": 3} | options)
    whole = fit_all_layers(str(tmp_path / "whole"), recipe=recipe)
    draw, places = np.random.default_rng(6), set()
    for _ in range(10):
        killed = Pictures(NUM_PICTURES, seed=4, ends_after=int(draw.integers(1, 7)))
        with pytest.raises(KilledError):
            fit_all_layers(str(tmp_path / "cut"), recipe=recipe, train=killed)
        state = checkpoint.load(str(tmp_path / "cut"))
        places.add((state["epoch"], state["step"]) if state else (0, 0))
    assert any(step for _, step in places), "no kill left a checkpoint amid an epoch"
    cut = fit_all_layers(str(tmp_path / "cut"), recipe=recipe)
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert rows_of(str(tmp_path / "cut")) == rows_of(str(tmp_path / "whole"))
    curves = [checkpoint.read_results(str(tmp_path / name), checkpoint.STEPS) for name in ("cut", "whole")]
    assert curves[0] == curves[1]
    states = [checkpoint.load(str(tmp_path / name)) for name in ("cut", "whole")]
    results = [checkpoint.weights_of(state) for state in states if state]
    assert all(torch.equal(results[0][key], results[1][key]) for key in whole)


def test_frozen_epochs_train_the_head_alone(tmp_path: Path):
    before = network().state_dict()
    with pytest.raises(KilledError):  # in the first step that is not frozen
        fit_all_layers(str(tmp_path), train=Pictures(NUM_PICTURES, seed=4, ends_after=2 * 6))
    state = checkpoint.load(str(tmp_path))
    assert state is not None
    assert state["epoch"] == 1
    changed = {key for key in before if not torch.equal(before[key], state["model"][key])}
    assert changed == {"model.classifier.weight", "model.classifier.bias"}
    after = fit_all_layers(str(tmp_path))
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved > changed
    assert not [key for key in moved if "running" in key or key in ("mean", "std")]


def test_equal_seeds_give_equal_runs_and_others_do_not(tmp_path: Path):
    first, second = (fit_all_layers(str(tmp_path / name)) for name in ("first", "second"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert rows_of(str(tmp_path / "first")) == rows_of(str(tmp_path / "second"))
    fit_all_layers(str(tmp_path / "other"), recipe=ALL_LAYERS.model_copy(update={"seed": 4}))
    losses = [[row["train_loss"] for row in rows_of(str(tmp_path / name))] for name in ("first", "other")]
    assert all(a != b for a, b in zip(*losses, strict=True))


def _of_two(rank: int, run_uri: str, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        step_losses = _trace(TWENTY_STEPS.model_copy(update={"accumulate": 1}), run_uri, rank=rank, world_size=2)
        Path(f"{run_uri}-losses-{rank}.json").write_text(json.dumps(step_losses))
    finally:
        dist.destroy_process_group()


def _trace(recipe: Recipe, run_uri: str, *, rank: int = 0, world_size: int = 1) -> list[float]:
    """Train, and return this worker's share of the sum of losses of each step."""
    losses: list[float] = []
    new_loss = Recipe.new_loss

    def traced(self: Recipe, targets: torch.Tensor, device: torch.device) -> Loss:
        loss = new_loss(self, targets, device)

        def kept(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
            found = loss(logits, classes)
            losses.append(float(found.detach()))
            return found

        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "new_loss", traced)
        fit_all_layers(run_uri, recipe=recipe, drop_rate=0.0, rank=rank, world_size=world_size)
    return [sum(losses[first : first + recipe.accumulate]) for first in range(0, len(losses), recipe.accumulate)]


def test_two_workers_train_all_layers_as_one_that_accumulates(tmp_path: Path):
    """Each step's loss, each epoch's figures, and the weights."""
    two, one = str(tmp_path / "two"), str(tmp_path / "one")
    run_in_processes(_of_two, two, str(tmp_path / "meeting"), count=2)
    alone = _trace(TWENTY_STEPS, one)
    shared = [json.loads(Path(f"{two}-losses-{rank}.json").read_text()) for rank in (0, 1)]
    assert len(alone) == len(shared[0]) >= 20
    for step, loss in enumerate(alone):
        # in the short last step of an epoch a worker may hold a picture of weight 0 only
        assert sum(losses[step] for losses in shared) == pytest.approx(loss, rel=1e-4), step
    states = [checkpoint.load(uri) for uri in (one, two)]
    assert states[0]
    assert states[1]
    for key, tensor in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][key], tensor, atol=1e-4, rtol=1e-4)
    for row, other in zip(rows_of(one), rows_of(two), strict=True):
        assert other == pytest.approx(row, rel=1e-4)


def _disagree(rank: int, run_uri: str, meeting: str) -> None:
    """The second worker of two reads another checkpoint than the first one, once or for ever."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    checkpoint.AGREE_S, read = 0.01, checkpoint._read
    seen = 0

    def stale(uri: str, name: str) -> bytes | None:
        nonlocal seen
        seen += 1
        return None if rank == 1 and seen <= late else read(uri, name)

    checkpoint._read = stale
    try:
        late = 3
        state = checkpoint.load_agreed(run_uri, group.all_equal)
        assert state
        assert state["epoch"] == 7
        assert seen == 4
        late = 1000
        with pytest.raises(
            storage.StorageError, match=r"keeps changing while workers start from it: end the other command"
        ):
            checkpoint.load_agreed(run_uri, group.all_equal)
    finally:
        dist.destroy_process_group()


def test_workers_start_from_one_checkpoint_or_not_at_all(tmp_path: Path):
    with checkpoint.Writer(str(tmp_path)) as writer:
        writer.save({"epoch": 7, "model": {}, "history": [], "curve": []})
    run_in_processes(_disagree, str(tmp_path), str(tmp_path / "meeting"), count=2)
