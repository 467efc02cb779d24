"""What training sees of an image is what scoring sees of it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch

from dragonclf.config import MAX_IMAGE_BYTES, MAX_PIXELS
from dragonclf.engine.inference import FeatureWorker
from dragonclf.engine.pipeline import Limits, Pipeline
from dragonclf.model import zoo
from dragonclf.model.execution import Execution
from dragonclf.model.predictor import Predictor
from dragonclf.train.data import Images
from tests.conftest import encoded

MODEL, SIZE = "test_resnet.r160_in1k", 64


@pytest.mark.parametrize("size", [(50, 40), (150, 130), (700, 500), (500, 1100)])
def test_training_and_scoring_have_the_same_pixels(size: tuple[int, int], tmp_path: Path):
    (tmp_path / "one.jpg").write_bytes(encoded(size=size))
    model = timm.create_model(MODEL, pretrained=False)
    transform = zoo.transform_for(model, size=SIZE)
    assert transform.min_side == 2 * transform.short_side
    samples = Images([f"{tmp_path}/one.jpg"], ["a"], ["a", "b"], transform, seed=None, num_threads=1)
    ((trained, _),) = samples.batches([np.zeros(1, np.int64)], epoch=0)

    f32 = Execution(runtime="torch", device="cpu", precision="f32")
    worker = FeatureWorker(Predictor(model, transform, f32, batch_size=1))
    scored: list[np.ndarray] = []
    worker.predict = lambda pixels: scored.append(pixels.copy()) or {"features": np.zeros((1, 1), np.float32)}
    planned = pa.table(
        {"uri": [f"{tmp_path}/one.jpg"], "etag": pa.nulls(1, pa.string()), "size": pa.nulls(1, pa.int64())}
    )
    Pipeline(worker, num_threads=1, limits=Limits(MAX_IMAGE_BYTES, MAX_PIXELS, 60)).process(planned)
    assert torch.equal(trained, torch.from_numpy(scored[0]))
