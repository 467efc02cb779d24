"""`score`: every object under a prefix, or in a manifest, becomes one row of probabilities."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, Field

from dragonclf import session, storage
from dragonclf.config import LayoutConfig, ScoreConfig, ScoringConfig
from dragonclf.data import listing, selection
from dragonclf.engine import inference, job, plan, runs
from dragonclf.engine.budget import Budget
from dragonclf.engine.layout import Layout
from dragonclf.engine.pipeline import Limits
from dragonclf.model import bundle, precision, tta, zoo
from dragonclf.model.execution import resolve_execution

log = logging.getLogger("dragonclf")


class ScoreSummary(BaseModel):
    """What a scoring run came to."""

    run: str = Field(description="URI of the published run.")
    parts: str = Field(description="URI of the folder of its Parquet files.")
    num_images: int
    counts: dict[str, int] = Field(description="Rows by status; their sum is num_images.")
    num_kept: int = Field(description="Rows kept of an earlier run: these images were not read.")
    num_deleted: int = Field(description="Images of that run that are no longer there; RUN/deleted.parquet names them.")
    model_version: str
    execution: str = Field(description="Runtime, device and precision; with --tta, how many views of an image.")
    images_per_s: float | None = Field(
        description="Of this call's images, the start of its actors included. None: nothing was to do."
    )
    bottleneck: str | None = Field(
        description="What the workers waited for most, and what would help. None: they read nothing."
    )


def score(config: ScoreConfig) -> ScoreSummary:
    """Score all of `config.source`, or what its filters choose, into `config.out`: one row per object, whatever it is.

    The same command again resumes a killed run, and does nothing if the input is as the last published run saw it. Raises what
    `job.run` does; a run that stops so can be resumed.
    """
    loaded = bundle.load_bundle(config.model)
    return score_rows(
        config,
        loaded,
        verb="score",
        input_id={"source": config.source} | selection.selection_id(config),
        rows=lambda: selection.select(listing.list_rows(config.source), config.source, config),
        since=config.since,
        budget=Budget(config),
        embeddings=config.embeddings,
        layout=layout_of(config),
    )


def score_rows(
    config: ScoringConfig,
    loaded: bundle.Bundle,
    *,
    verb: str,
    input_id: dict[str, Any],
    rows: Callable[[], Iterable[pa.Table]],
    layout: Layout,
    embeddings: bool = False,
    since: str | None = None,
    budget: Budget | None = None,
) -> ScoreSummary:
    """Score the planned `rows` with a loaded bundle under `config.out`; `input_id` tells their origin in the run's spec."""
    task = score_task(config, loaded, layout=layout, embeddings=embeddings)
    log.info("%s: model %s by %s", verb, loaded.version, task.how)
    done = job.run(
        config.out, verb, spec_of(task, loaded, input_id), lambda: plan.stage_plan(rows(), shard_images=config.shard_images),
        task, ray_config=config, run_config=config, retry_errors=config.retry_errors, since=since, budget=budget,
    )  # fmt: skip
    return summarize(done, loaded, task.how)


def score_task(
    config: ScoringConfig, loaded: bundle.Bundle, *, layout: Layout, embeddings: bool
) -> inference.ScoreTask:
    """What each worker is to do. ValueError for options that do not fit the model or the cluster."""
    layout.check(loaded.info.classes, thresholds=loaded.info.thresholds, embeddings=embeddings)
    f32 = resolve_execution(config.runtime, config.device, "f32", has_gpu=session.has_gpu(config.address))
    execution = precision.choose(loaded.uri, loaded.version, f32, config.precision)
    if embeddings and execution.precision != "f32":
        raise ValueError(
            f"--embeddings are kept in f32 only, and the precision is {execution.precision}: use --precision f32"
        )
    limits = Limits(config.max_image_bytes, config.max_pixels, config.max_image_s)
    return inference.ScoreTask(
        execution, config.batch_size, limits, loaded.uri, loaded.version, embeddings, layout, config.tta
    )


def spec_of(task: inference.ScoreTask, loaded: bundle.Bundle, input_id: dict[str, Any]) -> dict[str, Any]:
    """All that a run's rows depend on. How views are varied, and a model's own thresholds, are in its version."""
    spec = {
        "model": loaded.version, "transform": loaded.info.transform.digest, "execution": task.execution.model_dump(),
        "max_image_bytes": task.limits.max_bytes, "max_pixels": task.limits.max_pixels, runs.INPUT: input_id,
        "embeddings": zoo.backbone_digest(loaded.model) if task.embeddings else None, "layout": task.layout.model_dump(mode="json"),
    }  # fmt: skip
    return spec | ({"tta": {"num_views": task.num_views, "beta": tta.BETA}} if task.num_views else {})


def layout_of(config: LayoutConfig) -> Layout:
    columns = tuple(name.strip() for name in config.columns.split(",")) if config.columns else None
    return Layout(threshold=config.threshold, top_k=config.top_k, columns=columns)


def summarize(done: job.Outcome, loaded: bundle.Bundle, execution: str) -> ScoreSummary:
    """What a published run of scored rows came to."""
    manifest = done.manifest
    return ScoreSummary(
        run=done.uri, parts=storage.join(done.uri, "parts"), num_images=manifest.num_images, counts=manifest.counts,
        num_kept=manifest.num_kept, num_deleted=manifest.num_deleted, model_version=loaded.version, execution=execution,
        images_per_s=done.images_per_s, bottleneck=done.bottleneck,
    )  # fmt: skip
