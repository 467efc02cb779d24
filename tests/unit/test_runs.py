"""Runs: resumed, left alone or begun anew as they should be, and published once, by what is really in the store."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dragonclf import storage
from dragonclf.data import tables
from dragonclf.engine import lease, plan, published, reuse, runs
from dragonclf.scores import read_scores

SCHEMA = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("size", pa.int64())])
SPEC = {"model": "m1"}


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a job writes."""
    if request.param == "local":
        return str(tmp_path / "out")
    request.getfixturevalue("s3_env")
    return f"s3://work/{tmp_path.parent.name}/{tmp_path.name}/out"


def rows(count: int, *, etag: str = "e") -> pa.Table:
    return pa.Table.from_pylist([{"uri": f"/in/{i}", "etag": etag, "size": 5} for i in range(count)], schema=SCHEMA)


def stage(count: int, *, etag: str = "e", shard_images: int = 2) -> Callable[[], plan.StagedPlan]:
    return lambda: plan.stage_plan([rows(count, etag=etag)], shard_images=shard_images)


def never() -> plan.StagedPlan:
    pytest.fail("the input was listed, and a run was there to be resumed")


def open_run(
    out: str, verb: str, spec: dict[str, str], stage: Callable[[], plan.StagedPlan], **options: Any
) -> runs.Run:
    with lease.Lease(runs.lease_uri(out, verb, spec)) as held:
        return runs.open_run(out, verb, spec, stage, held=held, **options)


def result(run: runs.Run, shard: int) -> pa.Table:
    """Rows of a shard; every image of the first is bad."""
    planned = plan.read_shard(run.uri, run.plan, shard)
    return planned.append_column("status", pa.array(["ok" if shard else "missing"] * planned.num_rows))


def finish(run: runs.Run) -> published.Manifest:
    for shard in runs.missing_shards(run):
        runs.write_part(run, shard, result(run, shard))
    manifest = runs.publish(run, fence=1)
    published.point_to(run.uri.rpartition("/runs/")[0], manifest)
    return manifest


def test_from_claim_to_publication(out: str):
    run = open_run(out, "score", SPEC, stage(5))
    assert (run.published, run.plan.num_shards, run.name) == (False, 3, storage.name(run.uri))
    assert run.name.endswith("-00001")
    assert runs.missing_shards(run) == [0, 1, 2]
    assert runs.write_part(run, 1, result(run, 1)).counts == {"ok": 2}
    assert runs.missing_shards(run) == [0, 2]
    with pytest.raises(ValueError, match=r"is not a published run: _manifest.json is missing"):
        published.read_manifest(run.uri)
    with pytest.raises(ValueError, match=r"is not a published run"):
        next(published.read_parts(run.uri))

    again = open_run(out, "score", SPEC, never)
    assert again == run
    manifest = finish(again)
    assert (manifest.num_images, manifest.num_parts, manifest.counts) == (5, 3, {"missing": 2, "ok": 3})
    assert published.read_manifest(run.uri) == manifest
    table = pa.concat_tables(published.read_parts(run.uri))
    assert table["uri"].to_pylist() == [f"/in/{i}" for i in range(5)]
    assert table["status"].to_pylist() == ["missing"] * 2 + ["ok"] * 3
    assert json.loads(storage.get(f"{out}/_latest.json"))["run"] == run.name


def test_after_a_published_run_an_equal_input_is_nothing_to_do_and_a_changed_one_a_new_run(out: str):
    first = open_run(out, "score", SPEC, stage(4))
    finish(first)
    same = open_run(out, "score", SPEC, stage(4, shard_images=3))
    assert (same.uri, same.published) == (first.uri, True)
    changed = open_run(out, "score", SPEC, stage(4, etag="f"))
    assert (changed.name, changed.published) == (first.name[:-5] + "00002", False)
    assert open_run(out, "score", SPEC, never).uri == changed.uri
    finish(changed)
    assert open_run(out, "score", SPEC, stage(4, etag="f")).uri == changed.uri
    back = open_run(out, "score", SPEC, stage(4))
    assert back.name.endswith("-00003"), "a run stands for the newest input only"
    assert len({run.name for run in (first, changed, back)}) == 3
    assert published.read_manifest(first.uri).counts == {"missing": 2, "ok": 2}


def test_another_spec_or_verb_is_another_run(out: str):
    names = {
        open_run(out, verb, spec, stage(1)).name
        for verb, spec in (("score", SPEC), ("score", {"model": "m2"}), ("index", SPEC))
    }
    assert len(names) == 3


def test_a_claim_without_a_plan_is_planned_again_under_its_number(out: str):
    run = open_run(out, "score", SPEC, stage(3))
    other_out = f"{out}-2"
    storage.put(f"{other_out}/runs/{run.name}/run.json", storage.get(f"{run.uri}/run.json"))
    again = open_run(other_out, "score", SPEC, stage(3))
    assert again.uri == f"{other_out}/runs/{run.name}"
    assert finish(again).num_images == 3


def test_a_listing_that_fails_claims_nothing(tmp_path: Path):
    def fail() -> plan.StagedPlan:
        raise ValueError("there is no object")

    with pytest.raises(ValueError, match=r"there is no object"):
        open_run(str(tmp_path / "out"), "score", SPEC, fail)
    assert list(tmp_path.iterdir()) == []


def test_drivers_that_start_at_once_share_one_run(out: str):
    barrier = threading.Barrier(4)

    def drive(i: int) -> tuple[str, plan.PlanSummary]:
        barrier.wait()
        with lease.Lease(f"{out}/lease-{i}.json") as held:  # as if no lease kept them apart
            run = runs.open_run(out, "score", SPEC, stage(9 + i, shard_images=2 + i), held=held)
            return run.uri, run.plan

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(drive, range(4)))
    assert len({uri for uri, _ in found}) == 1
    assert all(summary == found[0][1] for _, summary in found)
    run = open_run(out, "score", SPEC, never)
    manifest = finish(run)
    uris = pa.concat_tables(published.read_parts(run.uri))["uri"].to_pylist()
    assert uris == [f"/in/{i}" for i in range(manifest.num_images)]


def test_a_part_is_written_once_and_a_second_result_yields_to_it(out: str):
    run = open_run(out, "score", SPEC, stage(4))
    assert runs.write_part(run, 0, result(run, 0)).counts == {"missing": 2}
    before = storage.get(run.part_uri(0))
    other = result(run, 0).set_column(3, "status", pa.array(["ok", "denied"]))
    assert runs.write_part(run, 0, other).counts == {"missing": 2}, "the counts are those of the part that stands"
    assert storage.get(run.part_uri(0)) == before


@pytest.mark.parametrize("wrong", ["another run", "another shard", "fewer rows"])
def test_a_part_that_is_not_this_runs_is_refused(wrong: str, out: str):
    run = open_run(out, "score", SPEC, stage(4))
    stranger = {
        "another run": lambda: open_run(out, "score", {"model": "m2"}, stage(4)),
        "another shard": lambda: run,
        "fewer rows": lambda: run,
    }[wrong]()
    shard = 1 if wrong == "another shard" else 0
    table = result(stranger, shard).slice(0, 1 if wrong == "fewer rows" else 2)
    runs.write_part(stranger, shard, table)
    moved = storage.get(stranger.part_uri(shard))
    runs.write_part(run, 1, result(run, 1))
    if run.part_uri(0) != stranger.part_uri(shard):
        storage.put(run.part_uri(0), moved)
    for attempt in (lambda: runs.write_part(run, 0, result(run, 0)), lambda: runs.publish(run, fence=1)):
        with pytest.raises(ValueError, match=r"parts/00000000.parquet is not this run's part: .* choose another --out"):
            attempt()
    assert storage.stat(f"{run.uri}/_manifest.json") is None


def test_a_missing_part_is_named_and_nothing_is_published(out: str):
    run = open_run(out, "score", SPEC, stage(6))
    with pytest.raises(ValueError, match=r"parts/00000000.parquet is missing: run the command again"):
        runs.publish(run, fence=1)
    runs.write_part(run, 0, result(run, 0))
    runs.write_part(run, 2, result(run, 2))
    with pytest.raises(ValueError, match=r"parts/00000001.parquet is missing"):
        runs.publish(run, fence=1)
    assert storage.stat(f"{run.uri}/_manifest.json") is None
    assert storage.stat(f"{out}/_latest.json") is None


@pytest.mark.parametrize("damage", ["cut at the end", "cut at the start", "emptied", "garbage"])
def test_a_damaged_part_is_named_and_nothing_is_published(damage: str, out: str):
    run = open_run(out, "score", SPEC, stage(4))
    for shard in (0, 1):
        runs.write_part(run, shard, result(run, shard))
    data = storage.get(run.part_uri(1))
    changed = {
        "cut at the end": data[:-20], "cut at the start": data[-100:], "emptied": b"", "garbage": bytes(200) + b"\x10\0\0\0PAR1",
    }[damage]  # fmt: skip
    storage.put(run.part_uri(1), changed)
    with pytest.raises(ValueError, match=r"parts/00000001.parquet is not a whole Parquet file: delete it"):
        runs.publish(run, fence=1)
    assert storage.stat(f"{run.uri}/_manifest.json") is None


def test_strangers_in_the_parts_folder_do_not_count(tmp_path: Path):
    run = open_run(str(tmp_path), "score", SPEC, stage(2))
    storage.put(f"{run.uri}/parts/notes.txt", b"x")
    storage.put(f"{run.uri}/parts/00000000.parquet.tmp", b"x")
    (Path(run.uri) / "parts" / ".dragonclf-aside-x").write_bytes(b"half")
    assert runs.missing_shards(run) == [0]
    assert finish(run).num_images == 2


def test_two_publishers_publish_once(out: str):
    run = open_run(out, "score", SPEC, stage(8))
    for shard in range(4):
        runs.write_part(run, shard, result(run, shard))
    barrier = threading.Barrier(3)

    def publish(_: int) -> published.Manifest:
        barrier.wait()
        return runs.publish(run, fence=1)

    with ThreadPoolExecutor(3) as pool:
        manifests = list(pool.map(publish, range(3)))
    assert manifests[0] == manifests[1] == manifests[2] == published.read_manifest(run.uri)
    assert runs.publish(run, fence=1) == manifests[0]


def test_latest_moves_forward_only(out: str):
    old = open_run(out, "score", SPEC, stage(2))
    new = open_run(out, "score", {"model": "m2"}, stage(2))
    finish(new)
    finish(old)
    assert json.loads(storage.get(f"{out}/_latest.json"))["run"] == new.name


def test_racing_pointers_end_at_the_latest(out: str):
    uri = f"{out}/p.json"
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda i: published.advance_pointer(uri, {"run": str(i), "planned_s": float(i)}),
                [3, 1, 7, 2, 5, 0, 6, 4],
            )
        )
    assert json.loads(storage.get(uri)) == {"run": "7", "planned_s": 7.0}


def test_a_run_of_nothing_is_published_empty(tmp_path: Path):
    run = open_run(str(tmp_path), "score", SPEC, lambda: plan.stage_plan([]))
    manifest = finish(run)
    assert (manifest.num_images, manifest.num_parts, manifest.counts) == (0, 0, {})
    assert list(published.read_parts(run.uri)) == []


def test_a_new_run_is_made_of_an_unchanged_input_only_if_asked_and_an_unfinished_one_is_resumed_first(out: str):
    first = open_run(out, "score", SPEC, stage(4))
    assert open_run(out, "score", SPEC, never, new_run=True).uri == first.uri
    finish(first)
    second = open_run(out, "score", SPEC, stage(4), new_run=True)
    assert (second.name, second.published) == (first.name[:-5] + "00002", False)
    assert open_run(out, "score", SPEC, never, new_run=True).uri == second.uri
    finish(second)
    assert published.read_latest(out) == second.uri
    assert open_run(out, "score", SPEC, stage(4)).uri == second.uri


def test_errors_are_retried_in_a_run_of_its_own_that_keeps_every_other_row(out: str):
    first = open_run(out, "score", SPEC, stage(5))
    with pytest.raises(ValueError, match="there is no run of this model and input"):
        open_run(out, "score", {"model": "m2"}, never, retry_errors=True)
    assert open_run(out, "score", SPEC, never, retry_errors=True).uri == first.uri, "what is not finished is resumed"
    statuses = {0: ["timeout", "ok"], 1: ["unreadable", "ok"], 2: ["denied"]}
    for shard, values in statuses.items():
        planned = plan.read_shard(first.uri, first.plan, shard)
        runs.write_part(first, shard, planned.append_column("status", pa.array(values)))
    published.point_to(out, runs.publish(first, fence=1))

    second = open_run(out, "score", SPEC, never, retry_errors=True)
    assert (second.base, second.plan.digest, second.published) == (first.uri, first.plan.digest, False)
    assert open_run(out, "score", SPEC, never).base == first.uri, "resumed as what it is"
    asked: list[str] = []

    def process(rows: pa.Table) -> pa.Table:
        asked.extend(rows["uri"].to_pylist())
        return rows.append_column("status", pa.array(["ok"] * rows.num_rows))

    for shard in runs.missing_shards(second):
        planned = plan.read_shard(second.uri, second.plan, shard)
        table, num_kept = reuse.EarlierRows(first.uri, same_plan=True).complete(shard, planned, process)
        runs.write_part(second, shard, table, num_kept=num_kept)
    manifest = runs.publish(second, fence=1)
    published.point_to(out, manifest)
    assert asked == ["/in/0", "/in/4"]
    assert manifest.counts == {"ok": 4, "unreadable": 1}
    table = pa.concat_tables(published.read_parts(second.uri))
    assert table["uri"].to_pylist() == [f"/in/{i}" for i in range(5)]
    assert table["status"].to_pylist() == ["ok", "ok", "unreadable", "ok", "ok"]
    assert published.read_latest(out) == second.uri
    assert published.read_manifest(first.uri).counts == {"timeout": 1, "ok": 2, "unreadable": 1, "denied": 1}
    assert open_run(out, "score", SPEC, never, retry_errors=True).uri == second.uri, "unreadable ones would be so again"


def test_a_run_that_retries_and_was_killed_before_its_plan_keeps_its_base(out: str):
    first = open_run(out, "score", SPEC, stage(4))
    finish(first)
    second = open_run(out, "score", SPEC, never, retry_errors=True)
    other = f"{out}-2"
    for found in [*storage.list_objects(first.uri), storage.stat(f"{second.uri}/run.json")]:
        assert found is not None
        storage.put(found.uri.replace(out, other, 1), storage.get(found.uri))
    again = open_run(other, "score", SPEC, never)
    assert (again.name, again.base) == (second.name, f"{other}/runs/{first.name}")
    assert again.plan.digest == first.plan.digest


def test_each_beginning_of_a_shard_is_counted(out: str):
    run = open_run(out, "score", SPEC, stage(4))
    assert [runs.begin_shard(run, shard) for shard in (0, 1, 0, 0)] == [1, 1, 2, 3]


def test_scores_are_read_of_published_runs_only(out: str):
    first = open_run(out, "score", SPEC, stage(5))
    with pytest.raises(ValueError, match="there is no published run under"):
        read_scores(out)
    with pytest.raises(ValueError, match="is not a published run"):
        read_scores(first.uri)
    finish(first)
    second = open_run(out, "score", SPEC, stage(3, etag="f"))
    runs.write_part(second, 0, result(second, 0))
    assert read_scores(out).to_table().num_rows == 5
    finish(second)
    table = read_scores(out).to_table(columns=["uri", "etag"])
    assert sorted(table["uri"].to_pylist()) == ["/in/0", "/in/1", "/in/2"]
    assert set(table["etag"].to_pylist()) == {"f"}
    for dataset in (read_scores(out, run=first.name), read_scores(first.uri), read_scores(first.uri + "/")):
        assert dataset.count_rows() == 5


def test_scores_that_were_changed_after_publication_are_refused(out: str):
    run = open_run(out, "score", SPEC, stage(4))
    finish(run)
    storage.put(f"{run.uri}/parts/00000007.parquet", b"a stranger")
    assert read_scores(out).count_rows() == 4
    kept = storage.get(run.part_uri(1))
    storage.put(run.part_uri(1), storage.get(run.part_uri(0)))
    with pytest.raises(ValueError, match=r"parts/00000001.parquet was changed since, though the run is published"):
        read_scores(out)
    storage.put(run.part_uri(1), kept)
    manifest = published.read_manifest(run.uri)
    storage.put(f"{run.uri}/{manifest.parts_table}", b"other")
    with pytest.raises(ValueError, match=r"parts-00001.parquet is not what _manifest.json says"):
        read_scores(out)


def test_a_copy_of_a_run_is_read_too_and_one_with_a_wrong_part_is_not(out: str):
    run = open_run(out, "score", SPEC, stage(4))
    finish(run)
    for found in list(storage.list_objects(out)):
        storage.put(found.uri.replace(out, f"{out}-copy"), storage.get(found.uri))
    assert read_scores(f"{out}-copy").count_rows() == 4
    copied = run.part_uri(1).replace(out, f"{out}-copy")
    storage.put(copied, storage.get(run.part_uri(0)))
    with pytest.raises(ValueError, match=r"parts/00000001.parquet is not this run's part"):
        read_scores(f"{out}-copy")


def test_two_drivers_without_a_lease_between_them_each_have_a_table_of_parts(out: str):
    run = open_run(out, "score", SPEC, stage(2))
    runs.write_part(run, 0, result(run, 0))
    first, second = runs.publish(run, fence=1), runs.publish(run, fence=2)
    assert first == second
    assert (first.parts_table, storage.stat(f"{run.uri}/parts-00002.parquet") is not None) == (
        "parts-00001.parquet",
        True,
    )
    assert len(published.check_parts(run.uri, first)) == 1


def scored_rows(planned: pa.Table, statuses: list[str], score: int) -> pa.Table:
    """A job's own columns, then the input's further ones."""
    own = planned.select(["uri", "etag"]).append_column("status", pa.array(statuses))
    own = own.append_column(
        "error", pa.array([None if status == "ok" else f"{status}!" for status in statuses], pa.string())
    )
    own = own.append_column("score", pa.array([score] * planned.num_rows))
    return reuse.with_input(own, planned)


def listed(objects: dict[str, str | None], note: str) -> Callable[[], plan.StagedPlan]:
    """A listing of {name: etag} with a column of the input's own, and one that the job has too."""
    names = sorted(objects)
    table = pa.table(
        {
            "uri": [f"/in/{name}" for name in names], "etag": pa.array([objects[name] for name in names], pa.string()),
            "size": pa.array([1] * len(names), pa.int64()), "note": [f"{note} {name}" for name in names], "score": names,
        }
    )  # fmt: skip
    return lambda: plan.stage_plan([table], shard_images=3)


def finish_since(run: runs.Run, *, score: int) -> tuple[published.Manifest, list[str]]:
    """Bring a run with a base to its publication. Returns also the uris that were processed."""
    assert run.base is not None
    earlier, asked = reuse.EarlierRows(run.base, same_plan=run.same_plan), []

    def process(rows: pa.Table) -> pa.Table:
        asked.extend(rows["uri"].to_pylist())
        return scored_rows(rows, ["ok"] * rows.num_rows, score)

    for shard in runs.missing_shards(run):
        planned = plan.read_shard(run.uri, run.plan, shard)
        table, num_kept = earlier.complete(shard, planned, process)
        runs.write_part(run, shard, table, num_kept=num_kept)
    return runs.publish(run, fence=1, num_deleted=reuse.write_deleted(run.uri, run.plan, run.base)), asked


def test_rows_of_unchanged_objects_are_kept_and_all_others_made(out: str):
    objects: dict[str, str | None] = {name: f"e-{name}" for name in "abcdefgh"}
    first = open_run(out, "score", SPEC, listed(objects, "then"), since="latest")
    assert first.base is None, "there is nothing yet to keep"
    statuses = dict.fromkeys(objects, "ok") | {"b": "unreadable", "c": "timeout", "d": "changed"}
    for shard in runs.missing_shards(first):
        planned = plan.read_shard(first.uri, first.plan, shard)
        table = scored_rows(planned, [statuses[uri[-1]] for uri in planned["uri"].to_pylist()], 1)
        if "/in/d" in table["uri"].to_pylist():  # read after it was replaced
            etags = ["new-d" if uri == "/in/d" else f"e-{uri[-1]}" for uri in table["uri"].to_pylist()]
            table = table.set_column(1, "etag", pa.array(etags))
        runs.write_part(first, shard, table)
    published.point_to(out, runs.publish(first, fence=1))

    now = (objects | {"d": "new-d", "e": "new-e", "f": None, "i": "e-i", "a0": "e-a0"}).copy()
    del now["h"]
    second = open_run(out, "score", SPEC, listed(now, "now"), since="latest")
    assert (second.base, second.same_plan) == (first.uri, False)
    assert open_run(out, "score", SPEC, never).base == first.uri, "resumed as what it is"
    manifest, asked = finish_since(second, score=2)
    assert asked == ["/in/a0", "/in/c", "/in/e", "/in/f", "/in/i"], "new, failed in passing, replaced, without an etag"
    assert (manifest.base, manifest.num_kept, manifest.num_deleted) == (first.name, 4, 1)
    assert tables.read(f"{second.uri}/deleted.parquet").to_pylist() == [{"uri": "/in/h"}]
    rows = pa.concat_tables(published.read_parts(second.uri)).to_pylist()
    assert [row["uri"] for row in rows] == sorted(f"/in/{name}" for name in now)
    assert {row["uri"][4:]: row["score"] for row in rows} == {
        "a": 1, "a0": 2, "b": 1, "c": 2, "d": 1, "e": 2, "f": 2, "g": 1, "i": 2,
    }  # fmt: skip
    assert [(row["note"], row["input_score"]) for row in rows] == [(f"now {name}", name) for name in sorted(now)]
    kept = {row["uri"][4:]: (row["status"], row["error"], row["etag"]) for row in rows}
    assert kept["b"] == ("unreadable", "unreadable!", "e-b")
    assert kept["d"] == ("ok", None, "new-d"), "what was read then is what is listed now"


def test_a_named_run_is_kept_of_only_if_it_did_the_same_to_its_images(out: str):
    spec = {"model": "m1", "input": "a"}
    first = open_run(out, "score", spec, listed({"a": "1"}, ""))
    with pytest.raises(ValueError, match="is not a published run"):
        open_run(out, "score", {"model": "m1", "input": "b"}, listed({"a": "1"}, ""), since=first.name)
    runs.write_part(first, 0, scored_rows(plan.read_shard(first.uri, first.plan, 0), ["ok"], 1))
    runs.publish(first, fence=1)
    with pytest.raises(ValueError, match=r"its model was 'm1' and is 'm2' now; leave --since out"):
        open_run(out, "score", {"model": "m2", "input": "a"}, listed({"a": "1"}, ""), since=first.name)
    with pytest.raises(ValueError, match=r"its tta was None and is '4' now"):
        open_run(out, "score", {"model": "m1", "tta": "4", "input": "a"}, listed({"a": "1"}, ""), since=first.name)
    second = open_run(out, "score", {"model": "m1", "input": "b"}, listed({"a": "1", "b": "1"}, ""), since=first.name)
    manifest, asked = finish_since(second, score=2)
    assert (asked, manifest.num_kept, manifest.num_deleted) == (["/in/b"], 1, 0)


def test_rows_are_kept_whatever_the_order_of_the_plans(tmp_path: Path):
    """As of a store that lists in an order of its own."""
    out, names = str(tmp_path / "out"), [f"{i * 37 % 101:03d}" for i in range(101)]

    def stage_names(order: list[str]) -> Callable[[], plan.StagedPlan]:
        rows = pa.Table.from_pylist([{"uri": f"/in/{n}", "etag": n, "size": 1} for n in order], schema=SCHEMA)
        return lambda: plan.stage_plan([rows], shard_images=7)

    first = open_run(out, "score", SPEC, stage_names(names))
    for shard in runs.missing_shards(first):
        planned = plan.read_shard(first.uri, first.plan, shard)
        runs.write_part(first, shard, scored_rows(planned, ["ok"] * planned.num_rows, 1))
    runs.publish(first, fence=1)
    second = open_run(out, "score", SPEC, stage_names([*names[::-1][:-5], "200"]), since="latest")
    manifest, asked = finish_since(second, score=2)
    assert (asked, manifest.num_images, manifest.num_kept, manifest.num_deleted) == (["/in/200"], 97, 96, 5)
