"""Decoding: every mode and orientation against Pillow, damage of every kind, and threads."""

import importlib.util
import io
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dragonclf.data.images import ImageError, decode, read
from dragonclf.data.transforms import Transform
from tests.conftest import encoded

T = Image.Transpose
# What was done to the upright picture before it was stored with this EXIF orientation.
STORED_AS = {
    1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270,
}  # fmt: skip


def picture(width: int = 48, height: int = 32) -> np.ndarray:
    """Smooth, and alike under none of the eight orientations: uint8 (H, W, 3)."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([columns * 255 // width, rows * 255 // height, np.full_like(rows, 90)], axis=-1).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    """Decoded to int (H, W, 3)."""
    decoded = decode(data)
    assert (decoded.dtype, decoded.shape[0]) == (torch.uint8, 3)
    return decoded.permute(1, 2, 0).numpy().astype(int)


def decoded_or_error(data: bytes, *, min_side: int | None = None) -> torch.Tensor | ImageError:
    try:
        return decode(data, max_pixels=10**6, min_side=min_side)
    except ImageError as error:
        return error


def photo() -> bytes:
    """A real photograph, 500 pixels wide."""
    spec = importlib.util.find_spec("foolbox")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "data" / "imagenet_00_243.jpg").read_bytes()


def png(width: int, height: int, *, bits: int, colour_type: int, rows: bytes = b"") -> bytes:
    """A PNG by hand: Pillow writes no 16-bit RGB, and no lies about the size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def icon_with_a_bomb() -> bytes:
    """An ICO whose header says 16 x 16, and whose image is of another size."""
    image = png(60_000, 60_000, bits=8, colour_type=2, rows=bytes(1000))
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(image), 22) + image


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)


@pytest.mark.parametrize(("kind", "tolerance"), [("JPEG", 6), ("PNG", 0), ("WEBP", 6), ("BMP", 0), ("TIFF", 0)])
def test_formats_of_rgb(kind: str, tolerance: int):
    assert np.abs(pixels(saved(Image.fromarray(picture()), kind)) - picture()).mean() <= tolerance


def test_gif_has_its_palette():
    assert np.abs(pixels(saved(Image.fromarray(picture()).quantize(256), "GIF")) - picture()).mean() < 6


def test_grey_becomes_three_equal_channels():
    grey = picture()[..., 0]
    for kind in ("PNG", "TIFF", "BMP"):
        assert (pixels(saved(Image.fromarray(grey), kind)) == grey[..., None]).all()
    decoded = pixels(saved(Image.fromarray(grey), "JPEG"))
    assert (decoded[..., 0] == decoded[..., 1]).all()
    assert np.abs(decoded[..., 0] - grey).mean() < 2


def test_one_bit():
    bits = picture()[..., 0] > 100
    for kind in ("PNG", "TIFF", "BMP"):
        assert (pixels(saved(Image.fromarray(bits), kind))[..., 1] == bits * 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_on_white(mode: str):
    image = Image.new("RGBA", (4, 1))
    for column, alpha in enumerate((0, 85, 170, 255)):
        image.putpixel((column, 0), (60, 60, 60, alpha))
    decoded = pixels(saved(image.convert(mode), "PNG"))
    assert np.abs(decoded - np.array([255, 190, 125, 60])[None, :, None]).max() <= 1


def test_a_transparent_palette_entry_or_colour_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        assert pixels(saved(image, kind, transparency=0))[0].tolist() == [[255, 255, 255], [0, 0, 200]]
    rgb = Image.new("RGB", (2, 1), (10, 20, 30))
    rgb.putpixel((1, 0), (0, 0, 200))
    assert pixels(saved(rgb, "PNG", transparency=(10, 20, 30)))[0].tolist() == [[255, 255, 255], [0, 0, 200]]
    grey = Image.new("L", (2, 1), 7)
    grey.putpixel((1, 0), 90)
    assert pixels(saved(grey, "PNG", transparency=7))[0].tolist() == [[255] * 3, [90] * 3]


def test_cmyk_comes_out_as_pillow_converts_it():
    image = Image.fromarray(picture()).convert("CMYK")
    for kind, tolerance in (("JPEG", 4), ("TIFF", 0)):
        expected = np.asarray(image.convert("RGB")).astype(int)
        assert np.abs(pixels(saved(image, kind)) - expected).mean() <= tolerance


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind: str):
    deep = np.array([[0, 257, 32768, 65535]], np.uint16)
    assert pixels(saved(Image.fromarray(deep), kind))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_wider_greys():
    integers = np.array([[0, 250_000, 1_000_000]], np.int32)
    assert pixels(saved(Image.fromarray(integers), "TIFF"))[0, :, 0].tolist() == [0, 64, 255]
    floats = np.array([[0, 0.5, 1, np.nan, -1]], np.float32)
    assert pixels(saved(Image.fromarray(floats), "TIFF"))[0, :, 0].tolist() == [0, 128, 255, 0, 0]
    infinite = np.array([[0, 25, 100, np.inf, -np.inf]], np.float32)
    assert pixels(saved(Image.fromarray(infinite), "TIFF"))[0, :, 0].tolist() == [0, 64, 255, 255, 0]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_png_of_every_depth_comes_out_as_eight_bits(bits: int):
    row = bytes([0, *range(0, 256, 16)])  # filter byte, then 16 bytes of samples
    width = 16 * 8 // bits
    data = png(width, 2, bits=bits, colour_type=0, rows=2 * row)
    samples = np.unpackbits(np.frombuffer(row[1:], np.uint8)).reshape(width, bits)
    expected = np.round(samples @ (2 ** np.arange(bits)[::-1]) * 255 / (2**bits - 1))
    assert np.abs(pixels(data)[1, :, 0] - expected).max() <= 1


def test_png_of_sixteen_bits_a_channel():
    row = b"\0" + np.array([[0, 32768, 65535]], ">u2").tobytes()
    assert np.abs(pixels(png(1, 1, bits=16, colour_type=2, rows=row))[0, 0] - [0, 128, 255]).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(kind: str):
    decoded = pixels(animated(kind))
    assert decoded.shape == (10, 20, 3)
    assert (decoded == [255, 0, 0]).all()


def test_a_tiff_of_pages_is_its_first():
    pages = [Image.new("L", (5, 4), grey) for grey in (10, 20)]
    assert (pixels(saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])) == 10).all()


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"quality": 95}), ("TIFF", {})]
)
def test_exif_orientations_all_come_out_upright(kind: str, options: dict[str, int]):
    upright = Image.fromarray(picture())
    for orientation, operation in STORED_AS.items():
        exif = Image.Exif()
        exif[274] = orientation
        stored = upright if operation is None else upright.transpose(operation)
        decoded = pixels(saved(stored, kind, exif=exif, **options))
        assert decoded.shape == (32, 48, 3)
        assert np.abs(decoded - picture()).mean() < 4, f"orientation {orientation}"


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0XX", b"Exif\0\0II*\0garbage!!!!!!!!!!!!!!!!", b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff"]
)
def test_damaged_exif_costs_no_image(exif: bytes):
    data = saved(Image.fromarray(picture()), "JPEG", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, already as it opens the file
        assert pixels(data).shape == (32, 48, 3)


@pytest.mark.parametrize(
    ("min_side", "scale"), [(None, 1), (120, 1), (61, 1), (60, 2), (31, 2), (30, 4), (16, 4), (15, 8), (1, 8)]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_is_reduced_while_enough_is_left(min_side: int | None, scale: int, mode: str):
    data = saved(Image.fromarray(picture(160, 120)).convert(mode), "JPEG", quality=95)
    found = read(data, min_side=min_side)
    assert (found.width, found.height) == (160, 120)
    assert found.pixels.shape == (3, 120 // scale, 160 // scale)
    averaged = pixels(data).reshape(120 // scale, scale, 160 // scale, scale, 3).mean(axis=(1, 3))
    assert np.abs(found.pixels.permute(1, 2, 0).numpy() - averaged).mean() < 1


def test_a_reduced_photograph_is_nearly_the_whole_one_once_it_is_small():
    small = Image.open(io.BytesIO(photo())).convert("RGB").resize((1600, 1200), Image.Resampling.LANCZOS)
    data = saved(small, "JPEG", quality=92)
    transform = Transform(size=224, crop_pct=0.875, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
    whole, reduced = (transform.for_eval(decode(data, min_side=side)).float() for side in (None, 512))
    difference = (whole - reduced).abs()
    assert 0 < difference.mean() < 0.5
    assert difference.max() <= 8


def test_all_but_jpegs_are_decoded_whole():
    upright = Image.fromarray(picture(160, 120))
    for kind in ("PNG", "WEBP", "TIFF", "GIF"):
        assert read(saved(upright, kind), min_side=10).pixels.shape == (3, 120, 160)


def test_a_reduced_cmyk_jpeg_has_the_colours_of_the_whole():
    data = saved(Image.fromarray(picture(160, 120)).convert("CMYK"), "JPEG", quality=95)
    reduced = read(data, min_side=30).pixels.permute(1, 2, 0).numpy()
    averaged = pixels(data).reshape(30, 4, 40, 4, 3).mean(axis=(1, 3))
    assert np.abs(reduced - averaged).mean() < 1


def test_what_is_readable_whole_is_readable_reduced():
    whole = bytearray(saved(Image.fromarray(picture(320, 240)), "JPEG", quality=90))
    for seed in range(60):
        damaged = bytearray(whole)
        for place in np.random.default_rng(seed).integers(20, len(whole), 3):
            damaged[place] ^= 0x41
        if isinstance(decoded_or_error(bytes(damaged)), torch.Tensor):
            assert isinstance(decoded_or_error(bytes(damaged), min_side=40), torch.Tensor), f"seed {seed}"


def test_a_reduced_jpeg_is_upright_and_tells_the_size_of_the_whole():
    upright = Image.fromarray(picture(192, 128))
    for orientation, operation in STORED_AS.items():
        exif = Image.Exif()
        exif[274] = orientation
        stored = upright if operation is None else upright.transpose(operation)
        for kind, options in (("JPEG", {}), ("MPO", {"save_all": True, "append_images": [stored]})):
            found = read(saved(stored, kind, exif=exif, quality=95, **options), min_side=32)
            assert (found.width, found.height) == (192, 128)
            small = np.asarray(upright.reduce(4)).astype(int)
            assert np.abs(found.pixels.permute(1, 2, 0).numpy() - small).mean() < 4, f"orientation {orientation}"


@pytest.mark.parametrize(
    ("kind", "min_side"),
    [("JPEG", None), ("JPEG", 20), *((kind, None) for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF"))],
)
def test_cut_short_anywhere_is_an_error_or_the_whole_picture(kind: str, min_side: int | None):
    whole = saved(Image.fromarray(picture(160, 120)), kind)
    expected = decode(whole, min_side=min_side)
    for cut in np.linspace(1, len(whole) - 1, 20).astype(int):
        decoded = decoded_or_error(whole[:cut], min_side=min_side)
        if isinstance(decoded, ImageError):
            assert decoded.status == "unreadable" or cut < 4, f"{cut} bytes: {decoded}"
            assert "\n" not in decoded.reason
            assert ".cpp" not in decoded.reason
        else:
            assert torch.equal(decoded, expected), f"{kind} cut at {cut} of {len(whole)} gave other pixels and no error"


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (b"", "unreadable", "the file is empty"),
        (b"this is a text, whatever its name says\n" * 9, "unsupported", "not an image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported", "not an image in a known format"),
        (b"\xff\xd8\xff", "unreadable", "cannot be decoded: "),
        (b"\x89PNG\r\n\x1a\n", "unreadable", "cannot be decoded: its header is damaged"),
        (icon_with_a_bomb(), "unsupported", "not an image in a known format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported", "not an image in a known format"),
    ],
)
def test_what_is_no_image(data: bytes, status: str, reason: str):
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert (caught.value.status, caught.value.reason[: len(reason)]) == (status, reason)


def test_too_many_pixels_are_refused_by_the_header():
    bomb = png(100_000, 100_000, bits=8, colour_type=2, rows=bytes(20_000_000))
    assert len(bomb) < 25_000
    started = time.monotonic()
    with pytest.raises(ImageError) as caught:
        decode(bomb)
    assert time.monotonic() - started < 0.5
    assert (caught.value.status, caught.value.reason) == (
        "too_many_pixels", "100000 x 100000 pixels, over the limit of 89,478,485",
    )  # fmt: skip
    with pytest.raises(ImageError, match=r"too_many_pixels: 40 x 30 pixels, over the limit of 1,199"):
        decode(encoded(size=(40, 30)), max_pixels=1199)
    assert decode(encoded(size=(40, 30)), max_pixels=1200).shape == (3, 30, 40)


def test_fast_path_equals_pillows():
    for data in (photo(), *(encoded(kind, size=(161, 87)) for kind in ("JPEG", "PNG", "WEBP"))):
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        difference = np.abs(pixels(data) - expected)
        assert difference.mean() < 0.5
        assert difference.max() <= 4


def test_eight_threads_at_once_warn_nothing_and_agree():
    exif = Image.Exif()
    exif[274] = 6
    image = Image.fromarray(picture())
    inputs = [
        photo(), encoded("PNG"), encoded("WEBP"), animated("GIF"), saved(image, "TIFF", exif=exif), saved(image, "JPEG", exif=exif),
        saved(image.convert("CMYK"), "JPEG"), saved(image.convert("RGBA"), "PNG"), saved(image.quantize(8), "GIF"),
        saved(image, "JPEG2000"),
    ]  # fmt: skip
    alone = [decode(data) for data in inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ThreadPoolExecutor(8) as pool:
            for _ in range(4):
                for one, other in zip(alone, pool.map(decode, inputs), strict=True):
                    assert torch.equal(one, other)


def test_a_damaged_png_does_not_end_the_process():
    """torchvision's PNG decoder died of one of these bytes in eight."""
    whole = saved(Image.fromarray(picture()), "PNG")
    outcomes = set()
    for position in range(41, len(whole) - 16):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        outcome = decoded_or_error(bytes(damaged))
        outcomes.add(outcome.status if isinstance(outcome, ImageError) else outcome.shape)
    assert "unreadable" in outcomes


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_image_error(data: bytes):
    with pytest.raises(ImageError):
        decode(data)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "QOI", "PCX", "SGI", "AVIF"]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_images_raise_nothing_but_image_error(kind: str, changes: list[tuple[int, int]]):
    data = bytearray(_SAMPLES[kind])
    for position, byte in changes:
        data[position % len(data)] = byte
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about odd metadata
        decoded = decoded_or_error(bytes(data))
    if isinstance(decoded, ImageError):
        assert decoded.status in ("unreadable", "unsupported", "too_many_pixels")
        assert decoded.reason
    else:
        assert (decoded.dtype, decoded.shape[0]) == (torch.uint8, 3)


_SAMPLES = {
    kind: saved(Image.fromarray(picture()), kind)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "QOI", "PCX", "SGI", "AVIF")
}


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_thousands_of_frames_the_first_is_decoded_and_no_other(kind: str, monkeypatch: pytest.MonkeyPatch):
    frames = [Image.new("RGB", (8, 8), (i % 256, i // 256, 99)) for i in range(2000)]
    buffer = io.BytesIO()
    lossless: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], **lossless)
    sought: list[int] = []
    plugin = type(Image.open(io.BytesIO(buffer.getvalue())))
    seek = plugin.seek
    monkeypatch.setattr(plugin, "seek", lambda self, frame: (sought.append(frame), seek(self, frame))[1])
    decoded = decode(buffer.getvalue())
    assert decoded.shape == (3, 8, 8)
    assert decoded[:, 0, 0].tolist() == [0, 0, 99]
    assert set(sought) <= {0}
