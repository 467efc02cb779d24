"""Time and peak memory of what a run does besides images, for N made-up keys. Usage: python benchmarks/plan_scale.py [N ...]

Planning, the parts (by one process in place of all actors), resuming and publication, each in a process of its own, in a local folder: with
a bucket the requests' time comes on top. Without Ray, whose own memory does not depend on N. Making the rows is part of planning.
"""

import concurrent.futures
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dragonclf.data.listing import BATCH_ROWS, SCHEMA
from dragonclf.engine import lease, plan, runs
from dragonclf.engine.layout import Layout

VERB = "score"
ETAG = "d41d8cd98f00b204e9800998ecf8427e"


def rows(num_keys: int) -> Iterator[pa.Table]:
    for start in range(0, num_keys, BATCH_ROWS):
        numbers = pa.array(range(start, min(start + BATCH_ROWS, num_keys)), pa.int64())
        names = pc.utf8_lpad(numbers.cast(pa.string()), 9, "0")  # pyright: ignore[reportAttributeAccessIssue]
        uris = pc.binary_join_element_wise("s3://photos/p/img_", names, ".jpg", "")  # pyright: ignore[reportAttributeAccessIssue]
        yield pa.table(
            [uris, pa.array([ETAG] * len(numbers)), pa.array([123456] * len(numbers), pa.int64())], schema=SCHEMA
        )


def open_run(num_keys: int, held: lease.Lease, out: str) -> runs.Run:
    return runs.open_run(out, VERB, {}, lambda: plan.stage_plan(rows(num_keys)), held=held)


def planning(num_keys: int, out: str) -> None:
    """What a driver does before its actors start: list, stage, claim the run, give it its plan."""
    with lease.Lease(runs.lease_uri(out, VERB, {})) as held:
        assert open_run(num_keys, held, out).plan.num_images == num_keys


def parts(num_keys: int, out: str) -> None:
    """What actors write, by one process: a row of two probabilities for each planned image."""
    with lease.Lease(runs.lease_uri(out, VERB, {})) as held:
        run = open_run(num_keys, held, out)
    layout = Layout()
    for shard in range(run.plan.num_shards):
        planned = plan.read_shard(run.uri, run.plan, shard)
        count = len(planned)
        probs = np.random.default_rng(shard).dirichlet((1, 1), count).astype(np.float32)
        nothing = pa.nulls(count, pa.string())
        answers = layout.answers(["cat", "dog"], probs, np.zeros(count, bool), thresholds={})
        own = {"uri": planned["uri"], "etag": planned["etag"], "status": pa.array(["ok"] * count), "error": nothing}
        runs.write_part(run, shard, pa.table(own | answers))


def resuming(num_keys: int, out: str) -> None:
    """What a driver does first when the same command comes again: find the run and what is missing of it."""
    with lease.Lease(runs.lease_uri(out, VERB, {})) as held:
        assert runs.missing_shards(open_run(num_keys, held, out)) == []


def publishing(num_keys: int, out: str) -> None:
    """What a driver does last: check every part, publish."""
    with lease.Lease(runs.lease_uri(out, VERB, {})) as held:
        run = open_run(num_keys, held, out)
        assert runs.publish(run, fence=held.fence).counts == {"ok": num_keys}


def measure(step: Callable[[int, str], None], num_keys: int, out: str) -> tuple[float, float]:
    """(seconds, peak resident MiB) of one step."""
    started = time.perf_counter()
    step(num_keys, out)
    return time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    counts = [int(value) for value in sys.argv[1:]] or [1_000_000, 3_000_000, 10_000_000]
    print(f"{os.cpu_count()} CPUs")
    print(f"{'keys':>11} {'shards':>7} {'step':>11} {'seconds':>8} {'peak MiB':>9}")
    for num_keys in counts:
        with tempfile.TemporaryDirectory() as out:
            for step in (planning, parts, resuming, publishing):
                spawn = multiprocessing.get_context("spawn")
                with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as child:
                    took, peak = child.submit(measure, step, num_keys, out).result()
                num_shards = len(list(Path(out).glob("runs/*/plan/*/[0-9]*.parquet")))
                print(f"{num_keys:>11,} {num_shards:>7,} {step.__name__:>11} {took:>8.1f} {peak:>9.0f}", flush=True)


if __name__ == "__main__":
    main()
