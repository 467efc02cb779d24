"""What `index` measures of each decoded image: how it looks from afar, how bright it is, how sharp. Cheap beside reading and decoding.

All three come of one grey thumbnail of 128 x 128 pixels, whatever the image's size and shape.

The hash is pHash (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010): the signs of the lowest frequencies
of the cosine transform against their median, as the library imagehash has it. It has 256 bits, not the usual 64, which take pictures of one
kind of thing for each other: of 2,624 solar cells 203 pairs are as near by 64 bits as re-encoded copies are, by 256 bits 53, and
nearly all of these are one cell, photographed twice.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

VERSION = 1  # part of an index's spec: raise it when the numbers change
SIDE, FREQUENCIES = 128, 16
HASH_BITS = FREQUENCIES**2
FLAT = 1.0  # variance of grey levels, 0 to 255, under which there is nothing to see

_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
_COSINES = np.cos(np.pi / SIDE * np.arange(FREQUENCIES)[:, None] * (np.arange(SIDE)[None] + 0.5)).astype(np.float32)


class Measures(NamedTuple):
    """Of one image."""

    phash: str | None  # 64 hex digits; None: the image is of one colour all over
    brightness: float  # mean grey level, 0 (black) to 1 (white)
    sharpness: float | None  # variance of the Laplacian over that of the grey levels, 0 to 20; None as `phash`


def measure(pixels: torch.Tensor) -> Measures:
    """Measure an image, uint8 (3, H, W)."""
    grey = _thumbnail(pixels)
    brightness, variance = round(float(grey.mean()) / 255, 4), float(grey.var())
    if variance < FLAT:
        return Measures(None, brightness, None)
    low = _COSINES @ grey @ _COSINES.T
    phash = np.packbits(low > np.median(low)).tobytes().hex()
    laplacian = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    return Measures(phash, brightness, round(float(laplacian.var()) / variance, 6))


def _thumbnail(pixels: torch.Tensor) -> np.ndarray:
    """Grey levels 0 to 255, float32 (128, 128). Of a large image every second, third, ... pixel is averaged."""
    down, across = (max(1, side // (2 * SIDE)) for side in pixels.shape[1:])
    small = F.interpolate(pixels[None, :, ::down, ::across], (SIDE, SIDE), mode="bilinear", antialias=True)[0]
    return small.permute(1, 2, 0).numpy().astype(np.float32) @ _GREY
