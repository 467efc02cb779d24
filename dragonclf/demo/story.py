"""`dragonclf demo`: the whole way on real photographs, as a user would go it: index, train, evaluate, score, then look.

A real S3 server runs on loopback for the length of it. The photographs are those of the elpv data set (2,624 solar cells seen by their
own glow, judged by experts): functional or defective.
"""

import concurrent.futures
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pyarrow as pa
from pydantic import BaseModel, Field
from rich.console import Console
from rich.table import Table

from dragonclf import storage
from dragonclf.demo.local_s3 import LocalS3
from dragonclf.engine import runs

DATA, WORK = "s3://photos/elpv", "s3://work"
DEFECTIVE_FROM = 0.5  # the experts' probability of a defect from which a cell counts as defective
NUM_UNCERTAIN = 8


class DemoSummary(BaseModel):
    """What the demo came to."""

    accuracy: float = Field(description="On the held-out validation split.")
    num_scored: int
    num_lost: int = Field(description="Photographs without a row: 0.")
    counts: dict[str, int]
    images_per_s: float
    seconds: float
    report: str
    model: str
    predictions: str


def demo(out: Path, *, limit: int | None = None) -> DemoSummary:
    """Run the demo and leave report, model and predictions in the folder `out`. `limit` takes only that many photographs.

    StorageError naming the step that failed; no process outlives this call.
    """
    started = time.monotonic()
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    photos = _photographs()[: limit or None]
    out.mkdir(parents=True, exist_ok=True)
    with LocalS3() as server:
        os.environ.update(server.environment)
        console.print(
            f"A local S3 server (SeaweedFS) answers at {server.endpoint}, on loopback, with random credentials."
        )
        for bucket in ("photos", "work"):
            server.create_bucket(bucket)
        _upload(photos)
        console.print(
            f"{len(photos):,} photographs of solar cells uploaded as {DATA}/functional/ and {DATA}/defective/.\n"
        )
        _run(console, "index", DATA, "--out", f"{WORK}/elpv")
        trained = _run(
            console, "train", f"{WORK}/elpv", "--out", f"{WORK}/models", "--precompute", "--epochs", "3", "--lr", "0.01",
            "--num-workers", "2", "--synthetic-canaries", "--mlflow-uri", f"sqlite:///{out.resolve()}/mlflow.db",
        )  # fmt: skip
        evaluated = _run(console, "evaluate", trained["model"], f"{WORK}/elpv", "--out", str(out / "evaluation"))
        scored = _run(console, "score", trained["model"], DATA, "--out", f"{WORK}/scores")
        frame = pa.concat_tables(runs.read_parts(scored["run"])).to_pandas()
        _download(trained["model"], out / "model")
        _download(scored["parts"], out / "scores")
    lost = len({uri for uri, _, _ in photos} - set(frame["uri"]))
    console.print(_uncertain(frame, {uri: chance for uri, _, chance in photos}))
    return DemoSummary(
        accuracy=evaluated["accuracy"], num_scored=len(frame), num_lost=lost, counts=scored["counts"],
        images_per_s=scored["images_per_s"], seconds=time.monotonic() - started,
        report=evaluated["report"], model=str(out / "model"), predictions=str(out / "scores"),
    )  # fmt: skip


def _photographs() -> list[tuple[str, Path, float]]:
    """(uri, file, experts' probability of a defect) of each photograph, from the installed elpv-dataset package."""
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the demo's photographs are not installed: pip install 'dragonclf[demo]'")
    data = Path(spec.submodule_search_locations[0]) / "data"
    photos = []
    for line in (data / "labels.csv").read_text().splitlines():
        path, chance, _cell_type = line.split()
        label = "defective" if float(chance) >= DEFECTIVE_FROM else "functional"
        photos.append((f"{DATA}/{label}/{Path(path).name}", data / path, float(chance)))
    return photos


def _upload(photos: list[tuple[str, Path, float]]) -> None:
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda photo: storage.put(photo[0], photo[1].read_bytes()), photos))


def _run(console: Console, verb: str, *arguments: str) -> dict:
    """Run one command as a user would and return its result. Its process group is gone when this returns, however it returns."""
    console.print(f"[bold]$ dragonclf {shlex.join([verb, *arguments])}[/bold]", markup=True)
    command = [sys.executable, "-m", "dragonclf", verb, *arguments, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        output, _ = process.communicate()
    finally:
        _end_group(process)
    if process.returncode:
        raise storage.StorageError(
            f"the demo failed at `dragonclf {verb}` (exit code {process.returncode}): see its message above"
        )
    console.print()
    return json.loads(output.splitlines()[-1])


def _end_group(process: subprocess.Popen[str]) -> None:
    """Ask the command to stop as Ctrl-C would, then make sure of it and of all that it started."""
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGINT)
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    _signal_group(process.pid, signal.SIGKILL)


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return


def _download(prefix: str, folder: Path) -> None:
    for found in storage.list_objects(prefix):
        target = folder / found.uri.removeprefix(f"{prefix}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(storage.get(found.uri))


def _uncertain(frame: pd.DataFrame, experts: dict[str, float]) -> Table:
    """The photographs nearest to 0.5, beside what the experts said."""
    rows = frame.loc[(frame["prob_defective"] - 0.5).abs().sort_values().index[:NUM_UNCERTAIN]]
    table = Table(
        "photograph", "model: defective", "experts: defective", title="Most uncertain", title_justify="left", box=None
    )
    for uri, chance in zip(rows["uri"], rows["prob_defective"], strict=True):
        table.add_row(storage.name(uri), f"{chance:.3f}", f"{experts[uri]:.2f}")
    return table
