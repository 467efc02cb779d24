"""`score --estimate`: what scoring a bucket would take and cost, by scoring a sample of it. Nothing is written."""

import logging
import time

from pydantic import BaseModel, Field

from dragonclf import session
from dragonclf.config import ScoreCommandConfig, ScoreConfig
from dragonclf.data import listing, selection
from dragonclf.engine import execute, plan, probe
from dragonclf.model import bundle
from dragonclf.verbs.score import ScoreSummary, layout_of, score, score_task

log = logging.getLogger("dragonclf")

Interval = tuple[float, float]


class Estimate(BaseModel):
    """What `score` with the same options would come to. Intervals are 95 %, of the sample: other times, other networks are not in them."""

    num_images: int
    num_bytes: int = Field(
        description="Of encoded images, to be read; where the listing gives no sizes, by the sample."
    )
    num_gets: int = Field(description="Requests for images. Listing takes one for 1,000.")
    num_workers: int
    cpus_per_worker: int
    images_per_s_per_worker: float
    images_per_s_per_worker_interval: Interval
    start_seconds: float = Field(
        description="Part of hours: all but the images. Python's start, listing, Ray, processes, the model, the end."
    )
    hours: float
    hours_interval: Interval
    cost: float | None = Field(description="Of all workers, by --price-per-worker-hour. None: it was not given.")
    cost_interval: Interval | None
    sample: dict[str, int] = Field(description="Images that were tried, by status.")
    bottleneck: str = Field(description="What the worker waited for most, and what would help.")
    execution: str = Field(description="Runtime, device and precision; with --tta, how many views of an image.")


def score_or_estimate(config: ScoreCommandConfig) -> ScoreSummary | Estimate:
    """The command line's `score`."""
    plain = ScoreConfig.model_validate(config.model_dump(exclude={"estimate"}))
    # A command has done little before this but import packages: CPU time, as a warm disk gives it.
    return estimate(plain, begun_for_s=time.process_time()) if config.estimate else score(plain)


def estimate(config: ScoreConfig, *, begun_for_s: float = 0.0) -> Estimate:
    """List what `score` would score, and score a sample of it, stratified by size, in one worker of the cluster.

    All that this takes beside the sample's images, `score` will take too; `begun_for_s` is what its caller takes before.

    Raises ValueError if there is nothing to score or --since is given (what has changed is known by reading the listing, not by a
    sample), and what `score` would.
    """
    began_s = time.monotonic() - begun_for_s
    if config.since:
        raise ValueError("--estimate is of a full run: leave out --since")
    loaded = bundle.load_bundle(config.model)
    task = score_task(config, loaded, layout=layout_of(config), embeddings=config.embeddings)
    rows = selection.select(listing.list_rows(config.source), config.source, config)
    with plan.stage_plan(rows, shard_images=config.shard_images) as staged:
        num_images = staged.summary.num_images
        log.info(
            "estimate: %s images; trying up to %s of them",
            f"{num_images:,}",
            f"{probe.NUM_CHUNKS * probe.CHUNK_IMAGES:,}",
        )
        with session.connect(config.address):
            workers, cpus = execute.fit(task, config.num_actors, config.cpus_per_actor, staged.summary.num_shards)
            found = probe.probe(task, staged, uses_gpu=task.uses_gpu, cpus=cpus)
    start_s = time.monotonic() - began_s - found.seconds

    def hours(image_s: float) -> float:
        return (start_s + num_images * image_s / workers) / 3600

    least_s, most_s = found.image_s_interval
    between = hours(least_s), hours(most_s)
    price = config.price_per_worker_hour
    return Estimate(
        num_images=num_images, num_bytes=staged.summary.num_bytes or round(found.image_bytes * num_images), num_gets=num_images,
        num_workers=workers, cpus_per_worker=cpus, images_per_s_per_worker=1 / found.image_s,
        images_per_s_per_worker_interval=(1 / most_s, 1 / max(least_s, 1e-9)), start_seconds=start_s,
        hours=hours(found.image_s), hours_interval=between,
        cost=None if price is None else hours(found.image_s) * workers * price,
        cost_interval=None if price is None else (between[0] * workers * price, between[1] * workers * price),
        sample=found.counts, bottleneck=found.busy.verdict, execution=task.how,
    )  # fmt: skip
