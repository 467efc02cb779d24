"""`rescore`: a new head on embeddings that an earlier run wrote. No image is read."""

import logging
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from dragonclf.busy import Busy
from dragonclf.config import RescoreConfig
from dragonclf.data import tables
from dragonclf.engine import inference, job, published, reuse, runs
from dragonclf.engine.layout import ALWAYS, FEATURES, Layout
from dragonclf.engine.pipeline import SCORED
from dragonclf.model import bundle, zoo
from dragonclf.model.predictor import Head, softmax
from dragonclf.verbs.score import ScoreSummary, layout_of, summarize

log = logging.getLogger("dragonclf")

HEAD = "head on embeddings"  # in a spec, and where other runs name how they were executed


def rescore(config: RescoreConfig) -> ScoreSummary:
    """Write the rows that `score` with `config.model` would write, out of a run of the same backbone that kept its embeddings.

    Probabilities are within 1e-3 of those of `score` (embeddings are kept as float16). Statuses, sizes and the input's own columns are
    that run's. The same command resumes a killed run, and does nothing if it is done.

    Raises:
        ValueError: that run has no embeddings, or they are of another backbone or transform than the model's.
        Also what `job.run` does.
    """
    loaded = bundle.load_bundle(config.model)
    layout = layout_of(config)
    layout.check(loaded.info.classes, thresholds=loaded.info.thresholds, embeddings=False)
    uri = published.find_run(config.features)
    manifest = published.read_manifest(uri)
    _check(loaded, uri, manifest.spec)
    log.info("rescore: model %s on the embeddings of run %s", loaded.version, manifest.run)
    spec = {
        "model": loaded.version, "transform": loaded.info.transform.digest, "execution": HEAD,
        "layout": layout.model_dump(mode="json"),
        runs.INPUT: {"run": manifest.run, "plan": manifest.plan_digest, "parts": manifest.parts_sha256},
    }  # fmt: skip
    done = job.run(
        config.out, "rescore", spec, _nothing_to_list, RescoreTask(loaded.uri, loaded.version, layout),
        ray_config=config, run_config=config, made_of=uri,
    )  # fmt: skip
    return summarize(done, loaded, HEAD)


@dataclass(frozen=True)
class RescoreTask:
    """The head of the bundle at `model_uri`, which must still be `model_version`, on the rows of the run that a run is made of."""

    model_uri: str
    model_version: str
    layout: Layout
    uses_gpu: bool = False

    def work(self, run: runs.Run, num_threads: int, max_bytes: int) -> "RescoreWork":
        return RescoreWork(run, self)


class RescoreWork:
    """Shards of a run out of the same shards of the run that it is made of."""

    def __init__(self, run: runs.Run, task: RescoreTask):
        assert run.base is not None
        self._parts = published.check_parts(run.base, published.read_manifest(run.base))
        self._layout, self._loaded = task.layout, inference.open_bundle(task.model_uri, task.model_version)
        self._head = Head(self._loaded.model)

    def take_busy(self) -> Busy:
        return Busy()

    def __call__(self, shard: int, planned: pa.Table, is_again: bool) -> tuple[pa.Table, int]:
        rows = tables.read(self._parts[shard])
        features = rows[FEATURES].combine_chunks().flatten().to_numpy()  # of the rows that have any
        logits = self._head(features.reshape(-1, self._head.num_features).astype(np.float32))
        scored = np.isin(rows["status"].to_pylist(), SCORED)
        probs = np.zeros((len(rows), logits.shape[1]), np.float32)
        probs[scored] = softmax(logits)
        info = self._loaded.info
        own = pa.table(
            {
                **{name: rows[name] for name in ALWAYS},
                **self._layout.answers(info.classes, probs, ~scored, thresholds=info.thresholds),
                **{name: rows[name] for name in ("width", "height") if name in rows.column_names},
                "model_version": pa.array([self._loaded.version] * len(rows), pa.string()),
            }
        )
        return reuse.with_input(self._layout.chosen(own), planned), 0


def _check(loaded: bundle.Bundle, uri: str, spec: dict[str, Any]) -> None:
    if not spec.get("embeddings"):
        raise ValueError(f"run {uri} has no embeddings: score with --embeddings, then rescore that run")
    for what, ours, theirs in (
        ("backbone", zoo.backbone_digest(loaded.model), spec["embeddings"]),
        ("transform", loaded.info.transform.digest, spec["transform"]),
    ):
        if ours != theirs:
            raise ValueError(
                f"the embeddings of run {uri} are of another {what} ({theirs}) than that of the model at {loaded.uri} ({ours}): "
                f"score with the model, reading the images"
            )


def _nothing_to_list() -> NoReturn:
    raise AssertionError("a run made of another one has its plan")
