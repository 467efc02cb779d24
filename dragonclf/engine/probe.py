"""What one worker of a cluster makes of a sample of a plan: seconds an image, and what it waits for. Nothing is written."""

import itertools
import statistics
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import ray
import ray.exceptions
from pydantic import BaseModel, Field

from dragonclf import storage
from dragonclf.busy import Busy
from dragonclf.data import sorting
from dragonclf.engine import execute, plan
from dragonclf.engine.image_work import ImageTask
from dragonclf.engine.pipeline import Pipeline, SuspectError

CHUNK_IMAGES = 64
GROUPS = 5  # of two chunks each, as many as are under way at one time: they tend to end together
WARM_UP, RUN_OUT = 2, 2  # chunks that are done and not timed, first and last
NUM_CHUNKS = WARM_UP + execute.SHARDS_PER_ACTOR * GROUPS + RUN_OUT
MAX_S = 90.0  # after which no further chunk is begun
POOL = 20_000  # images out of which the sample is drawn by size
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}  # 97.5 % quantile, by degrees of freedom


class Probe(BaseModel):
    """How a worker fared."""

    num_images: int = Field(description="Of the sample, some perhaps more than once.")
    counts: dict[str, int] = Field(description="Of them, by status.")
    image_bytes: float = Field(description="Of an encoded image, on average.")
    image_s: float = Field(description="Seconds an image, with all overlapping.")
    image_s_interval: tuple[float, float] = Field(description="95 %, by Student's t over groups of the sample.")
    seconds: float = Field(description="That it took for the sample, once it was ready.")
    busy: Busy


def probe(task: ImageTask, staged: plan.StagedPlan, *, uses_gpu: bool, cpus: int) -> Probe:
    """Do a sample of a plan in one worker of the cluster that is joined. StorageError if its process ends, or the store fails."""
    chunks = _sample(staged)
    remote = ray.remote(num_cpus=cpus, num_gpus=1 if uses_gpu else 0, max_retries=0)(_work)
    try:
        seconds, ends, counts, warming, busy = ray.get(remote.remote(task, chunks, cpus))
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, ValueError | storage.StorageError) else error) from None
    except ray.exceptions.RayError as error:
        raise storage.StorageError(
            f"the worker process that tried a sample of the images ended: {str(error).strip().splitlines()[-1]}"
        ) from error
    image_s, interval = _rate(ends)
    return Probe(
        num_images=sum(counts.values()), counts=counts, image_bytes=(warming + busy).num_bytes / sum(counts.values()),
        image_s=image_s, image_s_interval=interval, seconds=seconds, busy=busy,
    )  # fmt: skip


def _sample(staged: plan.StagedPlan) -> list[pa.Table]:
    """Chunks of planned rows, each with the same mixture of sizes. A small plan's rows come more than once."""
    with sorting.database() as (db, _):
        files = f"{staged.folder}/{'[0-9]' * 8}.parquet"
        drawn = db.sql(
            "SELECT uri, etag, size FROM (SELECT * FROM read_parquet(?) ORDER BY hash(uri) LIMIT ?) ORDER BY size, uri",
            params=[files, POOL],
        ).to_arrow_table()
    count = NUM_CHUNKS * CHUNK_IMAGES
    picked = np.resize(np.linspace(0, len(drawn) - 1, min(count, len(drawn))).astype(int), count)
    mixed = np.random.default_rng(0)
    return [drawn.take(mixed.permutation(picked[chunk::NUM_CHUNKS])) for chunk in range(NUM_CHUNKS)]


def _work(
    task: ImageTask, chunks: list[pa.Table], num_threads: int
) -> tuple[float, list[float], dict[str, int], Busy, Busy]:
    """Seconds that it took once open; the end of each chunk, in order; rows by status; what warm-up and the rest spent their time on."""
    uris = [uri for chunk in chunks for uri in chunk["uri"].to_pylist()[:1]]
    worker = task.open(num_threads)
    pipeline = Pipeline(worker, num_threads=num_threads, limits=task.limits, elsewhere=lambda: uris)
    opened_s = time.monotonic()
    counts: Counter[str] = Counter()
    ends: list[float] = []
    warming = Busy()

    def do(chunk: pa.Table) -> None:
        nonlocal warming
        if time.monotonic() - opened_s > MAX_S and len(ends) > WARM_UP + execute.SHARDS_PER_ACTOR:
            return
        try:
            rows = pipeline.process(chunk)
        except SuspectError:
            rows = pipeline.process(chunk, isolate=True)
        ends.append(time.monotonic())
        counts.update(rows["status"].to_pylist())
        if len(ends) == WARM_UP:
            warming = pipeline.take_busy()

    with ThreadPoolExecutor(execute.SHARDS_PER_ACTOR) as pool:
        for _ in pool.map(do, chunks):
            pass
    return time.monotonic() - opened_s, sorted(ends), dict(counts), warming, pipeline.take_busy()


def _rate(ends: list[float]) -> tuple[float, tuple[float, float]]:
    """Seconds an image and their interval, of the ends of chunks between warm-up and run-out."""
    step = execute.SHARDS_PER_ACTOR
    marks = ends[WARM_UP - 1 : len(ends) - RUN_OUT + 1 : step]
    values = [(end - begin) / (step * CHUNK_IMAGES) for begin, end in itertools.pairwise(marks)]
    middle = statistics.mean(values)
    if len(values) == 1:
        return middle, (0.0, 2 * middle)
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return middle, (max(0.0, middle - half), middle + half)
