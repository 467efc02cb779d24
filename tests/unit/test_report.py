"""The written evaluation: its files, and its page as a browser shows it."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, Page, sync_playwright

from dragonclf.evaluate.galleries import MAX_GALLERY_CLASSES, MAX_PER_GALLERY
from dragonclf.evaluate.page import MAX_LISTED, MAX_MATRIX_CLASSES, MAX_REPORT_BYTES, Origin
from dragonclf.evaluate.report import write_evaluation

# torchvision warns in each decoder; `decode` hides it with catch_warnings, which does not hold across threads

CHROMIUM = shutil.which("chromium")
CHROMIUM_ARGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
]  # fmt: skip
SCRIPT = "<script>alert(1)</script>"
CLASSES = [SCRIPT, "viserion"]
FACTS = {"model": "dragons v3", "data set": 's3://bucket/"dragons" & co/', "split": "valid"}
ODD_NAME = """it's a "drogon" #1 <b>дракон 100%.png"""


def save_picture(path: Path, *, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (320, 240), tuple(rng.integers(60, 200, 3).tolist()))
    left, top = rng.integers(0, 120, 2).tolist()
    ImageDraw.Draw(image).ellipse((left, top, left + 150, top + 100), fill=tuple(rng.integers(0, 255, 3).tolist()))
    image.save(path)


def evaluated_frame(folder: Path, *, num_images: int, classes: list[str], seed: int = 0) -> pd.DataFrame:
    """Real pictures in `folder`, with predictions that are right about three times in four."""
    rng = np.random.default_rng(seed)
    names = [ODD_NAME, *(f"image {i:03}.jpg" for i in range(1, num_images))]
    targets = rng.integers(len(classes), size=num_images)
    logits = rng.normal(size=(num_images, len(classes)))
    logits[np.arange(num_images), targets] += 1.5
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for index, name in enumerate(names):
        save_picture(folder / name, seed=index)
    frame = pd.DataFrame(
        {
            "uri": [str(folder / name) for name in names],
            "status": "ok",
            "error": None,
            "label": [classes[index] for index in probs.argmax(axis=1)],
            "confidence": probs.max(axis=1),
            "input_label": [classes[index] for index in targets],
            "camera": "north",
        }
    )
    return pd.concat([frame, pd.DataFrame(probs, columns=[f"prob_{name}" for name in classes])], axis=1)


def bad_rows(folder: Path) -> pd.DataFrame:
    """Two unreadable, one missing, one scored but without a true class."""
    return pd.DataFrame(
        {
            "uri": [str(folder / name) for name in ("cut 1.jpg", "cut 2.jpg", "gone.jpg", "unlabelled.jpg")],
            "status": ["unreadable", "unreadable", "missing", "ok"],
            "error": ["cannot be decoded: <i>truncated</i>", "the file is empty", "it does not exist", None],
            "label": [None, None, None, "viserion"],
            "confidence": [None, None, None, 0.75],
            "input_label": ["viserion", SCRIPT, "viserion", None],
            "camera": "south",
            f"prob_{SCRIPT}": [None, None, None, 0.25],
            "prob_viserion": [None, None, None, 0.75],
        }
    )


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Path]:
    """A frame of 44 rows, 40 of which count, and the folder of its evaluation; one picture broke since."""
    folder = tmp_path_factory.mktemp("dragons")
    good = evaluated_frame(folder, num_images=40, classes=CLASSES)
    frame = pd.concat([good, bad_rows(folder).astype({"confidence": float})], ignore_index=True)
    surest = good[good["input_label"] == "viserion"].sort_values("prob_viserion").iloc[-1]
    Path(surest["uri"]).write_bytes(Path(surest["uri"]).read_bytes()[:200])
    out = tmp_path_factory.mktemp("evaluation")
    write_evaluation(
        frame, classes=CLASSES, out_uri=str(out), title="Drogon or <viserion>?", origin=Origin(facts=FACTS)
    )
    return frame, out


def counted(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Targets and the probability of viserion, of the rows that count."""
    rows = frame[(frame["status"] == "ok") & frame["input_label"].notna()]
    return (rows["input_label"] == "viserion").to_numpy(dtype=int), rows["prob_viserion"].to_numpy(dtype=float)


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
    write_evaluation(
        frame, classes=CLASSES, out_uri=str(tmp_path), title="Drogon or <viserion>?", origin=Origin(facts=FACTS)
    )
    assert (tmp_path / "report.html").read_bytes() == (out / "report.html").read_bytes()


def test_the_page_stands_alone(evaluation: tuple[pd.DataFrame, Path]) -> None:
    html = (evaluation[1] / "report.html").read_text()
    assert len(html.encode()) < MAX_REPORT_BYTES
    assert "<script" not in html
    assert re.findall(r"(?:src|href)=\"(?!data:)", html) == []
    thumbnails = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    assert len(thumbnails) > 20


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH: the page cannot be looked at")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        yield chromium
        chromium.close()


def test_the_page_in_a_browser(evaluation: tuple[pd.DataFrame, Path], browser: Browser) -> None:
    frame, out = evaluation
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.goto((out / "report.html").as_uri())
    assert [url for url in requests if not url.startswith("data:")] == [(out / "report.html").as_uri()]
    assert complaints == []
    assert page.title() == page.inner_text("h1") == "Drogon or <viserion>?"
    assert page.get_attribute("html", "lang") == "en"

    targets, viserion = counted(frame)
    correct = (viserion > 0.5) == targets
    assert shown(page, "#accuracy") == f"{100 * correct.mean():.1f} %"
    assert shown(page, "#auroc") == f"{sklearn.metrics.roc_auc_score(targets, viserion):.3f}"
    assert shown(page, "#log-loss") == f"{sklearn.metrics.log_loss(targets, viserion):.3f}"
    assert shown(page, "#ece") == f"{calibration_error(targets, viserion):.3f}"
    assert shown(page, "#num-images") == "40"
    assert shown(page, "#left-out") == "4 images left out: 2 unreadable, 1 missing, 1 no true label"
    assert [text.split("\n") for text in page.locator("table.plain tr").all_inner_texts()] == [
        [f"{name}\t{value}"] for name, value in FACTS.items()
    ]
    confusion = sklearn.metrics.confusion_matrix(targets, viserion > 0.5)
    cells = page.locator("#confusion td").all_inner_texts()
    assert [int(cell.split()[0]) for cell in cells] == confusion.flatten().tolist()
    per_class = np.array(sklearn.metrics.precision_recall_fscore_support(targets, viserion > 0.5)).T
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
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)  # pyright: ignore[reportArgumentType]
    page.goto((evaluation[1] / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate(CONTRASTS) == []


# Every text whose contrast with the colour behind it is under WCAG's 4.5 : 1, as "text: ratio"
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const blend = (colours) => {
    colours.forEach(colour => { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); });
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const low = [];
  for (const element of document.querySelectorAll("main *")) {
    const own = [...element.childNodes].filter(node => node.nodeType === 3).map(node => node.data.trim()).join("");
    if (!own) continue;
    const behind = [];
    for (let at = element; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
    const [a, b] = [behind, [...behind, getComputedStyle(element).color]].map(blend).map(luminance);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${own}: ${ratio.toFixed(2)}`);
  }
  return low;
}"""


def shown(page: Page, selector: str) -> str:
    return page.inner_text(selector).replace("\xa0", " ")


def test_no_mistakes_and_one_class_only(tmp_path: Path) -> None:
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


def test_many_classes_and_many_pictures_stay_under_the_limit(tmp_path: Path) -> None:
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
    assert 500_000 < len(html.encode()) <= MAX_REPORT_BYTES
    thumbnail = re.search(r'src="data:image/jpeg;base64,([^"]+)"', html)
    assert thumbnail is not None
    assert len(classes) > MAX_MATRIX_CLASSES
    assert '<table class="matrix"' not in html
    assert f"the {MAX_GALLERY_CLASSES} with the most mistakes" in html
    wrong = np.array(metrics.confusion)
    np.fill_diagonal(wrong, 0)
    pairs = re.findall(
        r'<tr><td><bdi>(.*?)</bdi></td><td><bdi>(.*?)</bdi></td><td class="number">(\d+)</td></tr>', html
    )
    assert len(pairs) == MAX_LISTED
    assert [int(count) for *_, count in pairs] == sorted(wrong.flatten().tolist(), reverse=True)[:MAX_LISTED]
    assert all(
        wrong[classes.index(actual), classes.index(predicted)] == int(count) for actual, predicted, count in pairs
    )
    assert len(re.findall('<th scope="row">', html)) == 100  # the table of classes, cut
    assert len(list((out / "galleries").iterdir())) == 3 + 2 * MAX_GALLERY_CLASSES


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
