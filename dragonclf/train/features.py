"""Features of a frozen backbone: computed by the engine, once for each image, and kept for the trainings and snapshots to come.

OUT/features/ARCH-HASH/runs/...     a run for each snapshot; HASH tells backbone, transform, execution and views

A run keeps the rows of the newest one beside it, whatever its snapshot, for images of the same uri and etag, and reads the others.
"""

import hashlib
import json
import logging

from dragonclf import storage
from dragonclf.config import MAX_IMAGE_BYTES, MAX_IMAGE_S, MAX_PIXELS, TrainConfig
from dragonclf.data.snapshot import Snapshot, read_rows
from dragonclf.data.transforms import Transform
from dragonclf.engine import inference, job, plan, published, runs
from dragonclf.engine.pipeline import Limits
from dragonclf.model.execution import Execution

log = logging.getLogger("dragonclf")

COLUMNS = ["uri", "etag", "size", "label", "split"]


def compute(
    config: TrainConfig,
    snapshot: Snapshot,
    *,
    execution: Execution,
    pretrained: str,
    digest: str,
    transform: Transform,
    views: inference.Views | None = None,
) -> str:
    """URI of the published run with the features of all training and validation images, or of `views` of the training images.

    It is made, resumed, or there already. `digest` is the backbone's, which the weights `pretrained` must have in each actor. Raises what
    `job.run` does.
    """
    task = inference.FeatureTask(
        execution, config.batch_size, Limits(MAX_IMAGE_BYTES, MAX_PIXELS, MAX_IMAGE_S), config.arch, pretrained, digest, transform, views,
    )  # fmt: skip
    done_to_images = {"backbone": digest, "transform": transform.digest, "execution": execution.model_dump()}
    if views:
        done_to_images["views"] = views.model_dump()
    name = hashlib.sha256(json.dumps(done_to_images, sort_keys=True).encode()).hexdigest()[:8]
    out = storage.join(config.out, "features", f"{config.arch}-{name}")
    spec = done_to_images | {runs.INPUT: snapshot.info.id}

    def stage() -> plan.StagedPlan:
        rows = read_rows(snapshot, splits=["train"] if views else ["train", "valid"], columns=COLUMNS)
        return plan.stage_plan(rows, shard_images=config.shard_images)

    of_what = f" of {views.count} views" if views else ""
    log.info("features%s: frozen %s by %s", of_what, config.arch, execution)
    # Errors may have been met before there was any view.
    retry_errors = config.retry_errors and (views is None or runs.has_run(out, "features", spec))
    done = job.run(
        out, "features", spec, stage, task, ray_config=config, run_config=config, retry_errors=retry_errors,
        since=None if config.new_run else _newest(out),
    )  # fmt: skip
    found = done.manifest
    if found.num_kept and done.images_per_s is not None:
        log.info(
            "features%s: %s of %s images kept of run %s", of_what, f"{found.num_kept:,}", f"{found.num_images:,}", found.base
        )  # fmt: skip
    return done.uri


def _newest(out: str) -> str | None:
    """Name of the newest published run, which may be another snapshot's. None where there is none, or it was deleted."""
    uri = published.find_latest(out)
    if uri is None or storage.stat(storage.join(uri, published.MANIFEST)) is None:
        return None
    return storage.name(uri)
