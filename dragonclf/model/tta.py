"""Test-time augmentation: probabilities of several views of an image, the centre that evaluation crops and others varied as in training.

The mixture is fastai's (`Learner.tta`, https://docs.fast.ai/learner.html#learner.tta), which also takes its views from the transform of
training. Here they are drawn from the image's own bytes: the same image has the same views wherever and whenever it is looked at. A head
that was trained on features saw no crop but the centre, and other crops make it worse (docs/quality.md): its views are that one, mirrored.
"""

import hashlib

import numpy as np
import torch

from dragonclf.model import bundle
from dragonclf.model.execution import Execution
from dragonclf.model.predictor import Predictor, softmax

BETA = 0.25  # what the centre counts


class TtaPredictor:
    """A predictor that looks at each image 1 + `num_views` times. With `num_views` 0 its probabilities are the predictor's own.

    A batch holds so few images that its views are about a batch of the predictor, and never fewer than one image.
    """

    def __init__(self, predictor: Predictor, info: bundle.BundleInfo, *, num_views: int):
        """`info` is the model's."""
        self._predictor, self._num_views = predictor, num_views
        self._augment = info.augment
        self._crops = bool(not info.config.get("precompute") or info.config.get("views"))
        self.transform, self.num_features = predictor.transform, predictor.num_features
        self.batch_size = max(1, predictor.batch_size // (1 + num_views))  # images

    def new_batch(self, count: int) -> np.ndarray:
        """Room for what `views` gives of `count` images: zeros, uint8 (count, 1 + num_views, 3, S, S)."""
        pixels = self.transform.new_batch(count * (1 + self._num_views))
        return pixels.reshape(count, 1 + self._num_views, *pixels.shape[1:])

    def views(self, data: bytes, image: torch.Tensor) -> np.ndarray:
        """The centre, then the views, of an encoded image `data` that was decoded to `image` (3, H, W): uint8 (1 + num_views, 3, S, S).

        A function of `data`. Whoever decodes must let `transform.min_side` pixels stand, as for evaluation.
        """
        centre = self.transform.for_eval(image)
        if not self._num_views:
            return centre.numpy()[None]
        found = self.new_batch(1)[0]
        found[0] = centre.numpy()
        content = int.from_bytes(hashlib.sha256(data).digest())
        for number in range(self._num_views):
            draw = np.random.default_rng((content, number))
            view = (
                self.transform.varied(image, draw, self._augment) if self._crops else self._augment.vary(centre, draw)
            )
            found[1 + number] = view.numpy()
        return found

    def __call__(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Run uint8 (N, 1 + num_views, 3, S, S). Returns probabilities (N, K), and features of the centres (N, F), both float32."""
        count, step = len(pixels), self._predictor.batch_size
        flat = pixels.reshape(-1, *pixels.shape[2:])
        passes = [self._predictor(flat[start : start + step]) for start in range(0, len(flat), step)]
        logits, features = (np.concatenate(parts) for parts in zip(*passes, strict=True))
        probs = softmax(logits).reshape(count, 1 + self._num_views, -1)
        return mixed(probs) if self._num_views else probs[:, 0], features[:: 1 + self._num_views]


def mixed(probs: np.ndarray) -> np.ndarray:
    """Probabilities float32 (N, K) out of those of each view, (N, V, K), the centre first: BETA of it, the rest of the others' mean."""
    views = probs.astype(np.float64)
    return (BETA * views[:, 0] + (1 - BETA) * views[:, 1:].mean(axis=1)).astype(np.float32)


def open_predictor(
    loaded: bundle.Bundle, execution: Execution, *, num_views: int, batch_size: int = 32, num_threads: int = 1
) -> TtaPredictor:
    """`bundle.open_predictor`, for batches of whole images of up to `batch_size` views."""
    whole = max(1, batch_size // (1 + num_views)) * (1 + num_views)
    predictor = bundle.open_predictor(loaded, execution, batch_size=min(batch_size, whole), num_threads=num_threads)
    return TtaPredictor(predictor, loaded.info, num_views=num_views)
