"""The transform against timm's own, and the randomness of training."""

import importlib.util
import time
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from pydantic import ValidationError

from dragonclf.data.images import decode
from dragonclf.data.transforms import Transform

HALF = (0.5, 0.5, 0.5)


def photos() -> list[Path]:
    """Real photographs of several sizes: foolbox carries 20 from ImageNet."""
    spec = importlib.util.find_spec("foolbox")
    assert spec is not None
    assert spec.origin is not None
    return sorted((Path(spec.origin).parent / "data").glob("imagenet_*.jpg"))


def transform(**changes: object) -> Transform:
    return Transform.model_validate(
        {"size": 224, "crop_pct": 0.875, "interpolation": "bicubic", "mean": HALF, "std": HALF} | changes
    )


@pytest.mark.parametrize(
    ("size", "crop_pct", "interpolation", "tolerance"),
    [(224, 0.875, "bicubic", 2), (224, 0.875, "bilinear", 2), (240, 0.882, "bicubic", 2), (96, 1.0, "bilinear", 2)],
)
def test_for_eval_equals_timms(size: int, crop_pct: float, interpolation: str, tolerance: int):
    ours = transform(size=size, crop_pct=crop_pct, interpolation=interpolation)
    theirs = timm.data.create_transform(  # pyright: ignore[reportPrivateImportUsage]
        (3, size, size),
        is_training=False,
        crop_pct=crop_pct,
        interpolation=interpolation,
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    assert callable(theirs)
    found = photos()
    assert len(found) == 20
    for path in found[:5]:
        for turn in (0, 90):  # wide and tall
            image = Image.open(path).convert("RGB").crop((0, 0, 500, 333)).rotate(turn, expand=True)
            expected = theirs(image)
            assert isinstance(expected, torch.Tensor)
            got = ours.for_eval(torch.from_numpy(np.array(image)).permute(2, 0, 1))
            assert (got.dtype, got.shape) == (torch.uint8, (3, size, size))
            difference = (got.float() - expected * 255).abs()
            assert difference.mean() < 0.3
            assert difference.max() <= tolerance


@pytest.mark.parametrize(("height", "width"), [(1, 50_000), (50_000, 1), (3, 20_000), (1, 1), (1000, 8)])
def test_extreme_shapes_are_cheap(height: int, width: int):
    image = torch.full((3, height, width), 77, dtype=torch.uint8)
    started = time.process_time()
    for made in (transform().for_eval(image), transform().for_train(image, seed=0, epoch=0, sample=0)):
        assert made.shape == (3, 224, 224)
        assert (made == 77).all()
    assert time.process_time() - started < 1.0


def test_the_crop_is_centred_also_in_a_long_image():
    image = torch.zeros((3, 10, 1000), dtype=torch.uint8)
    image[:, :, 490:510] = 200
    made = transform(size=32, crop_pct=1.0, interpolation="bilinear").for_eval(image)
    assert (made[:, :, 4:28] == 200).all()


def test_for_train_is_a_function_of_seed_epoch_and_sample():
    image = decode(photos()[0].read_bytes())
    draws = [(seed, epoch, sample) for seed in (0, 1) for epoch in (0, 1) for sample in (0, 1, 2)]

    def draw(seed: int, epoch: int, sample: int) -> torch.Tensor:
        return transform(size=64).for_train(image, seed=seed, epoch=epoch, sample=sample)

    first = [draw(*key) for key in draws]
    torch.manual_seed(1)
    np.random.seed(1)
    again = [draw(*key) for key in draws]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert all(made.shape == (3, 64, 64) for made in first)
    distinct = {made.numpy().tobytes() for made in first}
    assert len(distinct) == len(draws)


def test_for_train_flips_half_and_keeps_35_to_100_percent():
    columns = torch.arange(256).repeat(256, 1).to(torch.uint8).expand(3, -1, -1)
    flipped, shares = 0, []
    for sample in range(200):
        made = (
            transform(size=32, interpolation="bilinear").for_train(columns, seed=0, epoch=0, sample=sample)[0].float()
        )
        slope = float(made[:, -1].mean() - made[:, 0].mean())
        flipped += slope < 0
        shares.append(abs(slope) / 256)
    assert 70 <= flipped <= 130
    assert min(shares) > 0.45  # 35 % of the area at aspect 3/4 is 51 % of the width
    assert max(shares) <= 1.0


def test_digest_changes_with_every_field():
    changed = [
        {}, {"size": 225}, {"crop_pct": 0.9}, {"interpolation": "bilinear"}, {"mean": (0.5, 0.5, 0.4)}, {"std": (0.4, 0.5, 0.5)},
        {"min_side": 512}, {"min_side": 513},
    ]  # fmt: skip
    digests = [transform(**change).digest for change in changed]
    assert len(set(digests)) == len(changed)
    assert digests[0] == transform().digest


def test_the_digest_of_a_transform_without_min_side_is_what_it_was_before_there_was_one():
    assert transform().digest == "11864f7dc754"


@pytest.mark.parametrize(
    "change", [{"size": 0}, {"crop_pct": 1.1}, {"crop_pct": 0}, {"interpolation": "lanczos"}, {"mean": (1, 2)}]
)
def test_what_no_transform_can_be_is_refused(change: dict[str, object]):
    with pytest.raises(ValidationError):
        transform(**change)
