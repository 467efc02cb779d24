"""What the host pays for an image, without a model: CPU milliseconds of the whole machine, the S3 server's included.

    python benchmarks/score_host.py [--rounds 5] [--images 10000] [--only ours,plain,ray,ray-uint8,daft]

Each way (score_peers.py) scores two prefixes in processes of its own, one larger by `--images`; what the larger one costs more, divided by
that, is the marginal cost: starting Python, Ray and actors cancels out. A slow peer reads a tenth. Ways are interleaved; medians.
Needs the extras `cpu` and `demo`, and `pip install daft` for Daft. The machine must be idle otherwise.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
from score_peers import jpegs

from dragonclf import storage
from dragonclf.demo.local_s3 import LocalS3
from dragonclf.storage import s3

FEW = 500
SLOW = {"ray": 10, "ray-uint8": 10}  # divides the images of a peer that would take minutes a round
PEERS = Path(__file__).with_name("score_peers.py")


def cpu_s() -> float:
    """By the scheduler's account, where this is a control group of its own; the machine's counters sample, and miss what is short."""
    if (one := Path("/sys/fs/cgroup/cpuacct/cpuacct.usage")).exists():
        return int(one.read_text()) / 1e9
    if (two := Path("/sys/fs/cgroup/cpu.stat")).exists():
        return int(two.read_text().split()[1]) / 1e6
    times = psutil.cpu_times()
    return times.user + times.system + times.nice + times.irq + times.softirq


def cost(method: str, prefix: str, count: int) -> float:
    """CPU seconds of the machine while one way scores a prefix."""
    with tempfile.TemporaryDirectory() as folder:
        before = cpu_s()
        command = [sys.executable, str(PEERS), method, "mean", prefix, str(count), f"{folder}/out"]
        subprocess.run(command, check=True, capture_output=True)
        return cpu_s() - before


def upload(sizes: set[int]) -> None:
    encoded = list(jpegs(200))
    print(f"images of {sum(map(len, encoded)) / len(encoded) / 1000:.0f} kB on average")
    for size in sizes:
        for i in range(size):
            storage.put(f"s3://photos/{size}/{i:06d}.jpg", encoded[i % len(encoded)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--only", default="ours,plain,ray,ray-uint8,daft")
    options = parser.parse_args()
    methods = options.only.split(",")
    more = {method: options.images // SLOW.get(method, 1) for method in methods}
    costs: dict[str, list[float]] = {method: [] for method in methods}
    with LocalS3() as server:
        os.environ |= server.environment("admin")
        s3.forget_clients()
        server.create_bucket("photos")
        upload({FEW} | {FEW + count for count in more.values()})
        print(
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {options.rounds} rounds", flush=True
        )
        for _ in range(options.rounds):
            for method in methods:
                few, many = FEW, FEW + more[method]
                difference = cost(method, f"s3://photos/{many}", many) - cost(method, f"s3://photos/{few}", few)
                costs[method].append(1000 * difference / more[method])
                print(f"  {method}: {costs[method][-1]:.2f} ms", flush=True)
    ours = statistics.median(costs["ours"])
    print(f"{'way':>6} {'CPU ms an image':>16} {'range':>16} {'to ours':>8}")
    for method, values in costs.items():
        middle = statistics.median(values)
        print(f"{method:>6} {middle:>16.2f} {min(values):>8.2f}-{max(values):<7.2f} {middle / ours:>8.2f}")


if __name__ == "__main__":
    main()
