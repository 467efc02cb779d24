"""`score --estimate` beside the run that follows, and `rescore` beside `score`: whole commands, on elpv's photographs.

    python benchmarks/estimate.py --model demo-run/model [--rounds 3] [--copies 8]

Estimate: 2,624 photographs (PNG, 300 x 300) in a local S3 server; the ratio is the seconds that it told to those that the command took.
Rescore: each photograph `--copies` times, scored once with --embeddings, then rescored by the same model in each round. Needs the extras
`cpu` and `demo`; the machine must be idle otherwise.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

from score_model import photographs

from dragonclf import storage
from dragonclf.demo.local_s3 import LocalS3
from dragonclf.storage import s3


def command(*arguments: str) -> tuple[float, dict]:
    """Seconds of a command, and its result."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "dragonclf", *arguments, "--json"], check=True, capture_output=True, text=True
    )
    return time.perf_counter() - started, json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=8)
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {options.rounds} rounds", flush=True)
    with LocalS3() as server:
        os.environ |= server.environment("admin")
        s3.forget_clients()
        server.create_bucket("photos")
        server.create_bucket("work")
        encoded = photographs()
        for copy in range(options.copies):
            for i, data in enumerate(encoded):
                storage.put(f"s3://photos/{copy}/{i:06d}.png", data)
        ratios = []
        for number in range(options.rounds):
            score = ["score", options.model, "s3://photos/0", "--out", f"s3://work/{number}"]
            _, told = command(*score, "--estimate")
            took_s, done = command(*score)
            told_s, between = 3600 * told["hours"], [3600 * hours for hours in told["hours_interval"]]
            ratios.append(told_s / took_s)
            print(
                f"  told {told_s:.1f} s ({between[0]:.1f} to {between[1]:.1f}), took {took_s:.1f} s: {ratios[-1]:.2f}; "
                f"{told['images_per_s_per_worker']:.1f} images/s told, {done['images_per_s']:.1f} with the start of the workers",
                flush=True,
            )
        print(f"estimate to run: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        score_s, done = command("score", options.model, "s3://photos", "--out", "s3://work/all", "--embeddings")
        rescored = [
            command("rescore", options.model, "s3://work/all", "--out", f"s3://work/again-{number}")[0]
            for number in range(options.rounds)
        ]
        middle = statistics.median(rescored)
        print(
            f"{done['num_images']:,} images: score {score_s:.1f} s, rescore {middle:.1f} s: {score_s / middle:.1f} times"
        )


if __name__ == "__main__":
    main()
