"""The pipeline: one row an image in order, whatever the images, the threads, or who comes first."""

import asyncio
import hashlib
import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dragonclf import storage
from dragonclf.data import images
from dragonclf.data.images import Picture
from dragonclf.demo.local_s3 import LocalS3
from dragonclf.engine.pipeline import Limits, Pipeline, ShardResult, SuspectError
from tests.conftest import use_identity

BATCH = 4


class NumberWorker:
    """An image is a number, its one pixel; the model doubles it and tells what else was in its batch."""

    batch_size = BATCH
    min_side = None

    def __init__(self, *, delay_s: float = 0.0):
        self.batches: list[tuple[int, ...]] = []
        self._delay_s, self._model = delay_s, threading.Lock()

    def new_batch(self) -> np.ndarray | None:
        return np.zeros((BATCH, 2), np.uint8)

    def read(self, data: bytes, picture: Picture) -> tuple[dict[str, Any], np.ndarray | None]:
        number = int(picture.pixels[0, 0, 0])
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
                "double": pa.array(doubles[:, 0], mask=~result.scored),
            }
        )  # fmt: skip


def pipeline_of(
    worker: NumberWorker, num_threads: int = 2, *, max_s: float = 60.0, elsewhere: Sequence[str] = ()
) -> Pipeline:
    limits = Limits(max_bytes=100, max_pixels=100, max_s=max_s)
    return Pipeline(worker, num_threads=num_threads, limits=limits, elsewhere=lambda: list(elsewhere))


def image_of(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


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
        (folder / str(number)).write_bytes(image_of(number))
    return [f"{folder}/{number}" for number in numbers]


def test_one_row_an_image_in_order_each_with_its_own_result(tmp_path: Path):
    worker = NumberWorker()
    uris = write_numbers(tmp_path, range(97))
    table = pipeline_of(worker, 3).process(plan_of(uris))
    assert table["uri"].to_pylist() == uris
    assert table["number"].to_pylist() == list(range(97))
    assert table["double"].to_pylist() == [2 * i for i in range(97)]
    assert set(table["status"].to_pylist()) == {"ok"}
    assert table["etag"].to_pylist() == [getattr(storage.stat(uri), "etag", None) for uri in uris]


def test_it_tells_what_its_time_was_spent_on(tmp_path: Path):
    worker = NumberWorker()
    worker.read, read = (lambda data, image: (time.sleep(0.01), read(data, image))[1]), worker.read  # pyright: ignore[reportAttributeAccessIssue]
    pipeline = pipeline_of(worker, 3)
    started_s = time.monotonic()  # the pipeline's own clock starts within the next line
    pipeline.take_busy()
    pipeline.process(plan_of(write_numbers(tmp_path, range(30))))
    busy = pipeline.take_busy()
    assert busy.wall_s <= time.monotonic() - started_s
    assert busy.threads_s == pytest.approx(3 * busy.wall_s)
    assert 0.3 <= busy.decode_s <= busy.threads_s
    assert 0 < busy.model_s < busy.wall_s
    assert busy.num_bytes == sum(len(image_of(i)) for i in range(30))
    assert busy.fetch_s > 0
    assert pipeline.take_busy().decode_s == 0


def test_batches_depend_on_the_plan_alone(tmp_path: Path):
    uris = write_numbers(tmp_path, range(1, 31))
    (tmp_path / "7").write_bytes(b"broken")
    seen = []
    for delay_s in (0.0, 0.003, 0.003):
        worker = NumberWorker(delay_s=delay_s)
        pipeline_of(worker, 8).process(plan_of(uris))
        seen.append(sorted(worker.batches))
    numbers = [
        0 if i in (7, 31, 32) else i for i in range(1, 33)
    ]  # a bad image's place and those past the end hold zeros
    assert seen[0] == seen[1] == seen[2] == sorted(tuple(numbers[i : i + BATCH]) for i in range(0, 32, BATCH))


def test_what_cannot_be_used_is_a_row_that_says_why(tmp_path: Path):
    uris = write_numbers(tmp_path, [1, 2, 3])
    (tmp_path / "bad").write_bytes(b"bad")
    (tmp_path / "long").write_bytes(image_of(1) + bytes(101))
    (tmp_path / "folder").mkdir()
    uris += [f"{tmp_path}/{name}" for name in ("bad", "none", "long", "folder", "listed-long")]
    table = pipeline_of(NumberWorker(), 2).process(plan_of(uris, [None] * 7 + [101]))
    assert table["status"].to_pylist() == ["ok"] * 3 + ["unsupported", "missing", "too_large", "missing", "too_large"]
    assert table["error"].to_pylist() == [
        None, None, None, "not an image in a known format", "the object is no longer there",
        f"{len(image_of(1)) + 101} bytes, over the limit of 100",
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
    table = pipeline_of(NumberWorker(), 1).process(plan_of([str(path)], [10**12]))
    assert (table["status"][0].as_py(), table["etag"][0].as_py(), path.stat().st_atime_ns) == (
        "too_large",
        None,
        unread,
    )


@pytest.mark.parametrize("count", [0, 1, BATCH, BATCH + 1])
def test_shards_of_any_size(count: int, tmp_path: Path):
    table = pipeline_of(NumberWorker(), 2).process(plan_of(write_numbers(tmp_path, range(count))))
    assert table["double"].to_pylist() == [2 * i for i in range(count)]


def test_without_a_model_nothing_is_predicted(tmp_path: Path):
    worker = NumberWorker()
    worker.new_batch = lambda: None
    worker.read = lambda data, picture: ({"number": int(picture.pixels[0, 0, 0])}, None)  # pyright: ignore[reportAttributeAccessIssue]
    table = pipeline_of(worker, 2).process(plan_of(write_numbers(tmp_path, range(9))))
    assert (table["number"].to_pylist(), worker.batches) == (list(range(9)), [])


def test_a_batch_of_bad_images_alone_is_not_predicted(tmp_path: Path):
    worker = NumberWorker()
    table = pipeline_of(worker, 2).process(plan_of([f"{tmp_path}/{i}" for i in range(BATCH)]))
    assert (table["status"].to_pylist(), worker.batches) == (["missing"] * BATCH, [])


def test_two_shards_at_once_keep_apart(tmp_path: Path):
    worker = NumberWorker(delay_s=0.001)
    pipeline = pipeline_of(worker, 4)
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
        storage.put(f"s3://photos/numbers/{i} #?.txt", image_of(i))
    uris = [f"s3://photos/numbers/{i} #?.txt" for i in range(4)]
    table = pipeline_of(NumberWorker(), 2).process(plan_of(uris))
    assert table["status"].to_pylist() == ["ok", "ok", "ok", "missing"]
    assert table["etag"].to_pylist()[:3] == [hashlib.md5(image_of(i)).hexdigest() for i in range(3)]

    fetch = storage.fetch

    async def denied(uri: str) -> tuple[bytes, str]:
        if uri == uris[1]:
            raise storage.AccessDeniedError(f"cannot read {uri}: access denied")
        return await fetch(uri)

    monkeypatch.setattr(storage, "fetch", denied)  # the server knows no rights per object
    table = pipeline_of(NumberWorker(), 2, elsewhere=uris).process(plan_of(uris))
    assert table["status"].to_pylist() == ["ok", "denied", "ok", "missing"]
    assert table["error"][1].as_py() == f"cannot read {uris[1]}: access denied"


def numbers_that_fail(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[[str, int], bool], *, error: type[storage.StorageError]
) -> Counter[str]:
    """Make reads fail for (uri, how often it was read before). Returns the counts of reads."""
    fetch, reads = storage.fetch, Counter[str]()

    async def failing(uri: str) -> tuple[bytes, str]:
        reads[uri] += 1
        if fails(uri, reads[uri] - 1):
            raise error(f"cannot read {uri}: it fails")
        return await fetch(uri)

    monkeypatch.setattr(storage, "fetch", failing)
    return reads


@pytest.mark.parametrize(
    ("error", "status"), [(storage.StorageError, "timeout"), (storage.AccessDeniedError, "denied")]
)
def test_one_image_that_cannot_be_read_is_blamed_after_others_could_be(
    error: type[storage.StorageError], status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    uris = write_numbers(tmp_path, range(8))
    reads = numbers_that_fail(monkeypatch, lambda uri, _: uri.endswith("/5"), error=error)
    table = pipeline_of(NumberWorker(), 2, elsewhere=uris).process(plan_of(uris))
    assert table["status"].to_pylist() == ["ok"] * 5 + [status] + ["ok"] * 2
    assert table["error"][5].as_py() == f"cannot read {uris[5]}: it fails"
    assert reads[uris[5]] == 2


def test_a_failure_that_passes_costs_a_second_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uris = write_numbers(tmp_path, range(8))
    numbers_that_fail(
        monkeypatch, lambda uri, before: uri.endswith("/5") and not before, error=storage.AccessDeniedError
    )
    table = pipeline_of(NumberWorker(), 2, elsewhere=uris).process(plan_of(uris))
    assert table["double"].to_pylist() == [2 * i for i in range(8)]


@pytest.mark.parametrize("error", [storage.StorageError, storage.AccessDeniedError, storage.CredentialsError])
def test_a_store_that_fails_in_the_middle_blames_no_image(
    error: type[storage.StorageError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    uris = write_numbers(tmp_path, range(200))
    reads = numbers_that_fail(monkeypatch, lambda uri, before: reads.total() > 100, error=error)
    with pytest.raises(storage.StorageError, match="it fails"):
        pipeline_of(NumberWorker(), 2, elsewhere=uris).process(plan_of(uris))


def test_a_shard_denied_whole_is_told_from_a_store_denied_by_images_of_other_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    uris = write_numbers(tmp_path, range(9))
    numbers_that_fail(monkeypatch, lambda uri, _: not uri.endswith("/8"), error=storage.AccessDeniedError)
    with pytest.raises(storage.StorageError, match="no other image there can be read either"):
        pipeline_of(NumberWorker(), 2, elsewhere=uris[:2]).process(plan_of(uris[:8]))
    table = pipeline_of(NumberWorker(), 2, elsewhere=uris[7:]).process(plan_of(uris[:8]))
    assert table["status"].to_pylist() == ["denied"] * 8


def test_files_that_are_all_gone_are_a_folder_that_is_gone(tmp_path: Path):
    uris = write_numbers(tmp_path, range(8))
    planned = plan_of(uris)
    for uri in uris[1:]:
        Path(uri).unlink()
    pipeline = pipeline_of(NumberWorker(), 2, elsewhere=uris)
    assert pipeline.process(planned)["status"].to_pylist() == ["ok"] + ["missing"] * 7
    Path(uris[0]).unlink()
    with pytest.raises(storage.StorageError, match="does not exist; no other image there can be read either"):
        pipeline.process(planned)


def test_control_reads_share_one_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uris = write_numbers(tmp_path, range(9))

    async def hanging(uri: str) -> tuple[bytes, str]:
        if uri != uris[8]:
            await asyncio.sleep(3600)
        raise storage.StorageError(f"cannot read {uri}: it fails")

    monkeypatch.setattr(storage, "fetch", hanging)
    monkeypatch.setattr("dragonclf.engine.fetch.CONTROL_S", 2.0)
    started_s = time.monotonic()
    with pytest.raises(storage.StorageError, match="it fails; no other image there"):
        pipeline_of(NumberWorker(), 2, elsewhere=uris[:8]).process(plan_of(uris[8:]))
    assert time.monotonic() - started_s < 10  # one after the other they would take 16 s


def test_a_replaced_object_is_scored_as_it_is_and_says_so(tmp_path: Path):
    uris = write_numbers(tmp_path, range(3))
    etags = [getattr(storage.stat(uri), "etag", "") for uri in uris]
    (tmp_path / "1").write_bytes(image_of(77))
    planned = plan_of(uris).set_column(1, "etag", pa.array(etags))
    table = pipeline_of(NumberWorker(), 2).process(planned)
    assert table["status"].to_pylist() == ["ok", "changed", "ok"]
    assert table["double"].to_pylist() == [0, 154, 4]
    assert table["etag"][1].as_py() == getattr(storage.stat(uris[1]), "etag", None) != etags[1]
    assert (
        table["error"][1].as_py()
        == f"the object was replaced after it was listed (then etag {etags[1]}): this is what it is now"
    )


def test_an_image_that_takes_too_long_makes_its_shard_suspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uris = write_numbers(tmp_path, range(12))
    read = images.read

    def slow(data: bytes, **limits: Any) -> Picture:
        picture = read(data, **limits)
        number = int(picture.pixels[0, 0, 0])
        if number == 5:
            time.sleep(1.5)
        if number == 6 and starved:
            raise MemoryError
        return picture

    monkeypatch.setattr(images, "read", slow)
    starved = False
    pipeline = pipeline_of(NumberWorker(), 2, max_s=0.3)
    with pytest.raises(SuspectError, match=r"was not decoded in 0\.3 s"):
        pipeline.process(plan_of(uris))
    starved = True
    with pytest.raises(SuspectError, match="not enough memory"):
        pipeline.process(plan_of(uris[6:]))
    starved = False
    assert pipeline.process(plan_of(uris[6:]))["double"].to_pylist() == [2 * i for i in range(6, 12)]


def test_isolated_rows_equal_the_others(tmp_path: Path):
    uris = write_numbers(tmp_path, range(30))
    (tmp_path / "7").write_bytes(b"broken")
    pipeline = pipeline_of(NumberWorker(), 2)
    assert pipeline.process(plan_of(uris), isolate=True).equals(pipeline.process(plan_of(uris)))
    assert pipeline._isolation._decoders == {}


def test_refused_credentials_stop_the_shard(s3_env: LocalS3, monkeypatch: pytest.MonkeyPatch):
    storage.put("s3://photos/numbers/1", image_of(1))
    pipeline = pipeline_of(NumberWorker(), 2)
    use_identity(s3_env.environment("admin") | {"AWS_SECRET_ACCESS_KEY": "wrong" * 8}, monkeypatch)
    with pytest.raises(storage.StorageError, match=r"the store refuses the credentials"):
        pipeline.process(plan_of(["s3://photos/numbers/1"] * 50))


def test_a_pipeline_works_on_after_a_shard_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipeline = pipeline_of(NumberWorker(), 2)
    uris = write_numbers(tmp_path, range(60))
    fetch = storage.fetch

    async def down(uri: str) -> tuple[bytes, str]:
        await asyncio.sleep(0)
        raise storage.StorageError(f"cannot read {uri}: no route to the store")

    for _ in range(5):
        monkeypatch.setattr(storage, "fetch", down)
        with pytest.raises(storage.StorageError, match=r"no route to the store"):
            pipeline.process(plan_of(uris))
        monkeypatch.setattr(storage, "fetch", fetch)
    with ThreadPoolExecutor(1) as pool:
        table = pool.submit(pipeline.process, plan_of(uris)).result(timeout=20)
    assert table["double"].to_pylist() == [2 * i for i in range(60)]


def test_images_are_fetched_while_others_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dragonclf.engine.pipeline.MAX_FETCHES", 1)
    worker, fetch, fetched = NumberWorker(), storage.fetch, threading.Semaphore(0)
    read = worker.read

    async def counted(uri: str) -> tuple[bytes, str]:
        fetched.release()
        return await fetch(uri)

    def waits_for_all(data: bytes, picture: Picture) -> tuple[dict[str, Any], np.ndarray | None]:
        assert all(fetched.acquire(timeout=10) for _ in range(BATCH)), "no image is fetched before one is decoded"
        fetched.release(BATCH)
        return read(data, picture)

    monkeypatch.setattr(storage, "fetch", counted)
    worker.read = waits_for_all  # pyright: ignore[reportAttributeAccessIssue]
    table = pipeline_of(worker, 1).process(plan_of(write_numbers(tmp_path, range(BATCH))))
    assert table["double"].to_pylist() == [2 * i for i in range(BATCH)]


@pytest.mark.parametrize("sizes", [[5] * 20 + [90] * 4, [None] * 24])
def test_bytes_in_flight_are_bounded_also_by_one_that_is_larger(
    sizes: list[int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("dragonclf.engine.pipeline.MAX_BYTES_IN_FLIGHT", 10)
    monkeypatch.setattr("dragonclf.engine.pipeline.UNKNOWN_SIZE", 5)
    worker = NumberWorker()
    flying, most, lock = 0, 0, threading.Lock()
    read = worker.read

    def counted(data: bytes, picture: Picture) -> tuple[dict[str, Any], np.ndarray | None]:
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)
        time.sleep(0.002)
        with lock:
            flying -= 1
        return read(data, picture)

    worker.read = counted  # pyright: ignore[reportAttributeAccessIssue]
    uris = write_numbers(tmp_path, range(24))
    table = pipeline_of(worker, 8).process(plan_of(uris, sizes))
    assert table["double"].to_pylist() == [2 * i for i in range(24)]
    assert most <= 2
