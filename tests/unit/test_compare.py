"""What `compare` says of small training runs, against figures computed apart; its page as a browser shows it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import sklearn.metrics
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page
from typer.testing import CliRunner

from dragonclf import cli
from dragonclf.config import CompareConfig
from dragonclf.data.transforms import Transform
from dragonclf.evaluate.comparison import Comparison
from dragonclf.evaluate.paired import agresti_min_interval, mcnemar_p_value, paired_difference
from dragonclf.model import bundle
from dragonclf.train import checkpoint
from dragonclf.verbs.compare import MAX_FLIPS, compare
from tests.unit.evaluations import CONTRASTS

SCRIPT = "<script>alert(1)</script>"
CLASSES = [SCRIPT, "viserion"]
ODD_NAME = """it's a "drogon" #1 <b>дракон 100%.png"""
TRANSFORM = Transform(size=32, crop_pct=1, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
HOSTILE = "<img src=x onerror=alert(1)>"


def predictions(folder: Path, seed: int, *, num_images: int = 90, classes: list[str] = CLASSES) -> pd.DataFrame:
    """Images with true classes that do not depend on the seed, as it does how they are predicted; the first ones are real pictures."""
    truth, drawn = np.random.default_rng(99), np.random.default_rng(seed)
    names = [ODD_NAME, *(f"{i:03}.jpg" for i in range(1, num_images))]
    targets = truth.integers(len(classes), size=num_images)
    logits = drawn.normal(size=(num_images, len(classes)))
    logits[np.arange(num_images), targets] += 1
    probs = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
    frame = pd.DataFrame(
        {
            "uri": [str(folder / name) for name in names],
            "etag": [f"e{i}" for i in range(num_images)],
            "status": "ok",
            "error": None,
            "label": [classes[place] for place in probs.argmax(axis=1)],
            "confidence": probs.max(axis=1),
            "abstain": probs.max(axis=1) < 0.7,
            "input_label": [classes[place] for place in targets],
            "width": 8,
            "camera": np.where(np.arange(num_images) % 5, "north", HOSTILE),
        }
    )
    return pd.concat([frame, pd.DataFrame(probs, columns=[f"prob_{name}" for name in classes])], axis=1)


def write_run(
    folder: Path,
    frame: pd.DataFrame | None,
    *,
    losses: list[float],
    classes: list[str] = CLASSES,
    snapshot: str = "/d/snapshots/s1",
    **options: Any,
) -> str:
    """A finished run's files, as `train` leaves them, but for weights and pictures."""
    history = [
        {"epoch": float(number), "train_loss": loss, "valid_loss": loss, "valid_accuracy": 1 - loss / 2}
        for number, loss in enumerate(losses, 1)
    ]
    checkpoint.write_results(str(folder), history, [{"step": 1.0, "loss": 1.0}])
    config = {"arch": "resnet18", "weights": "last", "lr": 0.01, "min_recall": None} | options
    best = min(history, key=lambda row: row["valid_loss"]) if config["weights"] == "best" else history[-1]
    info = bundle.BundleInfo(
        arch="resnet18", classes=classes, transform=TRANSFORM, pretrained="x", snapshot=snapshot, config=config,
        metrics={key: best[key] for key in ("train_loss", "valid_loss", "valid_accuracy")}, logit_bounds={"torch/f32": 0.1},
        num_canaries=1, created="2026-11-26T00:00:00+00:00", versions={"torch": "2.9"}, files={},
    )  # fmt: skip
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.json").write_text(info.model_dump_json())
    if frame is not None:
        (folder / "evaluation").mkdir()
        frame.to_parquet(folder / "evaluation" / "predictions.parquet", index=False)
    return str(folder)


def compared(*runs: str, out: Path | None = None) -> Comparison:
    return compare(CompareConfig(reference=runs[0], runs=list(runs[1:]), out=None if out is None else str(out)))


def right(frame: pd.DataFrame) -> pd.Series:
    return (frame["label"] == frame["input_label"]).set_axis(frame["uri"])


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, pd.DataFrame]:
    folder = tmp_path_factory.mktemp("images")
    a, b = predictions(folder, 1), predictions(folder, 2).sample(frac=1, random_state=0, ignore_index=True)
    for uri in a["uri"][:80]:
        Image.new("RGB", (48, 32), (90, 120, 60)).save(uri)
    return a, b


@pytest.fixture(scope="module")
def two_runs(frames: tuple[pd.DataFrame, pd.DataFrame], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("runs")
    return (
        write_run(folder / "my_head", frames[0], losses=[0.6, 0.5, 0.4]),
        write_run(folder / "fine <b>tuned", frames[1], losses=[0.5, 0.2, 0.3], lr=0.002, weights="best"),
    )


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 5), (3, 11), (12, 40), (0, 9), (700, 610)])
def test_paired_statistics_against_scipy_and_a_weighted_sample(gained: int, lost: int):
    expected = scipy.stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar_p_value(gained, lost) == pytest.approx(expected, rel=1e-9)
    # Wald's interval of the mean of images that count +1, -1 and 0, half an image more in each of the four cells.
    num_images = gained + lost + 25
    values, weights = np.array([1, -1, 0]), np.array([gained + 0.5, lost + 0.5, 25 + 1])
    mean = np.average(values, weights=weights)
    error = np.sqrt(np.average((values - mean) ** 2, weights=weights) / weights.sum())
    low, high = scipy.stats.norm.interval(0.95, mean, error)
    assert agresti_min_interval(gained, lost, num_images=num_images) == pytest.approx((max(-1, low), min(1, high)))


def test_the_interval_holds_its_coverage():
    """Of 2,000 draws of 40 images with a true difference of 0.1, some 95 % of the intervals hold it."""
    counts = np.random.default_rng(0).multinomial(40, [0.2, 0.1, 0.7], size=2000)
    intervals = [agresti_min_interval(int(b), int(c), num_images=40) for b, c, _ in counts]
    held = np.mean([low <= 0.1 <= high for low, high in intervals])
    assert 0.935 <= held <= 0.975


def test_a_difference_is_that_of_the_accuracies():
    a, b = np.array([True, True, False, False, False]), np.array([True, False, True, True, False])
    found = paired_difference(a, b, run="b")
    assert (found.num_images, found.num_gained, found.num_lost, found.is_small) == (5, 2, 1, True)
    assert found.difference == pytest.approx(b.mean() - a.mean())


def test_figures_differences_slices_and_flips(two_runs: tuple[str, str], frames: tuple[pd.DataFrame, pd.DataFrame]):
    found = compared(*two_runs)
    assert (found.reference, found.page, found.notes) == ("my_head", None, [])
    assert [(run.run, run.epoch, run.num_epochs, run.num_images) for run in found.runs] == [
        ("my_head", 3, 3, 90), ("fine <b>tuned", 2, 3, 90),
    ]  # fmt: skip
    assert found.runs[1].metrics == {"train_loss": 0.2, "valid_loss": 0.2, "valid_accuracy": 0.9}
    for run, frame in zip(found.runs, frames, strict=True):
        truth, prob = (frame["input_label"] == "viserion").astype(int), frame["prob_viserion"].astype(float)
        assert run.accuracy == pytest.approx(right(frame).mean())
        interval = scipy.stats.binomtest(int(right(frame).sum()), 90).proportion_ci(method="wilson")
        assert run.accuracy_interval == pytest.approx((interval.low, interval.high))
        assert run.auroc == pytest.approx(sklearn.metrics.roc_auc_score(truth, prob), abs=1e-6)
        assert run.log_loss == pytest.approx(sklearn.metrics.log_loss(truth, prob), abs=1e-6)
        assert run.coverage == pytest.approx(1 - frame["abstain"].mean())
        assert run.accepted_accuracy == pytest.approx(right(frame)[~frame["abstain"].to_numpy()].mean())
    assert {one.option: one.values for one in found.options} == {
        "weights": {"my_head": "last", "fine <b>tuned": "best"}, "lr": {"my_head": "0.01", "fine <b>tuned": "0.002"},
    }  # fmt: skip

    a, b = (right(frame).sort_index() for frame in frames)
    [difference] = found.differences
    assert difference.difference == pytest.approx(b.mean() - a.mean())
    assert (difference.num_gained, difference.num_lost) == (int((b & ~a).sum()), int((a & ~b).sum()))
    camera = frames[0].set_index("uri")["camera"].sort_index()
    assert {one.value: (one.num_images, one.is_small) for one in found.slices} == {HOSTILE: (18, True), "north": (72, False)}  # fmt: skip
    for one in found.slices:
        members = camera == one.value
        assert one.difference == pytest.approx(b[members].mean() - a[members].mean())
    assert [one.difference for one in found.slices] == sorted(one.difference for one in found.slices)

    gains = [flip for flip in found.flips if flip.is_gain]
    assert {flip.uri for flip in gains} <= set(a.index[b & ~a])
    assert len(gains) == min(MAX_FLIPS, int((b & ~a).sum()))
    assert {flip.uri for flip in found.flips if not flip.is_gain} <= set(a.index[a & ~b])
    by_uri = [frame.set_index("uri") for frame in frames]
    for flip in gains:
        assert flip.label == flip.actual != flip.label_reference
        assert flip.prob == pytest.approx(by_uri[1].loc[flip.uri, f"prob_{flip.actual}"])
        assert flip.prob_reference == pytest.approx(by_uri[0].loc[flip.uri, f"prob_{flip.actual}"])
    changes = [flip.prob - flip.prob_reference for flip in gains]
    assert changes == sorted(changes, reverse=True)


def test_only_images_in_common_of_one_content_and_label_count(
    frames: tuple[pd.DataFrame, pd.DataFrame], tmp_path: Path
):
    a, b = (frame.sort_values("uri", ignore_index=True) for frame in frames)
    b = b.iloc[10:].copy()
    b.loc[10:12, "etag"] = "new"
    b.loc[13:13, "input_label"] = [SCRIPT if b.loc[13, "input_label"] == "viserion" else "viserion"]
    a.loc[20:21, "etag"] = None  # not known: differs from none
    found = compared(
        write_run(tmp_path / "a", a, losses=[0.5]),
        write_run(tmp_path / "b", b, losses=[0.5], snapshot="/d/snapshots/s2"),
    )
    assert [(run.num_own_images, run.num_images) for run in found.runs] == [(90, 76), (80, 76)]
    assert found.runs[0].accuracy == pytest.approx(right(a.iloc[14:]).mean())
    assert found.differences[0].num_images == 76
    assert found.notes == [
        "the runs are trained on different snapshots (a: s1; b: s2)",
        "the validation sets differ (a 90, b 80 images): only the 80 in all of them are compared",
        "images left out, since one of the runs has another content for them: 3",
        "images left out, since one of the runs has another label for them: 1",
    ]


def test_nothing_in_common(frames: tuple[pd.DataFrame, pd.DataFrame], tmp_path: Path):
    a, b = frames[0].iloc[:40], frames[0].iloc[40:]
    found = compared(write_run(tmp_path / "a", a, losses=[1]), write_run(tmp_path / "b", b, losses=[1]), out=tmp_path)
    assert [(run.num_images, run.accuracy) for run in found.runs] == [(0, None), (0, None)]
    assert (found.differences, found.slices, found.flips) == ([], [], [])
    assert "only the 0 in all of them" in found.notes[0]
    assert (tmp_path / "compare.html").exists()


def test_a_run_without_predictions_and_other_classes(frames: tuple[pd.DataFrame, pd.DataFrame], tmp_path: Path):
    a = write_run(tmp_path / "x" / "run", frames[0], losses=[0.5])
    more = frames[1].assign(prob_other=0.0)
    b = write_run(tmp_path / "y" / "run", more, losses=[0.5], classes=[*CLASSES, "other"])
    c = write_run(tmp_path / "c", None, losses=[0.5])
    found = compared(a, b, c)
    assert [run.run for run in found.runs] == [a, b, c], "two folders have one name"
    assert [one.run for one in found.differences] == [b]
    assert found.runs[2].accuracy is None
    assert found.notes[0].startswith(f"{c} has no evaluation/predictions.parquet")
    assert found.notes[1].startswith("the runs are of different classes (")


def test_what_is_no_finished_run_is_refused(two_runs: tuple[str, str], tmp_path: Path):
    with pytest.raises(ValueError, match=r"none is no finished run of `train`: results.csv is missing; give a folder"):
        compared(two_runs[0], str(tmp_path / "none"))
    checkpoint.write_results(str(tmp_path), [{"epoch": 1.0}], [{"step": 1.0}])
    with pytest.raises(ValueError, match=r"is no finished run of `train`: model/model.json is missing"):
        compared(two_runs[0], str(tmp_path))
    with pytest.raises(ValueError, match="is given twice: give each run once"):
        compared(two_runs[0], two_runs[0] + "/")


def test_the_command_prints_tables_and_json(two_runs: tuple[str, str]):
    result = CliRunner().invoke(cli.app, ["compare", *two_runs])
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "reference my_head" in lines
    assert "lr 0.01 0.002" in lines
    assert "option my_head fine <b>tuned" in lines, "names of runs as they are"
    result = CliRunner().invoke(cli.app, ["compare", *two_runs, "--json"])
    assert json.loads(result.stdout) == json.loads(compared(*two_runs).model_dump_json())


@pytest.fixture(scope="module")
def page_path(two_runs: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    found = compared(*two_runs, out=out)
    assert found.page == str(out / "compare.html")
    return out / "compare.html"


def opened(browser: Browser, path: Path, complaints: list[str], **options: Any) -> Page:
    """The page in a window of its own; what the browser has to say about it is added to `complaints`."""
    page = browser.new_page(**options)
    own = path.as_uri()
    page.on("request", lambda request: complaints.extend({request.url} - {own} if request.url[:5] != "data:" else []))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.goto(own)
    return page


def assert_accessible(page: Page) -> None:
    """No finding of axe, and every text readable on what is behind it."""
    found = Axe().run(page).response["violations"]
    assert [(one["id"], one["impact"], [node["html"] for node in one["nodes"]]) for one in found] == []
    assert page.evaluate(CONTRASTS) == []


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (375, "light"), (375, "dark")])
def test_the_page_in_a_browser(page_path: Path, browser: Browser, two_runs: tuple[str, str], width: int, scheme: Any):
    complaints: list[str] = []
    page = opened(browser, page_path, complaints, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = compared(*two_runs)
    rows = [text.split("\t") for text in page.locator("#runs tbody tr").all_inner_texts()]
    assert [row[0].removesuffix(" reference") for row in rows] == ["my_head", "fine <b>tuned"]
    assert [row[1].replace("\xa0", " ") for row in rows] == [f"{100 * (run.accuracy or 0):.1f} %" for run in found.runs]
    assert [row[3] for row in rows] == [f"{run.auroc:.3f}" for run in found.runs]
    [difference] = [text.split("\t") for text in page.locator("#differences tbody tr").all_inner_texts()]
    assert difference[2].replace("−", "-") == f"{100 * found.differences[0].difference:+.1f}"
    assert difference[4:6] == [str(found.differences[0].num_gained), str(found.differences[0].num_lost)]
    values = page.locator(".slice-differences tbody th:nth-child(2)").all_inner_texts()
    assert values == [one.value for one in found.slices]
    assert page.locator(".slice-differences .small-slice").count() == 1
    assert page.locator(".tiles > li").count() == len(found.flips)
    strokes = page.locator("#valid-loss polyline").evaluate_all("all => all.map(one => getComputedStyle(one).stroke)")
    assert len(strokes) == len(set(strokes)) == 2
    shown = set(page.locator(".tiles .uri").all_inner_texts())
    assert shown == {flip.uri for flip in found.flips}
    assert_accessible(page)
    assert complaints == []
    page.close()
