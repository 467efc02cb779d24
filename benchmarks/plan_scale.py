"""Time and peak memory of planning: one listing of N made-up keys through `stage_plan`. Usage: python benchmarks/plan_scale.py [N ...]

Each N runs in a process of its own. Making the rows is timed alone and taken off.
"""

import concurrent.futures
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from dragonclf.data.listing import BATCH_ROWS, SCHEMA
from dragonclf.engine import plan

ETAG = "d41d8cd98f00b204e9800998ecf8427e"


def rows(num_keys: int) -> Iterator[pa.Table]:
    for start in range(0, num_keys, BATCH_ROWS):
        numbers = pa.array(range(start, min(start + BATCH_ROWS, num_keys)), pa.int64())
        names = pc.utf8_lpad(numbers.cast(pa.string()), 9, "0")  # pyright: ignore[reportAttributeAccessIssue]
        uris = pc.binary_join_element_wise("s3://photos/p/img_", names, ".jpg", "")  # pyright: ignore[reportAttributeAccessIssue]
        yield pa.table(
            [uris, pa.array([ETAG] * len(numbers)), pa.array([123456] * len(numbers), pa.int64())], schema=SCHEMA
        )


def measure(num_keys: int) -> tuple[float, float, int]:
    """(seconds, peak resident MiB, shards) of one plan."""
    started = time.perf_counter()
    for _ in rows(num_keys):
        pass
    made = time.perf_counter()
    with plan.stage_plan(rows(num_keys)) as staged:
        took = time.perf_counter() - made - (made - started)
        assert staged.summary.num_images == num_keys
        num_shards = staged.summary.num_shards
    return took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, num_shards


def main() -> None:
    counts = [int(value) for value in sys.argv[1:]] or [1_000_000, 3_000_000, 10_000_000]
    print(f"{os.cpu_count()} CPUs")
    print(f"{'keys':>11} {'seconds':>8} {'peak MiB':>9} {'shards':>7}")
    for num_keys in counts:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as child:
            took, peak, num_shards = child.submit(measure, num_keys).result()
        print(f"{num_keys:>11,} {took:>8.1f} {peak:>9.0f} {num_shards:>7,}", flush=True)


if __name__ == "__main__":
    main()
