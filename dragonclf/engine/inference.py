"""The two image jobs that run a model: probabilities from a bundle (scoring), features from a backbone (precompute)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from dragonclf.engine import runs
from dragonclf.engine.image_work import ImageWork
from dragonclf.engine.pipeline import Limits, ShardResult, Worker
from dragonclf.model import bundle, zoo
from dragonclf.model.predictor import Execution, Predictor, softmax

FEATURES = "features"
MAX_PROB_COLUMNS = 32  # more classes share one list column


@dataclass(frozen=True)
class _InferenceTask:
    execution: Execution
    batch_size: int
    limits: Limits

    @property
    def uses_gpu(self) -> bool:
        return self.execution.device == "cuda"

    def open(self, num_threads: int) -> Worker:
        raise NotImplementedError

    def work(self, run: runs.Run, num_threads: int, max_bytes: int) -> ImageWork:
        return ImageWork(run, self, num_threads, max_bytes)


@dataclass(frozen=True)
class ScoreTask(_InferenceTask):
    """Probabilities by the bundle at `model_uri`, which must still be `model_version` and reproduce its canaries in each actor.

    With `embeddings` the rows also hold what the head sees, as float16.
    """

    model_uri: str
    model_version: str
    embeddings: bool = False

    def open(self, num_threads: int) -> "ScoreWorker":
        loaded = open_bundle(self.model_uri, self.model_version)
        predictor = bundle.open_predictor(loaded, self.execution, batch_size=self.batch_size, num_threads=num_threads)
        return ScoreWorker(predictor, loaded.info.classes, loaded.version, embeddings=self.embeddings)


@dataclass(frozen=True)
class FeatureTask(_InferenceTask):
    """What the head of a pretrained backbone sees, float32, for images of a snapshot."""

    arch: str
    pretrained: str
    digest: str
    size: int | None

    def open(self, num_threads: int) -> "FeatureWorker":
        model = zoo.load_pretrained(self.arch, self.pretrained)
        if zoo.backbone_digest(model) != self.digest:
            raise ValueError(
                f"the weights of {self.arch} from {self.pretrained} differ between this node and the driver: install the same"
            )
        transform = zoo.transform_for(model, size=self.size)
        predictor = Predictor(model, transform, self.execution, batch_size=self.batch_size, num_threads=num_threads)
        return FeatureWorker(predictor)


def open_bundle(uri: str, version: str) -> bundle.Bundle:
    """Load a bundle in an actor. ValueError if it is not the one that the driver saw."""
    loaded = bundle.load_bundle(uri)
    if loaded.version != version:
        raise ValueError(f"{uri} is model {loaded.version} here and {version} at the start: start again")
    return loaded


class _InferenceWorker:
    """Transform, batch, run."""

    def __init__(self, predictor: Predictor):
        self.predictor = predictor
        self.batch_size = predictor.batch_size
        self.pixels_shape = (3, predictor.transform.size, predictor.transform.size)

    def read(self, data: bytes, image: torch.Tensor) -> tuple[dict[str, Any], np.ndarray]:
        _, height, width = image.shape
        return {"width": width, "height": height}, self.predictor.transform.for_eval(image).numpy()


class ScoreWorker(_InferenceWorker):
    """Rows: uri, etag, status, error, label, confidence, prob_*, width, height, model_version, and features if `embeddings`."""

    def __init__(self, predictor: Predictor, classes: list[str], model_version: str, *, embeddings: bool):
        super().__init__(predictor)
        self._classes, self._model_version, self._embeddings = classes, model_version, embeddings

    def predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        logits, features = self.predictor(pixels)
        found = {"prob": softmax(logits)}
        return found | {FEATURES: features.astype(np.float16)} if self._embeddings else found

    def table(self, planned: pa.Table, result: ShardResult) -> pa.Table:
        count, bad = planned.num_rows, ~result.scored
        probs = result.outputs.get("prob", np.zeros((count, len(self._classes)), np.float32))
        columns = {
            "uri": planned["uri"],
            "etag": pa.array(result.etags, pa.string()),
            "status": pa.array(result.statuses, pa.string()),
            "error": pa.array(result.errors, pa.string()),
            **answer_columns(self._classes, probs, bad),
            "width": pa.array([value.get("width") for value in result.values], pa.int32()),
            "height": pa.array([value.get("height") for value in result.values], pa.int32()),
            "model_version": pa.array([self._model_version] * count, pa.string()),
        }
        if self._embeddings:
            num_features = self.predictor.num_features
            features = result.outputs.get(FEATURES, np.zeros((count, num_features), np.float16))
            columns[FEATURES] = _lists(features, bad)
        return pa.table(columns)


class FeatureWorker(_InferenceWorker):
    """Rows: uri, etag, status, error, features (float32 list of one length)."""

    def predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {"features": self.predictor(pixels)[1]}

    def table(self, planned: pa.Table, result: ShardResult) -> pa.Table:
        features = result.outputs.get("features", np.zeros((planned.num_rows, 1), np.float32))
        return pa.table(
            {
                "uri": planned["uri"],
                "etag": pa.array(result.etags, pa.string()),
                "status": pa.array(result.statuses, pa.string()),
                "error": pa.array(result.errors, pa.string()),
                "features": pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1]),
            }
        )


def answer_columns(classes: list[str], probs: np.ndarray, bad: np.ndarray) -> dict[str, pa.Array]:
    """Columns label, confidence and those of `prob_columns` of probabilities float32 (N, K); null where `bad`, bool (N,)."""
    best = probs.argmax(axis=1)
    return {
        "label": pa.array([classes[i] for i in best], pa.string(), mask=bad),
        "confidence": pa.array(probs[np.arange(len(probs)), best], pa.float32(), mask=bad),
        **prob_columns(classes, probs, bad),
    }


def prob_columns(classes: list[str], probs: np.ndarray, bad: np.ndarray) -> dict[str, pa.Array]:
    """Columns of probabilities (N, K), null where `bad`: one named after each class, or past 32 classes one list column."""
    if len(classes) > MAX_PROB_COLUMNS:
        return {"probs": _lists(probs, bad)}
    return {f"prob_{name}": pa.array(probs[:, index], pa.float32(), mask=bad) for index, name in enumerate(classes)}


def _lists(values: np.ndarray, bad: np.ndarray) -> pa.ListArray:
    """A column of lists out of (N, D), null where `bad`. Not of a fixed size: pyarrow does not read those back if some are null."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel()), mask=pa.array(bad))


def check_class_names(classes: list[str]) -> None:
    """ValueError for classes whose names differ in case only: most readers of Parquet would take their columns for one."""
    seen: dict[str, str] = {}
    for name in classes:
        twin = seen.setdefault(name.casefold(), name)
        if twin != name:
            raise ValueError(
                f"classes {twin!r} and {name!r} differ in case only: rename one, their columns would collide in most readers"
            )
