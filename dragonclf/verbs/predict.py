"""`predict`: probabilities for a few images, at once and without Ray."""

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import BaseModel, Field

from dragonclf import storage
from dragonclf.config import LimitsConfig, PredictConfig
from dragonclf.data import images
from dragonclf.model import bundle, precision, tta
from dragonclf.model.bundle import BundleInfo
from dragonclf.model.execution import resolve_execution
from dragonclf.model.tta import TtaPredictor


class Prediction(BaseModel):
    """One image's row."""

    uri: str | None = Field(default=None, description="None: its bytes were given.")
    status: str = Field(description="ok, or why there is no prediction.")
    error: str | None = None
    label: str | None = None
    confidence: float | None = None
    abstain: bool | None = Field(
        default=None,
        description="Whether the confidence is below the model's threshold of the label. None: it has none.",
    )
    probs: dict[str, float] = {}


class PredictSummary(BaseModel):
    """Predictions in the order asked for."""

    model_version: str
    predictions: list[Prediction]

    @property
    def exit_code(self) -> int:
        """1 if an image has no prediction."""
        return int(any(row.status != "ok" for row in self.predictions))


def predict(config: PredictConfig) -> PredictSummary:
    """Return a prediction for each image, with a status for those that have none. ValueError or StorageError as for any bundle."""
    loaded = bundle.load_bundle(config.model)
    f32 = resolve_execution(config.runtime, config.device, "f32", has_gpu=torch.cuda.is_available())
    execution = precision.choose(loaded.uri, loaded.version, f32, config.precision)
    predictor = tta.open_predictor(
        loaded, execution, num_views=config.tta, num_threads=torch.get_num_threads(),
        batch_size=min(config.batch_size, len(config.images) * (1 + config.tta)),
    )  # fmt: skip
    rows = predict_images(predictor, loaded.info, config.images, config)
    return PredictSummary(model_version=loaded.version, predictions=rows)


def predict_images(
    predictor: TtaPredictor, info: BundleInfo, given: Sequence[str | bytes], limits: LimitsConfig
) -> list[Prediction]:
    """A prediction for each of `given`, a URI or an encoded image, in order. `info` is the model's. StorageError if the store fails."""
    rows: list[Prediction] = []
    for start in range(0, len(given), predictor.batch_size):
        batch = given[start : start + predictor.batch_size]
        pixels = predictor.new_batch(len(batch))
        for slot, source in enumerate(batch):
            row = Prediction(uri=storage.resolve(source) if isinstance(source, str) else None, status="ok")
            rows.append(row)
            try:
                data = _get(source, limits)
                image = images.decode(data, max_pixels=limits.max_pixels, min_side=predictor.transform.min_side)
                pixels[slot] = predictor.views(data, image)
            except images.ImageError as error:
                row.status, row.error = error.status, error.reason
        for row, probs in zip(rows[start:], predictor(pixels)[0], strict=True):
            if row.status == "ok":
                row.label, row.confidence = info.classes[int(probs.argmax())], float(probs.max())
                row.probs = dict(zip(info.classes, probs.tolist(), strict=True))
                if info.thresholds:
                    row.abstain = bool(probs.max() < np.float32(info.thresholds[row.label]))
    return rows


def _get(source: str | bytes, limits: LimitsConfig) -> bytes:
    try:
        data = storage.get(source) if isinstance(source, str) else source
    except storage.ObjectMissingError as error:
        raise images.ImageError("missing", "there is no such object") from error
    except storage.AccessDeniedError as error:
        raise images.ImageError("denied", str(error)) from error
    if len(data) > limits.max_image_bytes:
        raise images.ImageError("too_large", f"{len(data):,} bytes, over the limit of {limits.max_image_bytes:,}")
    return data
