"""Does `quality` find what was planted among elpv's 2,624 photographs, and what does it find besides?

    python benchmarks/planted.py [--seed 0] [--out FOLDER]

Of the photographs that all experts agree on 5 % get the other label. 20 exact copies, 20 re-encoded ones (JPEG of quality 75 to 95, or PNG,
0.9 to 1.1 times as large) and 5 black images with a little noise are added, and 10 photographs are blurred (Gaussian, 4 of 300 pixels).
`index`, `train` with a frozen tf_efficientnet_lite0, whose features judge the labels, then `quality`, as a user would run them. Needs the
extra `demo`; some minutes on two cores.
"""

import argparse
import io
import logging
import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from PIL import Image, ImageFilter
from score_model import CLASSES, elpv, labelled

from dragonclf import session
from dragonclf.config import IndexConfig, QualityConfig, TrainConfig
from dragonclf.verbs.index import index
from dragonclf.verbs.quality import LABEL_ISSUES, quality
from dragonclf.verbs.train import train

SHARE, NUM_COPIES, NUM_BLURRED, NUM_BLACK = 0.05, 20, 10, 5
FIRST = 0.15  # of the ranking


def plant(folder: Path, seed: int) -> tuple[pd.DataFrame, dict[str, set[str]]]:
    """A manifest (uri, label), and by kind the URIs of what was planted."""
    rng = np.random.default_rng(seed)
    rows = [(str(path), label) for path, label in labelled()]
    chances = [float(line.split()[1]) for line in (elpv() / "labels.csv").read_text().splitlines()]
    certain = [i for i, chance in enumerate(chances) if chance in (0, 1)]
    flipped = set(rng.choice(certain, round(SHARE * len(certain)), replace=False).tolist())
    others = rng.permutation([i for i in range(len(rows)) if i not in flipped])
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
    gone = {rows[i][0] for i in blurred}
    return pd.DataFrame([row for row in rows if row[0] not in gone], columns=["uri", "label"]), planted


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
            made = index(IndexConfig(source=str(folder / "manifest.csv"), out=str(folder / "data")))
            train(
                TrainConfig(
                    data=made.uri, out=str(folder / "models"), recipe="elpv-head", report=False, log_model=False,
                    synthetic_canaries=True, mlflow_uri=f"sqlite:///{folder}/mlflow.db",
                )
            )  # fmt: skip
        summary = quality(QualityConfig(data=made.uri, out=str(folder), features=str(folder / "models")))
        found = pq.read_table(summary.found).to_pandas()
        print(f"seed {given.seed}, {os.cpu_count()} CPUs\n\n{told(found, planted, summary.num_judged)}")


if __name__ == "__main__":
    main()
