"""The written evaluation: its files, and its page as a browser shows it."""

import base64
import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page

from dragonclf.evaluate.galleries import MAX_GALLERY_CLASSES, MAX_PER_GALLERY
from dragonclf.evaluate.html import MAX_PAGE_BYTES
from dragonclf.evaluate.page import MAX_LISTED, MAX_MATRIX_CLASSES, Origin
from dragonclf.evaluate.report import write_evaluation
from tests.unit.evaluations import (
    CLASSES,
    CONTRASTS,
    HOSTILE_COLUMN,
    ODD_NAME,
    SCRIPT,
    bad_rows,
    counted,
    evaluated_frame,
    opened,
    shown,
    value,
)

FACTS = {"model": "dragons v3", "data set": 's3://bucket/"dragons" & co/', "split": "valid"}
TEMPERATURE = 1.6
SIZES = {"train": {SCRIPT: 1200, "viserion": 900}, "valid": {SCRIPT: 22, "viserion": 18}}
ORIGIN = Origin(facts=FACTS | {"Versions": {"torch": "2.8 <b>"}}, splits=SIZES, temperature=TEMPERATURE)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Path]:
    """A frame of 44 rows, 40 of which count, and the folder of its evaluation; one picture broke since."""
    folder = tmp_path_factory.mktemp("dragons")
    good = evaluated_frame(folder, num_images=40, classes=CLASSES)
    frame = pd.concat([good, bad_rows(folder).astype({"confidence": float})], ignore_index=True)
    surest = good[good["input_label"] == "viserion"].sort_values("prob_viserion").iloc[-1]
    Path(surest["uri"]).write_bytes(Path(surest["uri"]).read_bytes()[:200])
    out = tmp_path_factory.mktemp("evaluation")
    write_evaluation(frame, classes=CLASSES, out_uri=str(out), title="Drogon or <viserion>?", origin=ORIGIN)
    return frame, out


def calibration_error(targets: np.ndarray, viserion: np.ndarray) -> float:
    sure, right = np.maximum(viserion, 1 - viserion), (viserion > 0.5) == targets
    bins = np.digitize(sure, np.linspace(0, 1, 16), right=True)
    return sum(abs((sure - right)[bins == number].sum()) for number in range(1, 16)) / len(sure)


def test_the_files(evaluation: tuple[pd.DataFrame, Path]) -> None:
    frame, out = evaluation
    slugs = [
        "most-correct-0-script-alert-1-script", "most-correct-1-viserion", "most-incorrect-0-script-alert-1-script",
        "most-incorrect-1-viserion", "most-uncertain", "random-correct", "random-incorrect",
    ]  # fmt: skip
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        "confusion_matrix.png",
        *(f"galleries/{slug}.png" for slug in slugs),
        "metrics.json",
        "predictions.parquet",
        "report.html",
    ]
    assert max(out.rglob("*.*"), key=lambda path: path.stat().st_mtime_ns).name == "report.html"
    assert all(Image.open(io.BytesIO(path.read_bytes())).format == "PNG" for path in out.rglob("*.png"))
    kept = pd.read_parquet(out / "predictions.parquet")
    pd.testing.assert_frame_equal(kept.drop(columns="error"), frame.drop(columns="error"))
    assert kept["error"].fillna("").tolist() == frame["error"].fillna("").tolist()

    targets, viserion = counted(frame)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["num_images"] == 40
    assert metrics["accuracy"] == pytest.approx(((viserion > 0.5) == targets).mean())
    assert metrics["auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(targets, viserion), abs=1e-6)
    assert metrics["confusion"] == sklearn.metrics.confusion_matrix(targets, viserion > 0.5).tolist()


def test_the_same_evaluation_again_gives_the_same_page(evaluation: tuple[pd.DataFrame, Path], tmp_path: Path) -> None:
    frame, out = evaluation
    write_evaluation(frame, classes=CLASSES, out_uri=str(tmp_path), title="Drogon or <viserion>?", origin=ORIGIN)
    assert (tmp_path / "report.html").read_bytes() == (out / "report.html").read_bytes()


def test_the_page_stands_alone(evaluation: tuple[pd.DataFrame, Path]) -> None:
    html = (evaluation[1] / "report.html").read_text()
    assert len(html.encode()) < MAX_PAGE_BYTES
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", html, flags=re.DOTALL)
    assert [attributes for attributes, _ in scripts] == [' type="application/json" id="data"', ""]
    digest = base64.b64encode(hashlib.sha256(scripts[1][1].encode()).digest()).decode()
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert re.findall(r"(?:src|href)=\"(?!data:)", html) == []
    assert re.findall(r"\son[a-z]+=|innerHTML|eval\(", html) == [" onerror="]  # in a value of the manifest, escaped
    thumbnails = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    assert len(thumbnails) > 20


def test_the_page_in_a_browser(evaluation: tuple[pd.DataFrame, Path], browser: Browser) -> None:
    frame, out = evaluation
    with opened(browser, out) as page:
        assert page.title() == page.inner_text("h1") == "Drogon or <viserion>?"
        assert page.get_attribute("html", "lang") == "en"

        targets, viserion = counted(frame)
        correct = (viserion > 0.5) == targets
        with_temperature = np.stack([1 - viserion, viserion], axis=1) ** TEMPERATURE
        uncalibrated = (with_temperature / with_temperature.sum(axis=1, keepdims=True))[:, 1]
        figures = {
            "accuracy": correct.mean(),
            "auroc": sklearn.metrics.roc_auc_score(targets, viserion),
            "log-loss": sklearn.metrics.log_loss(targets, viserion),
            "ece": calibration_error(targets, viserion),
            "ece-before": calibration_error(targets, uncalibrated),
        }
        assert {name: value(page, f"#{name}") for name in figures} == pytest.approx(figures, abs=1e-6)
        assert shown(page, "#accuracy") == f"{100 * correct.mean():.1f} %"
        assert shown(page, "#auroc") == f"{sklearn.metrics.roc_auc_score(targets, viserion):.3f}"
        assert shown(page, "#log-loss") == f"{sklearn.metrics.log_loss(targets, viserion):.3f}"
        assert shown(page, "#ece") == f"{calibration_error(targets, viserion):.3f}"
        assert shown(page, "#num-images") == "40"
        assert shown(page, "#left-out") == "4 images left out: 2 unreadable, 1 missing, 1 no true label"
        assert page.locator("table.plain tr").all_inner_texts() == [
            *(f"{name}\t{fact}" for name, fact in FACTS.items()),
            "Versions\t\n1 entries",
        ]
        page.get_by_text("1 entries").click()
        assert page.locator("dl.pairs").inner_text().split("\n") == ["torch", "2.8 <b>"]
        assert [text.split("\t") for text in page.locator("#sizes tbody tr").all_inner_texts()] == [
            [SCRIPT, "1,200", "22"], ["viserion", "900", "18"], ["all 2 classes", "2,100", "40"],
        ]  # fmt: skip
        confusion = sklearn.metrics.confusion_matrix(targets, viserion > 0.5)
        cells = page.locator("#confusion td").all_inner_texts()
        assert [int(cell.split()[0]) for cell in cells] == confusion.flatten().tolist()
        per_class = np.array(sklearn.metrics.precision_recall_fscore_support(targets, viserion > 0.5)).T
        exact = page.locator("#per-class data").evaluate_all("all => all.map(one => Number(one.value))")
        assert exact == pytest.approx(per_class[:, :3].flatten(), abs=1e-6)
        assert [text.split("\t") for text in page.locator("#per-class tbody tr").all_inner_texts()] == [
            [name, f"{precision:.3f}", f"{recall:.3f}", f"{f1:.3f}", f"{support:.0f}"]
            for name, (precision, recall, f1, support) in zip(CLASSES, per_class, strict=True)
        ]
        left_out = [text.split("\t") for text in page.locator("#left-out-list tbody tr").all_inner_texts()]
        assert left_out == [
            [uri, "no true label" if status == "ok" else status, "" if pd.isna(error) else error]
            for uri, status, error in frame.loc[40:, ["uri", "status", "error"]].itertuples(index=False)
        ]


def test_the_galleries_in_a_browser(evaluation: tuple[pd.DataFrame, Path], browser: Browser) -> None:
    frame, out = evaluation
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto((out / "report.html").as_uri())
    assert page.locator("section.gallery h3").all_inner_texts() == [
        "Random correct", "Random incorrect", "Most correct", "Most incorrect", "Most uncertain",
    ]  # fmt: skip
    assert f"Most incorrect: {SCRIPT}" in page.locator("section.gallery h4").all_inner_texts()
    widths = page.locator("section.gallery img").evaluate_all("all => all.map(one => one.naturalWidth)")
    assert len(widths) > 20
    assert set(widths) == {224}
    assert page.locator("section.gallery img:not([alt])").count() == 0

    counted_frame = frame[(frame["status"] == "ok") & frame["input_label"].notna()].set_index("uri")
    captions = page.locator("section.gallery li").all_inner_texts()
    assert any(ODD_NAME in text for text in captions)
    for text in captions:
        lines = [line for line in text.replace("\xa0", " ").split("\n") if line]
        row = counted_frame.loc[lines[-1]]
        said = dict(
            zip(lines[lines.index("predicted") : -1 : 2], lines[lines.index("predicted") + 1 : -1 : 2], strict=True)
        )
        assert said["predicted"] == row["label"]
        assert said["actual"] == row["input_label"]
        assert said["probability"] == f"{100 * row['confidence']:.1f} %"
        assert ("of the actual" in said) == (row["label"] != row["input_label"])
    tiles = page.locator(".missing").all_inner_texts()
    assert tiles
    assert all(text.startswith("unreadable: cannot be decoded") for text in tiles)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone(evaluation: tuple[pd.DataFrame, Path], browser: Browser, scheme: str) -> None:
    with opened(browser, evaluation[1], width=375, color_scheme=scheme) as page:
        look_around(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        assert page.evaluate(CONTRASTS) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(evaluation: tuple[pd.DataFrame, Path], browser: Browser, scheme: str) -> None:
    with opened(browser, evaluation[1], color_scheme=scheme) as page:
        look_around(page)
        found = Axe().run(page).response["violations"]
        assert [(one["id"], one["impact"], [node["html"] for node in one["nodes"]]) for one in found] == []


def look_around(page: Page) -> None:
    """Open all that can be opened."""
    page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true; })")
    page.locator(".cell").first.click()
    page.fill("#threshold-number", "0.8")
    page.press("#threshold-number", "Enter")
    page.click("#cost-choose")


def test_without_scripts(evaluation: tuple[pd.DataFrame, Path], browser: Browser) -> None:
    frame, out = evaluation
    targets, viserion = counted(frame)
    with opened(browser, out, java_script_enabled=False) as page:
        assert page.locator("input, select, .plain-button").all() != []
        assert not any(one.is_visible() for one in page.locator("input, select, .plain-button").all())
        assert page.locator(".cell:enabled").count() == 0
        assert shown(page, ".unscripted") == "At 0.5:"
        f1 = sklearn.metrics.f1_score(targets, viserion >= 0.5)
        assert value(page, "#at-f1") == pytest.approx(f1, abs=1e-6)
        assert page.locator("svg[role=img]").count() == 4


def test_charts_say_what_they_show(evaluation: tuple[pd.DataFrame, Path], browser: Browser) -> None:
    frame, out = evaluation
    targets, viserion = counted(frame)
    area, precision = (
        score(targets, viserion) for score in (sklearn.metrics.roc_auc_score, sklearn.metrics.average_precision_score)
    )
    with opened(browser, out) as page:
        assert value(page, ".class-auroc") == pytest.approx(area, abs=1e-6)
        assert value(page, ".class-ap") == pytest.approx(precision, abs=1e-6)
        roc = page.get_by_role("img", name="ROC curve of viserion")
        assert roc.locator("desc").text_content() == (
            f"True positive rate over false positive rate; the area under it is {area:.3f}."
        )
        left, top, width, height = map(float, (roc.get_attribute("data-plot") or "").split())
        pixels = [point.split(",") for point in (roc.locator(".first").get_attribute("points") or "").split()]
        false_rate, true_rate, _ = sklearn.metrics.roc_curve(targets, viserion, drop_intermediate=False)
        drawn = np.array(pixels, dtype=float)
        np.testing.assert_allclose(drawn[:, 0], left + width * false_rate, atol=0.06)
        np.testing.assert_allclose(drawn[:, 1], top + height * (1 - true_rate), atol=0.06)
        table = [text.split("\t") for text in page.locator("#reliability-table tbody tr").all_inner_texts()]
    sure, right = np.maximum(viserion, 1 - viserion), (viserion > 0.5) == targets
    bins = np.digitize(sure, np.linspace(0, 1, 16), right=True)
    assert table == [
        [
            f"{(number - 1) / 15:.3f} to {number / 15:.3f}", str((bins == number).sum()),
            f"{sure[bins == number].mean():.3f}", f"{right[bins == number].mean():.3f}",
        ]
        for number in np.unique(bins).tolist()
    ]  # fmt: skip


def test_slices(evaluation: tuple[pd.DataFrame, Path], browser: Browser) -> None:
    frame, out = evaluation
    rows = frame[(frame["status"] == "ok") & frame["input_label"].notna()]
    right = rows["label"] == rows["input_label"]
    with opened(browser, out) as page:
        names = page.locator(".slicing summary bdi").all_inner_texts()
        assert names == ["camera", "exposure", HOSTILE_COLUMN, "type of the file"]  # all images are of one size
        page.locator(".slicing summary").nth(2).press("Enter")
        table = page.locator(".slicing").nth(2).locator("tbody tr")
        found = {}
        for row in table.all():
            cells = [text.replace("\xa0", " ") for text in row.locator("th, td").all_inner_texts()]
            found[cells[0]] = (cells[1], float(row.locator("data").get_attribute("value") or "nan"))
    grouped = right.groupby(rows[HOSTILE_COLUMN])
    assert found == {name: (f"{len(part)} (few)", pytest.approx(part.mean(), abs=1e-12)) for name, part in grouped}
    assert list(found) == grouped.mean().sort_values().index.tolist()


def test_no_mistakes_and_one_class_only(tmp_path: Path, browser: Browser) -> None:
    frame = evaluated_frame(tmp_path, num_images=3, classes=["drogon", "viserion"])
    frame[["input_label", "prob_drogon", "prob_viserion"]] = ["drogon", 0.9, 0.1]
    metrics = write_evaluation(
        frame, classes=["drogon", "viserion"], out_uri=str(tmp_path / "out"), title="t", origin=Origin()
    )
    assert (metrics.accuracy, metrics.auroc) == (1.0, None)
    html = (tmp_path / "out" / "report.html").read_text()
    assert '<p class="none">None: no image predicted wrong.</p>' in html
    assert "undefined: all images are of one class" in html
    assert "no image left out" in html
    with opened(browser, tmp_path / "out") as page:
        page.click("#cost-choose")  # at the least cost nothing is taken for viserion
        assert [value(page, f"#at-{name}") for name in ("tp", "fp", "fn", "tn")] == [0, 0, 0, 3]
        assert shown(page, "#at-f1") == "–"


def test_many_classes_and_many_pictures_stay_under_the_limit(tmp_path: Path, browser: Browser) -> None:
    classes = [f"class {k:03}" for k in range(120)]
    frame = evaluated_frame(tmp_path, num_images=600, classes=classes, seed=3)
    noise = np.random.default_rng(0).integers(0, 256, (60, 224, 224, 3), dtype=np.uint8)  # what JPEG compresses worst
    for index, uri in enumerate(frame["uri"]):
        Image.fromarray(noise[index % 60]).save(uri)
    out = tmp_path / "out"
    metrics = write_evaluation(
        frame, classes=classes, out_uri=str(out), title="t", origin=Origin(), per_gallery=MAX_PER_GALLERY
    )
    html = (out / "report.html").read_text()
    assert 500_000 < len(html.encode()) <= MAX_PAGE_BYTES
    thumbnail = re.search(r'src="data:image/jpeg;base64,([^"]+)"', html)
    assert thumbnail is not None
    assert len(classes) > MAX_MATRIX_CLASSES
    assert '<table class="matrix"' not in html
    assert f"the {MAX_GALLERY_CLASSES} with the most mistakes" in html
    wrong = np.array(metrics.confusion)
    np.fill_diagonal(wrong, 0)
    pairs = re.findall(
        r'<tr><td><bdi>(.*?)</bdi></td><td><bdi>(.*?)</bdi></td><td class="number"><button .*?>(\d+)</button></td></tr>',
        html,
    )
    assert len(pairs) == MAX_LISTED
    assert [int(count) for *_, count in pairs] == sorted(wrong.flatten().tolist(), reverse=True)[:MAX_LISTED]
    assert all(
        wrong[classes.index(actual), classes.index(predicted)] == int(count) for actual, predicted, count in pairs
    )
    table = html[html.index('id="per-class"') :]
    assert table[: table.index("</table>")].count('<th scope="row">') == 100
    assert len(list((out / "galleries").iterdir())) == 3 + 2 * MAX_GALLERY_CLASSES
    with opened(browser, out, width=375) as page:
        page.locator("#confusions .cell").first.click()
        assert shown(page, "#cell-heading").startswith(
            f"{pairs[0][2]} images of {pairs[0][0]} predicted as {pairs[0][1]}"
        )
        assert page.get_by_label("Class", exact=True).locator("option").count() == MAX_GALLERY_CLASSES
        assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_refusals_write_nothing(tmp_path: Path) -> None:
    frame = evaluated_frame(tmp_path, num_images=4, classes=["drogon", "viserion"])
    out = tmp_path / "out"

    def write(rows: pd.DataFrame, **options: int) -> None:
        write_evaluation(rows, classes=["drogon", "viserion"], out_uri=str(out), title="t", origin=Origin(), **options)

    with pytest.raises(
        ValueError, match=r"input_label 'rhaegal' .* classes \['drogon', 'viserion'\]: correct the labels"
    ):
        write(frame.assign(input_label="rhaegal"))
    with pytest.raises(ValueError, match=r"no image to measure among 4 rows \(4 missing\): evaluate a split"):
        write(frame.assign(status="missing"))
    with pytest.raises(ValueError, match="per_gallery is 25"):
        write(frame, per_gallery=25)
    assert not out.exists()
