"""What the page's script answers, to keys and to the mouse, against numbers computed apart."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page

from dragonclf.evaluate import page_data
from dragonclf.evaluate.page import Origin
from dragonclf.evaluate.report import write_evaluation
from dragonclf.train import checkpoint, lr_find
from dragonclf.verbs.run_pictures import training_of
from tests.unit.evaluations import CLASSES, SCRIPT, counted, evaluated_frame, opened, shown, value

MANY = [f"class <{k}>" for k in range(7)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Path]:
    """150 images of two classes, float32 probabilities as scored ones are, and the folder of their evaluation."""
    return evaluated(tmp_path_factory, classes=CLASSES, num_images=150)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Path]:
    return evaluated(tmp_path_factory, classes=MANY, num_images=240)


def evaluated(factory: pytest.TempPathFactory, *, classes: list[str], num_images: int) -> tuple[pd.DataFrame, Path]:
    frame = evaluated_frame(factory.mktemp("dragons"), num_images=num_images, classes=classes, seed=5)
    frame = frame.astype({f"prob_{name}": np.float32 for name in classes})
    out = factory.mktemp("evaluation")
    write_evaluation(frame, classes=classes, out_uri=str(out), title="Dragons", origin=Origin())
    return frame, out


def check_threshold(page: Page, is_positive: np.ndarray, prob: np.ndarray, threshold: float) -> None:
    """Every figure at a threshold is scikit-learn's."""
    assert float(page.input_value("#threshold-number")) == threshold
    taken = prob >= threshold
    tn, fp, fn, tp = sklearn.metrics.confusion_matrix(is_positive, taken, labels=[False, True]).ravel().tolist()
    assert [value(page, f"#at-{name}") for name in ("tp", "fp", "fn", "tn")] == [tp, fp, fn, tn]
    scores = {
        "precision": sklearn.metrics.precision_score(is_positive, taken) if taken.any() else np.nan,
        "recall": sklearn.metrics.recall_score(is_positive, taken),
        "f1": sklearn.metrics.f1_score(is_positive, taken),
    }
    found = {name: value(page, f"#at-{name}") for name in scores}
    assert found == pytest.approx(scores, abs=1e-6, nan_ok=True)
    for name, score in scores.items():
        assert shown(page, f"#at-{name}") == ("–" if np.isnan(score) else f"{score:.3f}")
    assert value(page, "#flips") == (taken != (prob >= 0.5)).sum()


def test_the_slider_by_keyboard(two: tuple[pd.DataFrame, Path], browser: Browser) -> None:
    targets, viserion = counted(two[0])
    with opened(browser, two[1]) as page:
        check_threshold(page, targets == 1, viserion, 0.5)
        slider = page.get_by_role("slider", name="Threshold")
        slider.focus()
        for _ in range(7):
            page.keyboard.press("ArrowRight")
        check_threshold(page, targets == 1, viserion, 0.507)
        page.keyboard.press("Home")
        check_threshold(page, targets == 1, viserion, 0)
        page.keyboard.press("End")
        check_threshold(page, targets == 1, viserion, 1.001)
        page.keyboard.press("Tab")  # to the number beside it
        for threshold in ("0.25", "0.61", repr(float(viserion[3])), "0.999"):
            page.keyboard.press("Control+a")
            page.keyboard.type(threshold)
            page.keyboard.press("Enter")
            check_threshold(page, targets == 1, viserion, float(threshold))
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")  # back to the start
        check_threshold(page, targets == 1, viserion, 0.5)


def test_the_slider_by_mouse_and_what_flips(two: tuple[pd.DataFrame, Path], browser: Browser) -> None:
    frame, out = two
    targets, viserion = counted(frame)
    with opened(browser, out) as page:
        slider = page.get_by_role("slider", name="Threshold")
        slider.scroll_into_view_if_needed()
        box = slider.bounding_box()
        assert box is not None
        for share in (0.3, 0.8):
            page.mouse.click(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
            threshold = float(page.input_value("#threshold-number"))
            assert threshold == pytest.approx(share, abs=0.02)
            check_threshold(page, targets == 1, viserion, threshold)
            flipped = frame[(viserion >= threshold) != (viserion >= 0.5)]
            nearest_first = flipped.iloc[np.argsort(np.abs(flipped["prob_viserion"] - threshold), kind="stable")]
            assert sorted(uris_in(page.locator("#flip-images"))) == sorted(flipped["uri"])
            tiles = page.locator("#flip-images .tiles .uri").all_inner_texts()
            assert tiles == [uri for uri in nearest_first["uri"] if uri in set(tiles)]
        roc = page.locator("#roc-1")
        left, top, width, height = map(float, (roc.get_attribute("data-plot") or "").split())
        marker = roc.locator(".marker")
        taken = viserion >= threshold
        assert float(marker.get_attribute("cx") or 0) == pytest.approx(left + width * taken[targets == 0].mean())
        assert float(marker.get_attribute("cy") or 0) == pytest.approx(top + height * (1 - taken[targets == 1].mean()))


def uris_in(box: Locator) -> list[str]:
    """Of the pictures and of the list below them."""
    return box.locator(".uri, .uris bdi").all_inner_texts()


@pytest.mark.parametrize("costs", [(1, 1), (5, 1), (1, 5), (0.5, 20), (1, 0)])
def test_the_threshold_of_least_cost(
    two: tuple[pd.DataFrame, Path], browser: Browser, costs: tuple[float, float]
) -> None:
    targets, viserion = counted(two[0])
    candidates = np.append(np.unique(viserion), 1.001)
    in_all = [
        costs[0] * ((viserion >= one) & (targets == 0)).sum() + costs[1] * ((viserion < one) & (targets == 1)).sum()
        for one in candidates.tolist()
    ]
    with opened(browser, two[1]) as page:
        assert not page.locator("#cost-told").is_visible()
        for label, cost in zip(("Cost of a false positive", "of a false negative"), costs, strict=True):
            page.get_by_label(label).fill(str(cost))
        assert value(page, "#cost") == pytest.approx(
            costs[0] * value(page, "#at-fp") + costs[1] * value(page, "#at-fn"), abs=1e-9
        )
        page.get_by_role("button", name="Take the threshold of least cost").press("Enter")
        threshold = float(page.input_value("#threshold-number"))
        assert value(page, "#cost") == pytest.approx(min(in_all), abs=1e-9)
        best = candidates[np.isclose(in_all, min(in_all), rtol=0, atol=1e-9)]
        assert threshold == best[np.abs(best - 0.5).argmin()]
        check_threshold(page, targets == 1, viserion, threshold)
        assert "was chosen on these very images" in shown(page, "#cost-told")
        page.get_by_role("slider", name="Threshold").press("ArrowLeft")
        assert not page.locator("#cost-told").is_visible()


def test_a_model_with_thresholds_starts_there(two: tuple[pd.DataFrame, Path], browser: Browser, tmp_path: Path) -> None:
    frame, _ = two
    origin = Origin(thresholds={SCRIPT: 0.3, "viserion": 0.8125})
    write_evaluation(frame, classes=CLASSES, out_uri=str(tmp_path), title="Dragons", origin=origin)
    targets, viserion = counted(frame)
    with opened(browser, tmp_path) as page:
        check_threshold(page, targets == 1, viserion, 0.8125)
        page.get_by_role("slider", name="Threshold").press("Home")
        page.get_by_role("button", name="Back to 0.8125").click()
        check_threshold(page, targets == 1, viserion, 0.8125)


def test_cells_show_their_images(two: tuple[pd.DataFrame, Path], browser: Browser) -> None:
    frame, out = two
    with opened(browser, out) as page:
        cells = page.locator("#confusion .cell")
        assert cells.count() == 4
        for number, (actual, predicted) in enumerate((a, p) for a in CLASSES for p in CLASSES):
            if number % 2:
                cells.nth(number).click()
            else:
                cells.nth(number).press("Enter")
            there = frame[(frame["input_label"] == actual) & (frame["label"] == predicted)]
            assert shown(page, "#cell-heading") == f"{len(there)} images of {actual} predicted as {predicted}"
            assert sorted(uris_in(page.locator("#cell-images"))) == sorted(there["uri"])
            assert page.locator("#cell-images img").count() >= min(page_data.PER_CELL, len(there))
            assert page.locator("[aria-pressed=true]").count() == 1
            tile = page.locator("#cell-images .tiles li").first
            row = frame.set_index("uri").loc[tile.locator(".uri").inner_text()]
            assert f"{100 * row['confidence']:.1f} %" in tile.inner_text().replace("\xa0", " ")
            assert tile.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 224
        cells.nth(3).press("Space")
        assert shown(page, "#cell-heading") == ""
        assert page.locator("#cell-images > *").count() == 0


def test_what_is_not_in_the_page_is_counted(
    two: tuple[pd.DataFrame, Path], browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame, _ = two
    monkeypatch.setattr(page_data, "MAX_LISTED_BYTES", 2_000)
    write_evaluation(frame, classes=CLASSES, out_uri=str(tmp_path), title="Dragons", origin=Origin())
    targets, viserion = counted(frame)
    with opened(browser, tmp_path) as page:
        page.locator("#confusion .cell").first.click()
        total = int(shown(page, "#cell-heading").split()[0])
        left = total - len(uris_in(page.locator("#cell-images")))
        assert 0 < left < total
        assert f"{left} more: predictions.parquet holds all." in page.inner_text("#cell-images")
        page.fill("#threshold-number", "0.1")
        page.press("#threshold-number", "Enter")
        check_threshold(page, targets == 1, viserion, 0.1)
        named = len(uris_in(page.locator("#flip-images")))
        assert f"{value(page, '#flips') - named:.0f} more" in page.inner_text("#flip-images")


def test_many_classes(many: tuple[pd.DataFrame, Path], browser: Browser) -> None:
    frame, out = many
    wrong = frame[frame["label"] != frame["input_label"]]["input_label"].value_counts()
    most_first = sorted(MANY, key=lambda name: (-wrong.get(name, 0), name))
    with opened(browser, out) as page:
        select = page.get_by_label("Class", exact=True)
        assert select.locator("option").all_inner_texts() == most_first
        select.focus()
        for number, name in enumerate(most_first):
            if number:
                page.keyboard.press("ArrowDown")
            [block] = [one for one in page.locator(".of-class").all() if one.is_visible()]
            assert block.locator("h3").inner_text() == name
            is_positive, prob = (frame["input_label"] == name).to_numpy(), frame[f"prob_{name}"].to_numpy(float)
            area = sklearn.metrics.roc_auc_score(is_positive, prob)
            assert value_of(block, ".class-auroc") == pytest.approx(area, abs=1e-6)
            precision = sklearn.metrics.average_precision_score(is_positive, prob)
            assert value_of(block, ".class-ap") == pytest.approx(precision, abs=1e-6)
            check_threshold(page, is_positive, prob, 0.5)
        is_positive, prob = (
            (frame["input_label"] == most_first[-1]).to_numpy(),
            frame[f"prob_{most_first[-1]}"].to_numpy(float),
        )
        page.fill("#threshold-number", "0.1234")  # figures are exact at thousandths
        page.press("#threshold-number", "Enter")
        check_threshold(page, is_positive, prob, 0.123)
        flipped = frame[(prob >= 0.123) != (prob >= 0.5)]
        assert sorted(uris_in(page.locator("#flip-images"))) == sorted(flipped["uri"])

        pair = page.locator("#confusions tbody tr").first
        actual, predicted = pair.locator("bdi").all_inner_texts()
        pair.locator(".cell").press("Enter")
        there = frame[(frame["input_label"] == actual) & (frame["label"] == predicted)]
        assert shown(page, "#cell-heading") == f"{len(there)} images of {actual} predicted as {predicted}"
        assert sorted(uris_in(page.locator("#cell-images"))) == sorted(there["uri"])


def test_axe_finds_nothing_with_many_classes(many: tuple[pd.DataFrame, Path], browser: Browser) -> None:
    with opened(browser, many[1]) as page:
        page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true; })")
        page.locator("#confusions .cell").first.click()
        assert [(one["id"], one["impact"]) for one in Axe().run(page).response["violations"]] == []


def value_of(box: Locator, selector: str) -> float:
    return float(box.locator(selector).get_attribute("value") or "nan")


def test_galleries_can_be_filtered(two: tuple[pd.DataFrame, Path], browser: Browser) -> None:
    with opened(browser, two[1]) as page:
        tiles = page.locator("section.gallery li[data-actual]")
        said = [text.replace("\xa0", " ").split("\n") for text in tiles.all_inner_texts()]
        of_class = page.get_by_label("True class", exact=True)
        of_class.focus()
        page.keyboard.type("vis")  # a list finds what is typed
        page.get_by_label("Predicted", exact=True).select_option("wrong")
        left = [one.inner_text().replace("\xa0", " ").split("\n") for one in tiles.all() if one.is_visible()]
        wanted = [
            lines for lines in said if "of the actual" in lines and lines[lines.index("actual") + 1] == "viserion"
        ]
        assert 0 < len(wanted) < len(said)
        assert left == wanted
        assert shown(page, "#filter-told") == f"{len(wanted)} pictures shown"


def test_the_training_of_a_run(two: tuple[pd.DataFrame, Path], browser: Browser, tmp_path: Path) -> None:
    frame, _ = two
    losses = [2.5, 1.25, 0.625]
    epochs = [
        {"epoch": n + 1.0, "train_loss": loss, "valid_loss": loss + 0.25, "valid_accuracy": 0.5 + n / 8}
        for n, loss in enumerate(losses)
    ]
    steps = [{"step": n + 1.0, "loss": 3 - n / 8, "lr": 0.01 * (1 - n / 12)} for n in range(12)]
    run = str(tmp_path / "run")
    checkpoint.write_results(run, epochs, steps)
    found = lr_find.Sweep(
        lrs=[1e-5, 1e-4, 1e-3, 1e-2],
        losses=[2.0, 1.5, 1.0, 3.0],
        smoothed=[2.0, 1.75, 1.5, 2.0],
        valley=1e-4,
        steep=1e-3,
    )
    (tmp_path / "run" / lr_find.FOUND).write_text(found.model_dump_json())
    out = tmp_path / "out"
    origin = Origin(training=training_of(run))
    write_evaluation(frame, classes=CLASSES, out_uri=str(out), title="Dragons", origin=origin)
    with opened(browser, out) as page:
        titles = ["Losses", "Validation accuracy", "Learning rate", "Learning-rate finder"]
        assert page.locator(".chart figcaption").all_inner_texts()[:4] == titles
        told = [page.get_by_role("img", name=name).locator("desc").text_content() for name in titles[:2]]
        assert told == [
            "Training and validation loss by epoch; 0.625 and 0.875 in the last.",
            "Validation accuracy over the epochs; the best is 0.750.",
        ]
        page.locator("summary", has_text="Figures of the epochs").press("Enter")
        assert [text.split("\t") for text in page.locator("#epochs tbody tr").all_inner_texts()] == [
            [f"{row[name]:.5g}" for name in epochs[0]] for row in epochs
        ]
        points = page.locator("#losses polyline.first.line").get_attribute("points") or ""
        x, y = np.array([point.split(",") for point in points.split()], dtype=float).T
        assert np.diff(x) == pytest.approx(np.diff(x)[0], abs=0.11)  # epochs lie evenly
        assert np.diff(y)[0] == pytest.approx(2 * np.diff(y)[1], abs=0.2)  # as the losses halve
        marks = page.locator("#lr-find circle.second")
        places = [float(mark.get_attribute("cx") or 0) for mark in marks.all()]
        left, _, width, _ = map(float, (page.get_attribute("#lr-find", "data-plot") or "").split())
        assert places == pytest.approx([left + width / 3, left + 2 * width / 3], abs=0.06)  # of three decades
