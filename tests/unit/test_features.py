"""Features of images that were seen before are copied for a new snapshot; views are what training would see, and come again."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dragonclf import storage
from dragonclf.config import MAX_IMAGE_BYTES, MAX_PIXELS
from dragonclf.data import images
from dragonclf.data.augment import Augment
from dragonclf.engine import inference, lease, plan, published, reuse, runs
from dragonclf.engine.pipeline import Limits, Pipeline
from dragonclf.model import zoo
from dragonclf.model.execution import Execution
from dragonclf.model.predictor import Predictor
from tests.conftest import encoded

ARCH, SIZE = "test_resnet", 64
F32 = Execution(runtime="torch", device="cpu", precision="f32")
MODEL = zoo.load_pretrained(ARCH, "none")
TRANSFORM = zoo.transform_for(MODEL, size=SIZE)
TASK = inference.FeatureTask(
    F32, 4, Limits(MAX_IMAGE_BYTES, MAX_PIXELS, 60), ARCH, "none", zoo.backbone_digest(MODEL), TRANSFORM
)


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    """Six images."""
    uris = [f"{tmp_path}/{i}.jpg" for i in range(6)]
    for i, uri in enumerate(uris):
        Path(uri).write_bytes(encoded(seed=i, size=(90, 70)))
    return uris


def listed(uris: list[str]) -> Callable[[], plan.StagedPlan]:
    found = [storage.stat(uri) for uri in uris]
    table = pa.table(
        {
            "uri": uris, "etag": [info.etag if info else "gone" for info in found],
            "size": pa.array([info.size if info else 1 for info in found], pa.int64()),
            "label": ["a"] * len(uris), "split": ["train"] * len(uris),
        }
    )  # fmt: skip
    return lambda: plan.stage_plan([table], shard_images=2)


def computed(
    out: str,
    snapshot: str,
    stage: Callable[[], plan.StagedPlan],
    *,
    since: str | None,
    task: inference.FeatureTask = TASK,
) -> tuple[published.Manifest, pa.Table]:
    """A published run, as `job.run` makes it, and its rows."""
    spec = {"backbone": task.digest, runs.INPUT: snapshot}
    with lease.Lease(runs.lease_uri(out, "features", spec)) as held:
        run = runs.open_run(out, "features", spec, stage, held=held, since=since)
    pipeline = Pipeline(task.open(1), num_threads=1, limits=task.limits)

    def process(rows: pa.Table) -> pa.Table:
        return reuse.with_input(pipeline.process(rows), rows)

    earlier = reuse.EarlierRows(run.base, same_plan=False) if run.base else None
    for shard in runs.missing_shards(run):
        planned = plan.read_shard(run.uri, run.plan, shard)
        table, num_kept = earlier.complete(shard, planned, process) if earlier else (process(planned), 0)
        runs.write_part(run, shard, table, num_kept=num_kept)
    manifest = runs.publish(run, fence=1)
    published.point_to(out, manifest)
    return manifest, pa.concat_tables(published.read_parts(run.uri))


def features_of(table: pa.Table) -> np.ndarray:
    column = table["features"].combine_chunks()
    return column.flatten().to_numpy().reshape(-1, column.type.list_size)


def test_a_new_snapshot_reads_new_and_replaced_images_only(photos: list[str], tmp_path: Path):
    out = f"{tmp_path}/features"
    first, before = computed(out, "one", listed(photos[:5]), since=None)
    assert (first.num_kept, first.counts) == (0, {"ok": 5})
    model = Predictor(MODEL, TRANSFORM, F32, batch_size=4)
    pixels = [TRANSFORM.for_eval(images.decode(storage.get(uri), min_side=TRANSFORM.min_side)) for uri in photos]
    expected = np.concatenate([model(image.numpy()[None])[1] for image in pixels])
    np.testing.assert_allclose(features_of(before), expected[:5], atol=1e-5, rtol=1e-5)

    Path(photos[1]).write_bytes(encoded(seed=100, size=(90, 70)))
    stage = listed(photos)
    for kept in (0, 2, 3, 4):
        Path(photos[kept]).unlink()  # whoever asked for it would get a row `missing`
    second, after = computed(out, "two", stage, since=first.run)
    assert (second.base, second.num_kept, second.counts) == (first.run, 4, {"ok": 6})
    assert after["uri"].to_pylist() == photos
    assert after["split"].to_pylist() == ["train"] * 6
    same = (features_of(after)[:5] == features_of(before)).all(axis=1)
    assert same.tolist() == [True, False, True, True, True]
    np.testing.assert_allclose(features_of(after)[5], expected[5], atol=1e-5, rtol=1e-5)


def test_a_new_image_that_is_lost_is_a_row_among_those_that_are_kept(photos: list[str], tmp_path: Path):
    out = f"{tmp_path}/features"
    first, before = computed(out, "one", listed(photos[:3]), since=None)
    stage = listed(photos[:4])
    Path(photos[3]).unlink()
    second, after = computed(out, "two", stage, since=first.run)
    assert (second.num_kept, second.counts) == (3, {"ok": 3, "missing": 1})
    np.testing.assert_array_equal(features_of(after)[:3], features_of(before))


VIEWS = inference.Views(count=3, seed=5, augment=Augment(crop_scale=0.5, flips="both", policy="trivial", erase=0.3))


def of_views(out: str, uris: list[str], views: inference.Views) -> np.ndarray:
    """float32 (N, V, F)."""
    task = dataclasses.replace(TASK, views=views)
    _, rows = computed(out, "one", listed(uris), since=None, task=task)
    return features_of(rows).reshape(len(uris), views.count, -1)


def test_views_are_those_of_training_and_a_function_of_seed_view_and_content(photos: list[str], tmp_path: Path):
    uris = photos[:5]  # of batches of 4
    found = of_views(f"{tmp_path}/a", uris, VIEWS)
    model = Predictor(MODEL, TRANSFORM, F32, batch_size=1)
    for row, uri in zip(found, uris, strict=True):
        data = storage.get(uri)
        image = images.decode(data, min_side=TRANSFORM.min_side)
        content = int(hashlib.sha256(data).hexdigest()[:16], 16)
        drawn = [
            TRANSFORM.for_train(image, seed=5, epoch=view, sample=content, augment=VIEWS.augment) for view in range(3)
        ]
        expected = np.concatenate([model(view.numpy()[None])[1] for view in drawn])
        np.testing.assert_allclose(row, expected, atol=1e-5, rtol=1e-5)

    moved = [f"{tmp_path}/moved-{i}.jpg" for i in range(5)]
    for old, new in zip(reversed(uris), moved, strict=True):
        Path(old).rename(new)
    np.testing.assert_allclose(of_views(f"{tmp_path}/b", moved, VIEWS), found[::-1], atol=1e-5, rtol=1e-5)
    other = of_views(f"{tmp_path}/c", moved, VIEWS.model_copy(update={"seed": 6}))[::-1]
    centre = features_of(computed(f"{tmp_path}/d", "one", listed(moved), since=None)[1])[::-1]
    distinct = np.concatenate([centre[:, None], found, other], axis=1)  # (N, 7, F)
    for row in distinct:
        assert len(np.unique(row.round(4), axis=0)) == 7
