"""`dragonclf demo`: the whole way on real photographs, as a user would go it: index, train, evaluate, score, then look.

A real S3 server runs on loopback for the length of it. The photographs are those of the elpv data set (2,624 solar cells seen by their
own glow, judged by experts): functional or defective.
"""

import concurrent.futures
import importlib.util
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pandas as pd
import pyarrow as pa
from pydantic import BaseModel, Field

from dragonclf import options, session, storage
from dragonclf.config import EvaluateConfig, IndexConfig, ScoreConfig, TrainConfig
from dragonclf.demo.local_s3 import LocalS3
from dragonclf.engine import published
from dragonclf.verbs.evaluate import evaluate
from dragonclf.verbs.index import index
from dragonclf.verbs.score import score
from dragonclf.verbs.train import train

DATA, WORK = "s3://photos/elpv", "s3://work"
DEFECTIVE_FROM = 0.5  # the experts' probability of a defect from which a cell counts as defective
NUM_UNCERTAIN = 8

C = TypeVar("C", bound=BaseModel)
S = TypeVar("S")


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

    Raises what the verbs raise; no process outlives this call.
    """
    started = time.monotonic()
    photos = _photographs()[: limit or None]
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with LocalS3() as server, server.as_environment(), session.connect(session.LOCAL):
        _say(f"A local S3 server (SeaweedFS) answers at {server.endpoint}, on loopback, with random credentials.")
        for bucket in ("photos", "work"):
            server.create_bucket(bucket)
        _upload(photos)
        _say(f"{len(photos):,} photographs of solar cells uploaded as {DATA}/functional/ and {DATA}/defective/.")
        _step("index", index, IndexConfig(source=DATA, out=f"{WORK}/elpv"))
        trained = _step(
            "train",
            train,
            TrainConfig(
                data=f"{WORK}/elpv", out=f"{WORK}/models", recipe="elpv-head", num_workers=2, synthetic_canaries=True, report=False,
                mlflow_uri=f"sqlite:///{out}/mlflow.db",
            ),
        )  # fmt: skip
        evaluated = _step(
            "evaluate", evaluate, EvaluateConfig(model=trained.model, data=f"{WORK}/elpv", out=str(out / "evaluation"))
        )  # fmt: skip
        scored = _step("score", score, ScoreConfig(model=trained.model, source=DATA, out=f"{WORK}/scores"))
        frame = pa.concat_tables(published.read_parts(scored.run)).to_pandas()
        storage.download_all(trained.model, out / "model")
        storage.download_all(scored.parts, out / "scores")
    assert scored.images_per_s is not None
    _show_uncertain(frame, {uri: chance for uri, _, chance in photos})
    return DemoSummary(
        accuracy=evaluated.accuracy, num_scored=len(frame), num_lost=len({uri for uri, _, _ in photos} - set(frame["uri"])),
        counts=scored.counts, images_per_s=scored.images_per_s, seconds=time.monotonic() - started,
        report=evaluated.report, model=str(out / "model"), predictions=str(out / "scores"),
    )  # fmt: skip


def write_manifest(path: Path) -> str:
    """Write a manifest of the photographs where they are installed, for `index`; return its path. ValueError if they are not."""
    rows = [(str(file), uri.split("/")[-2]) for uri, file, _ in _photographs()]
    pd.DataFrame(rows, columns=["uri", "label"]).to_csv(path, index=False)
    return str(path)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _step(verb: str, function: Callable[[C], S], config: C) -> S:
    """Do a verb, and say the command that would do the same."""
    _say(f"\n$ dragonclf {verb} {shlex.join(options.arguments(config))}")
    return function(config)


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


def _show_uncertain(frame: pd.DataFrame, experts: dict[str, float]) -> None:
    """The photographs nearest to 0.5, beside what the experts said."""
    rows = frame.loc[(frame["prob_defective"] - 0.5).abs().sort_values().index[:NUM_UNCERTAIN]]
    _say("\nMost uncertain    model: defective    experts: defective")
    for uri, chance in zip(rows["uri"], rows["prob_defective"], strict=True):
        _say(f"{storage.name(uri):<16}  {chance:16.3f}  {experts[uri]:20.2f}")
    _say("")
