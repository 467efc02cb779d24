"""Test-time augmentation: fastai's mixture of the centre and views that follow from an image's bytes alone."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from pydantic import ValidationError

from dragonclf.config import MAX_IMAGE_BYTES, MAX_PIXELS, PredictConfig, ScoreConfig
from dragonclf.data.augment import Augment
from dragonclf.data.images import decode
from dragonclf.engine.inference import ScoreTask, ScoreWorker
from dragonclf.engine.layout import Layout
from dragonclf.engine.pipeline import Limits, Pipeline
from dragonclf.model import bundle, canaries, tta, zoo
from dragonclf.model.execution import Execution
from dragonclf.model.predictor import softmax
from dragonclf.verbs.predict import predict, predict_images
from dragonclf.verbs.score import spec_of
from tests.conftest import encoded

ARCH, SIZE = "test_resnet", 64
TORCH, OPENVINO = (
    Execution.model_validate({"runtime": runtime, "device": "cpu", "precision": "f32"}) for runtime in ("torch", "openvino")
)  # fmt: skip
TRAINED = {"crop_scale": 0.5, "flips": "both", "policy": "trivial", "erase": 0.3}
LIMITS = Limits(MAX_IMAGE_BYTES, MAX_PIXELS, 60)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bundle.Bundle:
    """A model whose probabilities differ between views, trained with another augmentation than the usual one."""
    torch.manual_seed(0)
    model = timm.create_model(ARCH, pretrained=False, num_classes=3)
    torch.nn.init.normal_(zoo.classifier(model).weight, std=2)
    return bundle.save_bundle(
        str(tmp_path_factory.mktemp("model")), model, arch=ARCH, classes=["a", "b", "c"],
        transform=zoo.transform_for(model, size=SIZE), canaries=canaries.synthetic(), pretrained="none", snapshot="", metrics={},
        config={"lr": 0.01, **TRAINED},
    )  # fmt: skip


def write_images(folder: Path, count: int) -> list[str]:
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(encoded(size=(90 + i, 70), colour=(30 * i % 256, 90, 200), seed=i))
    return [f"{folder}/{i}.jpg" for i in range(count)]


def open_worker(
    loaded: bundle.Bundle, execution: Execution, *, num_views: int, batch_size: int, num_threads: int = 1
) -> ScoreWorker:
    task = ScoreTask(execution, batch_size, LIMITS, loaded.uri, loaded.version, False, Layout(), num_views)
    return task.open(num_threads)


def score(worker: ScoreWorker, uris: list[str]) -> dict[str, dict[str, Any]]:
    """Rows by uri."""
    planned = {"uri": uris, "etag": pa.nulls(len(uris), pa.string()), "size": pa.nulls(len(uris), pa.int64())}
    rows = Pipeline(worker, num_threads=2, limits=LIMITS).process(pa.table(planned)).to_pylist()
    assert [row["uri"] for row in rows] == uris
    return {row["uri"]: row for row in rows}


def probs_of(row: dict[str, Any]) -> list[float]:
    return [row[f"prob_{name}"] for name in "abc"]


def test_fastais_mixture_by_hand():
    probs = np.array([[[0.8, 0.2], [0.4, 0.6], [0.2, 0.8]], [[1, 0], [1, 0], [0, 1]]], np.float32)
    found = tta.mixed(probs)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[0.25 * 0.8 + 0.75 * 0.3, 0.25 * 0.2 + 0.75 * 0.7], [0.625, 0.375]], atol=1e-7)


@pytest.mark.parametrize(
    ("num_views", "batch_size", "images"), [(4, 32, 6), (4, 5, 1), (2, 2, 1), (3, 1, 1), (1, 3, 1)]
)
def test_rows_are_the_mixture_of_a_predictor_on_views_made_by_hand(
    made: bundle.Bundle, num_views: int, batch_size: int, images: int, tmp_path: Path
):
    uris = write_images(tmp_path, 8)
    worker = open_worker(made, TORCH, num_views=num_views, batch_size=batch_size)
    assert worker.batch_size == images
    assert worker.new_batch().shape == (images, 1 + num_views, 3, SIZE, SIZE)
    rows = score(worker, uris)
    predictor = bundle.open_predictor(made, TORCH, batch_size=1)
    transform, augment, moved = made.info.transform, Augment.model_validate(TRAINED), []
    for uri in uris:
        data = Path(uri).read_bytes()
        image, seed = decode(data, min_side=transform.min_side), int.from_bytes(hashlib.sha256(data).digest(), "big")
        views = [transform.varied(image, np.random.default_rng((seed, i)), augment) for i in range(num_views)]
        centre, *others = (softmax(predictor(v.numpy()[None])[0])[0] for v in [transform.for_eval(image), *views])
        wanted = 0.25 * centre + 0.75 * np.mean(others, axis=0)
        np.testing.assert_allclose(probs_of(rows[uri]), wanted, atol=1e-5)
        moved.append(np.abs(wanted - centre).max())
    assert max(moved) > 1e-3, "the views count"


def test_no_views_are_the_predictors_own_probabilities(made: bundle.Bundle, tmp_path: Path):
    [uri] = write_images(tmp_path, 1)
    worker = open_worker(made, TORCH, num_views=0, batch_size=4)
    transform = made.info.transform
    pixels = transform.new_batch(4)
    pixels[0] = transform.for_eval(decode(Path(uri).read_bytes(), min_side=transform.min_side)).numpy()
    wanted = softmax(bundle.open_predictor(made, TORCH, batch_size=4)(pixels)[0])[0]
    np.testing.assert_array_equal(np.array(probs_of(score(worker, [uri])[uri]), np.float32), wanted)


def test_views_follow_from_the_bytes_alone(made: bundle.Bundle):
    one, other = encoded(size=(90, 70), seed=1), encoded(size=(90, 70), seed=2)
    image = decode(one)
    predictors = [tta.open_predictor(made, TORCH, num_views=n, batch_size=8) for n in (3, 5)]
    few, many = (predictor.views(one, image) for predictor in predictors)
    np.testing.assert_array_equal(few, many[:4])
    assert len({view.tobytes() for view in many}) == 6
    np.testing.assert_array_equal(few[0], made.info.transform.for_eval(image).numpy())
    # As an isolated decoder gives it, in memory plane by plane.
    np.testing.assert_array_equal(few, predictors[0].views(one, image.contiguous()))
    assert (predictors[0].views(other, image)[1:] != few[1:]).any()


def test_bits_depend_on_no_batch_order_neighbour_or_thread(made: bundle.Bundle, tmp_path: Path):
    uris = write_images(tmp_path, 11)
    (tmp_path / "copy.jpg").write_bytes((tmp_path / "3.jpg").read_bytes())
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    copy, broken = f"{tmp_path}/copy.jpg", f"{tmp_path}/broken.jpg"
    rows = score(open_worker(made, OPENVINO, num_views=2, batch_size=9), [*uris, copy, broken])
    assert rows[broken]["status"] == "unreadable"
    assert probs_of(rows[broken]) == [None] * 3
    assert probs_of(rows[copy]) == probs_of(rows[uris[3]])
    assert sum(probs_of(rows[copy])) == pytest.approx(1, abs=1e-6)
    for batch_size, num_threads in ((9, 2), (4, 1), (32, 2)):
        worker = open_worker(made, OPENVINO, num_views=2, batch_size=batch_size, num_threads=num_threads)
        again = score(worker, [broken, *uris[::-1]])
        assert {uri: probs_of(again[uri]) for uri in uris} == {uri: probs_of(rows[uri]) for uri in uris}


def test_predict_says_exactly_what_score_does(made: bundle.Bundle, tmp_path: Path):
    uris = write_images(tmp_path, 5)
    limits = PredictConfig(model=made.uri, images=uris, tta=3, runtime="openvino")
    rows = score(open_worker(made, OPENVINO, num_views=3, batch_size=limits.batch_size), uris)
    for told in predict(limits).predictions:
        assert told.uri is not None
        assert list(told.probs.values()) == probs_of(rows[told.uri])
        assert (told.label, told.confidence) == (rows[told.uri]["label"], rows[told.uri]["confidence"])
    # By torch an image's result may depend on the size of the batch; in batches of one size it is the same too.
    predictor = tta.open_predictor(made, TORCH, num_views=3, batch_size=8)
    rows = score(open_worker(made, TORCH, num_views=3, batch_size=8), uris)
    for told in predict_images(predictor, made.info, uris, limits):
        assert told.uri is not None
        assert list(told.probs.values()) == probs_of(rows[told.uri])


def test_predict_abstains_as_score_does(made: bundle.Bundle, tmp_path: Path):
    uris, broken = write_images(tmp_path, 5), f"{tmp_path}/broken.jpg"
    Path(broken).write_bytes(b"")
    rows = list(score(open_worker(made, OPENVINO, num_views=0, batch_size=8), uris).values())
    own = dict.fromkeys("abc", 2.0) | {rows[0]["label"]: rows[0]["confidence"]}
    strict = bundle.save_bundle(
        f"{tmp_path}/strict", made.model, arch=ARCH, classes=made.info.classes, transform=made.info.transform,
        canaries=canaries.synthetic(), pretrained="none", snapshot="", metrics={}, config={}, thresholds=own,
    )  # fmt: skip
    wanted = [row["confidence"] < own[row["label"]] for row in rows] + [None]
    assert wanted[0] is False, "it is its own threshold"
    scored = score(open_worker(strict, OPENVINO, num_views=0, batch_size=8), [*uris, broken])
    assert [row["abstain"] for row in scored.values()] == wanted
    told = predict(PredictConfig(model=strict.uri, images=[*uris, broken], runtime="openvino"))
    assert [row.abstain for row in told.predictions] == wanted
    assert [row.abstain for row in predict(PredictConfig(model=made.uri, images=uris)).predictions] == [None] * 5


def test_a_model_that_says_nothing_of_its_training_has_the_usual_views(made: bundle.Bundle):
    assert made.info.augment == Augment.model_validate(TRAINED)
    assert made.info.model_copy(update={"config": {"lr": 0.1}}).augment == Augment()


def test_a_head_that_was_trained_on_features_sees_the_centre_and_its_mirror(made: bundle.Bundle):
    info = made.info.model_copy(update={"config": {"precompute": True, "crop_scale": 0.35, "flips": "horizontal"}})
    predictor = tta.TtaPredictor(bundle.open_predictor(made, TORCH, batch_size=1), info, num_views=20)
    data = encoded(size=(90, 70))
    centre, *views = predictor.views(data, decode(data))
    mirrored = [np.array_equal(view, centre[..., ::-1]) for view in views]
    assert all(is_mirrored or np.array_equal(view, centre) for is_mirrored, view in zip(mirrored, views, strict=True))
    assert 4 <= sum(mirrored) <= 16
    of_views = info.model_copy(update={"config": info.config | {"views": 3}})
    _, *views = tta.TtaPredictor(bundle.open_predictor(made, TORCH, batch_size=1), of_views, num_views=20).views(
        data, decode(data)
    )
    assert not any(np.array_equal(view, centre) or np.array_equal(view, centre[..., ::-1]) for view in views)


def test_only_runs_with_views_tell_of_them(made: bundle.Bundle):
    def spec(num_views: int) -> dict[str, Any]:
        task = ScoreTask(OPENVINO, 32, LIMITS, made.uri, made.version, False, Layout(), num_views)
        assert task.how == "openvino on cpu in f32" + (", 5 views of an image" if num_views else "")
        return spec_of(task, made, {"source": "/in"})

    plain = {
        "model": made.version, "transform": made.info.transform.digest, "execution": OPENVINO.model_dump(),
        "max_image_bytes": MAX_IMAGE_BYTES, "max_pixels": MAX_PIXELS, "input": {"source": "/in"}, "embeddings": None,
        "layout": {"threshold": None, "top_k": None, "columns": None},
    }  # fmt: skip
    assert spec(0) == plain, "a run that was begun by an earlier version goes on"
    assert spec(4) == plain | {"tta": {"num_views": 4, "beta": 0.25}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tta": 4, "embeddings": True}, "--embeddings are of one view of an image, and --tta 4 mixes"),
        ({"tta": -1}, "greater than or equal to 0"),
        ({"tta": 65}, "less than or equal to 64"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], said: str):
    with pytest.raises(ValidationError, match=said):
        ScoreConfig.model_validate({"model": "m", "source": "s", "out": "o"} | given)
