"""The two image jobs that run a model: probabilities from a bundle (scoring), features from a backbone (precompute)."""

import abc
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from dragonclf.data.augment import Augment
from dragonclf.data.images import Picture
from dragonclf.data.transforms import Transform
from dragonclf.engine import runs
from dragonclf.engine.image_work import ImageWork
from dragonclf.engine.layout import FEATURES, Layout, lists
from dragonclf.engine.pipeline import Limits, ShardResult, Worker
from dragonclf.model import bundle, tta, zoo
from dragonclf.model.execution import Execution
from dragonclf.model.predictor import Predictor


@dataclass(frozen=True)
class _InferenceTask(abc.ABC):
    execution: Execution
    batch_size: int
    limits: Limits

    @property
    def uses_gpu(self) -> bool:
        return self.execution.device == "cuda"

    @abc.abstractmethod
    def open(self, num_threads: int) -> Worker:
        """Load the model."""

    def work(self, run: runs.Run, num_threads: int, max_bytes: int) -> ImageWork:
        return ImageWork(run, self, num_threads, max_bytes)


@dataclass(frozen=True)
class ScoreTask(_InferenceTask):
    """Probabilities by the bundle at `model_uri`, which must still be `model_version` and reproduce its canaries in each actor.

    With `embeddings` the rows also hold what the head sees, as float16. `num_views` are those of test-time augmentation.
    """

    model_uri: str
    model_version: str
    embeddings: bool
    layout: Layout
    num_views: int

    @property
    def how(self) -> str:
        """For people: by what, and how often an image is looked at."""
        return f"{self.execution}, {1 + self.num_views} views of an image" if self.num_views else str(self.execution)

    def open(self, num_threads: int) -> "ScoreWorker":
        loaded = open_bundle(self.model_uri, self.model_version)
        predictor = tta.open_predictor(
            loaded, self.execution, num_views=self.num_views, batch_size=self.batch_size, num_threads=num_threads
        )
        return ScoreWorker(predictor, loaded, embeddings=self.embeddings, layout=self.layout)


class Views(BaseModel):
    """Images cropped and varied as training does it: a function of the seed, the view's number and the image's bytes."""

    model_config = ConfigDict(frozen=True)

    count: int = Field(ge=1, description="Of each image.")
    seed: int
    augment: Augment


@dataclass(frozen=True)
class FeatureTask(_InferenceTask):
    """What the head of a pretrained backbone sees, float32, of images of a snapshot: as scoring sees them, or of `views` of them."""

    arch: str
    pretrained: str
    digest: str
    transform: Transform
    views: Views | None = None

    def open(self, num_threads: int) -> "FeatureWorker":
        model = zoo.load_pretrained(self.arch, self.pretrained)
        if zoo.backbone_digest(model) != self.digest:
            raise ValueError(
                f"the weights of {self.arch} from {self.pretrained} differ between this node and the driver: install the same"
            )
        predictor = Predictor(
            model, self.transform, self.execution, batch_size=self.batch_size, num_threads=num_threads
        )
        return ViewWorker(predictor, self.views) if self.views else FeatureWorker(predictor)


def open_bundle(uri: str, version: str) -> bundle.Bundle:
    """Load a bundle in an actor. ValueError if it is not the one that the driver saw."""
    loaded = bundle.load_bundle(uri)
    if loaded.version != version:
        raise ValueError(f"{uri} is model {loaded.version} here and {version} at the start: start again")
    return loaded


class ScoreWorker:
    """Rows as `layout` tells, with `layout.FEATURES` if `embeddings`. A slot of a batch has all views of an image."""

    def __init__(self, predictor: tta.TtaPredictor, loaded: bundle.Bundle, *, embeddings: bool, layout: Layout):
        self._predictor, self.batch_size = predictor, predictor.batch_size
        self._info, self._model_version = loaded.info, loaded.version
        self._embeddings, self._layout = embeddings, layout

    def new_batch(self) -> np.ndarray:
        return self._predictor.new_batch(self.batch_size)

    @property
    def min_side(self) -> int | None:
        return self._predictor.transform.min_side

    def read(self, data: bytes, picture: Picture) -> tuple[dict[str, Any], np.ndarray]:
        views = self._predictor.views(data, picture.pixels)
        return {"width": picture.width, "height": picture.height}, views

    def predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        probs, features = self._predictor(pixels)
        return {"prob": probs} | ({FEATURES: features.astype(np.float16)} if self._embeddings else {})

    def table(self, planned: pa.Table, result: ShardResult) -> pa.Table:
        count, bad = planned.num_rows, ~result.scored
        probs = result.outputs.get("prob", np.zeros((count, len(self._info.classes)), np.float32))
        columns = {
            "uri": planned["uri"],
            "etag": pa.array(result.etags, pa.string()),
            "status": pa.array(result.statuses, pa.string()),
            "error": pa.array(result.errors, pa.string()),
            **self._layout.answers(self._info.classes, probs, bad, thresholds=self._info.thresholds),
            "width": pa.array([value.get("width") for value in result.values], pa.int32()),
            "height": pa.array([value.get("height") for value in result.values], pa.int32()),
            "model_version": pa.array([self._model_version] * count, pa.string()),
        }
        if self._embeddings:
            features = result.outputs.get(FEATURES, np.zeros((count, self._predictor.num_features), np.float16))
            columns[FEATURES] = lists(features, bad, pa.float16())
        return self._layout.chosen(pa.table(columns))


class FeatureWorker:
    """Rows: uri, etag, status, error, features (float32 list of one length)."""

    def __init__(self, predictor: Predictor):
        self.predictor, self.batch_size = predictor, predictor.batch_size

    def new_batch(self) -> np.ndarray:
        return self.predictor.transform.new_batch(self.batch_size)

    @property
    def min_side(self) -> int | None:
        return self.predictor.transform.min_side

    def read(self, data: bytes, picture: Picture) -> tuple[dict[str, Any], np.ndarray]:
        return {}, self.predictor.transform.for_eval(picture.pixels).numpy()

    @property
    def num_values(self) -> int:
        """Of a row's features."""
        return self.predictor.num_features

    def predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {"features": self.predictor(pixels)[1]}

    def table(self, planned: pa.Table, result: ShardResult) -> pa.Table:
        features = result.outputs.get("features", np.zeros((planned.num_rows, self.num_values), np.float32))
        return pa.table(
            {
                "uri": planned["uri"],
                "etag": pa.array(result.etags, pa.string()),
                "status": pa.array(result.statuses, pa.string()),
                "error": pa.array(result.errors, pa.string()),
                "features": pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1]),
            }
        )


class ViewWorker(FeatureWorker):
    """The same rows, but that the features are those of each view, one after the other. An image is read and decoded once for all."""

    def __init__(self, predictor: Predictor, views: Views):
        super().__init__(predictor)
        self._views = views

    @property
    def num_values(self) -> int:
        return self._views.count * self.predictor.num_features

    def new_batch(self) -> np.ndarray:
        """Zeros, uint8 (batch_size, views, 3, size, size). In memory a view of all images lies together, as networks like it."""
        count = self._views.count
        pixels = self.predictor.transform.new_batch(count * self.batch_size)
        return pixels.reshape(count, self.batch_size, *pixels.shape[1:]).swapaxes(0, 1)

    def read(self, data: bytes, picture: Picture) -> tuple[dict[str, Any], np.ndarray]:
        views, content = self._views, int.from_bytes(hashlib.sha256(data).digest()[:8])
        drawn = [
            self.predictor.transform.for_train(
                picture.pixels, seed=views.seed, epoch=view, sample=content, augment=views.augment
            )
            for view in range(views.count)
        ]
        return {}, np.stack([view.numpy() for view in drawn])

    def predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {"features": np.concatenate([self.predictor(view)[1] for view in pixels.swapaxes(0, 1)], axis=1)}
