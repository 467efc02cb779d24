"""How well a fine-tuned tf_efficientnet_lite0 tells functional from defective solar cells, ours beside fastai.

    python benchmarks/quality_elpv.py --out results [--systems ours,fastai] [--seeds 0,1,2] [--inner] [--option lr=0.0005 ...]

elpv's 2,624 photographs, 75 % to train on and 25 % to test, stratified, one split a seed. A tenth of the 75 % is kept from training in
both, for the temperature. 10 epochs by the recipe elpv-finetune: the head alone in the first, then all layers. `--inner` splits the 75 %
once more in the same way and never looks at the test images: recipes are chosen there. Each (system, seed) is one process that writes one
JSON file, so a stopped benchmark goes on where it was; the table is printed from the files. fastai 2.8 has to be importable, and is given
what makes a CPU fast here (see `ON_CPUS`); its recipe is `fine_tune(9)` as it comes, with flips both ways. Seconds are of a process's
processors, so that they bear other work on the machine. Needs the extra `demo`; hours on a few cores.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from score_model import CLASSES, labelled
from sklearn.model_selection import train_test_split

from dragonclf.config import TrainConfig, recipes
from dragonclf.evaluate.metrics import classification_metrics
from dragonclf.verbs.train_workers import ON_CPUS

RECIPE = recipes.read("elpv-finetune", TrainConfig.model_fields).train
ARCH, EPOCHS, SIZE = RECIPE["arch"], RECIPE["freeze_epochs"] + RECIPE["epochs"], RECIPE["size"]


def frame(seed: int, *, inner: bool) -> pd.DataFrame:
    """path, label, split of every photograph that this run may see."""
    table = pd.DataFrame([(str(path), label) for path, label in labelled()], columns=["path", "label"])
    rest, test = parted(table, 0.25, seed)
    if inner:
        rest, test = parted(rest, 0.25, seed)
    kept, valid = parted(rest, 0.1, seed)
    named = {"train": kept, "valid": valid, "test": test}
    return pd.concat([part.assign(split=name) for name, part in named.items()], ignore_index=True)


def parted(table: pd.DataFrame, share: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows but a share of each class, and that share."""
    first, second = train_test_split(np.arange(len(table)), test_size=share, stratify=table["label"], random_state=seed)
    return table.iloc[first], table.iloc[second]


def ours(table: pd.DataFrame, seed: int, options: dict[str, Any], folder: str) -> tuple[pd.DataFrame, float]:
    """Probabilities of the test images, and the temperature."""
    from dragonclf.learner import ImageData, Learner
    from dragonclf.model import bundle

    manifest = f"{folder}/manifest.csv"
    table.rename(columns={"path": "uri"}).to_csv(manifest, index=False)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    data = ImageData.from_folder(manifest, size=SIZE, out=folder)
    recipe = RECIPE | {"seed": seed, "log_model": False} | options
    others = {name: value for name, value in recipe.items() if name not in ("arch", "size", "lr", "epochs")}
    learner = Learner(ARCH, data, out=folder, **others)
    trained = learner.fit(recipe["lr"], recipe["epochs"])
    return learner.predict(split="test"), bundle.load_bundle(trained.model).info.temperature


def fastai(table: pd.DataFrame, seed: int, options: dict[str, Any], folder: str) -> tuple[pd.DataFrame, float]:
    """As `ours`; fastai fits no temperature."""
    import fastai.vision.all as fv  # pyright: ignore[reportMissingImports]

    from dragonclf.model import zoo

    fv.set_seed(seed)
    pretrained = zoo.load_pretrained(ARCH, zoo.resolve_pretrained(ARCH, "auto"))
    stats = zoo.transform_for(pretrained)
    known = table[table["split"] != "test"]
    loaders = fv.ImageDataLoaders.from_df(
        known.assign(is_valid=known["split"] == "valid"), path="/", fn_col="path", label_col="label", valid_col="is_valid", bs=64,
        item_tfms=fv.Resize(300), num_workers=2,
        batch_tfms=[*fv.aug_transforms(size=SIZE, flip_vert=True), fv.Normalize.from_stats(stats.mean, stats.std)],
    )  # fmt: skip
    learner = fv.vision_learner(loaders, ARCH, pretrained=False, metrics=fv.accuracy, path=folder)
    body = learner.model[0].model
    weights = pretrained.state_dict()
    body.load_state_dict({key: weights[key] for key in body.state_dict()})
    learner.freeze()
    with learner.no_bar():
        learner.fine_tune(EPOCHS - 1)
    test = table[table["split"] == "test"]
    probs = learner.get_preds(dl=loaders.test_dl(test))[0].numpy()
    vocab = list(loaders.vocab)
    columns = {f"prob_{name}": probs[:, vocab.index(name)] for name in CLASSES}
    return pd.DataFrame({"input_label": test["label"].to_numpy(), **columns}), 1.0


def figures(predicted: pd.DataFrame, temperature: float) -> dict[str, float]:
    """Of the test images. `ece_before` is that of the probabilities without the temperature."""
    probs = predicted[[f"prob_{name}" for name in CLASSES]].to_numpy(np.float64)
    truth = np.array([CLASSES.index(name) for name in predicted["input_label"]])
    raw = np.clip(probs, 1e-12, None) ** temperature
    after, before = (
        classification_metrics(truth, probs=p, classes=CLASSES) for p in (probs, raw / raw.sum(1, keepdims=True))
    )
    found = after.model_dump(include={"num_images", "accuracy", "auroc", "log_loss", "ece"})
    return found | {"ece_before": before.ece, "temperature": temperature}


def run_one(system: str, seed: int, options: dict[str, Any], *, inner: bool) -> dict[str, float]:
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(prefix="quality-") as folder:
        way = {"ours": ours, "fastai": fastai}[system]
        return figures(*way(frame(seed, inner=inner), seed, options, folder))


def run_process(command: list[str], kept: Path) -> dict[str, float]:
    """What a process finds, with its seconds, and those of the processors it and all below it took."""
    started, cpu_s = time.monotonic(), {}
    found = kept.with_suffix(".part")
    process = subprocess.Popen([*command, "--one", str(found)], env=os.environ | ON_CPUS)
    while process.poll() is None:
        below = []
        with contextlib.suppress(psutil.Error):
            below = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in below:
            with contextlib.suppress(psutil.Error):
                cpu_s[one.pid] = sum(one.cpu_times()[:2])
        time.sleep(1)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    took = {"cpu_s": sum(cpu_s.values()), "seconds": time.monotonic() - started}
    result = json.loads(found.read_text()) | took
    found.unlink()
    return result


def told(results: list[tuple[str, int, dict[str, float]]]) -> str:
    """A table: a row a run, then each system's mean with the interval of Student's t, and the paired difference."""
    lines = [
        "| system | seed | accuracy | AUROC | ECE before | ECE | processor s | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for system, seed, found in results:
        lines.append(
            f"| {system} | {seed} | {found['accuracy']:.4f} | {found['auroc']:.4f} | {found['ece_before']:.4f} | {found['ece']:.4f} "
            f"| {found['cpu_s']:.0f} | {found['seconds']:.0f} |"
        )
    by_system = {
        name: {seed: f for system, seed, f in results if system == name} for name in {s for s, _, _ in results}
    }
    for name, runs in sorted(by_system.items(), reverse=True):
        lines.append(f"\n{name}: accuracy {interval([found['accuracy'] for found in runs.values()])}")
    both = sorted(set(by_system.get("ours", {})) & set(by_system.get("fastai", {})))
    if both:
        pairs = [(by_system["ours"][seed], by_system["fastai"][seed]) for seed in both]
        lines.append(f"\nours - fastai: accuracy {interval([a['accuracy'] - b['accuracy'] for a, b in pairs])}")
        lines.append(
            f"processor time, fastai / ours: {statistics.median(b['cpu_s'] / a['cpu_s'] for a, b in pairs):.2f}"
        )
    return "\n".join(lines)


def interval(values: list[float]) -> str:
    """Mean and 95 % by Student's t, which three runs make wide."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.4f} (one run)"
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.4f} (95 %: {mean - half:+.4f} to {mean + half:+.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--systems", default="ours,fastai")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--inner", action="store_true")
    parser.add_argument("--option", action="append", default=[], help="NAME=VALUE of `train`, in place of the recipe's")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    options = {name: json.loads(value) for name, _, value in (item.partition("=") for item in given.option)}
    systems, seeds = given.systems.split(","), [int(seed) for seed in given.seeds.split(",")]
    if given.one:
        given.one.write_text(json.dumps(run_one(systems[0], seeds[0], options, inner=given.inner)))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in seeds:
        for system in systems:
            words = [system, "inner" if given.inner else "test", str(seed), *(given.option if system == "ours" else [])]
            kept = given.out / f"{'-'.join(words)}.json"
            if not kept.exists():
                extra = ["--inner"] * given.inner + [part for item in given.option for part in ("--option", item)]
                command = [
                    sys.executable,
                    __file__,
                    "--out",
                    str(given.out),
                    "--systems",
                    system,
                    "--seeds",
                    str(seed),
                    *extra,
                ]
                found = run_process(command, kept)
                machine = {"machine": f"{platform.machine()}, {os.cpu_count()} CPUs", "torch": torch.__version__}
                kept.write_text(json.dumps(found | machine))
            results.append((system, seed, json.loads(kept.read_text())))
    print(told(results))


if __name__ == "__main__":
    main()
