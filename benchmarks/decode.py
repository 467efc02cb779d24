"""Decoding and transforming a JPEG whole, and reduced as training and scoring do. Usage: python benchmarks/decode.py [ROUNDS]

CPU milliseconds of one thread, medians of interleaved rounds, for made-up photographs of several sizes; and how far the transformed pixels
are from those of the whole image, in levels of 255.
"""

import io
import statistics
import sys
import time

import numpy as np
import torch
from PIL import Image

from dragonclf.data import images
from dragonclf.data.transforms import Transform
from dragonclf.model.zoo import SPARE

SIZES = [(4000, 3000), (2000, 1500), (1280, 960), (500, 375)]
WHOLE = Transform(size=224, crop_pct=0.875, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
REDUCED = WHOLE.model_copy(update={"min_side": SPARE * WHOLE.short_side})


def photograph(width: int, height: int) -> bytes:
    """Smooth shapes, smaller ones on them, fine noise."""
    draw = np.random.default_rng(0)
    pixels = draw.normal(0, 6, (height, width, 1))
    for cells, weight in ((60, 0.8), (6, 0.2)):
        shapes = Image.fromarray(draw.integers(0, 256, (height // cells, width // cells, 3), np.uint8))
        pixels = pixels + weight * np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def timed(data: bytes, transform: Transform) -> tuple[float, torch.Tensor]:
    started = time.thread_time()
    pixels = transform.for_eval(images.decode(data, min_side=transform.min_side))
    return 1000 * (time.thread_time() - started), pixels


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    torch.set_num_threads(1)
    print(f"{'JPEG':>12} {'kB':>6} {'whole':>7} {'reduced':>8} {'faster':>7} {'differ by':>10} {'at most':>8}")
    for width, height in SIZES:
        data = photograph(width, height)
        taken = [(timed(data, WHOLE), timed(data, REDUCED)) for _ in range(rounds)]
        whole, reduced = (statistics.median(pair[way][0] for pair in taken) for way in (0, 1))
        differ = (taken[0][0][1].float() - taken[0][1][1].float()).abs()
        print(
            f"{f'{width} x {height}':>12} {len(data) / 1000:>6.0f} {whole:>7.1f} {reduced:>8.1f} {whole / reduced:>6.2f}x "
            f"{differ.mean():>10.2f} {differ.max():>8.0f}"
        )


if __name__ == "__main__":
    main()
