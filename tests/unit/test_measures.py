"""What `index` measures of an image: a hash that survives re-encoding, brightness, sharpness; and how it gets into a snapshot's rows."""

import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.fft import dctn

from dragonclf.data import images, measures, snapshot
from dragonclf.data.measures import measure
from dragonclf.engine.pipeline import ShardResult
from dragonclf.verbs.index import READ, IndexWorker


def photo(seed: int, *, width: int = 300, height: int = 240) -> Image.Image:
    """Blobs of colour at two scales, so that it has edges and a shape that survives shrinking."""
    rng = np.random.default_rng(seed)
    coarse, fine = (
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        for side in (9, 40)
    )
    return Image.blend(coarse, fine, 0.3)


def encoded(image: Image.Image, format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def measured(image: Image.Image) -> measures.Measures:
    return measure(images.decode(encoded(image, "PNG")))


def distance(one: str | None, other: str | None) -> int:
    assert one is not None
    assert other is not None
    return (int(one, 16) ^ int(other, 16)).bit_count()


def test_the_hash_is_of_the_low_frequencies_as_scipy_has_them():
    image = photo(0, width=128, height=128)  # no shrinking: the numbers are exact
    grey = np.asarray(image, np.float64) @ [0.299, 0.587, 0.114]
    low = np.asarray(dctn(grey, type=2))[:16, :16]
    bits = low > np.median(low)
    found = measured(image)
    assert found.phash == np.packbits(bits).tobytes().hex()
    assert found.brightness == pytest.approx(grey.mean() / 255, abs=1e-4)
    laplacian = sum(
        np.roll(grey, shift, axis) for shift, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1))
    ) - 4 * grey  # fmt: skip
    gradient = (np.diff(grey, axis=0) ** 2).mean() + (np.diff(grey, axis=1) ** 2).mean()
    assert found.sharpness == pytest.approx((laplacian[1:-1, 1:-1] ** 2).mean() / gradient, abs=1e-5)


def test_a_re_encoded_copy_is_near_and_another_image_is_far():
    hashes = [measured(photo(seed)).phash for seed in range(20)]
    for seed, own in enumerate(hashes):
        image = photo(seed)
        copies = [
            encoded(image, "JPEG", quality=85),
            encoded(image.resize((270, 216), Image.Resampling.BICUBIC), "PNG"),
            encoded(image.resize((600, 480), Image.Resampling.BICUBIC), "JPEG", quality=90),
        ]
        assert max(distance(own, measure(images.decode(copy)).phash) for copy in copies) <= 10
        assert min(distance(own, other) for other in hashes if other != own) > 60


def test_blur_lowers_sharpness_and_neither_contrast_nor_size_does():
    image = photo(1)
    sharp = measured(image).sharpness
    blurred = [measured(image.filter(ImageFilter.GaussianBlur(radius))).sharpness for radius in (2, 4)]
    assert sharp is not None
    assert sharp > 1.3 * (blurred[0] or 0) > 1.3**2 * (blurred[1] or 0) > 0
    pale = Image.fromarray(100 + np.asarray(image) // 2)
    assert measured(pale).sharpness == pytest.approx(sharp, rel=0.15)  # whole levels are a little noise
    assert measured(image.resize((1200, 960), Image.Resampling.BICUBIC)).sharpness == pytest.approx(sharp, rel=0.1)


def test_a_ramp_is_as_soft_as_can_be():
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8), (256, 256))
    assert measured(Image.fromarray(ramp)).sharpness == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize(("level", "brightness"), [(0, 0.0), (255, 1.0), (51, 0.2)])
def test_an_image_of_one_colour_has_only_brightness(level: int, brightness: float):
    found = measured(Image.new("RGB", (70, 40), (level, level, level)))
    assert found == measures.Measures(None, brightness, None)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (2, 2), (1025, 3000)])
def test_every_shape_is_measured(shape: tuple[int, int]):
    pixels = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = measure(pixels)
    assert found.brightness == pytest.approx(0.5, abs=0.35)
    assert (found.phash is None) == (found.sharpness is None) == (shape == (1, 1))


def test_the_rows_of_an_index_have_them_and_null_where_an_image_could_not_be_read():
    data = encoded(photo(2), "JPEG", quality=90)
    values, pixels = IndexWorker().read(data, images.read(data))
    assert pixels is None
    planned = pa.table({"uri": ["/a.jpg", "/b.jpg"], "etag": ["1", "2"], "size": pa.array([5, 6], pa.int64())})
    result = ShardResult(
        statuses=["ok", "unreadable"], errors=[None, "cut"], etags=[None, None], values=[values, {}], outputs={},
    )  # fmt: skip
    table = IndexWorker().table(planned, result)
    assert set(READ) < set(table.column_names) | {"label", "split", "group"} == set(snapshot.COLUMNS)
    first, second = table.select(list(READ)).to_pylist()
    expected = measure(images.decode(data))._asdict()
    assert first == {"width": 300, "height": 240, "sha256": values["sha256"], **expected}
    assert second == dict.fromkeys(READ)
