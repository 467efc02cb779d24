"""How training varies images: by the generator that it is given, within the limits that it is told."""

import numpy as np
import pytest
import torch

from dragonclf.data import augment
from dragonclf.data.augment import Augment

PICTURE = torch.arange(3 * 20 * 30, dtype=torch.int32).reshape(3, 20, 30).remainder(251).to(torch.uint8)


def varied(how: Augment, seed: int) -> torch.Tensor:
    return how.vary(PICTURE, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("flips", "dims"), [("none", [()]), ("horizontal", [(), (2,)]), ("vertical", [(), (1,)]), ("both", [(), (1,), (2,), (1, 2)])]
)  # fmt: skip
def test_flips_are_all_there_and_no_others(flips: str, dims: list[tuple[int, ...]]):
    expected = [PICTURE.flip(d) if d else PICTURE for d in dims]
    how = Augment.model_validate({"flips": flips})
    found = [next(i for i, flip in enumerate(expected) if torch.equal(varied(how, seed), flip)) for seed in range(100)]
    assert set(found) == set(range(len(dims)))


@pytest.mark.parametrize("number", range(14))
@pytest.mark.parametrize("strength", [-0.999, 0.0, 0.4, 0.999])
@pytest.mark.parametrize("space", [augment.TRIVIAL, augment.RAND], ids=["trivial", "rand"])
def test_each_operation_keeps_shape_and_type(space: list[augment.Operation], number: int, strength: float):
    operation = space[number]
    made = operation.apply(PICTURE, strength if operation.both_ways else abs(strength))
    assert (made.dtype, made.shape) == (torch.uint8, PICTURE.shape)


@pytest.mark.parametrize("space", [augment.TRIVIAL, augment.RAND], ids=["trivial", "rand"])
def test_a_policy_has_fourteen_operations_that_differ(space: list[augment.Operation]):
    """As many as in torchvision's TrivialAugmentWide and RandAugment."""
    made = [operation.apply(PICTURE, 0.9) for operation in space]
    assert len(made) == 14
    assert torch.equal(made[0], PICTURE)
    assert sum(not torch.equal(made[0], other) for other in made) >= 11  # this picture has little to equalize


def test_operations_that_go_both_ways_change_nothing_at_strength_nothing():
    both = [operation for operation in augment.TRIVIAL if operation.both_ways]
    assert len(both) == 9
    for operation in both:
        assert (operation.apply(PICTURE, 0.0).int() - PICTURE.int()).abs().max() <= 1


def test_randaugment_makes_two_changes_of_one_strength_either_way(monkeypatch: pytest.MonkeyPatch):
    seen: list[float] = []

    def noted(image: torch.Tensor, strength: float) -> torch.Tensor:
        seen.append(strength)
        return image

    monkeypatch.setattr(augment, "RAND", [augment.Operation(noted), augment.Operation(noted, both_ways=True)])
    for seed in range(50):
        varied(Augment(flips="none", policy="rand"), seed)
    assert len(seen) == 100
    assert set(seen) == {0.3, -0.3}


def test_one_rectangle_of_the_wanted_size_is_erased():
    areas = []
    for seed in range(200):
        changed = (varied(Augment(flips="none", erase=1), seed) != PICTURE).any(0).nonzero()
        (top, left), (bottom, right) = changed.min(0).values, changed.max(0).values
        areas.append(float((bottom - top + 1) * (right - left + 1)) / (20 * 30))
    assert 0.01 < min(areas) < 0.05
    assert 0.28 < max(areas) < 0.36
    erased = [not torch.equal(varied(Augment(flips="none", erase=0.25), seed), PICTURE) for seed in range(400)]
    assert 0.18 < np.mean(erased) < 0.32


def test_equal_generators_give_equal_pictures_and_the_source_stays():
    before = PICTURE.clone()
    how = Augment(flips="both", policy="trivial", erase=0.5)
    assert all(torch.equal(varied(how, seed), varied(how, seed)) for seed in range(50))
    assert len({varied(how, seed).numpy().tobytes() for seed in range(50)}) > 40
    assert torch.equal(PICTURE, before)
