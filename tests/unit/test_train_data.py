"""What training sees of an image is what scoring sees of it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch

from dragonclf.config import MAX_IMAGE_BYTES, MAX_PIXELS, PredictConfig
from dragonclf.data import images
from dragonclf.data.images import decode
from dragonclf.engine import published
from dragonclf.engine.inference import FeatureWorker
from dragonclf.engine.pipeline import Limits, Pipeline
from dragonclf.model import bundle, zoo
from dragonclf.model.execution import Execution
from dragonclf.model.predictor import Predictor
from dragonclf.train.data import Features, Images
from dragonclf.verbs.predict import predict
from tests.conftest import encoded

MODEL, SIZE = "test_resnet.r160_in1k", 64
F32 = Execution(runtime="torch", device="cpu", precision="f32")


def test_training_and_scoring_have_the_same_pixels(tmp_path: Path):
    sizes = [(50, 40), (150, 130), (700, 500), (500, 1100)]
    uris = [f"{tmp_path}/{i}.jpg" for i in range(len(sizes))]
    for uri, size in zip(uris, sizes, strict=True):
        Path(uri).write_bytes(encoded(size=size))
    model = timm.create_model(MODEL, pretrained=False, num_classes=2)
    transform = zoo.transform_for(model, size=SIZE)
    assert transform.min_side == 2 * transform.short_side
    samples = Images(pa.table({"uri": uris, "label": ["a"] * 4}), ["a", "b"], transform, num_threads=1)
    ((trained, _),) = samples.batches([np.arange(4)], epoch=0)
    seen = spied_on(FeatureWorker(Predictor(model, transform, F32, batch_size=4)))
    planned = pa.table({"uri": uris, "etag": pa.nulls(4, pa.string()), "size": pa.nulls(4, pa.int64())})
    pipeline = Pipeline(seen.worker, num_threads=1, limits=Limits(MAX_IMAGE_BYTES, MAX_PIXELS, 60))
    for isolate in (False, True):
        pipeline.process(planned, isolate=isolate)
    assert len(seen.pixels) == 2
    for scored in seen.pixels:
        assert torch.equal(trained, torch.from_numpy(scored))


def test_predict_and_the_canaries_have_the_pixels_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = encoded(size=(700, 500))
    (tmp_path / "one.jpg").write_bytes(data)
    model = timm.create_model(MODEL, pretrained=False, num_classes=2)
    transform = zoo.transform_for(model, size=SIZE)
    wanted = transform.for_eval(decode(data, min_side=transform.min_side)).numpy()
    assert (wanted != transform.for_eval(decode(data)).numpy()).any()
    made = bundle.save_bundle(
        f"{tmp_path}/m", model, arch=MODEL, classes=["a", "b"], transform=transform, canaries=[data], pretrained="none", snapshot="",
        config={}, metrics={},
    )  # fmt: skip
    np.testing.assert_array_equal(made.canary_pixels[0], wanted)
    decoded: list[int | None] = []
    read = images.decode
    monkeypatch.setattr(images, "decode", lambda data, **how: decoded.append(how["min_side"]) or read(data, **how))
    told = predict(PredictConfig(model=made.uri, images=[f"{tmp_path}/one.jpg"], runtime="torch"))
    assert told.predictions[0].status == "ok"
    assert decoded == [transform.min_side]


def features_part(splits: list[str], first: float, *, num_values: int = 3) -> pa.Table:
    """Rows of a run of features whose values count up from `first`."""
    values = np.arange(num_values * len(splits), dtype=np.float32) + first
    return pa.table(
        {
            "uri": [f"{first}-{i}" for i in range(len(splits))], "status": ["ok"] * len(splits),
            "error": pa.nulls(len(splits), pa.string()), "label": ["b"] * len(splits), "split": splits,
            "features": pa.FixedSizeListArray.from_arrays(pa.array(values), num_values),
        }
    )  # fmt: skip


def test_features_of_a_part_without_the_split_are_none(monkeypatch: pytest.MonkeyPatch):
    """A snapshot that is ordered by split has such parts."""
    parts = [features_part(["valid", "valid"], 0), features_part(["train"], 10), features_part(["train", "valid"], 20)]
    monkeypatch.setattr(published, "read_parts", lambda uri: iter(parts))
    found = {split: Features("run", ["a", "b"], split) for split in ("train", "valid")}
    assert found["train"].features.tolist() == [[[10, 11, 12], [20, 21, 22]]]
    assert found["valid"].features.tolist() == [[[0, 1, 2], [3, 4, 5], [23, 24, 25]]]
    assert found["valid"].targets.tolist() == [1, 1, 1]


def test_epochs_take_the_images_own_features_and_those_of_each_view_in_turn(monkeypatch: pytest.MonkeyPatch):
    parts = {
        "own": [features_part(["train", "valid"], 0), features_part(["train"], 10)],
        "views": [features_part(["train"], 100, num_values=6), features_part(["train"], 200, num_values=6)],
    }
    monkeypatch.setattr(published, "read_parts", lambda uri: iter(parts[uri]))
    train = Features("own", ["a", "b"], "train", views_uri="views")
    assert len(train) == 2
    assert train.features.tolist() == [
        [[0, 1, 2], [10, 11, 12]], [[100, 101, 102], [200, 201, 202]], [[103, 104, 105], [203, 204, 205]],
    ]  # fmt: skip
    for epoch, wanted in enumerate([10, 200, 203, 10, 200]):
        batches = train.batches([np.array([1]), np.array([0, 1])], epoch=epoch)
        assert [inputs[-1, 0].item() for inputs, _ in batches] == [wanted, wanted]


@dataclass
class Seen:
    worker: FeatureWorker
    pixels: list[np.ndarray]


def spied_on(worker: FeatureWorker) -> Seen:
    """The worker, and all that its model is given."""
    seen = Seen(worker, [])

    def predict(pixels: np.ndarray) -> dict[str, np.ndarray]:
        seen.pixels.append(pixels.copy())
        return {"features": np.zeros((len(pixels), 1), np.float32)}

    worker.predict = predict
    return seen
