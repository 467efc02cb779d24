"""A converted model is kept on the machine, once for each model, and whatever happens to that place the model still opens."""

import logging
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from dragonclf.data.transforms import Transform
from dragonclf.model import runtimes
from dragonclf.model.predictor import Body

SIZE = 32


def body(seed: int = 0) -> Body:
    torch.manual_seed(seed)
    transform = Transform(size=SIZE, crop_pct=1.0, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return Body(timm.create_model("test_resnet", pretrained=False).eval(), transform)


def features(model: object, pixels: np.ndarray) -> np.ndarray:
    return runtimes.on_openvino(model, "f32", num_threads=1)(pixels)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dragonclf" / "openvino"


PIXELS = np.random.default_rng(0).integers(0, 256, (2, 3, SIZE, SIZE), np.uint8)


def test_it_is_converted_once_and_is_the_same(kept: Path, monkeypatch: pytest.MonkeyPatch):
    first = features(runtimes.convert_cached(body(), SIZE, "one"), PIXELS)
    with monkeypatch.context() as patch:
        patch.setattr(runtimes, "_save", lambda *_: pytest.fail("converted again"))
        np.testing.assert_array_equal(features(runtimes.convert_cached(body(), SIZE, "one"), PIXELS), first)
    other = features(runtimes.convert_cached(body(seed=1), SIZE, "two"), PIXELS)
    assert np.abs(other - first).max() > 0.01
    np.testing.assert_array_equal(features(runtimes.convert(body(), SIZE), PIXELS), first)
    np.testing.assert_allclose(first, runtimes.on_torch(body(), "cpu", "f32", num_threads=1)(PIXELS), atol=1e-4)
    assert len(list(kept.iterdir())) == 2


def test_an_image_is_the_same_in_any_batch_and_by_any_number_of_threads():
    many = np.random.default_rng(1).integers(0, 256, (7, 3, SIZE, SIZE), np.uint8)
    model, runs = body(), []
    for num_threads in (1, 3):
        forward = runtimes.on_openvino(runtimes.convert(model, SIZE), "f32", num_threads=num_threads)
        runs += [
            forward(many),
            forward(many[:2]),
            forward(many[:1]),
            np.concatenate([forward(many[:4]), forward(many[4:])]),
        ]
    for found in runs:
        np.testing.assert_array_equal(found, runs[0][: len(found)])
    by_torch = runtimes.on_torch(model, "cpu", "f32", num_threads=1)(many)
    np.testing.assert_allclose(runs[0], by_torch, atol=1e-4)
    assert np.abs(np.diff(by_torch, axis=0)).max() > 1e-3  # no two images look alike to it


def test_only_so_many_are_kept(kept: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtimes, "MAX_CACHED", 2)
    for key in ("one", "two", "one", "three"):
        runtimes.convert_cached(body(), SIZE, key)
    monkeypatch.setattr(runtimes, "_save", lambda *_: pytest.fail("converted again"))
    for key in ("one", "three"):
        runtimes.convert_cached(body(), SIZE, key)
    assert len(list(kept.iterdir())) == 2


def test_a_place_that_cannot_be_written_is_said_and_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(runtimes.log, "propagate", True)
    with caplog.at_level(logging.INFO, logger="dragonclf"):
        made = runtimes.convert_cached(body(), SIZE, "one")
    assert features(made, PIXELS).shape[0] == 2
    assert "cannot keep converted models" in caplog.text
