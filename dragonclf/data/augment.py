"""What training does to an image beside cropping it: flips, TrivialAugment or RandAugment, random erasing, drawn by the caller's generator.

torchvision's own random transforms draw from one generator of the process, which threads share: their pictures would depend on timing.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

_GREY = [128.0, 128.0, 128.0]  # what fills the corners that a rotation leaves
_ERASED_AREA = (0.02, 1 / 3)  # as timm and the paper, https://arxiv.org/abs/1708.04896

RAND_OPERATIONS, RAND_STRENGTH = 2, 0.3  # RandAugment's usual N = 2, and M = 9 of 30


class Operation(NamedTuple):
    """A change of an image, uint8 (3, H, W) to the same shape, by a strength of 0 to 1, or of -1 to 1 if it goes both ways."""

    apply: Callable[[torch.Tensor, float], torch.Tensor]
    both_ways: bool = False


class Augment(BaseModel):
    """How images are varied in training."""

    model_config = ConfigDict(frozen=True)

    crop_scale: float = 0.35
    flips: Literal["none", "horizontal", "vertical", "both"] = "horizontal"
    policy: Literal["none", "trivial", "rand"] = "none"
    erase: float = 0.0

    def vary(self, image: torch.Tensor, draw: np.random.Generator) -> torch.Tensor:
        """Flip, apply the policy and erase: uint8 (3, H, W) to the same shape."""
        if self.flips in ("horizontal", "both") and draw.random() < 0.5:
            image = F.horizontal_flip(image)
        if self.flips in ("vertical", "both") and draw.random() < 0.5:
            image = F.vertical_flip(image)
        if self.policy == "trivial":
            image = _changed(image, TRIVIAL, draw, strength=draw.random())
        elif self.policy == "rand":
            for _ in range(RAND_OPERATIONS):
                image = _changed(image, RAND, draw, strength=RAND_STRENGTH)
        if self.erase and draw.random() < self.erase:
            image = _erased(image, draw)
        return image.contiguous()


USUAL = Augment()


def _erased(image: torch.Tensor, draw: np.random.Generator) -> torch.Tensor:
    """Fill one rectangle of aspect 0.3 to 3.3 with noise, cut where the image ends."""
    height, width = image.shape[1:]
    area, aspect = height * width * draw.uniform(*_ERASED_AREA), np.exp(draw.uniform(np.log(0.3), np.log(1 / 0.3)))
    tall, wide = min(height, round(float(np.sqrt(area / aspect)))), min(width, round(float(np.sqrt(area * aspect))))
    top, left = (int(draw.integers(room + 1)) for room in (height - tall, width - wide))
    image = image.clone(memory_format=torch.contiguous_format)
    image[:, top : top + tall, left : left + wide] = torch.from_numpy(
        draw.integers(256, size=(3, tall, wide), dtype=np.uint8)
    )
    return image


def _changed(
    image: torch.Tensor, operations: list[Operation], draw: np.random.Generator, *, strength: float
) -> torch.Tensor:
    """Apply one of the operations."""
    operation = operations[int(draw.integers(len(operations)))]
    if operation.both_ways and draw.random() < 0.5:
        strength = -strength
    return operation.apply(image, strength)


def _affine(image: torch.Tensor, *, x: float = 0, y: float = 0, shear_x: float = 0, shear_y: float = 0) -> torch.Tensor:
    return F.affine(
        image, angle=0.0, translate=[x, y], scale=1.0, shear=[shear_x, shear_y], interpolation=InterpolationMode.BILINEAR,
        fill=_GREY,
    )  # fmt: skip


def _space(*, shear: float, shift: Callable[[int], float], angle: float, colour: float, bits: int) -> list[Operation]:
    """The fourteen operations of both policies at their strongest: degrees, pixels of a side, degrees, a share, bits of a channel."""
    return [
        Operation(lambda image, _: image),
        Operation(lambda image, s: _affine(image, shear_x=s * shear), both_ways=True),
        Operation(lambda image, s: _affine(image, shear_y=s * shear), both_ways=True),
        Operation(lambda image, s: _affine(image, x=s * shift(image.shape[2])), both_ways=True),
        Operation(lambda image, s: _affine(image, y=s * shift(image.shape[1])), both_ways=True),
        Operation(lambda image, s: F.rotate(image, s * angle, InterpolationMode.BILINEAR, fill=_GREY), both_ways=True),
        Operation(lambda image, s: F.adjust_brightness(image, 1 + s * colour), both_ways=True),
        Operation(lambda image, s: F.adjust_saturation(image, 1 + s * colour), both_ways=True),
        Operation(lambda image, s: F.adjust_contrast(image, 1 + s * colour), both_ways=True),
        Operation(lambda image, s: F.adjust_sharpness(image, 1 + s * colour), both_ways=True),
        Operation(lambda image, s: F.posterize(image, 8 - round(bits * s))),
        Operation(lambda image, s: F.solarize(image, 255 * (1 - s))),
        Operation(lambda image, _: F.autocontrast(image)),
        Operation(lambda image, _: F.equalize(image)),
    ]


# S. Müller, F. Hutter, https://arxiv.org/abs/2103.10158, table 6, the wide space: one at a random strength. 45 degrees are about its 0.99.
TRIVIAL = _space(shear=45, shift=lambda _: 32, angle=135, colour=0.99, bits=6)
# E. Cubuk et al., https://arxiv.org/abs/1909.13719, as in torchvision: two at a fixed strength. 17 degrees are its 0.3.
RAND = _space(shear=17, shift=lambda side: 150 / 331 * side, angle=30, colour=0.9, bits=4)
