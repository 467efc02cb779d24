"""The pipeline: one row an image in order, whatever the images, the threads, or who comes first."""

import asyncio
import hashlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dragonclf import storage
from dragonclf.data.images import ImageError
from dragonclf.demo.local_s3 import LocalS3
from dragonclf.engine.pipeline import Pipeline, ShardResult
from tests.conftest import use_identity

BATCH = 4


class NumberWorker:
    """An image is a number in text; the model doubles it and tells what else was in its batch."""

    batch_size = BATCH
    pixels_shape: tuple[int, ...] | None = (2,)
    max_image_bytes = 100

    def __init__(self, *, delay_s: float = 0.0):
        self.batches: list[tuple[int, ...]] = []
        self._delay_s, self._model = delay_s, threading.Lock()

    def read(self, data: bytes) -> tuple[dict[str, Any], np.ndarray | None]:
        if not data.isdigit():
            raise ImageError("unreadable", f"not a number: {data!r}")
        number = int(data)
        if self._delay_s:
            time.sleep(self._delay_s * (hash((number, threading.get_ident())) % 7))
        return {"number": number}, np.array([number, 1], np.uint8)

    def predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        assert self._model.acquire(blocking=False), "two threads in the model"
        try:
            assert pixels.shape == (BATCH, 2)
            self.batches.append(tuple(pixels[:, 0].tolist()))
            return {"double": pixels[:, :1].astype(np.int64) * 2}
        finally:
            self._model.release()

    def table(self, planned: pa.Table, result: ShardResult) -> pa.Table:
        doubles = result.outputs.get("double", np.zeros((planned.num_rows, 1), np.int64))
        return pa.table(
            {
                "uri": planned["uri"], "etag": pa.array(result.etags, pa.string()), "status": result.statuses,
                "error": pa.array(result.errors, pa.string()), "number": [value.get("number") for value in result.values],
                "double": pa.array(doubles[:, 0], mask=~result.ok),
            }
        )  # fmt: skip


def plan_of(uris: Sequence[str], sizes: Sequence[int | None] | None = None) -> pa.Table:
    return pa.table(
        {
            "uri": uris,
            "etag": pa.nulls(len(uris), pa.string()),
            "size": pa.array(sizes or [None] * len(uris), pa.int64()),
        }
    )


def write_numbers(folder: Path, numbers: Sequence[int]) -> list[str]:
    for number in numbers:
        (folder / str(number)).write_bytes(str(number).encode())
    return [f"{folder}/{number}" for number in numbers]


def test_one_row_an_image_in_order_each_with_its_own_result(tmp_path: Path):
    worker = NumberWorker()
    uris = write_numbers(tmp_path, range(97))
    table = Pipeline(worker, num_threads=3).process(plan_of(uris))
    assert table["uri"].to_pylist() == uris
    assert table["number"].to_pylist() == list(range(97))
    assert table["double"].to_pylist() == [2 * i for i in range(97)]
    assert set(table["status"].to_pylist()) == {"ok"}
    assert table["etag"].to_pylist() == [getattr(storage.stat(uri), "etag", None) for uri in uris]


def test_batches_depend_on_the_plan_alone(tmp_path: Path):
    uris = write_numbers(tmp_path, range(1, 31))
    (tmp_path / "7").write_bytes(b"broken")
    seen = []
    for delay_s in (0.0, 0.003, 0.003):
        worker = NumberWorker(delay_s=delay_s)
        Pipeline(worker, num_threads=8).process(plan_of(uris))
        seen.append(sorted(worker.batches))
    numbers = [
        0 if i in (7, 31, 32) else i for i in range(1, 33)
    ]  # a bad image's place and those past the end hold zeros
    assert seen[0] == seen[1] == seen[2] == sorted(tuple(numbers[i : i + BATCH]) for i in range(0, 32, BATCH))


def test_what_cannot_be_used_is_a_row_that_says_why(tmp_path: Path):
    uris = write_numbers(tmp_path, [1, 2, 3])
    (tmp_path / "bad").write_bytes(b"bad")
    (tmp_path / "long").write_bytes(b"1" * 101)
    (tmp_path / "folder").mkdir()
    uris += [f"{tmp_path}/{name}" for name in ("bad", "none", "long", "folder", "listed-long")]
    table = Pipeline(NumberWorker(), num_threads=2).process(plan_of(uris, [None] * 7 + [101]))
    assert table["status"].to_pylist() == ["ok"] * 3 + ["unreadable", "missing", "too_large", "missing", "too_large"]
    assert table["error"].to_pylist() == [
        None, None, None, "not a number: b'bad'", "the object is no longer there", "101 bytes, over the limit of 100",
        "the object is no longer there", "101 bytes, over the limit of 100",
    ]  # fmt: skip
    assert table["double"].to_pylist() == [2, 4, 6, None, None, None, None, None]
    assert table["number"].null_count == 5
    etags = table["etag"].to_pylist()
    assert [etag is not None for etag in etags] == [True] * 4 + [False, True, False, False], (
        "the bytes judged have an etag"
    )


def test_too_large_by_the_listing_is_never_read(tmp_path: Path):
    path = tmp_path / "1"
    path.write_bytes(b"1")
    unread = path.stat().st_atime_ns
    table = Pipeline(NumberWorker(), num_threads=1).process(plan_of([str(path)], [10**12]))
    assert (table["status"][0].as_py(), table["etag"][0].as_py(), path.stat().st_atime_ns) == (
        "too_large",
        None,
        unread,
    )


@pytest.mark.parametrize("count", [0, 1, BATCH, BATCH + 1])
def test_shards_of_any_size(count: int, tmp_path: Path):
    table = Pipeline(NumberWorker(), num_threads=2).process(plan_of(write_numbers(tmp_path, range(count))))
    assert table["double"].to_pylist() == [2 * i for i in range(count)]


def test_without_a_model_nothing_is_predicted(tmp_path: Path):
    worker = NumberWorker()
    worker.pixels_shape = None
    worker.read = lambda data: ({"number": int(data)}, None)  # pyright: ignore[reportAttributeAccessIssue]
    table = Pipeline(worker, num_threads=2).process(plan_of(write_numbers(tmp_path, range(9))))
    assert (table["number"].to_pylist(), worker.batches) == (list(range(9)), [])


def test_a_batch_of_bad_images_alone_is_not_predicted(tmp_path: Path):
    worker = NumberWorker()
    table = Pipeline(worker, num_threads=2).process(plan_of([f"{tmp_path}/{i}" for i in range(BATCH)]))
    assert (table["status"].to_pylist(), worker.batches) == (["missing"] * BATCH, [])


def test_two_shards_at_once_keep_apart(tmp_path: Path):
    worker = NumberWorker(delay_s=0.001)
    pipeline = Pipeline(worker, num_threads=4)
    uris = write_numbers(tmp_path, range(100))
    shards = [uris[:50], uris[50:], uris[25:75], uris[::-1]]
    with ThreadPoolExecutor(4) as pool:
        tables = list(pool.map(lambda shard: pipeline.process(plan_of(shard)), shards))
    for shard, table in zip(shards, tables, strict=True):
        assert table["uri"].to_pylist() == shard
        assert [f"{tmp_path}/{number}" for number in table["number"].to_pylist()] == shard
        assert table["double"].to_pylist() == [2 * number for number in table["number"].to_pylist()]


def test_s3_denied_is_a_row_and_missing_one_too(s3_env: LocalS3, monkeypatch: pytest.MonkeyPatch):
    for i in range(3):
        storage.put(f"s3://photos/numbers/{i} #?.txt", str(i).encode())
    uris = [f"s3://photos/numbers/{i} #?.txt" for i in range(4)]
    table = Pipeline(NumberWorker(), num_threads=2).process(plan_of(uris))
    assert table["status"].to_pylist() == ["ok", "ok", "ok", "missing"]
    assert table["etag"].to_pylist()[:3] == [hashlib.md5(str(i).encode()).hexdigest() for i in range(3)]

    async def denied(uri: str) -> tuple[bytes, str]:
        raise storage.AccessDeniedError(f"cannot read {uri}: access denied")

    monkeypatch.setattr(storage, "fetch", denied)  # the server knows no rights per object
    table = Pipeline(NumberWorker(), num_threads=2).process(plan_of(uris[:1]))
    assert (table["status"][0].as_py(), table["error"][0].as_py()) == (
        "denied",
        f"cannot read {uris[0]}: access denied",
    )


def test_refused_credentials_stop_the_shard(s3_env: LocalS3, monkeypatch: pytest.MonkeyPatch):
    storage.put("s3://photos/numbers/1", b"1")
    pipeline = Pipeline(NumberWorker(), num_threads=2)
    use_identity(s3_env.environment("admin") | {"AWS_SECRET_ACCESS_KEY": "wrong" * 8}, monkeypatch)
    with pytest.raises(storage.StorageError, match=r"the store refuses the credentials"):
        pipeline.process(plan_of(["s3://photos/numbers/1"] * 50))


def test_a_pipeline_works_on_after_a_shard_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipeline = Pipeline(NumberWorker(), num_threads=2)
    uris = write_numbers(tmp_path, range(60))
    fetch = storage.fetch

    async def down(uri: str) -> tuple[bytes, str]:
        await asyncio.sleep(0)
        if uri.endswith("/3"):
            raise storage.StorageError("cannot read: no route to the store")
        return await fetch(uri)

    for _ in range(5):
        monkeypatch.setattr(storage, "fetch", down)
        with pytest.raises(storage.StorageError, match=r"no route to the store"):
            pipeline.process(plan_of(uris))
        monkeypatch.setattr(storage, "fetch", fetch)
    with ThreadPoolExecutor(1) as pool:
        table = pool.submit(pipeline.process, plan_of(uris)).result(timeout=20)
    assert table["double"].to_pylist() == [2 * i for i in range(60)]


def test_bytes_in_flight_are_bounded_also_by_one_that_is_larger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dragonclf.engine.pipeline.MAX_BYTES_IN_FLIGHT", 10)
    worker = NumberWorker()
    flying, most, lock = 0, 0, threading.Lock()
    read = worker.read

    def counted(data: bytes) -> tuple[dict[str, Any], np.ndarray | None]:
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)
        time.sleep(0.002)
        with lock:
            flying -= 1
        return read(data)

    worker.read = counted  # pyright: ignore[reportAttributeAccessIssue]
    uris = write_numbers(tmp_path, range(24))
    table = Pipeline(worker, num_threads=8).process(plan_of(uris, [5] * 20 + [90] * 4))
    assert table["double"].to_pylist() == [2 * i for i in range(24)]
    assert most <= 2
