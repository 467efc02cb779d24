"""What a training run shows of its validation images, from features that were kept: no image is read."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import timm
import torch

from dragonclf import storage
from dragonclf.config import EvaluateConfig
from dragonclf.data import tables
from dragonclf.data.snapshot import write_snapshot
from dragonclf.engine import published
from dragonclf.model import bundle, canaries, zoo
from dragonclf.model.predictor import Head
from dragonclf.verbs.evaluate import write_report
from dragonclf.verbs.run_pictures import predict_features

NUM_IMAGES = 12
MODEL = timm.create_model("test_resnet", num_classes=2)
NUM_FEATURES = zoo.classifier(MODEL).in_features


def image_rows() -> pa.Table:
    """Half of them to validate on, the last one gone; with columns of a manifest, one of which is called as an answer is."""
    numbers = range(NUM_IMAGES)
    return pa.table({
        "uri": [f"/dragons/{i:02}.jpg" for i in numbers], "etag": [f"e{i}" for i in numbers], "size": [100] * NUM_IMAGES,
        "label": ["drogon" if i % 2 else "viserion" for i in numbers], "split": ["train"] * 6 + ["valid"] * 6,
        "group": pa.nulls(NUM_IMAGES, pa.string()), "width": [320 + i for i in numbers], "height": [240] * NUM_IMAGES,
        "sha256": [f"s{i}" for i in numbers], "phash": [f"{i:064x}" for i in numbers], "brightness": [i / 12 for i in numbers],
        "sharpness": [0.1] * NUM_IMAGES, "status": ["ok"] * 11 + ["missing"], "error": pa.array([None] * 11 + ["it is gone"]),
        "camera": ["north", "south"] * 6, "confidence": ["high"] * NUM_IMAGES,
    })  # fmt: skip


def write_features(uri: str, rows: pa.Table) -> np.ndarray:
    """A published run of one part: features, float32 (N, D), of the first N `rows`."""
    features = np.random.default_rng(0).normal(size=(len(rows), NUM_FEATURES)).astype(np.float32)
    part = rows.select(["uri", "etag", "status", "error", "label", "split"])
    part = part.append_column("features", pa.array(list(features), pa.list_(pa.float32())))
    storage.put(f"{uri}/parts/00000000.parquet", tables.encode(part))
    manifest = published.Manifest(
        run="a-1", uri=uri, verb="features", spec={}, plan_digest="", planned_s=0, num_images=len(rows), num_parts=1,
        counts={"ok": len(rows)}, parts_table="parts.parquet", parts_sha256="",
    )  # fmt: skip
    storage.put(f"{uri}/{published.MANIFEST}", manifest.model_dump_json().encode())
    return features


def test_features_give_the_rows_that_scoring_gives(tmp_path: Path) -> None:
    rows = image_rows()
    snapshot = write_snapshot(str(tmp_path), [rows], source="/dragons", valid_fraction=0.5, seed=0)
    features = write_features(str(tmp_path / "features"), rows[:11])
    model = bundle.save_bundle(
        str(tmp_path / "model"), MODEL, arch="test_resnet", classes=["drogon", "viserion"], canaries=canaries.synthetic(),
        transform=zoo.transform_for(MODEL, size=32), pretrained="none", snapshot=snapshot.uri, config={"lr": 0.0125}, metrics={},
        temperature=1.5,
    )  # fmt: skip
    frame = predict_features(str(tmp_path / "features"), model, snapshot, split="valid")
    assert frame["uri"].tolist() == rows["uri"].to_pylist()[6:]
    assert frame["status"].tolist() == ["ok"] * 5 + ["missing"]
    assert frame["input_label"].tolist() == ["viserion", "drogon"] * 3
    logits = torch.from_numpy(Head(model.model)(features[6:11]))
    probs = frame[["prob_drogon", "prob_viserion"]].to_numpy()
    np.testing.assert_allclose(probs[:5], logits.softmax(dim=1), atol=1e-6)
    assert np.isnan(probs[5]).all()
    assert frame["width"].tolist() == list(range(326, 332))
    assert frame["brightness"].tolist() == [i / 12 for i in range(6, 12)]
    assert not {"phash", "sharpness"} & set(frame)
    assert frame["camera"].tolist() == ["north", "south"] * 3
    assert frame["input_confidence"].tolist() == ["high"] * 6
    assert frame["confidence"].tolist()[:5] == probs[:5].max(axis=1).tolist()

    out = str(tmp_path / "evaluation")
    config = EvaluateConfig.model_validate({"model": model.uri, "data": snapshot.uri, "out": out})
    summary = write_report(frame, config, model, snapshot, run_by="the head")
    assert summary.num_images == 5
    html = storage.get(summary.report).decode()
    assert "before calibration, by the temperature 1.500" in html
    assert "<dt>lr</dt><dd>0.0125</dd>" in html
    assert f"<dt>torch</dt><dd>{torch.__version__.partition('+')[0]}" in html
    assert '<th scope="row"><bdi>drogon</bdi></th><td class="number">3</td><td class="number">2</td>' in html
    assert "<summary><bdi>camera</bdi>: 2 slices" in html
