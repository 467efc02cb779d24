"""A hostile bucket: whatever lies in it, under whatever name, is one row with the right uri, and says what is wrong with it."""

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from moto.server import ThreadedMotoServer
from PIL import ExifTags, Image

from dragonclf import storage
from dragonclf.data import images
from dragonclf.data.transforms import Transform
from dragonclf.model import bundle
from dragonclf.model.execution import Execution
from dragonclf.model.predictor import softmax
from dragonclf.storage import s3
from tests.conftest import use_identity
from tests.integration import commands
from tests.integration.conftest import save_random_head

pytestmark = (
    pytest.mark.slow
)  # one scoring run of about 70 objects, and moto to serve keys that SeaweedFS does not keep

NUM_CUTS = 20


@pytest.fixture
def moto(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that keeps every key byte for byte, as S3 does."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    environment = {
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    use_identity(environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.get_host_and_port()[1]}"}, monkeypatch)
    s3._client().create_bucket(Bucket="hostile")
    yield
    server.stop()
    s3.forget_clients()


def upright() -> Image.Image:
    """Different from each of its turned and mirrored versions: the model of this test gives those another probability by 0.2 and more."""
    pixels = np.full((64, 64, 3), 240, np.uint8)
    pixels[:32, :32], pixels[:32, 32:], pixels[32:, :32], pixels[8:20, 40:60] = (
        (220, 30, 30),
        (30, 200, 40),
        (30, 40, 210),
        0,
    )
    return Image.fromarray(pixels)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def with_orientation(image: Image.Image, orientation: int) -> bytes:
    """A JPEG whose pixels are turned so that the EXIF orientation makes it upright."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    turned = image.transpose(undo[orientation]) if orientation in undo else image
    return saved(turned, "JPEG", quality=98, subsampling=0, exif=exif)


def claiming(width: int, height: int) -> bytes:
    """A PNG of 20 kB whose header claims other dimensions than its data has."""
    data = saved(upright(), "PNG")
    header = struct.pack(">II", width, height) + data[24:29]
    padded = b"tEXt" + b"padding\0" + b"x" * 12_000
    chunk = struct.pack(">I", len(padded) - 4) + padded + struct.pack(">I", zlib.crc32(padded))
    return data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + chunk + data[33:]


def good() -> dict[str, bytes]:
    """Ways to store one picture, and names to store it under."""
    image = upright()
    jpeg = saved(image, "JPEG", quality=98, subsampling=0)
    grey16 = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    long = "long/" + "k" * (1024 - len("long/.jpg")) + ".jpg"
    names = [
        "sp ace.jpg", "hash#1.jpg", "per%2Fcent.jpg", "plus+.jpg", "ünï-龍.jpg", "que?ry=1.jpg", "a//b.jpg", "a/b.jpg", "/lead.jpg",
        "lead.jpg", "./x.jpg", "x.jpg", "a/../b.jpg", long,
    ]  # fmt: skip
    return {
        **dict.fromkeys(names, jpeg),
        **{f"exif/{n}.jpg": with_orientation(image, n) for n in range(1, 9)},
        "modes/cmyk.jpg": saved(image.convert("CMYK"), "JPEG", quality=98, subsampling=0),
        "modes/grey16.png": saved(grey16, "PNG"),
        "modes/rgba.png": saved(image.convert("RGBA"), "PNG"),
        "modes/animated.gif": saved(
            image.convert("RGB"), "GIF", save_all=True, append_images=[Image.new("RGB", image.size)] * 3
        ),
        "modes/wrong-name.txt": jpeg,
    }


def bad() -> dict[str, tuple[bytes, str, str]]:
    """Content, status, what the reason says."""
    jpeg = saved(upright(), "JPEG", quality=98, subsampling=0)
    cuts = [len(jpeg) * (i + 1) // (NUM_CUTS + 2) for i in range(NUM_CUTS)]
    wide = Image.new("1", (20_000, 20_000))
    return {
        "bad/empty.jpg": (b"", "unreadable", "the file is empty"),
        "dir/": (b"", "unreadable", "the file is empty"),
        "bad/text.jpg": (b"Drogon or Viserion?\n" * 9, "unsupported", "not an image in a known format"),
        "bad/wide.png": (saved(wide, "PNG"), "too_many_pixels", "20000 x 20000 pixels, over the limit of 89,478,485"),
        "bad/623-megapixel.png": (
            saved(Image.new("1", (24_960, 24_960)), "PNG"),
            "too_many_pixels",
            "24960 x 24960 pixels",
        ),
        "bad/claims.png": (claiming(100_000, 100_000), "too_many_pixels", "100000 x 100000 pixels"),
        "bad/heavy.bmp": (saved(Image.new("RGB", (600, 600)), "BMP"), "too_large", "over the limit of 1,000,000"),
        **{f"bad/cut-{i:02d}.jpg": (jpeg[:cut], "unreadable", "cannot be decoded") for i, cut in enumerate(cuts)},
    }


def test_every_object_is_one_row_that_tells_what_it_is(moto: None, tmp_path: Path):
    made = save_random_head(str(tmp_path / "bundle"), classes=["drogon", "viserion"], size=64)
    fine, broken = good(), bad()
    commands.upload("s3://hostile/in", fine | {key: data for key, (data, _, _) in broken.items()})
    keys = [*fine, *broken]
    assert len({found.uri for found in storage.list_objects("s3://hostile/in")}) == len(keys)

    done = commands.result(
        "score", made.uri, "s3://hostile/in", "--out", str(tmp_path / "scores"), "--max-image-bytes", "1000000", "--max-error-rate", "1"
    )  # fmt: skip
    frame = commands.frame_of(done["parts"], tmp_path / "copy").set_index("uri")
    assert sorted(frame.index) == sorted(f"s3://hostile/in/{key}" for key in keys)
    assert done["num_images"] == len(keys)

    def row(key: str) -> dict[str, Any]:
        return {str(name): value for name, value in frame.loc[f"s3://hostile/in/{key}"].items()}

    for key, (_, status, reason) in broken.items():
        assert row(key)["status"] == status, key
        assert reason in row(key)["error"], key
        assert all(pd.isna(row(key)[name]) for name in ("label", "confidence", "prob_drogon", "width")), key
    predictor = bundle.open_predictor(made, Execution(runtime="openvino", device="cpu", precision="f32"), batch_size=1)
    transform: Transform = made.info.transform

    def probs_of(data: bytes) -> np.ndarray:
        """By Pillow's decoder, whatever ours uses."""
        lossless = saved(Image.open(io.BytesIO(data)).convert("RGB"), "PNG")
        return softmax(predictor(transform.for_eval(images.decode(lossless)).numpy()[None])[0])[0]

    plain = probs_of(fine["exif/1.jpg"])
    expected = {
        "grey16.png": probs_of(saved(upright().convert("L"), "PNG")),
        "rgba.png": probs_of(saved(upright(), "PNG")),
    }
    for way in Image.Transpose:
        turned = probs_of(saved(upright().transpose(way), "PNG"))
        assert abs(turned[0] - plain[0]) > 0.2, "a wrong orientation would not be seen"
    for key in fine:
        probs = expected.get(storage.name(key), plain)
        label = made.info.classes[int(probs.argmax())]
        assert (row(key)["status"], row(key)["label"]) == ("ok", label), key
        assert row(key)["prob_drogon"] == pytest.approx(probs[0], abs=0.03), key
        assert (row(key)["width"], row(key)["height"]) == (64, 64)
