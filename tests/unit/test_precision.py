"""Low precision is used where it was proven, for that model on that class of processor, and nowhere else."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from typer.testing import CliRunner

from dragonclf.cli import app
from dragonclf.config import ExportConfig, PredictConfig
from dragonclf.data import images
from dragonclf.data.snapshot import Snapshot, write_snapshot
from dragonclf.data.transforms import Transform
from dragonclf.model import bundle, canaries, execution, precision, zoo
from dragonclf.model.execution import Execution
from dragonclf.model.predictor import Predictor
from dragonclf.verbs.export import export
from dragonclf.verbs.predict import predict
from tests.conftest import encoded
from tests.unit.test_snapshot import SCHEMA

TRANSFORM = Transform(size=64, crop_pct=0.9, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
F32 = Execution(runtime="torch", device="cpu", precision="f32")
COLOURS = {"blue": (30, 40, 200), "red": (200, 40, 30)}
NUM_VALID = 110


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """40 training and 110 validation images of two colours."""
    folder = tmp_path_factory.mktemp("colours")
    rows = []
    for index in range(150):
        label = ("blue", "red")[index % 2]
        path = folder / f"{index:03d}.png"
        path.write_bytes(encoded("PNG", size=(80, 72), colour=COLOURS[label], seed=index))
        rows.append(
            {"uri": str(path), "etag": "e", "size": 1, "label": label, "split": "train" if index < 40 else "valid", "group": None,
             "camera": 1, "width": 80, "height": 72, "sha256": str(index), "status": "ok", "error": None}
        )  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    return write_snapshot(str(folder / "out"), [table], source="colours", valid_fraction=0.5, seed=0)


def make_bundle(uri: Path, snapshot: Snapshot, *, noise: float = 0.0) -> bundle.Bundle:
    """A model whose head tells the colours apart by far; with `noise` it decides by a random direction of the features, and steeply."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", pretrained=False, num_classes=2).eval()
    pixels = np.stack(
        [TRANSFORM.for_eval(images.decode(encoded("PNG", size=(80, 72), colour=COLOURS[label], seed=900 + i))).numpy()
         for label in COLOURS for i in range(16)]
    )  # fmt: skip
    _, features = Predictor(model, TRANSFORM, F32, batch_size=32)(pixels)
    blue, red = features[:16].mean(axis=0), features[16:].mean(axis=0)
    direction = (red - blue) / np.square(red - blue).sum() * 8
    if noise:
        across = np.random.default_rng(1).normal(size=direction.shape).astype(np.float32)
        across -= across @ direction / (direction @ direction) * direction
        direction = across * noise
    centre = direction @ features.mean(axis=0)
    head = zoo.classifier(model)
    with torch.no_grad():
        head.weight[:] = torch.from_numpy(np.stack([-direction, direction]).astype(np.float32))
        head.bias[:] = torch.tensor([centre, -centre])
    return bundle.save_bundle(
        str(uri), model, arch="test_resnet", classes=snapshot.info.classes, transform=TRANSFORM, canaries=canaries.synthetic(),
        pretrained="none", snapshot=snapshot.uri, config={}, metrics={},
    )  # fmt: skip


def config(made: bundle.Bundle, snapshot: Snapshot, kind: str, runtime: str = "auto") -> ExportConfig:
    return ExportConfig.model_validate(
        {"model": made.uri, "data": snapshot.uri, "precision": kind, "runtime": runtime, "calibration_images": 32}
    )


def ask(
    made: bundle.Bundle, snapshot: Snapshot, kind: str, runtime: str = "auto"
) -> list[tuple[str | None, float | None]]:
    """Label and confidence of the first four training images."""
    uris = [str(Path(snapshot.uri).parents[2] / f"{index:03d}.png") for index in range(4)]
    found = predict(
        PredictConfig.model_validate({"model": made.uri, "images": uris, "precision": kind, "runtime": runtime})
    )
    return [(row.label, row.confidence) for row in found.predictions]


@pytest.mark.parametrize(("kind", "runtime"), [("bf16", "torch"), ("int8", "openvino")])
def test_what_holds_is_admitted_and_then_used(kind: str, runtime: str, snapshot: Snapshot, tmp_path: Path):
    made = make_bundle(tmp_path / "m", snapshot)
    with pytest.raises(
        ValueError, match=rf"does not admit {kind} by {runtime} on this processor \(.*\): prove it with"
    ):
        ask(made, snapshot, kind, runtime)
    summary = export(config(made, snapshot, kind, runtime))
    assert summary.num_images == NUM_VALID
    assert summary.agreement >= 0.99
    assert summary.accuracy_f32 == 1
    assert json.loads(Path(summary.proof).read_text())["execution"] == {
        "runtime": runtime, "device": "cpu", "precision": kind,
    }  # fmt: skip
    low, exact = ask(made, snapshot, kind, runtime), ask(made, snapshot, "f32", runtime)
    assert [label for label, _ in low] == [label for label, _ in exact] == ["blue", "red", "blue", "red"]
    assert low != exact  # it is another arithmetic
    np.testing.assert_allclose([p for _, p in low], [p for _, p in exact], atol=0.25)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert bundle.load_bundle(made.uri).version == made.version


@pytest.mark.parametrize(("kind", "runtime"), [("bf16", "torch"), ("int8", "openvino")])
def test_what_does_not_hold_is_refused_with_the_figures_and_leaves_nothing(
    kind: str, runtime: str, snapshot: Snapshot, tmp_path: Path
):
    made = make_bundle(tmp_path / "m", snapshot, noise=50)
    before = sorted(tmp_path.rglob("*"))
    told = CliRunner().invoke(app, ["export", made.uri, snapshot.uri, "--precision", kind, "--runtime", runtime])
    assert told.exit_code == 6
    assert f"{runtime} on cpu in {kind} on x86_64" in told.stderr or "aarch64" in told.stderr
    assert f"of {NUM_VALID} validation images keep their label (99% needed)" in " ".join(told.stderr.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_proof_holds_for_its_model_and_class_of_processor_alone(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = make_bundle(tmp_path / "m", snapshot)
    summary = export(config(made, snapshot, "bf16", "torch"))
    chosen = F32.model_copy(update={"precision": "bf16"})
    assert precision.find(made.uri, made.version, chosen).processor == summary.processor
    with pytest.raises(ValueError, match="does not admit bf16"):
        precision.find(made.uri, "0" * 12, chosen)
    monkeypatch.setattr(precision, "processor", lambda device: "riscv64")
    with pytest.raises(ValueError, match=r"does not admit bf16 by torch on this processor \(riscv64\)"):
        precision.find(made.uri, made.version, chosen)


def test_a_quantized_body_that_was_changed_is_refused(snapshot: Snapshot, tmp_path: Path):
    made = make_bundle(tmp_path / "m", snapshot)
    weights = Path(export(config(made, snapshot, "int8")).proof).parent / "model.bin"
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.bin was changed since it was proven"):
        ask(made, snapshot, "int8")


@pytest.mark.parametrize(("speedup", "expected"), [(1.7, "bf16"), (0.6, "f32")])
def test_auto_is_the_fastest_that_was_proven(speedup: float, expected: str, snapshot: Snapshot, tmp_path: Path):
    made = make_bundle(tmp_path / "m", snapshot)
    assert precision.choose(made.uri, made.version, F32, "auto") == F32
    proof = Path(export(config(made, snapshot, "bf16", "torch")).proof)
    proof.write_text(json.dumps(json.loads(proof.read_text()) | {"speedup": speedup}))
    assert precision.choose(made.uri, made.version, F32, "auto").precision == expected


def test_what_proves_nothing_is_refused(snapshot: Snapshot, tmp_path: Path):
    made = make_bundle(tmp_path / "m", snapshot)
    with pytest.raises(
        ValueError, match=rf"99 validation images prove nothing: 100 are needed, and .* has {NUM_VALID}"
    ):
        export(config(made, snapshot, "bf16").model_copy(update={"images": 99}))
    with pytest.raises(ValueError, match="openvino on cpu has no precision 'fp16'"):
        export(config(made, snapshot, "fp16", "openvino"))
    other = snapshot.model_copy(update={"info": snapshot.info.model_copy(update={"classes": ["blue", "green"]})})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "snapshot.json").write_text(other.info.model_dump_json())
    with pytest.raises(ValueError, match=r"the classes of .* \(blue, green\) are not those of the model"):
        export(config(made, snapshot, "bf16").model_copy(update={"data": str(tmp_path / "other")}))


def test_accuracy_counts_as_well_as_labels():
    tally = precision.Tally()
    f32 = np.array([[0.0, 1.0]] * 1000, np.float32)
    low = f32.copy()
    low[:6] = [1.0, 0.0]  # six labels change, 99.4 % stay
    tally.add(f32, low, np.ones(1000, np.int64), (2.0, 1.0))
    found = tally.comparison()
    assert (found.agreement, found.accuracy_f32, found.accuracy, found.speedup) == (0.994, 1.0, 0.994, 2.0)
    assert not found.passes  # accuracy falls by 0.6 points
    assert found.model_copy(update={"accuracy": 0.995}).passes
    assert not found.model_copy(update={"accuracy": 1.0, "agreement": 0.989}).passes


def test_the_class_of_a_processor_names_its_instructions():
    found = execution.processor("cpu").split()
    assert found[0] in ("x86_64", "aarch64")
    assert found[1:] == sorted(found[1:])
    assert set(found[1:]) <= execution._INSTRUCTIONS
