"""Mixup and CutMix: what is blended, by how much, and that the targets tell it."""

import pytest
import torch
from torch.nn import functional as F

from dragonclf.config import TrainConfig
from dragonclf.train.mix import new_mix

COUNT, CLASSES = 6, 3
PIXELS = (
    (torch.arange(COUNT, dtype=torch.uint8) * 40)[:, None, None, None].expand(COUNT, 3, 8, 8).clone()
)  # each of one grey
TARGETS = torch.tensor([0, 1, 2, 0, 1, 2])


def blended(seed: int, *, mixup: float = 0.0, cutmix: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    mix = new_mix(CLASSES, mixup=mixup, cutmix=cutmix)
    assert mix
    torch.manual_seed(seed)
    return mix(PIXELS.clone(), TARGETS)


def own_share(shares: torch.Tensor) -> float:
    """Of the first image in itself: its neighbour in the batch is of another class."""
    assert shares.shape == (COUNT, CLASSES)
    torch.testing.assert_close(shares.sum(1), torch.ones(COUNT))
    return float(shares[0, TARGETS[0]])


def test_nothing_is_blended_unless_asked():
    assert new_mix(CLASSES, mixup=0, cutmix=0) is None


@pytest.mark.parametrize("seed", range(5))
def test_mixup_blends_pixels_and_targets_by_the_same_share(seed: int):
    pixels, shares = blended(seed, mixup=1.0)
    share = own_share(shares)
    assert 0 < share < 1
    others = PIXELS.roll(1, 0).float()
    torch.testing.assert_close(pixels, share * PIXELS.float() + (1 - share) * others)
    torch.testing.assert_close(shares, share * F.one_hot(TARGETS) + (1 - share) * F.one_hot(TARGETS.roll(1)).float())


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_pastes_a_rectangle_whose_area_the_targets_tell(seed: int):
    pixels, shares = blended(seed, cutmix=1.0)
    pasted = (pixels[0] == PIXELS.roll(1, 0)[0]).all(0)
    kept = (pixels[0] == PIXELS[0]).all(0)
    assert (pasted ^ kept).all()
    assert own_share(shares) == pytest.approx(float(kept.float().mean()))


def test_of_both_one_is_drawn_each_time():
    found = {blended(seed, mixup=1.0, cutmix=1.0)[0].dtype for seed in range(20)}
    assert found == {torch.float32, torch.uint8}


def test_equal_seeds_blend_alike():
    (first, _), (second, _), (other, _) = (blended(seed, mixup=0.5) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_loss_takes_shares_of_classes():
    from dragonclf.train.recipe import Recipe

    loss = Recipe(epochs=1, lr=1, weight_decay=0, global_batch_size=8, seed=0).new_loss(TARGETS, torch.device("cpu"))
    logits = torch.randn(COUNT, CLASSES, generator=torch.Generator().manual_seed(0))
    half = 0.5 * F.one_hot(TARGETS) + 0.5 * F.one_hot(TARGETS.roll(1))
    torch.testing.assert_close(loss(logits, half), (loss(logits, TARGETS) + loss(logits, TARGETS.roll(1))) / 2)


def test_a_head_on_features_has_nothing_to_blend():
    with pytest.raises(ValueError, match="--cutmix is for training every layer: add --no-precompute"):
        TrainConfig.model_validate({"data": "d", "out": "o", "cutmix": 1.0})
