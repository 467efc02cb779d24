"""Bundles: what is loaded is what was saved, and reproduces it, or is refused by name."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import timm
import torch
from PIL import Image
from torch import nn

from dragonclf import storage
from dragonclf.data.images import decode
from dragonclf.data.transforms import Transform
from dragonclf.demo.local_s3 import LocalS3
from dragonclf.model import bundle, canaries, zoo
from dragonclf.model.execution import Execution, resolve_execution
from dragonclf.model.predictor import Predictor, softmax
from tests.conftest import encoded

ARCH = "test_resnet"
TRANSFORM = Transform(size=64, crop_pct=0.9, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
TORCH = Execution(runtime="torch", device="cpu", precision="f32")
OPENVINO = Execution(runtime="openvino", device="cpu", precision="f32")


def model(*, seed: int = 0, num_classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(ARCH, pretrained=False, num_classes=num_classes).eval()


def save(
    uri: str | Path, *, seed: int = 0, classes: tuple[str, ...] = ("cat", "dog", "émeu"), **changes: object
) -> bundle.Bundle:
    given = {
        "arch": ARCH, "classes": classes, "transform": TRANSFORM, "canaries": canaries.synthetic(), "pretrained": "none",
        "snapshot": "/data/snapshots/abc", "config": {"lr": 0.01}, "metrics": {"valid_loss": 0.5},
    } | changes  # fmt: skip
    return bundle.save_bundle(str(uri), model(seed=seed, num_classes=len(classes)), **given)  # pyright: ignore[reportArgumentType]


def edit(uri: str | Path, **changes: object) -> None:
    """Change fields of model.json."""
    path = Path(uri) / bundle.INFO
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_round_trip(tmp_path: Path):
    made = save(tmp_path / "m")
    loaded = bundle.load_bundle(str(tmp_path / "m"))
    assert (loaded.version, loaded.info) == (made.version, made.info)
    assert loaded.info.classes == ["cat", "dog", "émeu"]
    assert loaded.info.transform == TRANSFORM
    assert not loaded.model.training
    original = model().state_dict()
    assert all(torch.equal(tensor, loaded.model.state_dict()[key]) for key, tensor in original.items())
    files = sorted(str(path.relative_to(tmp_path / "m")) for path in (tmp_path / "m").rglob("*") if path.is_file())
    assert files == [
        "README.md",
        *(f"canaries/{i}" for i in range(4)),
        "canaries/expected.safetensors",
        "model.json",
        "model.safetensors",
    ]
    card = (tmp_path / "m" / "README.md").read_text()
    assert "| valid_loss | 0.5000 |" in card
    assert "cat / dog / émeu" in card


def test_thresholds_travel_with_the_model_and_its_card_tells_of_them(tmp_path: Path):
    own = {"cat": 0.8125, "dog": 0.0, "émeu": 2.0}
    made = save(tmp_path / "m", thresholds=own, config={"min_precision": 0.95, "min_recall": None})
    assert bundle.load_bundle(made.uri).info.thresholds == own
    card = (tmp_path / "m" / "README.md").read_text()
    assert "chosen on the same images for a precision of 0.95 of each class" in card
    assert "| cat | 0.8125 |\n| dog | 0.0000 |\n| émeu | never |\n" in card
    with pytest.raises(ValueError, match="there is another model"):
        save(tmp_path / "m", thresholds=own | {"dog": 0.5})
    save(tmp_path / "plain")
    assert "accepted" not in (tmp_path / "plain" / "README.md").read_text()
    written = json.loads((tmp_path / "plain" / bundle.INFO).read_text())
    assert written.pop("thresholds") == {}
    (tmp_path / "plain" / bundle.INFO).write_text(json.dumps(written))  # as bundles were before there were any
    assert bundle.load_bundle(str(tmp_path / "plain")).info.thresholds == {}


def test_round_trip_on_s3(s3_env: LocalS3):
    made = save("s3://work/models/m 1")
    assert bundle.load_bundle("s3://work/models/m 1").version == made.version


def test_saving_the_same_model_again_changes_nothing(tmp_path: Path):
    made = save(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    edit(tmp_path, created="2001-01-01T00:00:00+00:00")
    before[tmp_path / bundle.INFO] = (tmp_path / bundle.INFO).stat().st_mtime_ns
    again = save(tmp_path)
    assert again.info.files == made.info.files
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"classes": ("cat", "dog", "emu")}, {"transform": TRANSFORM.model_copy(update={"crop_pct": 1.0})}],
    ids=["weights", "classes", "transform"],
)
def test_another_model_is_refused_and_the_one_there_stays_whole(change: dict[str, Any], tmp_path: Path):
    made = save(tmp_path)
    with pytest.raises(
        ValueError, match=r"there is another model at .*: bundles are never changed; choose another name"
    ):
        save(tmp_path, **change)
    assert bundle.load_bundle(str(tmp_path)).version == made.version
    bundle.open_predictor(bundle.load_bundle(str(tmp_path)), TORCH)


def test_a_copy_is_the_same_model_and_replaces_no_other(tmp_path: Path):
    made = save(tmp_path / "first")
    (tmp_path / "first" / "precisions").mkdir()
    (tmp_path / "first" / "precisions" / "proof.json").write_text("{}")
    target = str(tmp_path / "copy")
    for _ in range(2):
        assert bundle.copy_bundle(made.uri, target) == target
        assert bundle.load_bundle(target).version == made.version
    assert (tmp_path / "copy" / "precisions" / "proof.json").read_text() == "{}"
    other = save(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="there is another model at"):
        bundle.copy_bundle(other.uri, target)
    assert bundle.load_bundle(target).version == made.version


def test_a_half_written_bundle_is_none_and_is_written_over(tmp_path: Path):
    save(tmp_path, seed=1)
    (tmp_path / bundle.INFO).unlink()
    with pytest.raises(ValueError, match=r"there is no model bundle at .*: model.json is missing; give the folder"):
        bundle.load_bundle(str(tmp_path))
    made = save(tmp_path, seed=0)
    assert bundle.load_bundle(str(tmp_path)).version == made.version


@pytest.mark.parametrize("name", ["model.safetensors", "canaries/expected.safetensors", "canaries/2"])
def test_a_changed_file_is_refused_by_name(name: str, tmp_path: Path):
    save(tmp_path)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} was changed since the bundle was written"):
        bundle.load_bundle(str(tmp_path))
    path.unlink()
    with pytest.raises(storage.ObjectMissingError, match=name):
        bundle.load_bundle(str(tmp_path))


def reseal(uri: Path, name: str, data: bytes) -> None:
    """Replace a file and its checksum: what a mistaken tool does, not what a checksum can find."""
    (uri / name).write_bytes(data)
    info = json.loads((uri / bundle.INFO).read_text())
    edit(uri, files=info["files"] | {name: hashlib.sha256(data).hexdigest()})


def test_canaries_that_do_not_come_out_are_refused(tmp_path: Path):
    save(tmp_path)
    path = tmp_path / bundle.EXPECTED
    expected = safetensors.numpy.load(path.read_bytes())
    logits = expected["logits"].copy()
    logits[2, 1] += 0.05
    reseal(tmp_path, bundle.EXPECTED, safetensors.numpy.save({"pixels": expected["pixels"], "logits": logits}))
    with pytest.raises(
        ValueError, match=r"come out otherwise with torch on cpu in f32: a logit is 0.05 off, 0.001\d* allowed"
    ):
        bundle.open_predictor(bundle.load_bundle(str(tmp_path)), TORCH)
    pixels = expected["pixels"].copy()
    pixels[1] = pixels[1][:, ::-1]
    reseal(tmp_path, bundle.EXPECTED, safetensors.numpy.save({"pixels": pixels, "logits": expected["logits"]}))
    with pytest.raises(
        ValueError, match=r"canary 1 of .* decodes to other pixels here: \d+\.\d\d levels apart on average, 0.5 allowed"
    ):
        bundle.open_predictor(bundle.load_bundle(str(tmp_path)), TORCH)


def test_other_weights_under_a_right_checksum_are_refused_by_the_canaries(tmp_path: Path):
    save(tmp_path)
    save(tmp_path / "other", seed=1)
    reseal(tmp_path, bundle.WEIGHTS, (tmp_path / "other" / bundle.WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match=r"come out otherwise"):
        bundle.open_predictor(bundle.load_bundle(str(tmp_path)), TORCH)


def test_another_transform_is_refused_by_the_canaries(tmp_path: Path):
    save(tmp_path)
    for change, message in (
        ({"crop_pct": 1.0}, "decodes to other pixels"),
        ({"mean": (0.4, 0.5, 0.5)}, "come out otherwise"),
    ):
        edit(tmp_path, transform=json.loads(TRANSFORM.model_copy(update=change).model_dump_json()))
        with pytest.raises(ValueError, match=message):
            bundle.open_predictor(bundle.load_bundle(str(tmp_path)), TORCH)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "model.json is not valid: extra: Extra inputs are not permitted"),
        ({"format": 2}, "model.json is not valid: format: Input should be less than or equal to 1"),
        ({"classes": ["cat"]}, "model.json is not valid: classes: List should have at least 2 items"),
        ({"thresholds": {"cat": 0.5}}, "model.json is not valid: thresholds: Value error, they are of other classes"),
        ({"classes": ["cat", "dog"]}, "do not fit timm's 'test_resnet' with 2 classes here"),
        ({"arch": "no_such_net"}, "do not fit timm's 'no_such_net' with 3 classes here"),
    ],
)
def test_a_model_json_that_cannot_be_is_refused(change: dict[str, object], message: str, tmp_path: Path):
    save(tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        bundle.load_bundle(str(tmp_path))


def test_what_is_not_json_is_refused(tmp_path: Path):
    (tmp_path / bundle.INFO).write_bytes(b"{")
    with pytest.raises(ValueError, match=r"model.json is not valid"):
        bundle.load_bundle(str(tmp_path))


def test_an_execution_that_the_bundle_does_not_admit_is_refused(tmp_path: Path):
    save(tmp_path)
    edit(tmp_path, logit_bounds={"torch/f32": 0.001})
    with pytest.raises(ValueError, match=r"does not admit openvino/f32: it admits torch/f32"):
        bundle.open_predictor(bundle.load_bundle(str(tmp_path)), OPENVINO)


def test_a_model_of_nan_is_not_written(tmp_path: Path):
    broken = model()
    with torch.no_grad():
        next(broken.parameters())[:] = float("nan")
    with pytest.raises(ValueError, match=r"logits that are not finite: it is not written to"):
        bundle.save_bundle(
            str(tmp_path / "m"), broken, arch=ARCH, classes=["a", "b", "c"], transform=TRANSFORM, canaries=canaries.synthetic(),
            pretrained="none", snapshot="", config={}, metrics={},
        )  # fmt: skip
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_torch_and_openvino_agree_and_batches_change_nothing(batch_size: int, tmp_path: Path):
    loaded = save(tmp_path)
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (3, 3, 64, 64), dtype=np.uint8)
    predictors = [
        bundle.open_predictor(loaded, execution, batch_size=batch_size, num_threads=2)
        for execution in (TORCH, OPENVINO)
    ]
    by_torch, by_openvino = (
        [np.concatenate(out) for out in zip(*(p(pixels[i : i + 1]) for i in range(3)), strict=True)] for p in predictors
    )
    for one, other in zip(by_torch, by_openvino, strict=True):
        assert one.dtype == other.dtype == np.float32
        assert np.abs(one - other).max() <= 1e-3
    whole = predictors[0](pixels[:batch_size])[0]
    np.testing.assert_allclose(whole, by_torch[0][: len(whole)], atol=1e-4)
    first = predictors[1](pixels[:1])[0]
    predictors[1](pixels[1:2])
    np.testing.assert_array_equal(first, by_openvino[0][:1])  # a later call does not write into an earlier result


def test_a_compiled_model_gives_the_same(tmp_path: Path):
    loaded = save(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), dtype=np.uint8)
    by_torch, by_inductor = (
        bundle.open_predictor(loaded, TORCH.model_copy(update={"runtime": runtime}), batch_size=2, num_threads=2)
        for runtime in ("torch", "inductor")
    )
    for start in (0, 2):
        for one, other in zip(by_torch(pixels[start : start + 2]), by_inductor(pixels[start : start + 2]), strict=True):
            assert np.abs(one - other).max() <= 1e-3


def test_where_nothing_can_be_compiled_it_says_so(tmp_path: Path):
    save(tmp_path)
    code = (
        "from dragonclf.model import bundle\nfrom dragonclf.model.execution import Execution\n"
        f"loaded = bundle.load_bundle({str(tmp_path)!r})\n"
        "try:\n    bundle.open_predictor(loaded, Execution(runtime='inductor', device='cpu', precision='f32'), batch_size=2)\n"
        "except ValueError as error:\n    print(error)\n"
    )
    nowhere = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=nowhere, capture_output=True, text=True, timeout=120)
    assert re.match(r"torch.compile fails on this machine \(.+\): it needs a C\+\+ compiler", done.stdout), done.stderr


def test_features_times_the_head_are_the_logits():
    network = model()
    predictor = Predictor(network, TRANSFORM, TORCH, batch_size=2, num_threads=1)
    pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
    logits, features = predictor(pixels)
    head = zoo.classifier(network)
    expected = features @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    normal = (torch.from_numpy(pixels).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        np.testing.assert_allclose(logits, network(normal).numpy(), atol=1e-4)


def test_softmax():
    probs = softmax(np.array([[0, 0], [1000, 0], [-1000, -1001]], np.float32))
    assert probs.dtype == np.float32
    np.testing.assert_allclose(probs, [[0.5, 0.5], [1, 0], [0.731059, 0.268941]], atol=1e-6)


@pytest.mark.parametrize(
    ("asked", "has_gpu", "expected"),
    [
        (("auto", "auto"), False, ("openvino", "cpu")),
        (("auto", "auto"), True, ("torch", "cuda")),
        (("torch", "auto"), False, ("torch", "cpu")),
        (("openvino", "auto"), True, ("openvino", "cpu")),
        (("inductor", "auto"), True, ("inductor", "cuda")),
        (("auto", "cpu"), True, ("openvino", "cpu")),
    ],
)
def test_resolve_execution(asked: tuple[str, str], has_gpu: bool, expected: tuple[str, str]):
    found = resolve_execution(*asked, "f32", has_gpu=has_gpu)
    assert (found.runtime, found.device, found.precision) == (*expected, "f32")


@pytest.mark.parametrize(
    ("asked", "has_gpu", "message"),
    [
        (("auto", "cuda", "f32"), False, "device 'cuda' was asked for and there is no GPU here"),
        (("openvino", "cuda", "f32"), True, "runtime 'openvino' runs on the CPU"),
        (("auto", "auto", "int8"), True, "torch on cuda has no precision 'int8': it has f32, fp16, bf16"),
        (("openvino", "auto", "fp16"), False, "openvino on cpu has no precision 'fp16': it has f32, bf16, int8"),
    ],
)
def test_resolve_execution_falls_back_to_nothing(asked: tuple[str, str, str], has_gpu: bool, message: str):
    with pytest.raises(ValueError, match=message):
        resolve_execution(*asked, has_gpu=has_gpu)


def test_synthetic_canaries_are_the_same_every_time_and_decode():
    first, second = canaries.synthetic(), canaries.synthetic()
    assert first == second
    assert [decode(image).shape for image in first] == [(3, 240, 320)] * canaries.COUNT
    assert len({TRANSFORM.for_eval(decode(image)).numpy().tobytes() for image in first}) == canaries.COUNT
    assert [Image.open(io.BytesIO(image)).format for image in first] == ["JPEG", "JPEG", "PNG", "PNG"]


def test_a_canary_of_any_mode_will_do(tmp_path: Path):
    made = save(tmp_path, canaries=[encoded("PNG"), encoded("JPEG"), encoded("WEBP")])
    bundle.open_predictor(made, TORCH)
    assert made.canary_pixels.shape == (3, 3, 64, 64)
