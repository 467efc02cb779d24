"""The runtimes that compute a network's features, each for batches of one size: torch, torch.compile (inductor) and OpenVINO."""

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from dragonclf.storage.errors import first_line

if TYPE_CHECKING:
    import openvino

log = logging.getLogger("dragonclf")

Forward = Callable[[np.ndarray], np.ndarray]  # uint8 (B, 3, S, S), best in memory pixel by pixel, to float32 (B, F)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Without the hint OpenVINO runs in bf16 where the CPU has it, which changed 4 % of labels in measurements.
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
IR = "model.xml"  # OpenVINO's format, with the weights in model.bin
CHUNK = 2  # images that a thread of OpenVINO runs at a time
MAX_CACHED = 8  # converted models, the least recently used of which goes


def on_torch(body: nn.Module, device: str, precision: str, *, num_threads: int, compiled: bool = False) -> Forward:
    """In a low precision, torch's autocast decides what stays in f32."""
    torch.set_num_threads(num_threads)
    torch.backends.cudnn.allow_tf32 = False  # f32 means f32, on every GPU
    body = body.to(device).to(memory_format=torch.channels_last)
    run = torch.compile(body, dynamic=False, fullgraph=True) if compiled else body
    pinned = device == "cuda"  # what is not can only be copied while the CPU waits

    @torch.inference_mode()
    def forward(pixels: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(pixels)
        batch = (batch.pin_memory() if pinned else batch).to(
            device, memory_format=torch.channels_last, non_blocking=pinned
        )
        with torch.autocast(device, dtype=DTYPES.get(precision), enabled=precision in DTYPES):
            features = run(batch)
        return features.float().cpu().numpy()

    return forward


def on_inductor(body: nn.Module, device: str, precision: str, blank: np.ndarray, *, num_threads: int) -> Forward:
    """`on_torch` by torch.compile, for batches like `blank`, compiled now: it takes a minute. ValueError where that cannot be done."""
    forward = on_torch(body, device, precision, num_threads=num_threads, compiled=True)
    try:
        forward(blank)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"torch.compile fails on this machine ({first_line(error)}): it needs a C++ compiler for the CPU, Triton for a GPU; "
            "or use --runtime torch"
        ) from error
    return forward


def on_openvino(model: "openvino.Model", precision: str, *, num_threads: int) -> Forward:
    """`precision` is of all that the model itself does not say: f32 for one that is quantized.

    Every thread runs `CHUNK` images of its own: none waits for another, their activations stay in its cache, and an image's result depends
    neither on the size of the batch nor on the number of threads.
    """
    import openvino
    from openvino import Layout
    from openvino.preprocess import PrePostProcessor

    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ValueError("OpenVINO has no bf16 on this processor: use --precision f32, or int8 where it is admitted")
    model.reshape([CHUNK, *model.input(0).get_partial_shape()[1:]])
    outside = PrePostProcessor(model)
    outside.input().tensor().set_layout(Layout("NHWC"))
    outside.input().model().set_layout(Layout("NCHW"))
    compiled = core.compile_model(
        outside.build(),
        "CPU",
        {"INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": num_threads, "INFERENCE_NUM_THREADS": num_threads},
    )
    num_features = compiled.output(0).shape[1]
    requests = openvino.AsyncInferQueue(compiled, num_threads)

    def forward(pixels: np.ndarray) -> np.ndarray:
        images = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        if missing := -len(images) % CHUNK:
            images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.uint8)])
        features = np.empty((len(images), num_features), np.float32)

        def keep(request: "openvino.InferRequest", start: int) -> None:
            features[start : start + CHUNK] = request.get_output_tensor(0).data

        requests.set_callback(keep)
        for start in range(0, len(images), CHUNK):
            requests.start_async([images[start : start + CHUNK]], start, share_inputs=True)
        requests.wait_all()
        return features[: len(pixels)]

    return forward


def convert(body: nn.Module, size: int) -> "openvino.Model":
    """Bring a network to OpenVINO, for any number of images of `size` pixels."""
    import openvino

    # By way of a file, also where it is not kept: what was read from one adds in another order than what was just traced.
    with tempfile.TemporaryDirectory(prefix="dragonclf-model-") as folder:
        _save(body, size, Path(folder))
        return openvino.Core().read_model(Path(folder) / IR)


def convert_cached(body: nn.Module, size: int, key: str) -> "openvino.Model":
    """`convert`, kept on this machine under `key`, which must tell networks apart: tracing takes longer than all else that opens one."""
    import openvino

    versions = [importlib.metadata.version(package) for package in ("openvino", "torch", "timm", "dragonclf")]
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dragonclf" / "openvino"
    kept = folder / hashlib.sha256(repr((key, size, versions)).encode()).hexdigest()
    try:
        if (kept / IR).exists():
            os.utime(kept)
        else:
            _keep(body, size, kept)
        return openvino.Core().read_model(kept / IR)
    except (OSError, RuntimeError) as error:  # OpenVINO raises the latter, for a full disk too
        log.info("%s cannot keep converted models (%s): each process converts its own", folder, error)
        return convert(body, size)


def _keep(body: nn.Module, size: int, kept: Path) -> None:
    folder = kept.parent
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder, prefix="new-") as made:
        whole = Path(made) / "whole"
        whole.mkdir()
        _save(body, size, whole)
        with contextlib.suppress(OSError):  # another process was faster
            whole.rename(kept)
    for stale in sorted(folder.glob("[0-9a-f]*"), key=lambda path: path.stat().st_mtime)[:-MAX_CACHED]:
        shutil.rmtree(stale, ignore_errors=True)


def _save(body: nn.Module, size: int, folder: Path) -> None:
    pixels = torch.zeros((1, 3, size, size), dtype=torch.uint8)
    with without_telemetry(), warnings.catch_warnings(), torch.inference_mode():
        import openvino

        warnings.simplefilter(
            "ignore", FutureWarning
        )  # of torch.jit; tracing without its own check takes 1 s, torch.export 4 s
        traced = torch.jit.trace(body, pixels, check_trace=False)
        model = openvino.convert_model(traced, input=[[-1, 3, size, size]])
        model.output(0).set_names({"features"})
        openvino.save_model(model, folder / IR, compress_to_fp16=False)


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """OpenVINO's tools report their use over the network unless their telemetry module cannot be imported."""
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
