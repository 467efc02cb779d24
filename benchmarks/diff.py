"""Seconds and peak memory of `dragonclf diff`. Usage: python benchmarks/diff.py [NUM_IMAGES [NUM_CLASSES ...]]

Two published runs of made-up probabilities are written to the local disk, half of their images replaced and a few missing in either; then
they are compared in a process of its own, flips.parquet included. Past 32 classes the runs have the list column. Peak memory is the
resident set of that process at its greatest.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from dragonclf.engine import lease, plan, runs
from dragonclf.engine.layout import Layout

NUM_IMAGES, NUM_CLASSES = 1_000_000, [2, 10]
SHARD_IMAGES = 20_000
MISSING_EVERY = 1_000  # every so many images one is in the other run only

# In between stands a small process: a child's peak begins at that of the process that started it, and this one holds torch.
MEASURE = """import json, resource, subprocess, sys, time
started = time.monotonic()
done = subprocess.run(sys.argv[1:], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps([json.loads(done.stdout), time.monotonic() - started, peak]))"""


def planned(num_images: int, first: int) -> Iterator[pa.Table]:
    for start in range(first, first + num_images, SHARD_IMAGES):
        uris = [f"/photos/new/{i:09d}.jpg" for i in range(start, min(start + SHARD_IMAGES, first + num_images))]
        yield pa.table({"uri": uris, "etag": ["0" * 32] * len(uris), "size": pa.array([5] * len(uris), pa.int64())})


def publish(out: str, *, num_images: int, num_classes: int, seed: int) -> str:
    """Write a run as scoring does, without images. Returns its URI."""
    rng = np.random.default_rng(seed)
    classes, spec = [f"class{i:04d}" for i in range(num_classes)], {"model": f"{seed:012x}"}
    first = seed * (num_images // MISSING_EVERY)
    with lease.Lease(runs.lease_uri(out, "score", spec)) as held:
        run = runs.open_run(
            out, "score", spec, lambda: plan.stage_plan(planned(num_images, first), shard_images=SHARD_IMAGES), held=held
        )  # fmt: skip
        for shard in runs.missing_shards(run):
            uris = plan.read_shard(run.uri, run.plan, shard)["uri"]
            probs = rng.dirichlet(np.full(num_classes, 0.3), len(uris)).astype(np.float32)
            bad = rng.random(len(uris)) < 0.01
            table = pa.table(
                {
                    "uri": uris,
                    "etag": [f"{value:032x}" for value in rng.integers(0, 2, len(uris))],
                    "status": np.where(bad, "unreadable", "ok"),
                    "error": pa.nulls(len(uris), pa.string()),
                    **Layout().answers(classes, probs, bad, thresholds={}),
                    "width": pa.array([640] * len(uris), pa.int32()),
                }
            )
            runs.write_part(run, shard, table)
        runs.publish(run, fence=held.fence)
    return run.uri


def main() -> None:
    num_images = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_IMAGES
    print(f"{os.cpu_count()} CPUs, two runs of {num_images:,} images each")
    print(f"{'classes':>8} {'in both':>12} {'flips':>10} {'seconds':>8} {'peak MiB':>9}")
    for num_classes in [int(value) for value in sys.argv[2:]] or NUM_CLASSES:
        with tempfile.TemporaryDirectory() as folder:
            uris = [
                publish(str(Path(folder) / "scores"), num_images=num_images, num_classes=num_classes, seed=seed)
                for seed in (0, 1)
            ]
            command = [sys.executable, "-m", "dragonclf", "diff", *uris, "--out", f"{folder}/changes", "--json"]
            measured = subprocess.run(
                [sys.executable, "-c", MEASURE, *command], check=True, stdout=subprocess.PIPE
            ).stdout  # fmt: skip
            done, seconds, peak = json.loads(measured)
            assert done["num_both"] == num_images - num_images // MISSING_EVERY
            print(
                f"{num_classes:>8} {done['num_both']:>12,} {done['num_flips']:>10,} {seconds:>8.1f} {peak:>9.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
