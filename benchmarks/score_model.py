"""Images a second from bucket to Parquet with a real model, ours beside peers, and what decoding and the model alone would allow.

    python benchmarks/score_model.py --model demo-run/training/RUN/model [--rounds 5] [--only ours,ours-auto,plain,plain-bf16,ray]

The images are elpv's 2,624 photographs (PNG, 300 x 300) in a local S3 server; the model is a bundle, as the demo makes one. The rate is
marginal: (2,624 - 200) / (seconds for 2,624 - seconds for 200), each in a process of its own, so that starting Python, Ray and actors
cancels out; a slow peer reads fewer. Ways (score_peers.py) are interleaved; medians. Beside each speed: its label agreement with ours, and
its accuracy (most of these photographs were trained on). Needs the extras `cpu` and `demo`; the machine must be idle otherwise.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from score_peers import NUM_CPUS

from dragonclf import storage
from dragonclf.data import images
from dragonclf.demo.local_s3 import LocalS3
from dragonclf.model import bundle
from dragonclf.model.execution import Execution
from dragonclf.storage import s3

FEW = 200
CLASSES = ["defective", "functional"]
SLOW = {"plain-bf16": 10}  # divides the images of a peer that would take many minutes: bf16 on a CPU that has none
PEERS = Path(__file__).with_name("score_peers.py")


def elpv() -> Path:
    spec = importlib.util.find_spec("elpv_dataset")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "data"


def photographs() -> list[bytes]:
    return [path.read_bytes() for path in sorted(elpv().glob("images/*.png"))]


def labelled() -> list[tuple[Path, str]]:
    """Each photograph and its class, as the demo has them, in the data set's order."""
    rows = [line.split() for line in (elpv() / "labels.csv").read_text().splitlines()]
    return [(elpv() / path, CLASSES[int(float(chance) < 0.5)]) for path, chance, _ in rows]


def classes() -> list[int]:
    """Of `photographs`, by their place in `CLASSES`."""
    return [CLASSES.index(name) for _, name in sorted(labelled())]


def run(method: str, model: str, prefix: str, count: int) -> tuple[float, dict[str, int]]:
    """Seconds, and the label of each key."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(PEERS), method, model, prefix, str(count), f"{folder}/out"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        told = json.loads(done.stdout.strip().splitlines()[-1])
        return told["seconds"], json.loads(Path(f"{folder}/out.json").read_text())


def bound(model: str, encoded: list[bytes]) -> float:
    """Images a second if nothing but decoding and the model took time, one after the other on all CPUs."""
    loaded = bundle.load_bundle(model)
    openvino = Execution(runtime="openvino", device="cpu", precision="f32")
    predictor = bundle.open_predictor(loaded, openvino, num_threads=NUM_CPUS)
    started = time.perf_counter()
    with ThreadPoolExecutor(NUM_CPUS) as pool:
        pixels = np.stack(
            list(
                pool.map(
                    lambda data: loaded.info.transform.for_eval(
                        images.decode(data, min_side=loaded.info.transform.min_side)
                    ).numpy(),
                    encoded,
                )
            )
        )
    decoded = time.perf_counter()
    for start in range(0, len(pixels), predictor.batch_size):
        predictor(pixels[start : start + predictor.batch_size])
    return len(encoded) / (time.perf_counter() - decoded + decoded - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="ours,ours-auto,plain,plain-bf16,ray")
    options = parser.parse_args()
    methods, encoded = options.only.split(","), photographs()
    rates: dict[str, list[float]] = {method: [] for method in methods}
    bounds: list[float] = []
    labels: dict[str, dict[str, int]] = {}
    with LocalS3() as server:
        os.environ |= server.environment("admin")
        s3.forget_clients()
        server.create_bucket("photos")
        most = {method: FEW + (len(encoded) - FEW) // SLOW.get(method, 1) for method in methods}
        for count in {FEW, *most.values()}:
            for i, data in enumerate(encoded[:count]):
                storage.put(f"s3://photos/{count}/{i:06d}.png", data)
        print(
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {options.rounds} rounds", flush=True
        )
        for _ in range(options.rounds):
            bounds.append(bound(options.model, encoded))
            for method in methods:
                few_s, _ = run(method, options.model, f"s3://photos/{FEW}", FEW)
                many_s, found = run(method, options.model, f"s3://photos/{most[method]}", most[method])
                labels[method] = {storage.name(key): label for key, label in found.items()}
                rates[method].append((most[method] - FEW) / (many_s - few_s))
                print(f"  {method}: {rates[method][-1]:.1f} images/s ({few_s:.1f} s for {FEW})", flush=True)
    ours = statistics.median(rates["ours"])
    print(f"{'way':>11} {'images/s':>9} {'range':>15} {'ours is':>8} {'labels as ours':>15} {'accuracy':>9}")
    targets = dict(zip(sorted(labels["ours"]), classes(), strict=True))
    for method, values in rates.items():
        same = np.mean([labels["ours"][key] == label for key, label in labels[method].items()])
        accuracy = np.mean([targets[key] == label for key, label in labels[method].items()])
        middle = statistics.median(values)
        print(
            f"{method:>11} {middle:>9.1f} {min(values):>7.1f}-{max(values):<7.1f} {ours / middle:>7.2f}x {same:>15.2%} {accuracy:>9.2%}"
        )
    print(
        f"decoding and model alone: {statistics.median(bounds):.1f} images/s; ours is {ours / statistics.median(bounds):.0%} of it"
    )


if __name__ == "__main__":
    main()
