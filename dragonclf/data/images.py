"""Decode any image to RGB uint8, safely: one function, `read` (`decode` where the pixels are enough), and one error, `ImageError`.

The header is read first (Pillow opens lazily), so that size limits hold before a pixel is decoded. Plain JPEG and WebP then go
through torchvision.io, at about twice Pillow's speed; everything else (CMYK, palettes, alpha, 16 bit, animations, PNG, GIF, TIFF,
BMP, ...) through Pillow. Both ways end in the same convention: EXIF orientation applied, transparency on white, first frame.

A JPEG of which less is wanted than it holds is decoded at a half, a quarter or an eighth: libjpeg then computes only those frequencies.
At a quarter, 12 megapixels take 0.7 of the time and a sixteenth of the memory. What is skipped would have been averaged away by resizing.
"""

import io
import re
from typing import NamedTuple

import numpy as np
import torch
import torchvision.io  # registers torch.ops.image
from PIL import ExifTags, Image, UnidentifiedImageError
from torchvision.transforms.v2 import functional as F

from dragonclf.config import MAX_PIXELS

TURNED = (5, 6, 7, 8)  # EXIF orientations of images that are stored lying
DECODE_VERSION = 1  # part of the transform digest: raise it when the pixels that `decode` returns change

# The operators behind torchvision.io's functions, which warn that they will move to another package: a warning for each image, and no
# way to silence it that is safe in threads.
_RGB = torchvision.io.ImageReadMode.RGB.value
# Formats that a signature tells: none that needs another program (EPS), takes any bytes for its own (TGA), or holds an image of another
# size than its header says (ICO).
_FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI", "TIFF", "WEBP",
)  # fmt: skip
_NO_MEMORY = re.compile(r"can't allocate memory|Insufficient memory|out of memory", re.I)  # torch's and libjpeg's words
_COMMON_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")
Image.init()  # all plugins, now: when threads make Pillow load them late, one thread can miss those that another is loading
# Without PNG: one wrong byte in its data makes torchvision 0.29's decoder end the process (SIGSEGV). Pillow costs 6 to 18 % of speed there.
_FAST = {"JPEG": torch.ops.image.decode_jpeg, "WEBP": torch.ops.image.decode_webp}


class ImageError(Exception):
    """An image that cannot be used: `status` is its row's status, `reason` a sentence for a person."""

    def __init__(self, status: str, reason: str):
        super().__init__(f"{status}: {reason}")
        self.status, self.reason = status, reason


class Picture(NamedTuple):
    """A decoded image."""

    pixels: torch.Tensor  # uint8 (3, H, W), RGB, upright; in memory as it was decoded, pixel by pixel
    width: int  # of the whole image, of which `pixels` may be a reduction
    height: int


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, min_side: int | None = None) -> torch.Tensor:
    """`read`'s pixels."""
    return read(data, max_pixels=max_pixels, min_side=min_side).pixels


def read(data: bytes, *, max_pixels: int = MAX_PIXELS, min_side: int | None = None) -> Picture:
    """Return the image in `data`: a JPEG at 1/2, 1/4 or 1/8 where its shorter side still has `min_side` pixels then, all else whole.

    Raises:
        ImageError: `unreadable` (empty, truncated, damaged), `unsupported` (no known image format), `too_many_pixels`.
        MemoryError: there was not enough memory, which says nothing of the image. Nothing else is raised.
    """
    if not data:
        raise ImageError("unreadable", "the file is empty")
    try:
        Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit warns or raises; ours is next
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError("too_many_pixels", f"{width} x {height} pixels, over the limit of {max_pixels:,}")
        pixels = _pixels(image, data, min_side)
        orientation = _orientation(image)
        if orientation in TURNED:
            width, height = height, width
        return Picture(_upright(pixels, orientation), width, height)
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        if data.startswith(_COMMON_SIGNATURES):
            raise ImageError("unreadable", "cannot be decoded: its header is damaged") from error
        raise ImageError("unsupported", "not an image in a known format") from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if _NO_MEMORY.search(reason):
            raise MemoryError(reason) from error
        reason = re.sub(r"^.*\.cpp:\d+, ", "", reason)  # where in torchvision's source it was raised
        raise ImageError("unreadable", f"cannot be decoded: {reason}") from error


def reduced(data: bytes, *, min_side: int) -> bytes:
    """`data` itself, or where its shorter side is twice `min_side` or more, a JPEG of that side: a tenth of the time to decode again.

    The JPEG has quality 95 and whole colours. Raises as `read` does.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if min(image.size) < 2 * min_side:
                return data
    except Exception:  # noqa: BLE001  whoever decodes it says what is wrong
        return data
    pixels = F.resize(decode(data, min_side=min_side), [min_side], antialias=True)
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _pixels(image: Image.Image, data: bytes, min_side: int | None) -> torch.Tensor:
    fast = _FAST.get(image.format or "") if image.mode in ("RGB", "L") else None
    if min_side is not None and image.format in ("JPEG", "MPO") and min(image.size) >= 2 * min_side:
        image.draft(None, (min_side, min_side))
    elif fast is not None and "transparency" not in image.info and getattr(image, "n_frames", 1) == 1:
        return fast(torch.frombuffer(bytearray(data), dtype=torch.uint8), _RGB)
    image.seek(0)
    if image.mode.startswith(("I", "F")):  # 16 and 32 bit grey: Pillow's own conversion clips instead of scaling
        image = Image.fromarray(_to_eight_bit(np.asarray(image)))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _to_eight_bit(grey: np.ndarray) -> np.ndarray:
    """Scale (H, W) integers of 16 bits to 8 by the type's range, floats in 0..1 by 255; others by their own maximum. NaN is black."""
    values = grey.astype(np.float64)
    most = float(values.max(initial=0, where=np.isfinite(values)))
    full = (1.0 if most <= 1 else most) if grey.dtype.kind == "f" else (65535.0 if most <= 65535 else most)
    return (np.nan_to_num(values, posinf=full, neginf=0.0) * (255.0 / full)).clip(0, 255).round().astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 where there is none or the EXIF block is damaged: the pixels are whole all the same."""
    if not ("exif" in image.info or "Raw profile type exif" in image.info or image.format in ("TIFF", "MPO")):
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001  Pillow raises whatever it stumbled over
        return 1
    return found if isinstance(found, int) else 1


def _upright(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Undo EXIF orientations 2 to 8 of a (3, H, W) tensor; unknown values count as upright."""
    if orientation in TURNED:
        pixels = pixels.transpose(1, 2)
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation, ())
    return pixels.flip(flips) if flips else pixels
