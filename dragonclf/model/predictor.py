"""Run a model on batches of transformed images, by torch or OpenVINO, in f32. Plain Python: no Ray needed to use or measure it."""

import contextlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from dragonclf.data.transforms import Transform
from dragonclf.model import zoo

Forward = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Execution(BaseModel):
    """How a model is run: part of what a scored row depends on, so it is resolved once and recorded."""

    model_config = ConfigDict(frozen=True)

    runtime: Literal["torch", "openvino"]
    device: Literal["cpu", "cuda"]
    precision: Literal["f32"]

    @property
    def key(self) -> str:
        return f"{self.runtime}/{self.precision}"

    def __str__(self) -> str:
        return f"{self.runtime} on {self.device} in {self.precision}"


def resolve_execution(runtime: str, device: str, precision: str, *, has_gpu: bool) -> Execution:
    """Choose once what ``auto`` means: torch on a GPU, else OpenVINO if it is installed, else torch.

    `has_gpu` says whether the machines that will run the model have one. ValueError for a choice that cannot be honoured.
    """
    if precision != "f32":
        raise ValueError(f"precision {precision!r} is not admitted: only f32 is proven equal to training")
    device = ("cuda" if has_gpu and runtime != "openvino" else "cpu") if device == "auto" else device
    if device == "cuda" and not has_gpu:
        raise ValueError("device 'cuda' was asked for and there is no GPU here: use --device cpu or a node with a GPU")
    has_openvino = importlib.util.find_spec("openvino") is not None
    if runtime == "auto":
        runtime = "openvino" if device == "cpu" and has_openvino else "torch"
    if runtime == "openvino" and device == "cuda":
        raise ValueError("runtime 'openvino' runs on the CPU: use --device cpu, or --runtime torch")
    if runtime == "openvino" and not has_openvino:
        raise ValueError("runtime 'openvino' is not installed: pip install 'dragonclf[cpu]', or use --runtime torch")
    return Execution.model_validate({"runtime": runtime, "device": device, "precision": precision})


class Network(nn.Module):
    """The whole way from transformed pixels to logits: scale to 0..1, normalise, backbone, head."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, transform: Transform):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(transform.mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(transform.std).view(1, 3, 1, 1) * 255)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, S, S) to what the head sees, float32 (B, F)."""
        normal = (pixels.float() - self.mean) / self.std
        return self.model.forward_head(self.model.forward_features(normal), pre_logits=True)  # type: ignore[operator]

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (B, 3, S, S) to logits float32 (B, K) and features float32 (B, F)."""
        features = self.features(pixels)
        return zoo.classifier(self.model)(features), features


class Predictor:
    """A model ready to run on batches of up to `batch_size` images.

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
    ):
        self.transform, self.execution, self.batch_size = transform, execution, batch_size
        self.num_features = zoo.classifier(model).in_features
        network = Network(model, transform).eval()
        build = {"torch": _torch_forward, "openvino": _openvino_forward}[execution.runtime]
        self._forward = build(network, execution.device, (batch_size, transform.size), num_threads)

    def __call__(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Run uint8 (N, 3, S, S), N <= batch_size. Returns logits (N, K) and features (N, F), both float32."""
        count = len(pixels)
        assert 0 < count <= self.batch_size, f"{count} images for a batch of {self.batch_size}"
        if count < self.batch_size:
            pixels = np.concatenate([pixels, np.zeros((self.batch_size - count, *pixels.shape[1:]), np.uint8)])
        logits, features = self._forward(pixels)
        return logits[:count], features[:count]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float32 (N, K) of logits (N, K), computed in float64; each row sums to 1."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)


def _torch_forward(network: Network, device: str, shape: tuple[int, int], num_threads: int) -> Forward:
    torch.set_num_threads(num_threads)
    torch.backends.cudnn.allow_tf32 = False  # f32 means f32, on every GPU
    network = network.to(device).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        batch = torch.from_numpy(pixels).to(device, memory_format=torch.channels_last)
        logits, features = network(batch)
        return logits.cpu().numpy(), features.cpu().numpy()

    return forward


def _openvino_forward(network: Network, device: str, shape: tuple[int, int], num_threads: int) -> Forward:
    batch_size, size = shape
    pixels = torch.zeros((1, 3, size, size), dtype=torch.uint8)
    with _without_telemetry(), warnings.catch_warnings(), torch.inference_mode():
        import openvino

        warnings.simplefilter(
            "ignore", FutureWarning
        )  # of torch.jit; tracing without its own check takes 1 s, torch.export 4 s
        traced = torch.jit.trace(network, pixels, check_trace=False)
        converted = openvino.convert_model(traced, input=[[batch_size, 3, size, size]])
    compiled = openvino.Core().compile_model(
        converted,
        "CPU",
        # Without the hint OpenVINO runs in bf16 where the CPU has it, which changed 4 % of labels in measurements.
        {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": num_threads},
    )
    request = compiled.create_infer_request()

    def forward(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        request.infer([pixels], share_inputs=True)
        return request.get_output_tensor(0).data.copy(), request.get_output_tensor(1).data.copy()

    return forward


@contextlib.contextmanager
def _without_telemetry() -> Iterator[None]:
    """OpenVINO's converter reports its use over the network unless its telemetry module cannot be imported."""
    absent = object()
    before = sys.modules.get("openvino_telemetry", absent)
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is absent:
            del sys.modules["openvino_telemetry"]
        else:
            sys.modules["openvino_telemetry"] = before  # type: ignore[assignment]
