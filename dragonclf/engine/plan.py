"""The plan of a run: which images, in which shards, written before anything is read.

A plan is staged in a local folder first, so that an input that cannot be listed, or is the same as last time, leaves nothing behind
in the output. Its digest covers every row; equal digests mean the same images with the same contents and columns.
"""

import concurrent.futures
import hashlib
import itertools
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Field

from dragonclf import storage
from dragonclf.data import tables
from dragonclf.data.digest import RowDigest

MIN_SHARD_IMAGES, MAX_SHARD_IMAGES = 512, 20_000
MAX_SHARD_BYTES = 4 * 2**30

NUM_COPIERS = 16

COLUMNS = ("uri", "etag", "size")  # of every planned row; the input's further columns follow
SHARDS = "shards.parquet"
SUMMARY = "plan.json"


class PlanSummary(BaseModel):
    """``plan.json``, written last and never replaced: it chooses the plan, whose files lie in a folder of its own."""

    digest: str = Field(
        description="SHA-256 over names and types of the columns and every row of the plan, however it is cut."
    )
    folder: str = Field(description="Name of the folder with its files: a hash of the rows and of where they are cut.")
    planned_s: float = Field(description="When the listing began, seconds since 1970: orders runs.")
    num_images: int
    num_bytes: int = Field(description="Sum of the sizes that the listing gave.")
    num_shards: int


@dataclass(frozen=True)
class StagedPlan:
    """A plan in a local folder. Use it as a context manager: leaving it deletes the folder."""

    folder: Path
    summary: PlanSummary

    def __enter__(self) -> "StagedPlan":
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder)

    def upload(self, run_uri: str, *, atomic: bool = True) -> None:
        """Give the plan to a run that has none yet. Of two drivers that do so at once, one wins, whole, and both use its plan."""
        for path in sorted(self.folder.iterdir()):
            storage.put(storage.join(_folder(run_uri, self.summary), path.name), path.read_bytes())
        _choose(run_uri, self.summary, atomic)


def stage_plan(rows: Iterable[pa.Table], *, shard_images: int | None = None) -> StagedPlan:
    """Cut the rows into shards in their order, in constant memory.

    Each table has the columns ``uri`` (string), ``etag`` (string or null), ``size`` (int64 bytes or null), then any further ones, which
    are carried into the result. A shard holds `shard_images` rows; None lets shards grow with the plan from 512 to 20,000 images, so
    that small inputs resume finely and large ones have few parts. A shard also ends once it holds 4 GiB.
    """
    started_s = time.time()
    folder = Path(tempfile.mkdtemp(prefix="dragonclf-plan-"))
    digest = RowDigest()
    shards: list[dict[str, int]] = []
    try:
        for shard in _cut(rows, shard_images):
            digest.update(shard)
            pq.write_table(shard, folder / f"{len(shards):08d}.parquet", compression="zstd")
            shards.append({"shard": len(shards), "images": shard.num_rows, "bytes": _num_bytes(shard)})
        schema = pa.schema([("shard", pa.int64()), ("images", pa.int64()), ("bytes", pa.int64())])
        table = pa.Table.from_pylist(shards, schema=schema)
        pq.write_table(table, folder / SHARDS, compression="zstd")
    except BaseException:
        shutil.rmtree(folder)
        raise
    cuts = ",".join(str(shard["images"]) for shard in shards)
    summary = PlanSummary(
        digest=digest.hexdigest(),
        folder=hashlib.sha256(f"{digest.hexdigest()} {cuts}".encode()).hexdigest()[:12],
        planned_s=started_s,
        num_images=sum(shard["images"] for shard in shards),
        num_bytes=sum(shard["bytes"] for shard in shards),
        num_shards=len(shards),
    )
    return StagedPlan(folder, summary)


def copy(from_run_uri: str, run_uri: str, *, atomic: bool = True) -> None:
    """Give a run the plan of another one, as of now."""
    summary = read_summary(from_run_uri)
    assert summary is not None, f"{from_run_uri} has no plan"
    names = [SHARDS, *(f"{shard:08d}.parquet" for shard in range(summary.num_shards))]
    source, target = _folder(from_run_uri, summary), _folder(run_uri, summary)
    with concurrent.futures.ThreadPoolExecutor(NUM_COPIERS) as pool:
        for _ in pool.map(
            lambda name: storage.put(storage.join(target, name), storage.get(storage.join(source, name))), names
        ):
            pass
    _choose(run_uri, summary.model_copy(update={"planned_s": time.time()}), atomic)


def read_summary(run_uri: str) -> PlanSummary | None:
    """The plan's summary, or None if the run has no whole plan."""
    found = storage.get_if_exists(storage.join(run_uri, SUMMARY))
    return PlanSummary.model_validate_json(found[0]) if found else None


def read_shard(run_uri: str, summary: PlanSummary, shard: int) -> pa.Table:
    """The planned rows of one shard."""
    return tables.read(storage.join(_folder(run_uri, summary), f"{shard:08d}.parquet"))


def shard_sizes(run_uri: str, summary: PlanSummary) -> list[int]:
    """Number of images of each shard, in order."""
    return tables.read(storage.join(_folder(run_uri, summary), SHARDS), columns=["images"])["images"].to_pylist()


def sample_uris(run_uri: str, summary: PlanSummary, *, count: int) -> list[str]:
    """`count` images or a few more, spread over the plan; all of them if it has fewer."""
    shards = _spread(summary.num_shards, count)
    found: list[str] = []
    for shard in shards:
        uris = read_shard(run_uri, summary, shard)["uri"]
        found += [uris[row].as_py() for row in _spread(len(uris), -(-count // len(shards)))]
    return found


def _spread(total: int, count: int) -> list[int]:
    return sorted({int(place) for place in np.linspace(0, total - 1, min(total, count))})


def _choose(run_uri: str, summary: PlanSummary, atomic: bool) -> None:
    storage.put_if_absent(storage.join(run_uri, SUMMARY), summary.model_dump_json(indent=2).encode(), atomic=atomic)


def _folder(run_uri: str, summary: PlanSummary) -> str:
    return storage.join(run_uri, "plan", summary.folder)


def _cut(rows: Iterable[pa.Table], shard_images: int | None) -> Iterator[pa.Table]:
    waiting: pa.Table | None = None
    planned = 0
    for table in itertools.chain(rows, [None]):
        if table is not None:
            waiting = table if waiting is None else pa.concat_tables([waiting, table])
        while waiting is not None and waiting.num_rows:
            limit = shard_images or min(MAX_SHARD_IMAGES, max(MIN_SHARD_IMAGES, planned // 20))
            num_bytes = np.cumsum(waiting["size"].slice(0, limit).fill_null(0).to_numpy())
            count = max(1, int(np.searchsorted(num_bytes, MAX_SHARD_BYTES, side="right")))
            is_full = count < waiting.num_rows or count == limit
            if not is_full and table is not None:
                break
            yield waiting.slice(0, count)
            planned += count
            waiting = waiting.slice(count)


def _num_bytes(table: pa.Table) -> int:
    return int(table["size"].fill_null(0).to_numpy().sum())
