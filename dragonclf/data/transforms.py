"""The transform between a decoded image and the model: uint8 in, uint8 out, the same in training, evaluation and scoring.

Scaling to floats and normalising happen inside the network (`model.network`), so that a transformed image is a quarter of the bytes and
all runtimes share the arithmetic. Train-time augmentation draws its randomness from (seed, epoch, sample) alone.
"""

import hashlib
import math

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from dragonclf.data.augment import USUAL, Augment
from dragonclf.data.images import DECODE_VERSION

MAX_ASPECT = 8  # a longer image is cut around its centre first: resizing 1 x 50,000 pixels whole would fill the memory


class Transform(BaseModel):
    """What an image goes through before the network, in timm's terms. Travels in the bundle."""

    model_config = ConfigDict(frozen=True)

    size: int = Field(gt=0, description="Side of the square crop that the network sees, in pixels.")
    crop_pct: float = Field(gt=0, le=1, description="Side of the crop as a share of the resized image's short side.")
    interpolation: str = Field(pattern="^(bilinear|bicubic)$", description="Resampling filter, always antialiased.")
    mean: tuple[float, float, float] = Field(description="Mean of each RGB channel, on the scale 0 to 1.")
    std: tuple[float, float, float] = Field(description="Standard deviation of each RGB channel, on the scale 0 to 1.")
    min_side: int | None = Field(
        default=None,
        gt=0,
        description="A JPEG is decoded at 1/2, 1/4 or 1/8 where its shorter side still has that many pixels then. None: always whole.",
    )

    @property
    def digest(self) -> str:
        """Twelve hex digits that change when the same bytes would give other pixels."""
        return hashlib.sha256(f"{DECODE_VERSION} {self.model_dump_json(exclude_none=True)}".encode()).hexdigest()[:12]

    @property
    def short_side(self) -> int:
        """Of the image that `for_eval` crops, in pixels."""
        return math.floor(self.size / self.crop_pct)

    def for_eval(self, image: torch.Tensor) -> torch.Tensor:
        """Resize the short side, crop the centre: uint8 (3, H, W) to uint8 (3, size, size), in memory in the order that `image` has."""
        height, width = image.shape[1:]
        longest = MAX_ASPECT * min(height, width)
        image = F.center_crop(image, [min(height, longest), min(width, longest)])
        resized = F.resize(
            image, [self.short_side], interpolation=InterpolationMode(self.interpolation), antialias=True
        )
        return F.center_crop(resized, [self.size, self.size])

    def new_batch(self, count: int) -> np.ndarray:
        """Room for what `for_eval` gives: zeros, uint8 (count, 3, size, size), in memory pixel by pixel as networks like it."""
        return np.zeros((count, self.size, self.size, 3), np.uint8).transpose(0, 3, 1, 2)

    def for_train(
        self,
        image: torch.Tensor,
        *,
        seed: int,
        epoch: int,
        sample: int,
        augment: Augment = USUAL,
        size: int | None = None,
    ) -> torch.Tensor:
        """`varied`, a function of (seed, epoch, sample)."""
        return self.varied(image, np.random.default_rng((seed, epoch, sample)), augment, size=size)

    def varied(
        self, image: torch.Tensor, draw: np.random.Generator, augment: Augment, *, size: int | None = None
    ) -> torch.Tensor:
        """Crop at random, then vary: uint8 (3, H, W) to uint8 (3, size, size). `size` None: the own.

        Random resized crop of at least `augment.crop_scale` of the area and aspect 3/4 to 4/3 (Inception's,
        https://arxiv.org/abs/1409.4842; fine-tuning favours a narrower range than its 8 to 100 %).
        """
        height, width = image.shape[1:]
        area = height * width * draw.uniform(augment.crop_scale, 1.0)
        aspect = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width = min(width, max(1, round(math.sqrt(area * aspect))))
        crop_height = min(height, max(1, round(math.sqrt(area / aspect))))
        top = int(draw.integers(height - crop_height + 1))
        left = int(draw.integers(width - crop_width + 1))
        size = size or self.size
        cropped = F.resized_crop(
            image, top, left, crop_height, crop_width, [size, size],
            interpolation=InterpolationMode(self.interpolation), antialias=True,
        )  # fmt: skip
        return augment.vary(cropped, draw)
