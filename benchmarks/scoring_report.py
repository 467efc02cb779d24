"""Seconds and peak memory of `dragonclf report`. Usage: python benchmarks/scoring_report.py [NUM_IMAGES [NUM_CLASSES ...]]

A published run of made-up probabilities is written to the local disk, one image in a hundred unreadable; its report is made in a process of
its own. No image is there, so the galleries say so. Peak memory is the resident set of that process at its greatest.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from diff import MEASURE, NUM_CLASSES, NUM_IMAGES, publish


def main() -> None:
    num_images = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_IMAGES
    print(f"{os.cpu_count()} CPUs, a run of {num_images:,} images")
    print(f"{'classes':>8} {'labelled':>12} {'seconds':>8} {'peak MiB':>9} {'page KB':>8}")
    for num_classes in [int(value) for value in sys.argv[2:]] or NUM_CLASSES:
        with tempfile.TemporaryDirectory() as folder:
            uri = publish(f"{folder}/scores", num_images=num_images, num_classes=num_classes, seed=0)
            command = [sys.executable, "-m", "dragonclf", "report", uri, "--out", f"{folder}/report", "--json"]
            measured = subprocess.run(
                [sys.executable, "-c", MEASURE, *command], check=True, stdout=subprocess.PIPE
            ).stdout
            summary, seconds, peak = json.loads(measured)
            size = Path(summary["page"]).stat().st_size / 1000
            print(
                f"{num_classes:>8} {summary['num_labelled']:>12,} {seconds:>8.1f} {peak:>9.0f} {size:>8.0f}", flush=True
            )


if __name__ == "__main__":
    main()
