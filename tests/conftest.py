"""Fixtures: a real S3 server, small real images."""

import io
import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dragonclf.demo.local_s3 import LocalS3
from dragonclf.storage import s3


def pytest_configure() -> None:
    """Tests send Ctrl-C, which what a shell starts in the background ignores, with all that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted models are kept for the tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """A command that was run in this process leaves its log and its handler of SIGTERM to no other test."""
    log, handler = logging.getLogger("dragonclf"), signal.getsignal(signal.SIGTERM)
    handlers, level, propagate = log.handlers, log.level, log.propagate
    yield
    log.handlers, log.propagate = handlers, propagate
    log.setLevel(level)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[LocalS3]:
    """A SeaweedFS with buckets `photos` and `work`. Use `s3_env` to point this process at it."""
    with LocalS3() as server:
        for bucket in ("photos", "work"):
            server.create_bucket(bucket)
        yield server


@pytest.fixture
def s3_env(s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalS3]:
    """This process talks to the server as its administrator."""
    use_identity(s3_server.environment("admin"), monkeypatch)
    yield s3_server
    s3.forget_clients()


def use_identity(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make storage use other AWS_* variables from here on."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3.forget_clients()


def encoded(
    kind: str = "JPEG", *, size: tuple[int, int] = (40, 30), colour: tuple[int, int, int] = (200, 30, 30), seed: int = 0
) -> bytes:
    """A small real image: `colour` with a little noise, so that no two seeds give the same bytes."""
    noise = np.random.default_rng(seed).integers(-20, 20, (size[1], size[0], 3))
    pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_folder(root: Path, *, per_class: int = 12, classes: tuple[str, ...] = ("blue", "red")) -> Path:
    """An ImageFolder of `per_class` images in each class; the class decides the colour."""
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            red, green, blue = (int(c) for c in np.random.default_rng(number).integers(40, 220, 3))
            (root / name / f"{i:03d}.jpg").write_bytes(encoded(colour=(red, green, blue), seed=1000 * number + i))
    return root
