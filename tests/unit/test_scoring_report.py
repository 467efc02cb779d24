"""What `report` says of small published runs, against figures computed apart; its page as a browser shows it."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.stats
from PIL import Image
from playwright.sync_api import Browser
from typer.testing import CliRunner

from dragonclf import cli
from dragonclf.config import ReportConfig
from dragonclf.engine.layout import Layout
from dragonclf.evaluate.drift import confidence_bins, population_stability
from dragonclf.evaluate.scoring import ScoringReport
from dragonclf.verbs.report import EXAMPLES, report
from tests.unit.test_compare import CLASSES, ODD_NAME, SCRIPT, assert_accessible, opened, predictions, write_run
from tests.unit.test_diff import Row, publish, scored
from tests.unit.test_snapshot import image
from tests.unit.test_snapshot import write as write_snapshot

HOSTILE = "cannot be decoded: <img src=x onerror=alert(1)>"
NUM_IMAGES = 60


def scored_rows(folder: Path, *, num_images: int = NUM_IMAGES, seed: int = 0) -> list[Row]:
    """Images that are mostly of the second class, and some without a result."""
    probs = np.random.default_rng(seed).beta(2, 3, num_images).astype(np.float32)
    names = [ODD_NAME, *(f"{i:03}.jpg" for i in range(1, num_images))]
    rows = [
        Row(str(folder / name), (float(prob), float(1 - prob))) for name, prob in zip(names, probs, strict=True)
    ]  # fmt: skip
    bad = [Row(str(folder / f"bad {i}.jpg"), None, "unreadable" if i % 3 else "missing") for i in range(9)]
    return sorted([*rows, *bad, Row(str(folder / "new.jpg"), (0.9, 0.1), "changed")], key=lambda row: row.uri)


def reported(run: str, **options: Any) -> ScoringReport:
    return report(ReportConfig(run=run, **options))


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, pa.Table]:
    """A published run whose model abstains under 0.7, and its rows. Most of its images are real pictures."""
    folder, out = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("scores")
    rows = scored_rows(folder)
    for place, row in enumerate(row for row in rows if row.probs):
        if place % 10:
            Image.new("RGB", (40, 30), (120, 60 + place, 90)).save(row.uri)
    table = scored(rows, CLASSES, layout=Layout(threshold=0.7))
    errors = [HOSTILE if status == "unreadable" else None for status in table["status"].to_pylist()]
    table = table.set_column(table.column_names.index("error"), "error", pa.array(errors, pa.string()))
    return publish(out, table, shard_images=15), table


def test_counts_against_pandas(scores: tuple[str, pa.Table], tmp_path: Path):
    found, rows = reported(scores[0], out=str(tmp_path)), scores[1].to_pandas()
    labelled = rows[rows["label"].notna()]
    assert (found.num_images, found.num_labelled) == (70, 61)
    assert {one.status: one.num_images for one in found.statuses} == rows["status"].value_counts().to_dict()
    assert [one.num_images for one in found.statuses] == sorted((60, 6, 3, 1), reverse=True)
    assert sum(one.share for one in found.statuses) == pytest.approx(1)
    assert found.mean_confidence == pytest.approx(labelled["confidence"].mean(), abs=1e-6)
    assert found.num_abstained == labelled["abstain"].sum()
    for one in found.classes:
        members = labelled[labelled["label"] == one.label]
        assert one.num_images == len(members)
        assert one.share == pytest.approx(len(members) / 61)
        assert one.mean_confidence == pytest.approx(members["confidence"].mean(), abs=1e-6)
        assert one.num_abstained == members["abstain"].sum()
    wanted = np.histogram(labelled["confidence"].astype(float), bins=np.linspace(0, 1, 21))[0]
    assert found.confidence_histogram == wanted.tolist()
    assert confidence_bins(labelled["confidence"].to_numpy(), 20).tolist() == wanted.tolist()
    examples = pd.DataFrame([one.model_dump() for one in found.examples])
    assert examples.groupby("status").size().to_dict() == {"changed": 1, "missing": 3, "unreadable": EXAMPLES}
    unreadable = rows[rows["status"] == "unreadable"].sort_values("uri").head(EXAMPLES)
    assert examples[examples["status"] == "unreadable"]["uri"].tolist() == unreadable["uri"].tolist()
    assert set(examples[examples["status"] == "unreadable"]["error"]) == {HOSTILE}


def test_throughput_is_that_of_the_parts(scores: tuple[str, pa.Table], tmp_path: Path):
    found = reported(scores[0], out=str(tmp_path))
    times = [path.stat().st_mtime_ns / 1e9 for path in sorted(Path(scores[0], "parts").iterdir())]
    assert found.images_per_s == pytest.approx(55 / (times[-1] - times[0]), rel=0.01), "70 images, 15 of them before"
    copy = tmp_path / "copy" / "runs" / Path(scores[0]).name
    shutil.copytree(scores[0], copy)
    found = reported(str(copy), out=str(tmp_path))
    assert found.images_per_s is None
    assert f"throughput is not told: this is a copy of {scores[0]}, and its parts were" in found.notes[1]


def test_a_run_is_never_written_into(scores: tuple[str, pa.Table]):
    before = sorted(Path(scores[0]).rglob("*"))
    out = Path(scores[0]).parents[1]
    found = reported(str(out))
    assert found.page == str(out / "reports" / Path(scores[0]).name / "scoring.html")
    assert Path(found.page).exists()
    assert sorted(Path(scores[0]).rglob("*")) == before


def divergence(counts: np.ndarray, reference: np.ndarray) -> float:
    """Jeffreys' divergence, which the PSI is, by scipy's relative entropies."""
    p, q = counts + 0.5, reference + 0.5
    return float(scipy.stats.entropy(p, q) + scipy.stats.entropy(q, p))


def test_the_stability_index_and_what_chance_makes_of_it():
    counts, reference = np.array([50, 30, 0, 20]), np.array([400, 300, 100, 200])
    found = population_stability(counts, reference, what="x", name="y")
    assert found.psi == pytest.approx(divergence(counts, reference))
    assert (found.num_reference, found.reading) == (1000, "large")
    same = population_stability(counts, 3 * counts, what="x", name="y")
    assert (same.psi < 0.01, same.reading) == (True, "small")
    draws = np.random.default_rng(0).multinomial(2000, np.full(20, 0.05), size=(2, 500))
    found_each = [population_stability(a, b, what="x", name="y") for a, b in zip(*draws, strict=True)]
    assert np.mean([one.psi for one in found_each]) == pytest.approx(found_each[0].by_chance, rel=0.05)


@pytest.fixture(scope="module")
def with_model(scores: tuple[str, pa.Table], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, pd.DataFrame]:
    """A run that a trained model scored, the model, and its predictions of validation images."""
    folder = tmp_path_factory.mktemp("trained")
    made = [
        image(f"{label}/{i}.jpg", label, split=split)
        for label, count in ((SCRIPT, 30), ("viserion", 50))
        for i in range(count)
        for split in ["valid" if i % 5 == 0 else "train"]
    ]
    snapshot = write_snapshot(folder / "data", made)
    valid = predictions(folder, 3)
    model = write_run(folder / "run", valid, losses=[0.5], snapshot=snapshot.uri) + "/model"
    version = hashlib.sha256(Path(model, "model.json").read_bytes()).hexdigest()[:12]
    return publish(folder / "scores", scores[1], model=version, shard_images=15), model, valid


def test_drift_against_what_the_model_was_made_from(
    with_model: tuple[str, str, pd.DataFrame], scores: tuple[str, pa.Table], tmp_path: Path
):
    run, model, valid = with_model
    found, rows = reported(run, model=model, out=str(tmp_path)), scores[1].to_pandas()
    labelled = rows[rows["label"].notna()]
    counts = np.array([(labelled["label"] == name).sum() for name in CLASSES])
    predicted = np.array([(valid["label"] == name).sum() for name in CLASSES])
    assert found.notes == []
    assert [(one.what, one.reference, one.num_reference) for one in found.drift] == [
        ("predicted classes", "validation images, as predicted", 90),
        ("predicted classes", "validation images, as labelled", 16),
        ("predicted classes", "training images, as labelled", 64),
        ("confidences", "validation images", 90),
    ]
    bins = [np.histogram(one["confidence"].astype(float), bins=20, range=(0, 1))[0] for one in (labelled, valid)]
    wanted = [
        divergence(counts, predicted), divergence(counts, np.array([6, 10])), divergence(counts, np.array([24, 40])), divergence(*bins),
    ]  # fmt: skip
    assert [one.psi for one in found.drift] == pytest.approx(wanted)
    shares = {one.label: (one.valid_share, one.train_share) for one in found.classes}
    assert shares["viserion"] == pytest.approx((predicted[1] / 90, 40 / 64))


def test_what_cannot_be_read_of_the_reference_is_told(scores: tuple[str, pa.Table], tmp_path: Path):
    model = write_run(tmp_path / "run", None, losses=[0.5], snapshot=str(tmp_path / "gone")) + "/model"
    version = hashlib.sha256(Path(model, "model.json").read_bytes()).hexdigest()[:12]
    run = publish(tmp_path / "scores", scores[1], model=version)
    found = reported(run, model=model)
    assert found.drift == []
    assert "the model's snapshot cannot be read: there is no snapshot at" in found.notes[0]
    assert "there is no" in found.notes[1]
    with pytest.raises(ValueError, match=rf"was scored by model m1, and {model} is {version}: give the bundle that"):
        reported(scores[0], model=model)


def test_many_classes_and_a_run_of_errors_alone(tmp_path: Path):
    classes = [f"class{i:02}" for i in range(40)]
    probs = np.random.default_rng(0).dirichlet(np.ones(40), 80).astype(np.float32)
    rows = [Row(f"/gone/{i:03}.jpg", tuple(map(float, prob))) for i, prob in enumerate(probs)]
    found = reported(publish(tmp_path / "many", scored(rows, classes), shard_images=40))
    assert found.num_abstained is None
    html = Path(found.page).read_text()
    assert html.count("Predicted as") == 12, "galleries of the most frequent classes"
    assert html.count('<figure class="chart">') == 2, "all confidences and the throughput, no histogram of each class"
    found = reported(publish(tmp_path / "bad", scored([Row("/1", None, "missing")], CLASSES)))
    assert (found.num_labelled, found.classes, found.mean_confidence) == (0, [], None)
    assert "no image has a label" in Path(found.page).read_text()


def test_a_run_without_labels_is_refused(tmp_path: Path):
    table = scored([Row("/1", (0.5, 0.5))], CLASSES).drop_columns(["confidence"])
    uri = publish(tmp_path, table)
    with pytest.raises(ValueError, match=rf"{uri} is a run of `score` without the column 'confidence': give a run of"):
        reported(uri)


def test_no_image_is_read_if_no_picture_is_asked_for(scores: tuple[str, pa.Table], tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr("dragonclf.evaluate.galleries._read_picture", lambda uri: pytest.fail(uri))
    html = Path(reported(scores[0], out=str(tmp_path), per_gallery=0).page).read_text()
    assert "Most uncertain" not in html
    assert "Predicted classes" in html


def test_a_seed_draws_the_same_images(scores: tuple[str, pa.Table], tmp_path: Path):
    pages = [
        Path(reported(scores[0], out=str(tmp_path / str(place)), seed=seed).page).read_text()
        for place, seed in enumerate((0, 0, 1))
    ]
    assert pages[0] == pages[1] != pages[2]


def test_the_command_prints_tables_and_json(with_model: tuple[str, str, pd.DataFrame], tmp_path: Path):
    run, model, _ = with_model
    result = CliRunner().invoke(cli.app, ["report", run, "--model", model, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "unreadable 6 0.0857" in [" ".join(line.split()) for line in result.stdout.splitlines()]
    result = CliRunner().invoke(cli.app, ["report", run, "--out", str(tmp_path), "--json"])
    assert json.loads(result.stdout) == json.loads(reported(run, out=str(tmp_path)).model_dump_json())


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (375, "light"), (375, "dark")])
def test_the_page_in_a_browser(
    with_model: tuple[str, str, pd.DataFrame],
    scores: tuple[str, pa.Table],
    browser: Browser,
    tmp_path: Path,
    width: int,
    scheme: Any,
):
    run, model, _ = with_model
    found, rows = reported(run, model=model, out=str(tmp_path)), scores[1].to_pandas()
    complaints: list[str] = []
    page = opened(browser, Path(found.page), complaints, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.inner_text("#num-labelled") == "61"
    assert page.inner_text("#num-abstained") == str(rows["abstain"].sum())
    statuses = [text.split("\t") for text in page.locator("#statuses tbody tr").all_inner_texts()]
    assert [row[:2] for row in statuses] == [["ok", "60"], ["unreadable", "6"], ["missing", "3"], ["changed", "1"]]
    classes = page.locator("#classes tbody th").all_inner_texts()
    assert classes == [one.label for one in found.classes]
    assert SCRIPT in classes
    drift = [text.split("\t") for text in page.locator("#drift tbody tr").all_inner_texts()]
    assert [row[3] for row in drift] == [f"{one.psi:.3f}" for one in found.drift]
    labelled = rows[rows["label"].notna()].sort_values(["confidence", "uri"])
    first = page.locator("section.gallery").first
    assert first.locator(".uri").all_inner_texts() == labelled["uri"].head(8).tolist()
    for gallery in page.locator("section.gallery").all()[1:]:
        uris = gallery.locator(".uri").all_inner_texts()
        assert len(set(uris)) == 8
        label = gallery.locator("h2").inner_text().removeprefix("Predicted as ")
        assert set(rows.set_index("uri").loc[uris, "label"]) == {label}
    assert page.locator(".missing").count() > 0, "some pictures are gone"
    assert HOSTILE in page.inner_text("#examples")
    heights = page.locator("#confidences rect.first").evaluate_all("all => all.map(one => +one.getAttribute('height'))")
    wanted = [count for count in found.confidence_histogram if count]
    assert np.array(heights) / sum(heights) == pytest.approx(np.array(wanted) / sum(wanted), abs=0.01)
    assert_accessible(page)
    assert complaints == []
    page.close()
