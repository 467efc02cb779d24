"""`export`: prove that a model may be run in a lower precision on this class of processor, or say by how much it may not."""

import hashlib
import heapq
import logging
import operator
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import torch
from pydantic import BaseModel, Field

from dragonclf.config import ExportConfig
from dragonclf.data.snapshot import Snapshot, open_snapshot, read_rows
from dragonclf.model import bundle, precision, quantize
from dragonclf.model.execution import processor, resolve_execution
from dragonclf.model.predictor import Predictor
from dragonclf.outcomes import RefusedError
from dragonclf.train.data import Images

log = logging.getLogger("dragonclf")


class ExportSummary(BaseModel):
    """A proven precision."""

    proof: str = Field(description="URI of the figures, kept beside the bundle.")
    model_version: str
    execution: str = Field(description="Runtime, device and precision.")
    processor: str = Field(description="The class of processors that it holds for.")
    num_images: int = Field(description="Validation images compared.")
    agreement: float = Field(description="Share of them that keep their label.")
    accuracy_f32: float
    accuracy: float
    speedup: float = Field(description="Of the model alone, to f32 by the same runtime.")


def export(config: ExportConfig) -> ExportSummary:
    """Compare a low precision with f32 on validation images; admit it, for this class of processor, if it holds.

    It holds if at least 99 % of the labels stay and accuracy falls by at most half a point. `score --precision` then accepts it. An
    earlier proof for the same model and processor is made anew.

    Raises:
        RefusedError: it does not hold; nothing is written.
        ValueError: this processor or runtime does not have that precision, or there are too few validation images.
    """
    loaded, snapshot = bundle.load_bundle(config.model), open_snapshot(config.data)
    if snapshot.info.classes != loaded.info.classes:
        raise ValueError(
            f"the classes of {snapshot.uri} ({', '.join(snapshot.info.classes)}) are not those of the model at {loaded.uri} "
            f"({', '.join(loaded.info.classes)}): give data with the same ones"
        )
    num_valid = sum(snapshot.info.splits.get("valid", {}).values())
    if min(num_valid, config.images) < precision.MIN_IMAGES:
        raise ValueError(
            f"{min(num_valid, config.images)} validation images prove nothing: {precision.MIN_IMAGES} are needed, and {snapshot.uri} has "
            f"{num_valid}"
        )
    has_gpu = torch.cuda.is_available()
    execution = resolve_execution(config.runtime, config.device, config.precision, has_gpu=has_gpu)
    f32 = execution.model_copy(update={"precision": "f32"})
    num_threads = torch.get_num_threads()
    files: dict[str, bytes] = {}
    if execution.precision == "int8":
        count = config.calibration_images
        log.info("export: setting int8's ranges by up to %s training images, which takes minutes", f"{count:,}")
        drawn = _draw(loaded, snapshot, "train", count, config.batch_size, num_threads)
        files = quantize.quantize(loaded.model, loaded.info.transform, np.concatenate([pixels for pixels, _ in drawn]))
    reference = bundle.open_predictor(loaded, f32, batch_size=config.batch_size, num_threads=num_threads)
    low = Predictor(
        loaded.model, loaded.info.transform, execution, batch_size=config.batch_size, num_threads=num_threads,
        quantized=quantize.load(files) if files else None, cache_key=loaded.version,
    )  # fmt: skip
    log.info("export: comparing %s with f32 on up to %s validation images", execution, f"{config.images:,}")
    compared = _compare(
        loaded, reference, low, _draw(loaded, snapshot, "valid", config.images, config.batch_size, num_threads)
    )
    where = f"{execution} on {processor(execution.device)}"
    if not compared.passes:
        raise RefusedError(f"{where} is not admitted for the model at {loaded.uri}: {compared}; nothing was written")
    log.info("export: %s is admitted: %s", where, compared)
    admission = precision.Admission(
        **compared.model_dump(), model_version=loaded.version, execution=execution, processor=processor(execution.device),
        snapshot=snapshot.uri, files={name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        created=datetime.now(UTC).isoformat(timespec="seconds"), versions=bundle.versions(),
    )  # fmt: skip
    return ExportSummary(
        proof=precision.write(loaded.uri, admission, files), model_version=loaded.version, execution=str(execution),
        **admission.model_dump(include={"processor", "num_images", "agreement", "accuracy_f32", "accuracy", "speedup"}),
    )  # fmt: skip


def _compare(
    loaded: bundle.Bundle, reference: Predictor, low: Predictor, batches: Iterator[tuple[np.ndarray, np.ndarray]]
) -> precision.Comparison:
    tally = precision.Tally()
    canaries = loaded.canary_pixels
    for start in range(0, len(canaries), low.batch_size):  # also the warm-up
        pixels = canaries[start : start + low.batch_size]
        tally.note_difference(reference(pixels)[0], low(pixels)[0])
    for pixels, targets in batches:
        began_s = time.perf_counter()
        wanted, _ = reference(pixels)
        between_s = time.perf_counter()
        found, _ = low(pixels)
        tally.add(wanted, found, targets, (between_s - began_s, time.perf_counter() - between_s))
    return tally.comparison()


def _draw(
    loaded: bundle.Bundle, snapshot: Snapshot, split: str, count: int, batch_size: int, num_threads: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of up to `count` images of a split, uint8 (N, 3, S, S), and their classes int64 (N,): always the same ones."""
    rows = (
        (hashlib.sha256(uri.encode()).digest(), {"uri": uri, "label": label})
        for table in read_rows(snapshot, splits=[split], columns=["uri", "label"])
        for uri, label in zip(*(column.to_pylist() for column in table.columns), strict=True)
    )
    drawn = pa.Table.from_pylist([row for _, row in heapq.nsmallest(count, rows, key=operator.itemgetter(0))])
    images = Images(drawn, loaded.info.classes, loaded.info.transform, num_threads=num_threads)
    indices = np.array_split(np.arange(len(images)), range(batch_size, len(images), batch_size))
    for pixels, targets in images.batches(indices, epoch=0):
        yield pixels.numpy(), targets.numpy()
