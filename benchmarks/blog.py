"""How long the notebook's own case takes, once Ray is up: two classes, 16 photographs to learn from and 8 to check, then 2,000.

    python benchmarks/blog.py [--rounds 3]

The photographs are elpv's. The first case computes features and trains the head for 3 epochs at 0.01, as the notebook did. The second
trains on 2,000 photographs for 10 epochs; then again at another rate, when no feature is computed; then on a snapshot with 20 photographs
more, when only theirs are. Seconds of whole `Learner.fit` calls in this process, and of the head's epochs alone, as results.csv has them.
Medians. Needs the extra `demo`.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import ray
from score_model import CLASSES, labelled

from dragonclf import session
from dragonclf.learner import ImageData, Learner
from dragonclf.train import checkpoint

ARCH = "tf_efficientnet_lite0"


def data(folder: Path, num_train: int, num_valid: int) -> ImageData:
    """A snapshot of the first photographs of both classes, in turn."""
    by_class = {name: [path for path, label in labelled() if label == name] for name in CLASSES}
    rows = [
        f"{path},{name}"
        for pair in zip(*by_class.values(), strict=False)
        for path, name in zip(pair, by_class, strict=True)
    ]
    rows += [f"{path},{CLASSES[1]}" for path in by_class[CLASSES[1]][len(rows) // 2 :]]
    splits = ["valid"] * num_valid + ["train"] * num_train
    folder.mkdir()
    manifest = folder / "manifest.csv"
    manifest.write_text(
        "uri,label,split\n" + "\n".join(f"{row},{split}" for row, split in zip(rows, splits, strict=False))
    )
    return ImageData.from_folder(str(manifest), out=str(folder))


def fit(of: ImageData, out: Path, lr: float, epochs: int) -> tuple[float, float]:
    """Seconds of the call, and of its epochs."""
    started = time.monotonic()
    trained = Learner(ARCH, of, out=str(out), log_model=False).fit(lr, epochs)
    return time.monotonic() - started, sum(row["seconds"] for row in checkpoint.read_results(trained.run))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    told: dict[str, list[tuple[float, float]]] = {
        "16 + 8, 3 epochs": [],
        "2,000, 10 epochs": [],
        "again, no feature": [],
        "1 % more, 20 features": [],
    }
    with tempfile.TemporaryDirectory(prefix="blog-") as folder, session.connect(session.LOCAL):
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        few, many, more = (
            data(Path(folder, name), num_train, num_valid)
            for name, num_train, num_valid in (("few", 16, 8), ("many", 2_000, 600), ("more", 2_020, 600))
        )
        for number in range(rounds):
            out = Path(folder, str(number))
            told["16 + 8, 3 epochs"].append(fit(few, out / "few", 0.01, 3))
            told["2,000, 10 epochs"].append(fit(many, out / "many", 0.01, 10))
            told["again, no feature"].append(fit(many, out / "many", 0.02, 10))
            told["1 % more, 20 features"].append(fit(more, out / "many", 0.01, 10))
        cpus = ray.cluster_resources()["CPU"]
    print(f"{cpus:.0f} CPUs, {rounds} rounds, medians\n\n| case | whole call, s | its epochs, s |\n|---|---|---|")
    for case, times in told.items():
        whole, epochs = (statistics.median(values) for values in zip(*times, strict=True))
        print(f"| {case} | {whole:.1f} | {epochs:.2f} |")


if __name__ == "__main__":
    main()
