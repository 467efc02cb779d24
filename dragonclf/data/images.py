"""Decode any image to RGB uint8, safely: one function, `decode`, and one error, `ImageError`.

The header is read first (Pillow opens lazily), so that size limits hold before a pixel is decoded. Plain JPEG, PNG and WebP then go
through torchvision.io, at about twice Pillow's speed; everything else (CMYK, palettes, alpha, 16 bit, animations, GIF, TIFF,
BMP, ...) through Pillow. Both ways end in the same convention: EXIF orientation applied, transparency on white, first frame.
"""

import io

import numpy as np
import torch
import torchvision.io  # registers torch.ops.image
from PIL import ExifTags, Image, UnidentifiedImageError

from dragonclf.config import MAX_PIXELS

DECODE_VERSION = 1  # part of the transform digest: raise it when the pixels that `decode` returns change

# The operators behind torchvision.io's functions, which warn that they will move to another package: a warning for each image, and no
# way to silence it that is safe in threads.
_RGB = torchvision.io.ImageReadMode.RGB.value
_FAST = {"JPEG": torch.ops.image.decode_jpeg, "PNG": torch.ops.image.decode_png, "WEBP": torch.ops.image.decode_webp}


class ImageError(Exception):
    """An image that cannot be used: `status` is its row's status, `reason` a sentence for a person."""

    def __init__(self, status: str, reason: str):
        super().__init__(f"{status}: {reason}")
        self.status, self.reason = status, reason


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Return the image in `data` as a uint8 tensor (3, height, width), RGB, upright.

    Raises:
        ImageError: `unreadable` (empty, truncated, damaged), `unsupported` (no known image format), `too_many_pixels`. Nothing else.
    """
    if not data:
        raise ImageError("unreadable", "the file is empty")
    try:
        Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit warns or raises; ours is next
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError("too_many_pixels", f"{width} x {height} pixels, over the limit of {max_pixels:,}")
        pixels = _pixels(image, data)
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if _has_exif(image) else 1
        return _upright(pixels, orientation)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("unsupported", "not an image in a known format") from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImageError("unreadable", f"cannot be decoded: {reason}") from error


def _pixels(image: Image.Image, data: bytes) -> torch.Tensor:
    fast = _FAST.get(image.format or "") if image.mode in ("RGB", "L") else None
    if fast is not None and "transparency" not in image.info and getattr(image, "n_frames", 1) == 1:
        return fast(torch.frombuffer(bytearray(data), dtype=torch.uint8), _RGB)
    image.seek(0)
    if image.mode.startswith(("I", "F")):  # 16 and 32 bit grey: Pillow's own conversion clips instead of scaling
        image = Image.fromarray(_to_eight_bit(np.asarray(image)))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _to_eight_bit(grey: np.ndarray) -> np.ndarray:
    """Scale (H, W) integers of 16 bits to 8 by the type's range, floats in 0..1 by 255; wider integers by their own maximum."""
    if grey.dtype.kind == "f":
        scale = 255.0 if grey.max(initial=0) <= 1 else 255.0 / grey.max()
    else:
        scale = 255.0 / (65535 if grey.max(initial=0) <= 65535 else grey.max())
    return (np.nan_to_num(grey.astype(np.float64)) * scale).clip(0, 255).round().astype(np.uint8)


def _has_exif(image: Image.Image) -> bool:
    return "exif" in image.info or "Raw profile type exif" in image.info or image.format in ("TIFF", "MPO")


def _upright(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Undo EXIF orientations 2 to 8 of a (3, H, W) tensor; unknown values count as upright."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation, ())
    return pixels.flip(flips).contiguous()
