"""What a report of many predictions costs: seconds, MB and peak memory. Usage: python benchmarks/report.py [NUM_IMAGES] [--classes K]

The images are 200 small files with many names (links), so that the number of predictions is what grows; the page shows a few hundred.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from dragonclf.evaluate.page import Origin
from dragonclf.evaluate.report import write_evaluation

NUM_FILES, SIDE = 200, 320


def predictions(folder: Path, *, num_images: int, classes: list[str]) -> pd.DataFrame:
    """Rows as scoring gives them, right about three times in four, with two columns of a manifest."""
    rng = np.random.default_rng(0)
    for number in range(NUM_FILES):
        small = Image.fromarray(rng.integers(0, 256, (10, 10, 3), dtype=np.uint8))
        small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
    uris = [folder / f"camera-{i % 7}" / f"2026-11-{i % 30 + 1:02}" / f"image-{i:07}.jpg" for i in range(num_images)]
    for number, uri in enumerate(uris):
        uri.parent.mkdir(parents=True, exist_ok=True)
        uri.symlink_to(folder / f"{number % NUM_FILES}.jpg")
    targets = rng.integers(len(classes), size=num_images)
    logits = rng.normal(size=(num_images, len(classes)))
    logits[np.arange(num_images), targets] += 1.0 + np.log(len(classes))
    probs = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
    columns = {
        "uri": [str(uri) for uri in uris], "status": "ok", "error": None, "label": np.array(classes)[probs.argmax(axis=1)],
        "confidence": probs.max(axis=1), "width": SIDE, "height": SIDE, "input_label": np.array(classes)[targets],
        "camera": [f"camera {i % 7}" for i in range(num_images)], "exposure": rng.normal(size=num_images),
    }  # fmt: skip
    return pd.DataFrame(columns | {f"prob_{name}": probs[:, index] for index, name in enumerate(classes)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("num_images", type=int, nargs="?", default=50_000)
    parser.add_argument("--classes", type=int, default=2)
    options = parser.parse_args()
    classes = [f"class {k}" for k in range(options.classes)]
    with tempfile.TemporaryDirectory(prefix="report-") as folder:
        frame = predictions(Path(folder), num_images=options.num_images, classes=classes)
        started = time.monotonic()
        write_evaluation(
            frame, classes=classes, out_uri=f"{folder}/out", title="Report", origin=Origin(temperature=1.2)
        )
        seconds = time.monotonic() - started
        num_bytes = Path(folder, "out", "report.html").stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("| images | classes | s | report.html, MB | peak memory, GiB |\n|---|---|---|---|---|")
    print(f"| {options.num_images:,} | {options.classes} | {seconds:.1f} | {num_bytes / 1e6:.2f} | {peak:.2f} |")


if __name__ == "__main__":
    main()
