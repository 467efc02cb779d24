"""Evaluations to write and to look at: pictures with predictions, and their page in Chromium."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, Page

SCRIPT = "<script>alert(1)</script>"
CLASSES = [SCRIPT, "viserion"]
HOSTILE_COLUMN, HOSTILE_VALUE = 'lens "<i>"', "<img src=x onerror=alert(1)>"
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
            "camera": np.where(np.arange(num_images) % 4, "north", "south"),
            "exposure": rng.normal(size=num_images),
            HOSTILE_COLUMN: np.where(np.arange(num_images) % 3, HOSTILE_VALUE, "plain"),
            "width": 320,
            "height": 240,
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


def counted(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Targets and the probability of viserion, of the rows that count."""
    rows = frame[(frame["status"] == "ok") & frame["input_label"].notna()]
    return (rows["input_label"] == "viserion").to_numpy(dtype=int), rows["prob_viserion"].to_numpy(dtype=float)


@contextmanager
def opened(browser: Browser, out: Path, *, width: int = 1280, **options: Any) -> Iterator[Page]:
    """The page `out` from disk, or the report in it. Fails if it asks for anything else, or writes anything to the console."""
    page = browser.new_page(viewport={"width": width, "height": 900}, **options)
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    url = (out / "report.html" if out.is_dir() else out).as_uri()
    page.goto(url)
    yield page
    assert [one for one in requests if not one.startswith("data:")] == [url]
    assert complaints == []
    page.close()


def shown(page: Page, selector: str) -> str:
    return page.inner_text(selector).replace("\xa0", " ")


def value(page: Page, selector: str) -> float:
    """A figure with all its digits."""
    return float(page.get_attribute(selector, "value") or "nan")


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
