"""What training does to an image beside cropping it: flips, TrivialAugment, random erasing, drawn by the caller's generator.

torchvision's own random transforms draw from one generator of the process, which threads share: their pictures would depend on timing.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

_GREY = [128.0, 128.0, 128.0]  # what fills the corners that a rotation leaves
_ERASED_AREA = (0.02, 1 / 3)  # as timm and the paper, https://arxiv.org/abs/1708.04896

Level = float  # 0 to 1, how strong
Operation = Callable[[torch.Tensor, Level], torch.Tensor]


class Augment(BaseModel):
    """How images are varied in training."""

    model_config = ConfigDict(frozen=True)

    crop_scale: float = 0.35
    flips: Literal["none", "horizontal", "vertical", "both"] = "horizontal"
    policy: Literal["none", "trivial"] = "none"
    erase: float = 0.0

    def vary(self, image: torch.Tensor, draw: np.random.Generator) -> torch.Tensor:
        """Flip, apply the policy and erase: uint8 (3, H, W) to the same shape."""
        if self.flips in ("horizontal", "both") and draw.random() < 0.5:
            image = F.horizontal_flip(image)
        if self.flips in ("vertical", "both") and draw.random() < 0.5:
            image = F.vertical_flip(image)
        if self.policy == "trivial":
            operation = _TRIVIAL[int(draw.integers(len(_TRIVIAL)))]
            image = operation(image, draw.random())
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


def _both_ways(most: float, apply: Callable[[torch.Tensor, float], torch.Tensor]) -> Operation:
    """The lower half of the levels goes from -`most` to 0, the upper from 0 to `most`."""
    return lambda image, level: apply(image, most * (2 * level - 1))


def _affine(image: torch.Tensor, *, x: float = 0, y: float = 0, shear_x: float = 0, shear_y: float = 0) -> torch.Tensor:
    return F.affine(
        image, angle=0.0, translate=[x, y], scale=1.0, shear=[shear_x, shear_y], interpolation=InterpolationMode.BILINEAR,
        fill=_GREY,
    )  # fmt: skip


# TrivialAugment's wide space (S. Müller, F. Hutter, https://arxiv.org/abs/2103.10158, table 6), one of them at a random strength.
_TRIVIAL: list[Operation] = [
    lambda image, _: image,
    _both_ways(45, lambda image, angle: _affine(image, shear_x=angle)),  # about the paper's 0.99 in tangents
    _both_ways(45, lambda image, angle: _affine(image, shear_y=angle)),
    _both_ways(32, lambda image, pixels: _affine(image, x=pixels)),
    _both_ways(32, lambda image, pixels: _affine(image, y=pixels)),
    _both_ways(135, lambda image, angle: F.rotate(image, angle, InterpolationMode.BILINEAR, fill=_GREY)),
    _both_ways(0.99, lambda image, change: F.adjust_brightness(image, 1 + change)),
    _both_ways(0.99, lambda image, change: F.adjust_saturation(image, 1 + change)),
    _both_ways(0.99, lambda image, change: F.adjust_contrast(image, 1 + change)),
    _both_ways(0.99, lambda image, change: F.adjust_sharpness(image, 1 + change)),
    lambda image, level: F.posterize(image, 8 - round(6 * level)),
    lambda image, level: F.solarize(image, 255 * (1 - level)),
    lambda image, _: F.autocontrast(image),
    lambda image, _: F.equalize(image),
]
