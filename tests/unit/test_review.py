"""`review`: which pictures it chooses, against hand-computed rankings; and its page, driven by keys in a browser up to the new labels."""

import csv
import io
import json
import logging
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page

from dragonclf import storage
from dragonclf.config import ReviewConfig
from dragonclf.data.corrections import read_corrections
from dragonclf.evaluate import review as page_module
from dragonclf.evaluate.page import Origin
from dragonclf.evaluate.report import write_evaluation
from dragonclf.verbs.review import ReviewSummary, review
from tests.unit.test_corrections import correct, rows_of
from tests.unit.test_diff import Row, publish, scored
from tests.unit.test_report import CONTRASTS
from tests.unit.test_snapshot import image

SCRIPT = "<script>alert(1)</script>"
ODD_NAMES = [
    'a "quoted", name.png', "two\nlines.png", "carriage\r\nreturn.png", "дракон 龍 🐉.png", "</script><b>bold</b>.png",
    "bare\rreturn =1+1 '.png", "עברית.png",
]  # fmt: skip


def save_pictures(folder: Path, names: list[str], *, side: int = 48) -> dict[str, str]:
    """Pictures in `folder`, and the etag of each, by uri."""
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / name)
    return {found.uri: found.etag for found in storage.list_objects(str(folder)) if found.etag}


def table_of(
    folder: Path,
    probs: dict[str, tuple[float, ...] | None],
    classes: list[str],
    labels: Sequence[str | None] | None = None,
) -> pa.Table:
    """Scored rows of pictures that are there, with what they are labelled."""
    etags = save_pictures(folder, list(probs))
    uris = {name: f"{folder}/{name}" for name in probs}
    rows = [Row(uris[name], row, "ok" if row else "unreadable", etags[uris[name]]) for name, row in probs.items()]
    table = scored(rows, classes)
    return table if labels is None else table.append_column("input_label", pa.array(labels, pa.string()))


def look(run: str | Path, out: Path, **options: Any) -> tuple[ReviewSummary, list[str], dict[str, Any]]:
    """What `review` says, the names of the pictures in the order of the page, and the page's data."""
    summary = review(ReviewConfig(run=str(run), out=str(out), **options))
    html = (out / "review.html").read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    data = json.loads(found[1])
    assert summary.num_pictures == len(data["items"]) == html.count("<figure")
    return summary, [Path(item["uri"]).name for item in data["items"]], data


CATS = {
    "1.png": (0.9, 0.1), "2.png": (0.4, 0.6), "3.png": (0.3, 0.7), "4.png": (0.55, 0.45), "5.png": None, "6.png": (0.2, 0.8),
}  # fmt: skip
CAT_LABELS = ["cat", "cat", "dog", "dog", "cat", None]


def test_the_highest_loss_first(tmp_path: Path):
    run = publish(tmp_path / "s", table_of(tmp_path / "in", CATS, ["cat", "dog"], CAT_LABELS))
    summary, names, data = look(tmp_path / "s", tmp_path / "out")
    assert (summary.by, summary.num_candidates, summary.left_out) == ("loss", 4, {})
    assert names == ["2.png", "4.png", "3.png", "1.png"], "of the label: 0.4, 0.45, 0.7, 0.9"
    assert data["run"] == run
    first = data["items"][0]
    assert (first["label"], first["predicted"], first["likeliest"]) == ("cat", "dog", ["dog", "cat"])
    assert (first["prob_label"], first["prob_predicted"]) == pytest.approx((0.4, 0.6), abs=1e-6)
    assert look(run, tmp_path / "out", worst=2)[1] == ["2.png", "4.png"]


def test_the_closest_call_first_where_there_is_no_label(tmp_path: Path):
    publish(tmp_path / "s", table_of(tmp_path / "in", CATS, ["cat", "dog"]))
    summary, names, data = look(tmp_path / "s", tmp_path / "out")
    assert (summary.by, summary.num_candidates) == ("uncertain", 5)
    assert names == ["4.png", "2.png", "3.png", "6.png", "1.png"], "margins 0.1, 0.2, 0.4, 0.6, 0.8"
    assert {item["label"] for item in data["items"]} == {None}
    with pytest.raises(ValueError, match=r"no predicted image of .* has a label of the model: use --by uncertain"):
        look(tmp_path / "s", tmp_path / "out", by="loss")


def test_random_ones_are_drawn_by_the_seed(tmp_path: Path):
    probs: dict[str, tuple[float, ...] | None] = {f"{i:02d}.png": (0.5, 0.5) for i in range(20)}
    table = table_of(tmp_path / "in", probs, ["cat", "dog"])
    publish(tmp_path / "a", table)
    publish(tmp_path / "b", table.take(list(range(19, -1, -1))).sort_by("uri"), shard_images=7)
    orders = [look(tmp_path / "a", tmp_path / "out", by="random", seed=seed)[1] for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(probs)
    assert look(tmp_path / "b", tmp_path / "out", by="random")[1] == orders[0]


def test_many_classes_in_a_list_column_and_a_label_that_was_never_predicted(tmp_path: Path):
    """Past 32 classes rows name only what they predict: a label without a place has no known probability."""
    classes = [f"class {k:02d}" for k in range(40)]
    rng = np.random.default_rng(1)
    probs = {}
    for number in range(12):
        row = rng.dirichlet(np.full(40, 0.3))
        probs[f"{number:02d}.png"] = tuple(row.tolist())
    predicted = [classes[int(np.argmax(row))] for row in probs.values()]
    never = next(name for name in classes if name not in predicted)
    labels = [*[predicted[0]] * 11, never]
    publish(tmp_path / "s", table_of(tmp_path / "in", probs, classes, labels))
    summary, names, data = look(tmp_path / "s", tmp_path / "out")
    assert summary.num_candidates == 11
    place = classes.index(predicted[0])
    own = {name: row[place] for name, row in list(probs.items())[:11]}
    assert names == sorted(own, key=lambda name: own[name])
    assert set(data["classes"]) == {*predicted, never}
    for item in data["items"]:
        row = np.array(probs[Path(item["uri"]).name])
        known = [classes[k] for k in np.argsort(-row)[:9] if classes[k] in predicted]
        assert item["likeliest"] == known


@pytest.mark.parametrize("num_classes", [3, 40])
def test_the_folder_that_evaluate_wrote(num_classes: int, tmp_path: Path):
    """Its predictions.parquet has a column a class, however many; after the input's own columns where there are many."""
    classes = [f"c{k}" for k in range(num_classes)]
    rng = np.random.default_rng(2)
    names = [f"{number:02d}.png" for number in range(10)]
    etags = save_pictures(tmp_path / "in", names)
    probs = rng.dirichlet(np.ones(num_classes), size=10)
    targets = rng.integers(num_classes, size=10)
    own = {"uri": list(etags), "etag": list(etags.values()), "status": "ok", "error": None,
           "label": [classes[k] for k in probs.argmax(axis=1)], "confidence": probs.max(axis=1)}  # fmt: skip
    further = {"width": 48, "input_label": [classes[k] for k in targets], "camera": "north"}
    answers = {f"prob_{name}": probs[:, k] for k, name in enumerate(classes)}
    frame = pd.DataFrame({**own, **answers, **further} if num_classes == 3 else {**own, **further, **answers})
    write_evaluation(frame, classes=classes, out_uri=str(tmp_path / "report"), title="t", origin=Origin())
    _, found, data = look(tmp_path / "report", tmp_path / "out")
    assert found == [names[k] for k in np.argsort(probs[np.arange(10), targets])]
    assert data["classes"] == classes
    assert data["run"] == str(tmp_path / "report")


def test_what_cannot_be_shown_is_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    publish(tmp_path / "s", table_of(tmp_path / "in", CATS, ["cat", "dog"], CAT_LABELS))
    (tmp_path / "in/2.png").unlink()
    Image.new("RGB", (9, 9)).save(tmp_path / "in/3.png")
    with caplog.at_level(logging.WARNING, logger="dragonclf"):
        summary, names, _ = look(tmp_path / "s", tmp_path / "out")
    assert names == ["4.png", "1.png"]
    assert summary.left_out == {"missing": 1, "replaced": 1}
    assert f"2 of 4 pictures cannot be shown; the first is {tmp_path}/in/2.png: missing" in caplog.text
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"4 of 4 pictures cannot be shown; .*: is this the bucket that was scored\?"):
        look(tmp_path / "s", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_a_run_without_any_prediction_is_refused(tmp_path: Path):
    publish(tmp_path / "s", table_of(tmp_path / "in", {"1.png": None}, ["cat", "dog"]))
    with pytest.raises(ValueError, match=r"no image of .* was predicted"):
        look(tmp_path / "s", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pictures_shrink_until_the_page_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = [f"{number}.png" for number in range(30)]
    etags = save_pictures(tmp_path / "in", names, side=400)  # noise: what JPEG compresses worst
    thumbnails, reasons = page_module.read_thumbnails(list(etags.items()))
    assert reasons == {}
    assert Image.open(io.BytesIO(thumbnails[f"{tmp_path}/in/0.png"])).size == (384, 384)
    shown = [page_module.Candidate(uri, etag, "cat", "dog", 0.9, 0.1, ["dog", "cat"]) for uri, etag in etags.items()]

    def render() -> bytes:
        return page_module.render_review(shown, thumbnails=thumbnails, classes=["cat", "dog"], run="r", order="o")

    whole = len(render())
    for limit in (whole - 1, 200_000):
        monkeypatch.setattr(page_module, "MAX_PAGE_BYTES", limit)
        assert 0.2 * limit < len(render()) <= limit
    monkeypatch.setattr(page_module, "MAX_PAGE_BYTES", 20_000)
    with pytest.raises(ValueError, match="30 pictures are over 20,000 bytes however small: lower --worst"):
        render()


# The page


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    made = browser.new_context(viewport={"width": 1280, "height": 900})
    yield made
    made.close()


CLASSES = [SCRIPT, "viserion", "wyvern"]
LABELS = [SCRIPT, "viserion", SCRIPT, "wyvern", "viserion", None, SCRIPT]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of pictures with odd names, and a page of them, the i-th of the i-th name."""
    folder = tmp_path_factory.mktemp("odd") / "in"
    rows = {name: (0.1 + 0.05 * k, 0.2, 0.7 - 0.05 * k) for k, name in enumerate(ODD_NAMES)}
    etags = save_pictures(folder, ODD_NAMES)
    thumbnails, _ = page_module.read_thumbnails(list(etags.items()))
    shown = [
        page_module.Candidate(
            f"{folder}/{name}", etags[f"{folder}/{name}"], label, "wyvern", rows[name][2], None, CLASSES
        )
        for name, label in zip(ODD_NAMES, LABELS, strict=True)
    ]
    page = page_module.render_review(
        shown, thumbnails=thumbnails, classes=CLASSES, run=f's3://b/"{SCRIPT}"/runs/1-00001', order="for a test"
    )
    (folder.parent / "review.html").write_bytes(page)
    return folder, folder.parent / "review.html"


def open_page(context: BrowserContext, path: Path) -> tuple[Page, list[str]]:
    """A page, and what it complains about or asks of the network from here on."""
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", lambda request: complaints.append(request.url))
    page.goto(path.as_uri())
    assert [text for text in complaints if not text.startswith("data:image/jpeg")] == [path.as_uri()]
    complaints.clear()
    return page, complaints


def save_file(page: Page, folder: Path) -> list[list[str]]:
    """Save corrections.csv into the folder, and return its rows."""
    with page.expect_download() as caught:
        page.click("#download")
    assert caught.value.suggested_filename == "corrections.csv"
    caught.value.save_as(folder / "corrections.csv")
    with (folder / "corrections.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file, strict=True))


def focused(page: Page) -> str:
    return page.evaluate("document.activeElement.getAttribute('aria-labelledby') ?? document.activeElement.id")


def press(page: Page, keys: str) -> None:
    for key in keys.split():
        page.keyboard.press(key)


def test_labels_are_mended_by_keys_alone(context: BrowserContext, hostile: tuple[Path, Path], tmp_path: Path):
    """Up to the snapshot: the file that the page saves is applied to rows of these pictures."""
    folder, path = hostile
    page, complaints = open_page(context, path)
    assert page.title() == f'Review of s3://b/"{SCRIPT}"/runs/1-00001'
    assert page.locator("#pictures figcaption").all_inner_texts()[4].count("</script><b>bold</b>.png") == 1
    assert page.locator("#pictures b, #pictures script").count() == 0
    assert focused(page) == "caption-1"
    press(page, "2")  # 1: viserion
    assert focused(page) == "caption-2"
    press(
        page, "d k ArrowRight d ArrowLeft ArrowLeft 3"
    )  # 2 delete, 3 right, 4 passed by, 5 delete, 4 is wyvern already
    assert page.inner_text("#num-decided") == "5 of 7 decided."
    press(page, "Enter")  # 6 has no label: as predicted
    press(page, "1 u 3")  # 7 is that already: undone, and decided again
    assert page.inner_text("#num-decided") == "7 of 7 decided."
    assert page.inner_text("#tally") == "3 relabelled, 2 deleted, 2 right"
    assert page.is_visible("#done")
    assert "corrections.csv" in page.inner_text("#done")

    listed = {found.uri: found.etag for found in storage.list_objects(str(folder))}
    uris = [f"{folder}/{name}" for name in ODD_NAMES]
    wanted = [
        [uris[0], listed[uris[0]], SCRIPT, "viserion", "relabel"], [uris[1], listed[uris[1]], "viserion", "", "delete"],
        [uris[4], listed[uris[4]], "viserion", "", "delete"], [uris[5], listed[uris[5]], "", "wyvern", "relabel"],
        [uris[6], listed[uris[6]], SCRIPT, "wyvern", "relabel"],
    ]  # fmt: skip
    assert save_file(page, tmp_path) == [["uri", "etag", "old", "new", "reason"], *wanted]
    assert complaints == [url for url in complaints if url.startswith("blob:")]

    file = read_corrections(str(tmp_path / "corrections.csv"))
    assert file.rows.select(["uri", "etag", "old", "new", "reason"]).to_pydict() == dict(
        zip(("uri", "etag", "old", "new", "reason"), map(list, zip(*wanted, strict=True)), strict=True)
    )
    rows = [image(uri, label) | {"uri": uri, "etag": listed[uri]} for uri, label in zip(uris, LABELS, strict=True)]
    others = [image(f"{name}/{i}", name) for name in CLASSES for i in range(20)]
    made = correct(tmp_path / "out", [*rows, *others], str(tmp_path / "corrections.csv"))
    found = rows_of(made)
    assert [found[uri]["label"] for uri in uris] == ["viserion", "viserion", SCRIPT, "wyvern", "viserion", "wyvern", "wyvern"]  # fmt: skip
    assert [found[uri]["status"] for uri in uris] == ["ok", "deleted", "ok", "ok", "deleted", "ok", "ok"]


def test_progress_is_kept_and_undone(context: BrowserContext, hostile: tuple[Path, Path]):
    page, _ = open_page(context, hostile[1])
    press(page, "2 3 d")
    page.reload()
    assert page.inner_text("#num-decided") == "3 of 7 decided."
    assert page.locator(".decision").all_inner_texts()[:4] == ["becomes viserion", "becomes wyvern", "delete", ""]
    assert focused(page) == "caption-4"
    press(page, "u")
    assert focused(page) == "caption-3"
    press(page, "u u u")
    assert page.inner_text("#num-decided") == "0 of 7 decided."
    assert page.inner_text("#status") == "There is nothing to undo."
    assert page.is_disabled("#undo")
    assert page.is_disabled("#download")
    page.reload()
    assert page.inner_text("#num-decided") == "0 of 7 decided."


def test_two_pages_of_a_run_share_their_progress(context: BrowserContext, tmp_path: Path):
    etags = save_pictures(tmp_path / "in", ["1.png", "2.png", "3.png"])
    thumbnails, _ = page_module.read_thumbnails(list(etags.items()))
    both = [page_module.Candidate(uri, etag, "cat", "dog", 0.9, 0.1, ["dog", "cat"]) for uri, etag in etags.items()]
    for name, shown in (("all", both), ("last", both[2:])):
        page = page_module.render_review(shown, thumbnails=thumbnails, classes=["cat", "dog"], run="r", order="o")
        (tmp_path / f"{name}.html").write_bytes(page)
    first, _ = open_page(context, tmp_path / "all.html")
    press(first, "2 d")
    last, _ = open_page(context, tmp_path / "last.html")
    assert last.inner_text("#num-decided") == "0 of 1 decided."
    press(last, "2 u k")
    wanted, deadline = ["becomes dog", "delete", "the label is right"], time.monotonic() + 10
    while first.locator(".decision").all_inner_texts() != wanted:  # the browser tells other pages in its own time
        assert time.monotonic() < deadline
        first.reload()


def test_a_change_of_mind_is_undone_to_what_was_before(context: BrowserContext, hostile: tuple[Path, Path]):
    page, _ = open_page(context, hostile[1])
    press(page, "2 ArrowLeft 3")
    assert page.locator(".decision").first.inner_text() == "becomes wyvern"
    press(page, "u")
    assert page.locator(".decision").first.inner_text() == "becomes viserion"


def test_a_key_that_is_held_decides_once_and_moves_on_and_on(context: BrowserContext, hostile: tuple[Path, Path]):
    page, _ = open_page(context, hostile[1])
    for key in ("d", "d", "d", "ArrowRight", "ArrowRight"):
        page.keyboard.down(key)
    assert page.inner_text("#num-decided") == "1 of 7 decided."
    assert focused(page) == "caption-4"


def test_without_a_store_the_page_works_and_says_so(
    context: BrowserContext, hostile: tuple[Path, Path], tmp_path: Path
):
    context.add_init_script("Object.defineProperty(window, 'localStorage', {get() { throw new Error('denied'); }})")
    page, complaints = open_page(context, hostile[1])
    assert page.is_visible("#unkept")
    press(page, "2 d")
    assert len(save_file(page, tmp_path)) == 3
    assert [text for text in complaints if not text.startswith("blob:")] == []


def test_filters_and_views(context: BrowserContext, hostile: tuple[Path, Path]):
    page, _ = open_page(context, hostile[1])

    def shown() -> list[int]:
        tiles = page.locator("#pictures > li").all()
        return [number for number, tile in enumerate(tiles, 1) if tile.is_visible()]

    assert page.locator("#only-label option").all_inner_texts() == ["all classes", *sorted(CLASSES)]
    page.select_option("#only-label", label="viserion")
    assert shown() == [2, 5]
    assert page.inner_text("#which") == "Picture 2 of 7"
    page.select_option("#only-label", label="wyvern")
    assert shown() == [4, 6], "6 has no label: what it is predicted as"
    page.select_option("#only-label", label=SCRIPT)
    page.select_option("#only-state", "undecided")
    page.keyboard.press("Escape")
    press(page, "d")
    assert shown() == [3, 7]
    assert focused(page) == "caption-3"
    press(page, "d d d")
    assert (shown(), page.is_visible("#nothing"), page.inner_text("#which")) == ([], True, "No picture")
    assert page.is_disabled("#delete")
    press(page, "u")
    assert (shown(), focused(page)) == ([7], "caption-7")
    page.select_option("#only-state", "decided")
    assert shown() == [1, 3]
    page.select_option("#only-label", "")
    page.select_option("#only-state", "")
    page.keyboard.press("Escape")
    press(page, "g")
    assert shown() == [1]
    press(page, "ArrowRight ArrowDown")
    assert shown() == [3]
    press(page, "g")
    assert len(shown()) == 7
    columns = len({box["x"] for tile in page.locator("#pictures > li").all() if (box := tile.bounding_box())})
    assert columns > 2
    press(page, "ArrowLeft ArrowLeft ArrowDown")
    assert focused(page) == f"caption-{1 + columns}"
    press(page, "?")
    assert page.is_visible("#help")
    press(page, "d Escape")
    assert page.inner_text("#num-decided") == "2 of 7 decided.", "no key decides while the list of keys is open"


def test_by_clicks_as_on_a_phone(browser: Browser, hostile: tuple[Path, Path]):
    context = browser.new_context(viewport={"width": 375, "height": 740}, has_touch=True, is_mobile=True)
    page, _ = open_page(context, hostile[1])
    page.tap("#choices button:nth-child(2)")
    page.tap("#keep")
    page.tap("#pictures > li:nth-child(5)")
    page.tap("#delete")
    assert page.inner_text("#tally") == "1 relabelled, 1 deleted, 1 right"
    assert page.locator(".decision").all_inner_texts()[4] == "delete"
    page.tap("#undo")
    assert page.inner_text("#num-decided") == "2 of 7 decided."
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", ["grid", "one"])
def test_fits_a_phone(browser: Browser, hostile: tuple[Path, Path], scheme: str, view: str):
    context = browser.new_context(viewport={"width": 375, "height": 740}, color_scheme=scheme)  # pyright: ignore[reportArgumentType]
    page, _ = open_page(context, hostile[1])
    press(page, "2 d k")
    if view == "one":
        press(page, "g")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.evaluate(CONTRASTS.replace('"main *"', '"main *:not(option), #bar button:enabled *"')) == []
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible(browser: Browser, hostile: tuple[Path, Path], scheme: str):
    """axe finds nothing at all: in the grid, in the other view with something decided, and in the list of keys."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme)  # pyright: ignore[reportArgumentType]
    page, _ = open_page(context, hostile[1])
    for keys in ("", "2 d k g ArrowLeft", "?"):
        press(page, keys)
        found = Axe().run(page)
        assert found.response["passes"]
        assert found.violations_count == 0, found.generate_report()
    context.close()


def test_more_than_nine_classes_are_typed(context: BrowserContext, tmp_path: Path):
    classes = [f"dragon {k:02d}" for k in range(30)] + ["Wyrm"]
    etags = save_pictures(tmp_path / "in", ["1.png", "2.png", "3.png"])
    thumbnails, _ = page_module.read_thumbnails(list(etags.items()))
    likeliest = [classes[k] for k in (7, 3, 11, 0, 1, 2, 4, 5, 6)]
    shown = [page_module.Candidate(uri, etag, "Wyrm", "dragon 07", 0.5, 0.1, likeliest) for uri, etag in etags.items()]
    page_path = tmp_path / "review.html"
    page_path.write_bytes(page_module.render_review(shown, thumbnails=thumbnails, classes=classes, run="r", order="o"))
    page, complaints = open_page(context, page_path)
    assert page.locator("#choices bdi").all_inner_texts() == likeliest
    press(page, "3")
    press(page, "/")
    assert focused(page) == "other"
    page.keyboard.type("dragon 1")
    press(page, "Enter")
    assert page.inner_text("#status") == "10 classes match: type more."
    page.keyboard.type("9")
    press(page, "Enter")
    assert page.locator(".decision").all_inner_texts() == ["becomes dragon 11", "becomes dragon 19", ""]
    press(page, "/")
    page.keyboard.type("gryphon")
    press(page, "Enter")
    assert page.inner_text("#status") == "No class matches “gryphon”."
    assert Axe().run(page).violations_count == 0
    press(page, "Escape")
    assert focused(page) == "caption-3"
    assert complaints == []


def test_no_script_but_the_pages_own(hostile: tuple[Path, Path]):
    html = hostile[1].read_text()
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert html.count("<script") == 2, "the data, and the script"
    assert re.findall(r"(?:src|href)=\"(?!data:)", html) == []
    assert "innerHTML" not in html
