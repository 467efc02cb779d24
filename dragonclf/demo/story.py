"""`dragonclf demo`: the whole way on real photographs, as a user would go it: index, train, evaluate, look for bad labels, score.

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
from typing import NamedTuple, TypeVar

import pandas as pd
import pyarrow as pa
from pydantic import BaseModel, Field

from dragonclf import options, session, storage
from dragonclf.config import EvaluateConfig, IndexConfig, QualityConfig, ReviewConfig, ScoreConfig, TrainConfig
from dragonclf.demo.local_s3 import LocalS3
from dragonclf.engine import published
from dragonclf.verbs.evaluate import evaluate
from dragonclf.verbs.index import index
from dragonclf.verbs.quality import quality
from dragonclf.verbs.review import review
from dragonclf.verbs.score import score
from dragonclf.verbs.train import train

DATA, MANIFEST, WORK = "s3://photos/elpv", "s3://photos/elpv.csv", "s3://work"
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
    quality: str = Field(description="Page of what is wrong with the data set.")
    review: str = Field(description="Page to decide on the labels that are doubted most.")
    model: str
    predictions: str


class Photograph(NamedTuple):
    """One of the installed package."""

    uri: str  # where the demo puts it
    path: Path
    label: str
    chance: float  # of a defect, by the experts, 0 to 1
    cell: str  # mono or poly

    def row(self, uri: str) -> dict[str, str | float]:
        """Of a manifest, where it is at `uri`."""
        return {"uri": uri, "label": self.label, "cell": self.cell, "experts": round(self.chance, 2)}


def demo(out: Path, *, limit: int | None = None) -> DemoSummary:
    """Run the demo and leave pages, model and predictions in the folder `out`. `limit` takes only that many photographs.

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
        _say(
            f"{len(photos):,} photographs of solar cells uploaded to {DATA}/, and what the experts said of them as {MANIFEST}."
        )
        _step("index", index, IndexConfig(source=MANIFEST, out=f"{WORK}/elpv"))
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
        looked = _step(
            "quality",
            quality,
            QualityConfig(data=f"{WORK}/elpv", features=f"{WORK}/models", out=str(out / "quality")),
        )
        reviewed = _step("review", review, ReviewConfig(run=str(out / "quality"), worst=100, out=str(out / "review")))
        scored = _step("score", score, ScoreConfig(model=trained.model, source=DATA, out=f"{WORK}/scores"))
        frame = pa.concat_tables(published.read_parts(scored.run)).to_pandas()
        storage.download_all(trained.model, out / "model")
        storage.download_all(scored.parts, out / "scores")
    assert scored.images_per_s is not None
    _show_uncertain(frame, {photo.uri: photo.chance for photo in photos})
    return DemoSummary(
        accuracy=evaluated.accuracy, num_scored=len(frame), num_lost=len({photo.uri for photo in photos} - set(frame["uri"])),
        counts=scored.counts, images_per_s=scored.images_per_s, seconds=time.monotonic() - started,
        report=evaluated.report, quality=looked.page, review=reviewed.page, model=str(out / "model"), predictions=str(out / "scores"),
    )  # fmt: skip


def write_manifest(path: Path) -> str:
    """Write a manifest of the photographs where they are installed, for `index`; return its path. ValueError if they are not."""
    pd.DataFrame([photo.row(str(photo.path)) for photo in _photographs()]).to_csv(path, index=False)
    return str(path)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _step(verb: str, function: Callable[[C], S], config: C) -> S:
    """Do a verb, and say the command that would do the same."""
    _say(f"\n$ dragonclf {verb} {shlex.join(options.arguments(config))}")
    return function(config)


def _photographs() -> list[Photograph]:
    """Those of the installed elpv-dataset package."""
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the demo's photographs are not installed: pip install 'dragonclf[demo]'")
    data = Path(spec.submodule_search_locations[0]) / "data"
    photos = []
    for line in (data / "labels.csv").read_text().splitlines():
        path, chance, cell = line.split()
        label = "defective" if float(chance) >= DEFECTIVE_FROM else "functional"
        photos.append(Photograph(f"{DATA}/{label}/{Path(path).name}", data / path, label, float(chance), cell))
    return photos


def _upload(photos: list[Photograph]) -> None:
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda photo: storage.put(photo.uri, photo.path.read_bytes()), photos))
    storage.put(MANIFEST, pd.DataFrame([photo.row(photo.uri) for photo in photos]).to_csv(index=False).encode())


def _show_uncertain(frame: pd.DataFrame, experts: dict[str, float]) -> None:
    """The photographs nearest to 0.5, beside what the experts said."""
    rows = frame.loc[(frame["prob_defective"] - 0.5).abs().sort_values().index[:NUM_UNCERTAIN]]
    _say("\nMost uncertain    model: defective    experts: defective")
    for uri, chance in zip(rows["uri"], rows["prob_defective"], strict=True):
        _say(f"{storage.name(uri):<16}  {chance:16.3f}  {experts[uri]:20.2f}")
    _say("")
