"""Run a model on batches of transformed images. Plain Python: no Ray needed to use or measure it."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from dragonclf.data.transforms import Transform
from dragonclf.model import runtimes, zoo
from dragonclf.model.execution import Execution

if TYPE_CHECKING:
    import openvino


class Network(nn.Module):
    """The whole way from transformed pixels to logits: scale to 0..1, normalise, backbone, head."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, transform: Transform):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(transform.mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(transform.std).view(1, 3, 1, 1) * 255)

    @property
    def head(self) -> nn.Linear:
        return zoo.classifier(self.model)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, S, S) to what the head sees, float32 (B, F)."""
        normal = (pixels.float() - self.mean) / self.std
        return self.model.forward_head(self.model.forward_features(normal), pre_logits=True)  # type: ignore[operator]

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (B, 3, S, S) to logits float32 (B, K) and features float32 (B, F)."""
        features = self.features(pixels)
        return self.head(features), features


class Body(nn.Module):
    """A network up to its head."""

    def __init__(self, model: nn.Module, transform: Transform):
        super().__init__()
        self.network = Network(model, transform)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network.features(pixels)


class Head:
    """A model's last layer in f32, by numpy: the same arithmetic whatever ran the body."""

    def __init__(self, model: nn.Module):
        layer = zoo.classifier(model)
        self.num_features = layer.in_features
        self._weight, self._bias = (tensor.detach().cpu().numpy().copy() for tensor in (layer.weight, layer.bias))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features float32 (N, F) to logits float32 (N, K)."""
        return features @ self._weight.T + self._bias


class Predictor:
    """A model ready to run on batches of up to `batch_size` images. Only its body runs in `execution.precision`: the head is f32.

    A batch is always run at its full size (short ones are padded and cut), so an image's result does not depend on how many
    images happen to be in its batch.
    """

    def __init__(
        self,
        model: nn.Module,
        transform: Transform,
        execution: Execution,
        *,
        batch_size: int = 32,
        num_threads: int = 1,
        quantized: "openvino.Model | None" = None,
        cache_key: str | None = None,
    ):
        """`quantized` is the body in int8. `cache_key` tells the model from all others: it is then converted once on a machine."""
        self.transform, self.execution, self.batch_size = transform, execution, batch_size
        self._head = Head(model)
        assert (execution.precision == "int8") == (quantized is not None)
        body = Body(model, transform).eval()
        how = execution.device, execution.precision
        if execution.runtime == "torch":
            self._forward = runtimes.on_torch(body, *how, num_threads=num_threads)
            return
        if execution.runtime == "inductor":
            self._forward = runtimes.on_inductor(body, *how, transform.new_batch(batch_size), num_threads=num_threads)
            return
        size, hint = transform.size, execution.precision
        if quantized is not None:
            converted, hint = quantized, "f32"
        elif cache_key is None:
            converted = runtimes.convert(body, size)
        else:
            converted = runtimes.convert_cached(body, size, cache_key)
        self._forward = runtimes.on_openvino(converted, hint, num_threads=num_threads)

    @property
    def num_features(self) -> int:
        return self._head.num_features

    def __call__(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Run uint8 (N, 3, S, S), N <= batch_size. Returns logits (N, K) and features (N, F), both float32."""
        count = len(pixels)
        assert 0 < count <= self.batch_size, f"{count} images for a batch of {self.batch_size}"
        if count < self.batch_size:
            pixels = np.concatenate([pixels, np.zeros((self.batch_size - count, *pixels.shape[1:]), np.uint8)])
        features = self._forward(pixels)
        return self._head(features)[:count], features[:count]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float32 (N, K) of logits (N, K), computed in float64; each row sums to 1."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)
