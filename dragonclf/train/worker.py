"""What Ray Train starts on every worker: build data and model from a small job description, then run the loop."""

import functools
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from pydantic import BaseModel
from timm.layers import convert_sync_batchnorm  # pyright: ignore[reportPrivateImportUsage]
from torch import nn

from dragonclf import storage
from dragonclf.data.snapshot import Snapshot
from dragonclf.data.transforms import Transform
from dragonclf.model import zoo
from dragonclf.model.predictor import Network
from dragonclf.train import loop, lr_find
from dragonclf.train.cache import ImageCache, user_folder
from dragonclf.train.data import Features, Images, Samples
from dragonclf.train.head import Head
from dragonclf.train.recipe import Recipe


class TrainJob(BaseModel):
    """All that a worker needs to know. Small: weights and images are read from where they are."""

    run_uri: str
    snapshot: Snapshot
    features_uri: str | None  # published run of features; None trains every layer on images
    views_uri: str | None  # published run of features of augmented views
    arch: str
    pretrained: str
    backbone_digest: str
    transform: Transform
    recipe: Recipe
    regularization: dict[str, float]  # of the architecture, as timm names it
    find_lr: bool
    train: bool = True  # else the sweep is all
    num_threads: int
    cache: bool
    cache_dir: str | None  # on every node


def train_worker(job_json: dict[str, str]) -> None:
    """Ray Train's entry point."""
    job = TrainJob.model_validate_json(job_json["job"])
    torch.set_num_threads(job.num_threads)
    context = ray.train.get_context()
    model, train, valid = (_images_job if job.features_uri is None else _features_job)(job)
    here: dict[str, Any] = {
        "run_uri": job.run_uri,
        "rank": context.get_world_rank(),
        "world_size": context.get_world_size(),
        "device": ray.train.torch.get_device(),
        "wrap": functools.partial(ray.train.torch.prepare_model, move_to_device=False),
    }
    recipe = job.recipe
    if job.find_lr:
        recipe = recipe.model_copy(update={"lr": lr_find.find(model, train, recipe, **here)})
    if job.train:
        loop.fit(model, train, valid, recipe, report=ray.train.report, **here)


def load_backbone(job: TrainJob) -> nn.Module:
    """The pretrained model with a new head. ValueError if this node's weights are not the driver's."""
    model = zoo.load_pretrained(job.arch, job.pretrained, job.regularization)
    if zoo.backbone_digest(model) != job.backbone_digest:
        raise ValueError(
            f"the weights of {job.arch} from {job.pretrained} differ between this node and the driver: install the same"
        )
    return zoo.with_new_head(model, len(job.snapshot.info.classes))


def _features_job(job: TrainJob) -> tuple[nn.Module, Samples, Samples]:
    assert job.features_uri is not None
    classes = job.snapshot.info.classes
    train = Features(job.features_uri, classes, "train", views_uri=job.views_uri)
    valid = Features(job.features_uri, classes, "valid")
    return Head(train.features.flatten(0, 1), len(classes)), train, valid


def _images_job(job: TrainJob) -> tuple[nn.Module, Samples, Samples]:
    model = load_backbone(job)
    if job.recipe.batch_norm == "sync":
        model = convert_sync_batchnorm(model)
    cache = ImageCache(Path(job.cache_dir) if job.cache_dir else user_folder()) if job.cache else None
    opened = functools.partial(
        Images.of_split, job.snapshot, transform=job.transform, num_threads=job.num_threads, cache=cache
    )
    size_at = functools.partial(job.recipe.size_at, size=job.transform.size)
    train: Samples = opened("train", seed=job.recipe.seed, augment=job.recipe.augment, size_at=size_at)
    if ray.train.get_context().get_world_rank() == 0:
        from dragonclf.train import pictures  # with matplotlib and torchmetrics: a second, which only this one needs

        uri = storage.join(job.run_uri, pictures.BATCH)
        train = pictures.FirstBatch(train, job.snapshot.info.classes, uri)
    return Network(model, job.transform), train, opened("valid")
