"""Made-up pictures to put in a bundle where the data set's own may not be passed on."""

import io

import numpy as np
from PIL import Image

COUNT = 4


def synthetic() -> list[bytes]:
    """Four encoded images, the same every time: a colour gradient and noise as JPEG, rings and stripes as PNG."""
    rows, columns = np.mgrid[0:240, 0:320]
    draw = np.random.default_rng(0)
    gradient = np.stack([columns * 255 // 319, rows * 255 // 239, (rows + columns) * 255 // 558], axis=-1)
    noise = draw.integers(0, 256, (60, 80, 3)).repeat(4, axis=0).repeat(4, axis=1)
    rings = np.sin(np.hypot(rows - 120, columns - 160) / 6)[..., None] * [90, 60, 30] + 128
    stripes = ((columns // 16 + rows // 40) % 2 * 200 + 20)[..., None] * np.ones(3)
    return [
        _encode(gradient, "JPEG"),
        _encode(noise, "JPEG"),
        _encode(rings, "PNG"),
        _encode(stripes, "PNG"),
    ]  # fmt: skip


def _encode(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, kind, **({"quality": 92} if kind == "JPEG" else {}))
    return buffer.getvalue()
