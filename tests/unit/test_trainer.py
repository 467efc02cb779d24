"""What options of a recipe do to the steps: averages, early stopping, BatchNorm, growing images, the curve of losses."""

from pathlib import Path

import pytest
import torch
from timm.layers import DropPath  # pyright: ignore[reportPrivateImportUsage]
from timm.models import create_model  # pyright: ignore[reportPrivateImportUsage]
from torch import nn

from dragonclf.model import zoo
from dragonclf.train import checkpoint, loop
from dragonclf.train.head import Head
from dragonclf.train.recipe import Recipe
from dragonclf.train.trainer import POINTS, Trainer
from tests.unit.test_loop import ALL_LAYERS, RECIPE, TRAIN, VALID, fit, fit_all_layers, network


def changed(recipe: Recipe, **options: object) -> Recipe:
    return Recipe.model_validate(recipe.model_dump() | options)


def test_the_average_is_that_of_the_weights_after_each_step():
    """As timm's with a warm-up: after step n the decay is 1 - n ** (-2 / 3), at most the one that is asked for."""
    decay = 0.7
    head = Head(TRAIN.features, 2)
    trainer = Trainer(head, TRAIN, changed(RECIPE, ema=decay), rank=0, world_size=1, device=torch.device("cpu"))
    expected = torch.zeros(())
    for number, _ in trainer.steps(head, 0, first=0, lr_at=lambda step: 0.05):
        now = min(decay, 1 - number ** (-2 / 3))
        expected = now * expected + (1 - now) * head.linear.weight.detach()
        torch.testing.assert_close(trainer.result.state_dict()["linear.weight"], expected)
    assert not torch.allclose(expected, head.linear.weight)


def test_the_average_is_what_is_validated_and_kept(tmp_path: Path):
    fit(str(tmp_path), recipe=changed(RECIPE, ema=0.999, epochs=1))
    state, best = checkpoint.load(str(tmp_path)), checkpoint.load(str(tmp_path), checkpoint.BEST)
    assert state
    assert best
    average = checkpoint.weights_of(state)
    assert not torch.equal(average["linear.weight"], state["model"]["linear.weight"])
    assert torch.equal(best["model"]["linear.weight"], average["linear.weight"])
    head = Head(TRAIN.features, 2)
    head.load_state_dict(average)
    loss = nn.functional.cross_entropy(head(VALID.features), VALID.targets)
    assert checkpoint.read_results(str(tmp_path))[0]["valid_loss"] == pytest.approx(float(loss.detach()))


def test_training_stops_when_it_gets_no_better_and_stays_stopped(tmp_path: Path):
    patient = changed(RECIPE, epochs=30, patience=2, lr=3.0)  # so high that epochs come out differently
    fit(str(tmp_path), recipe=patient)
    rows = checkpoint.read_results(str(tmp_path))
    waited = [checkpoint.since_best(rows[: done + 1]) for done in range(len(rows))]
    assert waited[-1] == 2 > max(waited[:-1])
    assert len(rows) < 30
    assert fit(str(tmp_path), recipe=patient) == []


@pytest.mark.parametrize(
    ("figures", "since"),
    [([], 0), ([(0.5, 1)], 0), ([(0.5, 1), (0.5, 0.9)], 0), ([(0.5, 1), (0.5, 1)], 1), ([(0.9, 1), (0.5, 0.1), (0.8, 0)], 2)],
)  # fmt: skip
def test_the_best_epoch_is_the_first_of_the_most_accurate(figures: list[tuple[float, float]], since: int):
    history = [{"valid_accuracy": accuracy, "valid_loss": loss} for accuracy, loss in figures]
    assert checkpoint.since_best(history) == since


@pytest.mark.parametrize(("batch_norm", "training"), [("frozen", False), ("train", True), ("sync", True)])
def test_batch_norm_learns_statistics_only_if_told(batch_norm: str, training: bool):
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    changed(ALL_LAYERS, batch_norm=batch_norm).train_mode(model)
    assert [module.training for module in model] == [True, training, True, True]


def test_trained_statistics_are_those_of_the_images(tmp_path: Path):
    before = network().state_dict()
    after = fit_all_layers(str(tmp_path), recipe=changed(ALL_LAYERS, batch_norm="train"))
    moved = {key for key in before if "running" in key and not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if "running" in key}


def test_images_grow_to_their_size():
    growing = changed(ALL_LAYERS, epochs=9, freeze_epochs=1, start_size=96)
    sizes = [growing.size_at(epoch, 224) for epoch in range(10)]
    assert sizes == [96, 128, 128, 160, 160, 192, 224, 224, 224, 224]
    assert [changed(growing, start_size=224).size_at(epoch, 96) for epoch in range(10)] == [96] * 10
    assert changed(growing, epochs=1, freeze_epochs=0).size_at(0, 224) == 96


def test_the_curve_has_each_step_of_a_short_epoch(tmp_path: Path):
    fit(str(tmp_path))
    curve, results = checkpoint.read_results(str(tmp_path), checkpoint.STEPS), checkpoint.read_results(str(tmp_path))
    num_steps = 7  # 101 samples by 16
    assert [row["step"] for row in curve] == list(range(1, 4 * num_steps + 1))
    assert [row["epoch"] for row in curve] == [1 + step // num_steps for step in range(4 * num_steps)]
    first = [row["loss"] for row in curve[:num_steps]]
    assert sum(loss * count for loss, count in zip(first, [16] * 6 + [5], strict=True)) / 101 == pytest.approx(
        results[0]["train_loss"]
    )
    assert curve[num_steps - 1]["lr"] == results[0]["lr"]


def test_the_curve_of_a_long_epoch_is_bounded(tmp_path: Path):
    fit(str(tmp_path), recipe=changed(RECIPE, global_batch_size=1, epochs=2))
    curve = checkpoint.read_results(str(tmp_path), checkpoint.STEPS)
    assert len(curve) == 2 * POINTS
    assert curve[-1]["step"] == 2 * 101


def test_a_gpu_without_memory_is_told_with_what_helps(tmp_path: Path):
    class Full(Head):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(ValueError, match="too small for 16 images over 1 workers in 1 parts: raise --accumulate"):
        loop.fit(
            Full(TRAIN.features, 2), TRAIN, VALID, RECIPE, run_uri=str(tmp_path), rank=0, world_size=1, device=torch.device("cpu"),
            wrap=lambda model: model, report=lambda row: None,
        )  # fmt: skip


def test_regularization_reaches_the_architecture_and_others_refuse_it():
    model = zoo.load_pretrained("test_efficientnet", "none", {"drop_rate": 0.25, "drop_path_rate": 0.2})
    assert model.drop_rate == 0.25
    assert [module for module in model.modules() if isinstance(module, DropPath) and module.drop_prob]
    assert not [module for module in create_model("test_efficientnet").modules() if isinstance(module, DropPath)]
    with pytest.raises(ValueError, match=r"'vgg11' does not take --drop-path .*: leave it out"):
        zoo.load_pretrained("vgg11", "none", {"drop_path_rate": 0.2})


def test_a_compiled_model_learns_the_same(tmp_path: Path):
    plain, compiled = (
        fit(str(tmp_path / str(way)), recipe=changed(RECIPE, epochs=1, compile=way)) for way in (False, True)
    )
    assert compiled == [pytest.approx(row, rel=1e-4) for row in plain]
    first, second = (checkpoint.load(str(tmp_path / str(way))) for way in (False, True))
    assert first
    assert second
    assert first["model"].keys() == second["model"].keys()
