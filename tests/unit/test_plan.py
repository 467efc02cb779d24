"""Plans: where shards are cut, what the digest covers, and two drivers that plan one run."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dragonclf import storage
from dragonclf.engine import plan

GIB = 2**30
SCHEMA = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("size", pa.int64()), ("label", pa.string())])


def table(start: int, stop: int, *, size: int | None = 10) -> pa.Table:
    rows = [{"uri": f"/in/{i:07d}", "etag": "e", "size": size, "label": None} for i in range(start, stop)]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def planned(run_uri: str, rows: Sequence[pa.Table], shard_images: int | None = None) -> list[pa.Table]:
    """The shards of a plan as an actor reads them."""
    with plan.stage_plan(rows, shard_images=shard_images) as staged:
        staged.upload(run_uri)
    summary = plan.read_summary(run_uri)
    assert summary is not None
    shards = [plan.read_shard(run_uri, summary, shard) for shard in range(summary.num_shards)]
    assert plan.shard_sizes(run_uri, summary) == [shard.num_rows for shard in shards]
    assert summary.num_images == sum(shard.num_rows for shard in shards)
    assert summary.num_bytes == sum(size or 0 for shard in shards for size in shard["size"].to_pylist())
    return shards


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=6), st.integers(1, 9))
def test_every_row_is_in_one_shard_in_its_order(batches: list[int], shard_images: int):
    starts = [0, *itertools.accumulate(batches)]
    rows = [table(start, stop) for start, stop in itertools.pairwise(starts)]
    with plan.stage_plan(rows, shard_images=shard_images) as staged:
        files = sorted(path for path in staged.folder.iterdir() if path.name[:8].isdigit())
        shards = [pq.read_table(path) for path in files]
    sizes = [shard.num_rows for shard in shards]
    total = sum(batches)
    assert sizes == [shard_images] * (total // shard_images) + [total % shard_images] * (total % shard_images > 0)
    uris = [uri for shard in shards for uri in shard["uri"].to_pylist()]
    assert uris == [f"/in/{i:07d}" for i in range(total)]


def test_shards_end_at_four_gibibytes(tmp_path: Path):
    big = [table(0, 3, size=GIB), table(3, 4, size=5 * GIB), table(4, 10, size=GIB)]
    assert [shard.num_rows for shard in planned(f"{tmp_path}/r", big)] == [3, 1, 4, 2]
    assert [shard.num_rows for shard in planned(f"{tmp_path}/q", [table(0, 5, size=None)])] == [5]


def test_shards_grow_with_the_plan(tmp_path: Path):
    with plan.stage_plan(table(i, i + 10_000) for i in range(0, 100_000, 10_000)) as staged:
        sizes = pq.read_table(staged.folder / plan.SHARDS)["images"].to_pylist()
    assert sizes[:10] == [plan.MIN_SHARD_IMAGES] * 10
    assert sizes[:-1] == sorted(sizes[:-1])
    assert plan.MIN_SHARD_IMAGES < max(sizes) < 10_000
    assert sum(sizes) == 100_000


def test_the_digest_covers_every_cell_and_name_but_not_the_cut():
    rows = table(0, 6)

    def digest(one: pa.Table, shard_images: int = 3) -> str:
        with plan.stage_plan([one], shard_images=shard_images) as staged:
            return staged.summary.digest

    base = digest(rows)
    assert digest(rows, shard_images=2) == base
    with plan.stage_plan([rows.slice(0, 1), rows.slice(1)]) as staged:
        assert staged.summary.digest == base
    cells = {"uri": "/other", "etag": "f", "size": 11, "label": "cat"}
    changed = [
        digest(pa.Table.from_pylist([*rows.to_pylist()[:5], {**rows.to_pylist()[5], k: v}], schema=SCHEMA))
        for k, v in cells.items()
    ]
    others = [
        digest(rows.slice(1)),
        digest(rows.rename_columns({"label": "class"})),
        digest(rows.take([1, 0, 2, 3, 4, 5])),
    ]
    assert len({base, *changed, *others}) == 8


def test_a_null_is_not_its_word():
    for null, word in ((None, "None"), (None, "")):
        digests = []
        for value in (null, word):
            rows = pa.Table.from_pylist([{"uri": "/a", "etag": "e", "size": 1, "label": value}], schema=SCHEMA)
            with plan.stage_plan([rows]) as staged:
                digests.append(staged.summary.digest)
        assert digests[0] != digests[1]


def test_two_plans_for_one_run_leave_one_that_is_whole(tmp_path: Path):
    """Of two drivers with another listing, or the same and another cut, the first is followed, whatever the second writes."""
    rivals = {"other rows": (table(0, 8), 2), "other cut": (table(0, 10), 5)}
    for name, (rows, shard_images) in rivals.items():
        run_uri = f"{tmp_path}/{name}"
        with (
            plan.stage_plan([table(0, 10)], shard_images=3) as first,
            plan.stage_plan([rows], shard_images=shard_images) as second,
        ):
            for path in sorted(second.folder.iterdir())[:2]:  # the rival is at work, is overtaken, and goes on
                storage.put(f"{run_uri}/plan/{second.summary.folder}/{path.name}", path.read_bytes())
            first.upload(run_uri)
            second.upload(run_uri)
        summary = plan.read_summary(run_uri)
        assert summary is not None
        assert summary == first.summary
        shards = [plan.read_shard(run_uri, summary, shard) for shard in range(4)]
        assert [shard.num_rows for shard in shards] == plan.shard_sizes(run_uri, summary) == [3, 3, 3, 1]
        assert pa.concat_tables(shards)["uri"].to_pylist() == table(0, 10)["uri"].to_pylist()


def test_a_plan_without_its_summary_is_none(tmp_path: Path):
    with plan.stage_plan([table(0, 3)]) as staged:
        staged.upload(f"{tmp_path}/r")
        folder = staged.folder
    assert not folder.exists()
    (tmp_path / "r" / plan.SUMMARY).unlink()
    assert plan.read_summary(f"{tmp_path}/r") is None


def test_a_listing_that_fails_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def rows():
        yield table(0, 10)
        raise storage.StorageError("cannot list")

    with pytest.raises(storage.StorageError, match=r"cannot list"):
        plan.stage_plan(rows(), shard_images=2)
    assert list(tmp_path.iterdir()) == []


def test_no_rows_make_no_shards(tmp_path: Path):
    assert planned(f"{tmp_path}/r", []) == []
    assert planned(f"{tmp_path}/q", [table(0, 0)]) == []
