"""`index`: a prefix or manifest of labelled images becomes an immutable snapshot."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from dragonclf import storage
from dragonclf.config import IndexConfig
from dragonclf.data import corrections, images, listing, measures, selection, snapshot
from dragonclf.data.images import Picture
from dragonclf.engine import job, plan, published, runs
from dragonclf.engine.image_work import ImageWork
from dragonclf.engine.pipeline import Limits, ShardResult

log = logging.getLogger("dragonclf")

SPLIT_FOLDERS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}
# What reading an image gives.
READ = {
    "width": pa.int32(), "height": pa.int32(), "sha256": pa.string(),
    "phash": pa.string(), "brightness": pa.float64(), "sharpness": pa.float64(),
}  # fmt: skip
# Columns of our own: a manifest's of that name becomes input_<name>.
MEASURED = (*READ, "status", "error", corrections.FROM)


def index(config: IndexConfig) -> snapshot.Snapshot:
    """Read and check every image of `config.source` that its filters choose once, and write a snapshot under `config.out`.

    Each object is a row, with a status if it cannot be used. The same command resumes a killed run; on an unchanged source it returns
    the snapshot that is there. Files of `config.corrections` change labels of the snapshot, not what was read: no image is read for them.
    ValueError, before anything is written, for classes that could not be trained on and for a file that is no file of corrections; and,
    with no snapshot written, for corrections that do not hold any more.
    """
    given = [corrections.read_corrections(uri) for uri in config.corrections]
    spec = {
        "max_image_bytes": config.max_image_bytes, "max_pixels": config.max_pixels, "decode": images.DECODE_VERSION,
        "measures": measures.VERSION,
        runs.INPUT: {"source": config.source, **selection.selection_id(config)},
    }  # fmt: skip
    limits = Limits(config.max_image_bytes, config.max_pixels, config.max_image_s)
    done = job.run(
        config.out, "index", spec, lambda: _stage(config), IndexTask(limits),
        ray_config=config, run_config=config, retry_errors=config.retry_errors,
    )  # fmt: skip
    manifest = done.manifest
    _say_unusable(manifest, done.uri)
    made = snapshot.write_snapshot(
        config.out,
        published.read_parts(done.uri),
        source=config.source,
        valid_fraction=config.valid_fraction,
        seed=config.seed,
        corrected_by=given,
    )
    _say_corrected(made.info.corrections)
    pointer = {"snapshot": made.info.id, "planned_s": manifest.planned_s}
    published.advance_pointer(storage.join(config.out, snapshot.FOLDER, snapshot.LATEST), pointer, atomic=done.atomic)
    return made


@dataclass(frozen=True)
class IndexTask:
    """Decodes each image whole, so that what training meets later is known now."""

    limits: Limits
    uses_gpu: bool = False

    def work(self, run: runs.Run, num_threads: int, max_bytes: int) -> ImageWork:
        return ImageWork(run, self, num_threads, max_bytes)

    def open(self, num_threads: int) -> "IndexWorker":
        torch.set_num_threads(1)  # each decoding thread measures an image of its own
        return IndexWorker()


class IndexWorker:
    """Size in pixels, SHA-256 and `measures` of each image."""

    batch_size = 64
    min_side = None  # whole: what can be trained on is decided here

    def new_batch(self) -> None:
        return None

    def read(self, data: bytes, picture: Picture) -> tuple[dict[str, Any], None]:
        size = {"width": picture.width, "height": picture.height}
        digest = hashlib.sha256(data).hexdigest()
        return {**size, "sha256": digest, **measures.measure(picture.pixels)._asdict()}, None

    def predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        raise AssertionError("an index has no model")

    def table(self, planned: pa.Table, result: ShardResult) -> pa.Table:
        etags = [read or listed for read, listed in zip(result.etags, planned["etag"].to_pylist(), strict=True)]
        table = planned.select(plan.COLUMNS).set_column(1, "etag", pa.array(etags, pa.string()))
        for name, kind in READ.items():
            table = table.append_column(name, pa.array([value.get(name) for value in result.values], kind))
        # An object replaced since it was listed is indexed as it was read, with that etag: nothing of its row is about another.
        statuses = ["ok" if status == "changed" else status for status in result.statuses]
        errors = [None if status == "ok" else error for status, error in zip(statuses, result.errors, strict=True)]
        table = table.append_column("status", pa.array(statuses, pa.string()))
        return table.append_column("error", pa.array(errors, pa.string()))


def _stage(config: IndexConfig) -> plan.StagedPlan:
    """Plan the labelled rows. Classes that no row could fill are refused here, before anything is written."""
    labels: Counter[str] = Counter()

    def rows() -> Iterator[pa.Table]:
        is_manifest, base = listing.is_manifest(config.source), listing.base(config.source)
        for table in selection.select(listing.list_rows(config.source), config.source, config):
            labelled = (
                _label_manifest(table, config.source, labels) if is_manifest else _label_prefix(table, base, labels)
            )
            if labelled.num_rows:
                yield labelled

    for name in _empty_folders(config.source) if not selection.selection_id(config) else ():
        labels[name] += 0
    staged = plan.stage_plan(rows(), shard_images=config.shard_images)
    try:
        empty = sorted(name for name, count in labels.items() if not count)
        if empty:
            raise ValueError(f"class {empty[0]!r} has no image under {config.source}: add some, or remove its folder")
        if len(labels) < 2:
            found = f"only one class, {next(iter(labels))!r}" if labels else "no image in a class folder"
            raise ValueError(
                f"{config.source} has {found}: a classifier needs two or more, one folder each (or a column label)"
            )
    except ValueError:
        staged.__exit__()
        raise
    return staged


def _label_prefix(table: pa.Table, source: str, labels: Counter[str]) -> pa.Table:
    """ImageFolder's rule: the first folder is the class; train/, valid/ (val/, validation/) and test/ above it are splits."""
    keep, found_labels, found_splits = [], [], []
    start = len(source.removesuffix("/")) + 1
    for uri, size in zip(table["uri"].to_pylist(), table["size"].to_pylist(), strict=True):
        folders = uri[start:].split("/")[:-1]
        split = SPLIT_FOLDERS.get(folders[0]) if len(folders) > 1 else None
        label = folders[1 if split else 0] if folders else None
        is_marker = uri.endswith("/") and not size  # a console's "folder": it names a class, it is no image
        keep.append(not is_marker)
        if label is not None and not (is_marker and label in SPLIT_FOLDERS):
            labels[label] += not is_marker
        found_labels.append(label)
        found_splits.append(split)
    for name, column in (("label", found_labels), ("split", found_splits), ("group", [None] * len(keep))):
        table = table.append_column(name, pa.array(column, pa.string()))
    return table.filter(pa.array(keep))


def _label_manifest(table: pa.Table, source: str, labels: Counter[str]) -> pa.Table:
    if "label" not in table.column_names:
        raise ValueError(f"the manifest {source} has no column 'label': it has {', '.join(table.column_names)}")
    own = [f"input_{name}" if name in MEASURED else name for name in table.column_names]
    if len(set(own)) < len(own):
        twice = next(name for name in own if own.count(name) > 1)
        raise ValueError(
            f"the manifest {source} has the columns {twice.removeprefix('input_')!r} and {twice!r}: rename one"
        )
    table = table.rename_columns(own)
    for name in ("label", "split", "group"):
        column = table[name].cast(pa.string()) if name in table.column_names else pa.nulls(table.num_rows, pa.string())
        table = table.drop_columns(name) if name in table.column_names else table
        table = table.append_column(name, column)
    splits = [None if value is None else SPLIT_FOLDERS.get(value, "") for value in table["split"].to_pylist()]
    if "" in splits:
        wrong = table["split"][splits.index("")].as_py()
        raise ValueError(f"the manifest {source} has a split {wrong!r}: use train, valid or test, or leave it empty")
    labels.update(label for label in table["label"].to_pylist() if label is not None)
    return table.set_column(table.column_names.index("split"), "split", pa.array(splits, pa.string()))


def _empty_folders(source: str) -> list[str]:
    """Class folders of a local source that hold nothing: a listing of files cannot show them."""
    if storage.is_s3(source) or not os.path.isdir(source):
        return []
    found = []
    for folder in sorted(entry.path for entry in os.scandir(source) if entry.is_dir()):
        inside = [entry.path for entry in os.scandir(folder) if entry.is_dir()]
        if storage.name(folder) in SPLIT_FOLDERS and inside:
            found += [storage.name(path) for path in inside if not os.listdir(path)]
        elif not os.listdir(folder):
            found.append(storage.name(folder))
    return found


def _say_corrected(files: list[corrections.AppliedCorrections]) -> None:
    for file in files:
        log.info("index: %s: %s relabelled, %s left out", file.uri, f"{file.num_relabelled:,}", f"{file.num_deleted:,}")
        if file.num_test:
            log.warning(
                "index: %s touches %s images of the test split: figures on it are of another test than before",
                file.uri,
                f"{file.num_test:,}",
            )


def _say_unusable(manifest: published.Manifest, run_uri: str) -> None:
    bad = {status: count for status, count in manifest.counts.items() if status != "ok"}
    if bad:
        log.warning(
            "index: %s images cannot be used: %s; each is a row of %s/parts",
            sum(bad.values()),
            json.dumps(bad),
            run_uri,
        )
