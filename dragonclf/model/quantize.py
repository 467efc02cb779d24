"""A network's body in int8, by NNCF's post-training quantization; layers that cost too many labels stay in f32."""

import contextlib
import logging
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from dragonclf.data.transforms import Transform
from dragonclf.model import runtimes
from dragonclf.model.execution import processor
from dragonclf.model.predictor import Body, Head

if TYPE_CHECKING:
    import openvino

FILES = ("model.xml", "model.bin")
MAX_LABELS_LOST = 0.005  # of the images given; a proof, on others, asks for 0.01
BATCH_SIZE = 32
MAX_RESTORED = (
    10  # layers that may go back to f32: each takes a pass over the images, and with many of them int8 gains nothing
)
RANKING = 64  # images by which layers are ranked, one at a time: most of the time goes there

Sample = tuple[np.ndarray, int]  # pixels, f32's label


def quantize(model: nn.Module, transform: Transform, pixels: np.ndarray) -> dict[str, bytes]:
    """The body as `FILES`. `pixels`, uint8 (N, 3, S, S), some hundred training images, set ranges and tell which layers stay in f32.

    ValueError if NNCF is not installed.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # NNCF looks for a CUDA compiler
    with (
        runtimes.without_telemetry(),
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(sys.stderr),  # progress bars
    ):
        try:
            import nncf
        except ImportError as error:
            raise ValueError("int8 needs NNCF: pip install 'dragonclf[cpu]'") from error
        import openvino
        from nncf.quantization.advanced_parameters import (
            AdvancedAccuracyRestorerParameters,
            AdvancedQuantizationParameters,
            OverflowFix,
        )

        nncf.set_log_level(logging.ERROR)
        converted = runtimes.convert(Body(model, transform).eval(), transform.size)
        head = Head(model)

        def agreement(
            body: "openvino.CompiledModel", samples: Iterable[Sample]
        ) -> tuple[float, list[list[np.ndarray]]]:
            images, wanted = zip(*samples, strict=True)
            features = _features(body, np.stack(images))
            return float((head(features).argmax(axis=1) == wanted).mean()), [[row[None]] for row in features]

        f32 = openvino.compile_model(converted, "CPU", runtimes.F32)
        wanted = head(_features(f32, pixels)).argmax(axis=1)
        images = nncf.Dataset(list(zip(pixels, wanted, strict=True)), lambda sample: sample[0][None])
        quantized = nncf.quantize_with_accuracy_control(
            converted,
            images,
            images,
            agreement,
            max_drop=MAX_LABELS_LOST,
            subset_size=len(pixels),
            # Processors without these instructions add two products in 16 bits, which full-range weights overflow.
            advanced_quantization_parameters=AdvancedQuantizationParameters(
                overflow_fix=OverflowFix.DISABLE if _has_wide_sums() else OverflowFix.ENABLE
            ),
            advanced_accuracy_restorer_parameters=AdvancedAccuracyRestorerParameters(
                ranking_subset_size=RANKING, max_num_iterations=MAX_RESTORED
            ),
        )
        openvino.save_model(quantized, Path(folder) / FILES[0], compress_to_fp16=False)
        return {name: (Path(folder) / name).read_bytes() for name in FILES}


def load(files: dict[str, bytes]) -> "openvino.Model":
    """The body that `quantize` gave."""
    import openvino

    xml, weights = (files[name] for name in FILES)
    return openvino.Core().read_model(xml, weights)


def _features(body: "openvino.CompiledModel", pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([body(pixels[start : start + BATCH_SIZE])[0] for start in range(0, len(pixels), BATCH_SIZE)])


def _has_wide_sums() -> bool:
    return any("vnni" in word or word in ("amx_int8", "asimddp", "i8mm") for word in processor("cpu").split())
