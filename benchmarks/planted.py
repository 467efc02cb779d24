"""Does `quality` find what was planted among elpv's 2,624 photographs, what does it find besides, and what does it help to mend it?

    python benchmarks/planted.py [--seed 0] [--out FOLDER]

A quarter of the photographs is kept to test on, as it is. Of the others that all experts agree on 5 % get the other label. 20 exact copies,
20 re-encoded ones (JPEG of quality 75 to 95, or PNG, 0.9 to 1.1 times as large) and 5 black images with a little noise are added, and 10
photographs are blurred (Gaussian, 4 of 300 pixels). `index`, `train` with a frozen tf_efficientnet_lite0, whose features judge the labels,
then `quality`, as a user would run them. Then `review` of the first 15 % by loss, in Chromium, by keys, as one would press who knows which
labels were flipped and which images are black, and leaves all others; its corrections.csv goes to `index --corrections`, and the head is
trained again. Needs the extras `demo` and `dev`, and chromium; some minutes on two cores.
"""

import argparse
import io
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from PIL import Image, ImageFilter
from playwright.sync_api import sync_playwright
from score_model import CLASSES, elpv, labelled

from dragonclf import session
from dragonclf.config import EvaluateConfig, IndexConfig, QualityConfig, ReviewConfig, TrainConfig
from dragonclf.data.snapshot import Snapshot
from dragonclf.verbs.evaluate import EvaluateSummary, evaluate
from dragonclf.verbs.index import index
from dragonclf.verbs.quality import LABEL_ISSUES, quality
from dragonclf.verbs.review import review
from dragonclf.verbs.train import train

SHARE, NUM_COPIES, NUM_BLURRED, NUM_BLACK = 0.05, 20, 10, 5
FIRST, TEST = 0.15, 0.25  # of the ranking, of the photographs


def plant(folder: Path, seed: int) -> tuple[pd.DataFrame, dict[str, set[str]]]:
    """A manifest (uri, label, split: test, or empty), and by kind the URIs of what was planted."""
    rng = np.random.default_rng(seed)
    rows = [(str(path), label) for path, label in labelled()]
    chances = [float(line.split()[1]) for line in (elpv() / "labels.csv").read_text().splitlines()]
    test = set(rng.choice(len(rows), round(TEST * len(rows)), replace=False).tolist())
    certain = [i for i, chance in enumerate(chances) if chance in (0, 1) and i not in test]
    flipped = set(rng.choice(certain, round(SHARE * len(certain)), replace=False).tolist())
    others = rng.permutation([i for i in range(len(rows)) if i not in flipped | test])
    exact, again, blurred = np.split(others[: 2 * NUM_COPIES + NUM_BLURRED], [NUM_COPIES, 2 * NUM_COPIES])
    planted: dict[str, set[str]] = {name: set() for name in ("flipped", "exact", "re-encoded", "blurred", "black")}
    other = dict(zip(CLASSES, reversed(CLASSES), strict=True))

    def add(kind: str, data: bytes, label: str, suffix: str) -> None:
        path = folder / f"{kind}-{len(planted[kind]):02d}.{suffix}"
        path.write_bytes(data)
        rows.append((str(path), label))
        planted[kind].add(str(path))

    for i in sorted(flipped):
        uri, label = rows[i]
        rows[i] = uri, other[label]
        planted["flipped"].add(uri)
    for i in exact:
        add("exact", Path(rows[i][0]).read_bytes(), rows[i][1], "png")
    for number, i in enumerate(again):
        image = Image.open(rows[i][0])
        sides = [round(side * rng.uniform(0.9, 1.1)) for side in image.size] if number % 2 else image.size
        suffix, options = ("png", {}) if number % 4 == 1 else ("jpg", {"quality": int(rng.integers(75, 96))})
        add("re-encoded", encoded(image.resize((sides[0], sides[1])), suffix, **options), rows[i][1], suffix)
    for i in blurred:
        add("blurred", encoded(Image.open(rows[i][0]).filter(ImageFilter.GaussianBlur(4)), "png"), rows[i][1], "png")
    for _ in range(NUM_BLACK):
        noise = rng.normal(3, 1.5, (300, 300)).clip(0, 255).astype(np.uint8)
        add("black", encoded(Image.fromarray(noise), "png"), str(rng.choice(CLASSES)), "png")
    gone, of_test = {rows[i][0] for i in blurred}, {rows[i][0] for i in test}
    manifest = pd.DataFrame([row for row in rows if row[0] not in gone], columns=["uri", "label"])
    return manifest.assign(split=["test" if uri in of_test else "" for uri in manifest["uri"]]), planted


def encoded(image: Image.Image, suffix: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, {"png": "PNG", "jpg": "JPEG"}[suffix], **options)
    return buffer.getvalue()


def told(found: pd.DataFrame, planted: dict[str, set[str]], num_judged: int) -> str:
    """A table: what was planted, how much of it was found, and how many images the issue has in all."""
    uris = {name: set(rows["uri"]) for name, rows in found.groupby("issue")}
    doubted = found[found["issue"].isin(LABEL_ISSUES)]
    ranking = doubted.sort_values(["issue", "score"], ascending=[False, True])["uri"]
    first = ranking.head(round(FIRST * num_judged))
    looked_at = [
        (f"flipped labels, in the first {FIRST:.0%} of the ranking", "flipped", set(first)),
        ("flipped labels, among label errors", "flipped", uris["label_error"]),
        ("exact copies", "exact", uris["exact_duplicate"]),
        ("re-encoded copies", "re-encoded", uris["near_duplicate"]),
        ("blurred images", "blurred", uris["blurred"]),
        ("black images, dark", "black", uris["dark"]),
        ("black images, flat", "black", uris.get("flat", set())),
    ]
    lines = ["| planted | images | found | images with the issue |", "|---|---|---|---|"]
    for what, kind, has in looked_at:
        share = len(planted[kind] & has) / len(planted[kind])
        lines.append(f"| {what} | {len(planted[kind])} | {share:.0%} | {len(has)} |")
    rest = {name: len(has) for name, has in uris.items() if name in ("label_conflict", "across_splits")}
    return "\n".join([*lines, "", f"of {num_judged} labels that were judged; also found: {rest}"])


def decide(page: Path, planted: dict[str, set[str]], folder: Path) -> Path:
    """Go through review.html by keys: relabel what was flipped, delete what is black, keep the rest. Returns the file that it saves."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        opened = browser.new_page()
        opened.goto(page.as_uri())
        data = json.loads(opened.text_content("#data") or "")
        for item in data["items"]:
            right = next(name for name in data["classes"] if name != item["label"])
            keys = {"flipped": str(data["classes"].index(right) + 1), "black": "d"}
            opened.keyboard.press(next((key for kind, key in keys.items() if item["uri"] in planted[kind]), "k"))
        with opened.expect_download() as caught:
            opened.click("#download")
        caught.value.save_as(folder / "corrections.csv")
        browser.close()
    return folder / "corrections.csv"


def trained(data: Snapshot, folder: Path) -> EvaluateSummary:
    """A head on the snapshot, and how it does on the images kept to test on."""
    done = train(
        TrainConfig(
            data=data.uri, out=str(folder / "models"), recipe="elpv-head", report=False, log_model=False,
            synthetic_canaries=True, mlflow_uri=f"sqlite:///{folder}/mlflow.db",
        )
    )  # fmt: skip
    out = f"{folder}/reports/{data.info.id}"
    return evaluate(EvaluateConfig(model=done.model, data=data.uri, split="test", out=out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="Keep everything there. A temporary folder by default.")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="planted-") as temporary:
        folder = (given.out or Path(temporary)).resolve()
        (folder / "images").mkdir(parents=True, exist_ok=True)
        manifest, planted = plant(folder / "images", given.seed)
        manifest.to_csv(folder / "manifest.csv", index=False)
        with session.connect(session.LOCAL):
            source, out = str(folder / "manifest.csv"), str(folder / "data")
            made = index(IndexConfig(source=source, out=out))
            before = trained(made, folder)
            summary = quality(QualityConfig(data=made.uri, out=str(folder), features=str(folder / "models")))
            found = pq.read_table(summary.found).to_pandas()
            worst = round(FIRST * summary.num_judged)
            shown = review(ReviewConfig(run=str(folder), out=str(folder / "review"), worst=worst))
            corrections = decide(Path(shown.page), planted, folder)
            mended = index(IndexConfig(source=source, out=out, corrections=[str(corrections)]))
            after = trained(mended, folder)
        print(f"seed {given.seed}, {os.cpu_count()} CPUs\n\n{told(found, planted, summary.num_judged)}\n")
        [applied] = mended.info.corrections
        print(
            f"{shown.num_pictures} pictures reviewed: {applied.num_relabelled} labels mended, {applied.num_deleted} images left out\n\n"
            "| on the images kept to test on | accuracy | 95 % | AUROC | log loss |\n|---|---|---|---|---|"
        )
        for name, one in (("before", before), ("after", after)):
            low, high = one.accuracy_interval
            print(f"| {name} | {one.accuracy:.4f} | {low:.4f} to {high:.4f} | {one.auroc:.4f} | {one.log_loss:.4f} |")


if __name__ == "__main__":
    main()
