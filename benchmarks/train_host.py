"""What the host pays for a training image in the first epoch, beside scoring's: CPU milliseconds of the whole machine.

    python benchmarks/train_host.py [--rounds 5] [--images 5000]

The images are those of score_host.py in a local S3 server, whose work counts. The first epoch reads each one, checks its SHA-256, keeps
it in the node's cache, decodes, crops and mirrors it; the second finds it in the cache. Scoring is score_host.py's `ours`. No model:
batches are dropped. Each way runs in a process of its own, with few images and with more: what these cost more is the marginal cost, so
that starting Python, Ray and workers cancels out. Interleaved; medians. Needs the extra `demo`; the machine must be idle otherwise.
"""

import argparse
import hashlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from score_host import FEW, PEERS, cpu_s
from score_peers import NUM_CPUS, SHORT, SIZE, jpegs

from dragonclf import storage
from dragonclf.data.transforms import Transform
from dragonclf.demo.local_s3 import LocalS3
from dragonclf.storage import s3
from dragonclf.train.cache import ImageCache
from dragonclf.train.data import Images
from dragonclf.train.order import Order

BATCH_SIZE = 64
TRANSFORM = Transform(
    size=SIZE, crop_pct=SIZE / SHORT, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), min_side=2 * SHORT
)  # fmt: skip


def upload(folder: Path, count: int) -> None:
    """`count` images of different contents, and their table."""
    encoded = list(jpegs(200))
    rows = []
    for i in range(count):
        data = encoded[i % len(encoded)] + b"%d" % i  # decoders stop before it
        uri = f"s3://photos/{count}/{i:06d}.jpg"
        storage.put(uri, data)
        rows.append({"uri": uri, "label": "a", "sha256": hashlib.sha256(data).hexdigest()})
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{count}.parquet")


def epoch(table: Path, cache: Path) -> None:
    """One epoch over the images of a table."""
    rows = pq.read_table(table)
    samples = Images(rows, ["a"], TRANSFORM, num_threads=NUM_CPUS, seed=0, cache=ImageCache(cache))
    order = Order(len(samples), BATCH_SIZE, 0)
    for _ in samples.batches(order.batches(0, rank=0, world_size=1), epoch=0):
        pass


def cost(*command: str) -> float:
    """CPU seconds of the machine while a command runs."""
    before = cpu_s()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return cpu_s() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--epoch", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.epoch:
        epoch(*options.epoch)
        return
    few, many = FEW, FEW + options.images
    costs: dict[str, list[float]] = {"scoring": [], "first epoch": [], "second epoch": []}
    with LocalS3() as server, tempfile.TemporaryDirectory(prefix="train-host-") as temporary:
        os.environ |= server.environment("admin")
        s3.forget_clients()
        server.create_bucket("photos")
        folder = Path(temporary)
        for count in (few, many):
            upload(folder, count)
        print(
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {options.rounds} rounds", flush=True
        )
        for number in range(options.rounds):

            def train(count: int, number: int = number) -> float:
                return cost(
                    __file__, "--epoch", str(folder / f"{count}.parquet"), str(folder / f"cache-{number}-{count}")
                )

            def score(count: int, number: int = number) -> float:
                out = folder / f"out-{number}-{count}"
                return cost(str(PEERS), "ours", "mean", f"s3://photos/{count}", str(count), str(out))

            for name, way in (("scoring", score), ("first epoch", train), ("second epoch", train)):
                costs[name].append(1000 * (way(many) - way(few)) / options.images)
                print(f"  {name}: {costs[name][-1]:.2f} ms", flush=True)
    scoring = statistics.median(costs["scoring"])
    print(f"{'way':>12} {'CPU ms an image':>16} {'range':>14} {'to scoring':>11}")
    for name, values in costs.items():
        middle = statistics.median(values)
        print(f"{name:>12} {middle:>16.2f} {min(values):>6.2f}-{max(values):<7.2f} {middle / scoring:>11.2f}")


if __name__ == "__main__":
    main()
