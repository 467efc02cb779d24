"""Which training needs processes of its own, and what one in this process leaves behind."""

from typing import Any

import pytest
import ray.train
import torch

from dragonclf.config import TrainConfig
from dragonclf.data.snapshot import Snapshot
from dragonclf.model import zoo
from dragonclf.train import worker
from dragonclf.verbs import train_workers
from tests.unit.test_learner import INFO


def job(features_uri: str | None = "/features") -> worker.TrainJob:
    recipe = train_workers.recipe(TrainConfig(data="/data", arch="resnet18", out="/out"))
    transform = zoo.transform_for(zoo.load_pretrained("resnet18", "none"), size=64)
    return worker.TrainJob(
        run_uri="/run", snapshot=Snapshot(uri="/data/snapshots/0", info=INFO), features_uri=features_uri, views_uri=None, arch="resnet18",
        pretrained="none", backbone_digest="", transform=transform, recipe=recipe,
        regularization={}, find_lr=False, num_threads=1, cache=False, cache_dir=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "features_uri", "use_gpu", "expected"),
    [
        ({}, "/features", False, True),
        ({}, "/features", True, False),
        ({}, None, False, False),  # every layer: memory and threads as ON_CPUS has them
        ({"num_workers": 2}, "/features", False, False),
        ({"address": "auto"}, "/features", False, False),  # a cluster's driver may be a small machine
    ],
)
def test_a_head_on_this_machine_needs_none(
    options: dict[str, Any], features_uri: str | None, use_gpu: bool, expected: bool
):
    config = TrainConfig.model_validate({"data": "/data", "arch": "resnet18", "out": "/out"} | options)
    assert train_workers._fits_here(config, job(features_uri), use_gpu=use_gpu) is expected


def test_training_in_this_process_leaves_torch_as_it_was(monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, Any] = {}

    def train_worker(given: dict[str, str]) -> None:
        context = ray.train.get_context()
        seen.update(given, rank=context.get_world_rank(), world_size=context.get_world_size())
        torch.manual_seed(7)
        torch.set_num_threads(torch.get_num_threads() + 1)
        ray.train.report({"train_loss": 0.5})
        raise ValueError("the loss is nan in epoch 2: lower --lr")

    monkeypatch.setattr(worker, "train_worker", train_worker)
    num_threads, state = torch.get_num_threads(), torch.get_rng_state()
    with pytest.raises(
        ValueError, match="the loss is nan in epoch 2: lower --lr"
    ):  # as the worker said it, and at once
        train_workers._run_here(job())
    assert (seen["job"], seen["rank"], seen["world_size"]) == (job().model_dump_json(), 0, 1)
    assert torch.get_num_threads() == num_threads
    assert torch.equal(torch.get_rng_state(), state)
