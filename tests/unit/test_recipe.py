"""What the options of a recipe mean: learning rates, groups of parameters, the loss."""

import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from dragonclf.config import TrainConfig
from dragonclf.data.transforms import Transform
from dragonclf.model.predictor import Network
from dragonclf.train.recipe import Recipe, freeze, one_cycle, set_lr

RECIPE = Recipe(epochs=3, lr=0.1, weight_decay=0.3, global_batch_size=8, seed=0)
NUM_STEPS = 10


def recipe(**changes: object) -> Recipe:
    return Recipe.model_validate(RECIPE.model_dump() | changes)


@pytest.mark.parametrize("total", [1, 2, 3, 10, 1000])
def test_one_cycle_learns_in_a_run_of_any_length(total: int):
    rates = [one_cycle(step, total_steps=total) for step in range(total)]
    assert max(rates) > 0.7
    assert min(rates) > 0
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_frozen_epochs_have_a_cycle_of_their_own_and_the_rest_one_half_as_high():
    made = recipe(freeze_epochs=2)
    rates = [made.lr_at(epoch, step, num_steps=NUM_STEPS) for epoch in range(5) for step in range(NUM_STEPS)]
    frozen, rest = rates[: 2 * NUM_STEPS], rates[2 * NUM_STEPS :]
    assert max(frozen) == pytest.approx(0.1, rel=0.01)
    assert max(rest) == pytest.approx(0.05, rel=0.01)
    assert frozen[-1] < 0.002
    assert rest[0] < 0.01
    assert rest[-1] < 0.001
    plain = [recipe().lr_at(epoch, step, num_steps=NUM_STEPS) for epoch in range(3) for step in range(NUM_STEPS)]
    assert plain == [pytest.approx(2 * rate) for rate in rest]


def test_layers_learn_the_slower_the_farther_they_are_from_the_head():
    model = timm.create_model("test_efficientnet", num_classes=2)
    transform = Transform(size=32, crop_pct=1, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    optimizer = recipe(layer_decay=0.5).new_optimizer(Network(model, transform))
    set_lr(optimizer, 1.0)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert set(of) == {id(p) for p in model.parameters()}
    named = dict(model.named_parameters())
    assert of[id(named["classifier.weight"])]["lr"] == 1
    blocks = [of[id(p)]["lr"] for name, p in named.items() if name.startswith("blocks")]
    assert all(a <= b for a, b in itertools.pairwise(blocks))
    assert of[id(named["conv_stem.weight"])]["lr"] < blocks[0] or blocks[0] < blocks[-1] < 1


def test_norms_and_biases_do_not_decay():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    for name in ("adamw", "sgd"):
        groups = recipe(optimizer=name).new_optimizer(model).param_groups
        decay = {tuple(p.shape): group["weight_decay"] for group in groups for p in group["params"]}
        assert decay == {(4, 6): 0.3, (2, 4): 0.3, (4,): 0.0, (2,): 0.0}


def test_balanced_classes_weigh_the_same_and_samples_one_on_average():
    targets = torch.tensor([0] * 30 + [1] * 10)
    logits = torch.zeros(40, 2)
    loss = recipe(class_weights="balanced").new_loss(targets, torch.device("cpu"))
    rare, common = loss(logits[:1], torch.tensor([1])), loss(logits[:1], torch.tensor([0]))
    assert float(30 * common) == pytest.approx(float(10 * rare))
    assert float(loss(logits, targets)) == pytest.approx(float(F.cross_entropy(logits, targets, reduction="sum")))


def test_label_smoothing_is_that_of_the_field():
    logits, targets = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1, 0])
    loss = recipe(label_smoothing=0.1).new_loss(targets, torch.device("cpu"))
    assert torch.equal(loss(logits, targets), F.cross_entropy(logits, targets, label_smoothing=0.1, reduction="sum"))


def test_thresholds_are_for_a_precision_or_a_recall():
    TrainConfig.model_validate({"data": "d", "out": "o", "min_precision": 1})
    with pytest.raises(ValueError, match="--min-precision and --min-recall exclude each other: give one"):
        TrainConfig.model_validate({"data": "d", "out": "o", "min_precision": 0.9, "min_recall": 0.9})


@pytest.mark.parametrize("option", [{"freeze_epochs": 2}, {"freeze_to": -1}, {"layer_decay": 0.8}, {"amp": True}])
def test_what_the_head_alone_has_no_use_for_is_refused(option: dict[str, object]):
    flag = f"--{next(iter(option)).replace('_', '-')}"
    with pytest.raises(ValueError, match=f"{flag} is for training every layer: add --no-precompute"):
        TrainConfig.model_validate({"data": "d", "out": "o", **option})
    TrainConfig.model_validate({"data": "d", "out": "o", "precompute": False, **option})


@pytest.mark.parametrize("option", [{"crop_scale": 0.5}, {"flips": "both"}, {"policy": "trivial"}, {"erase": 0.1}])
def test_features_are_varied_by_views_alone(option: dict[str, object]):
    flag, given = f"--{next(iter(option)).replace('_', '-')}", {"data": "d", "out": "o", **option}
    with pytest.raises(
        ValueError, match=rf"{flag} varies images, and features are computed of each as it is: add --views"
    ):
        TrainConfig.model_validate(given)
    TrainConfig.model_validate(given | {"views": 2})
    TrainConfig.model_validate(given | {"precompute": False})


def test_views_that_no_epoch_takes_are_refused():
    given = {"data": "d", "out": "o", "epochs": 3}
    with pytest.raises(ValueError, match=r"--views 3 is more than 3 epochs take, .* lower it, or raise --epochs"):
        TrainConfig.model_validate(given | {"views": 3})
    with pytest.raises(ValueError, match=r"--views is for features, .* leave one out"):
        TrainConfig.model_validate(given | {"views": 2, "precompute": False})


@pytest.mark.parametrize(
    ("first", "trained"),
    [
        (0, ("",)),
        (3, ("layer3.", "layer4.", "fc.")),
        (-2, ("layer4.", "fc.")),
        (-1, ("fc.",)),
    ],
)
def test_layers_are_trained_from_a_group_on(first: int, trained: tuple[str, ...]):
    """resnet18 has six groups: the stem, layer1 to layer4, fc."""
    transform = Transform(size=32, crop_pct=1.0, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    model = timm.create_model("resnet18", num_classes=2)
    for frozen, wanted in ((False, trained), (True, ("fc.",))):
        freeze(Network(model, transform), frozen=frozen, first=first)
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert names == {name for name, _ in model.named_parameters() if name.startswith(wanted)}
    for beyond in (6, -7):
        with pytest.raises(ValueError, match=f"--freeze-to {beyond}: the layers are in 6 groups"):
            freeze(Network(model, transform), frozen=False, first=beyond)
