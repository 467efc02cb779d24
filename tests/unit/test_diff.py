"""What `diff` says of small published runs, against figures computed by hand."""

import json
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from dragonclf import cli, storage
from dragonclf.config import DiffConfig
from dragonclf.engine import lease, pairs, plan, published, runs
from dragonclf.engine.layout import Layout
from dragonclf.verbs.diff import DiffSummary, Flip, StatusChange, diff

PLAIN = Layout()
SCHEMA = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("size", pa.int64())])


@dataclass
class Row:
    """A row of a run; `probs` None: it has no result."""

    uri: str
    probs: Sequence[float] | None
    status: str = "ok"
    etag: str | None = "e"


def scored(
    rows: list[Row], classes: list[str], *, own: dict[str, Any] | None = None, layout: Layout = PLAIN
) -> pa.Table:
    """The rows as scoring writes them, with the input's own columns after the run's."""
    bad = np.array([row.probs is None for row in rows])
    probs = np.array([row.probs or [0.0] * len(classes) for row in rows], np.float32)
    return pa.table(
        {
            "uri": [row.uri for row in rows],
            "etag": pa.array([row.etag for row in rows], pa.string()),
            "status": [row.status for row in rows],
            "error": pa.nulls(len(rows), pa.string()),
            **layout.answers(classes, probs, bad, thresholds={}),
            "width": pa.array([8] * len(rows), pa.int32()),
            **{name: [value] * len(rows) for name, value in (own or {}).items()},
        }
    )


def publish(
    out: Path, table: pa.Table, *, model: str = "m1", verb: str = "score", shard_images: int = 2, **further: Any
) -> str:
    """Publish the rows as a run, in shards, and point to it; its spec has `further` too. Returns its URI."""
    spec = {"model": model, **further}
    planned = pa.Table.from_pylist([{"uri": uri, "etag": None, "size": 5} for uri in table["uri"].to_pylist()], SCHEMA)
    with lease.Lease(runs.lease_uri(str(out), verb, spec)) as held:
        run = runs.open_run(
            str(out), verb, spec, lambda: plan.stage_plan([planned], shard_images=shard_images), held=held, new_run=True
        )  # fmt: skip
        for shard in runs.missing_shards(run):
            runs.write_part(run, shard, table.slice(shard * shard_images, shard_images))
        published.point_to(str(out), runs.publish(run, fence=held.fence))
    return run.uri


def compare(a: str, b: str, **options: Any) -> DiffSummary:
    return diff(DiffConfig(run_a=a, run_b=b, **options))


CATS_A = [
    Row("/in/1", (0.9, 0.1)), Row("/in/2", (0.6, 0.4)), Row("/in/3", (0.3, 0.7)), Row("/in/4", (0.5, 0.5)),
    Row("/in/5", None, "unreadable"), Row("/in/6", (0.9, 0.1)), Row("/in/8", None, "missing", None), Row("/in/9", (0.9, 0.1)),
]  # fmt: skip
CATS_B = [
    Row("/in/1", (0.8, 0.2)), Row("/in/2", (0.25, 0.75)), Row("/in/3", (0.75, 0.25), etag="new"), Row("/in/4", None, "denied"),
    Row("/in/5", (1.0, 0.0)), Row("/in/7", (0.9, 0.1)), Row("/in/8", None, "missing"), Row("/in/9", (0.9, 0.1), "changed", "new"),
]  # fmt: skip


@pytest.fixture
def cats(tmp_path: Path) -> tuple[str, str]:
    """Two runs of one bucket by two models."""
    classes = ["cat", "dog"]
    return (
        publish(tmp_path / "scores", scored(CATS_A, classes)),
        publish(tmp_path / "scores", scored(CATS_B, classes), model="m2"),
    )


def test_rows_statuses_flips(cats: tuple[str, str]):
    found = compare(*cats)
    assert (found.run_a, found.run_b, found.model_a, found.model_b) == (*cats, "m1", "m2")
    assert (found.num_images_a, found.num_images_b, found.num_only_a, found.num_only_b, found.num_both) == (
        8,
        8,
        1,
        1,
        7,
    )
    assert found.num_replaced == 2, "3 and 9; that of 8 is not known in a"
    assert found.statuses == [
        StatusChange(status_a="ok", status_b="changed", num_images=1),
        StatusChange(status_a="ok", status_b="denied", num_images=1),
        StatusChange(status_a="unreadable", status_b="ok", num_images=1),
    ]
    assert (found.num_labelled, found.num_flips, found.flip_rate) == (4, 2, 0.5), "labelled in both: 1, 2, 3, 9"
    assert (found.num_flip_pairs, found.num_flips_replaced) == (2, 1)
    assert found.flips == [
        Flip(label_a="cat", label_b="dog", num_images=1, num_replaced=0),
        Flip(label_a="dog", label_b="cat", num_images=1, num_replaced=1),
    ]
    assert (found.classes_gone, found.classes_added, found.notes, found.flips_uri) == ([], [], [], None)


def test_changes_and_movers(cats: tuple[str, str]):
    found = compare(*cats, movers=2)
    # cat: 0.1, 0.35, 0.45, 0; confidence: 0.1, 0.15, 0.05, 0. Nearest rank: the 2nd, 4th and 4th of four.
    expected = {"confidence": (0.075, 0.05, 0.15, 0.15, 0.15), "prob_cat": (0.225, 0.1, 0.45, 0.45, 0.45)}
    expected["prob_dog"] = expected["prob_cat"]
    assert [change.column for change in found.changes] == list(expected)
    for change in found.changes:
        figures = (change.mean, change.p50, change.p90, change.p99, change.max)
        assert figures == pytest.approx(expected[change.column], abs=1e-6)
    assert [(row.uri, row.label_a, row.label_b, row.replaced) for row in found.movers] == [
        ("/in/3", "dog", "cat", True),
        ("/in/2", "cat", "dog", False),
    ]
    assert [row.change for row in found.movers] == pytest.approx([0.45, 0.35], abs=1e-6)
    assert [row.uri for row in compare(*cats).movers] == ["/in/3", "/in/2", "/in/1"], "what has not changed is no mover"


def test_flips_parquet_has_every_image_with_another_label_or_status(cats: tuple[str, str], tmp_path: Path):
    out = tmp_path / "changes"
    storage.put(f"{out}/flips.parquet", b"of an earlier comparison")
    assert compare(*cats, out=str(out)).flips_uri == f"{out}/flips.parquet"
    assert [path.name for path in out.iterdir()] == ["flips.parquet"]
    rows = pq.read_table(out / "flips.parquet").to_pylist()
    assert [tuple(row[name] for name in ("uri", "label_a", "label_b", "status_a", "status_b", "replaced")) for row in rows] == [
        ("/in/2", "cat", "dog", "ok", "ok", False),
        ("/in/3", "dog", "cat", "ok", "ok", True),
        ("/in/4", "cat", None, "ok", "denied", False),
        ("/in/5", None, "cat", "unreadable", "ok", False),
        ("/in/9", "cat", "cat", "ok", "changed", True),
    ]  # fmt: skip
    figures = [(row["confidence_a"], row["confidence_b"], row["change"]) for row in rows]
    assert figures[0] == pytest.approx((0.6, 0.75, 0.35), abs=1e-6)
    assert figures[2:4] == [(0.5, None, None), (None, 1.0, None)]
    assert figures[4][2] == 0


def test_an_output_stands_for_its_newest_run_and_a_run_equals_itself(cats: tuple[str, str], tmp_path: Path):
    found = compare(str(tmp_path / "scores"), cats[1] + "/", out=str(tmp_path))
    assert (found.run_a, found.run_b) == (cats[1], cats[1])
    assert (found.num_both, found.num_only_a, found.num_only_b, found.num_replaced) == (8, 0, 0, 0)
    assert (found.num_labelled, found.num_flips, found.flip_rate, found.flips, found.statuses) == (6, 0, 0.0, [], [])
    assert (found.movers, [change.max for change in found.changes]) == ([], [0, 0, 0])
    assert pq.read_table(tmp_path / "flips.parquet").num_rows == 0


def test_classes_added_and_gone_are_named_and_not_compared(tmp_path: Path):
    # The places of the classes differ, and an own column is named like a probability.
    a = scored(
        [Row("/1", (0.5, 0.2, 0.3)), Row("/2", (0.1, 0.8, 0.1))], ["cat", 'a "dog"', "eel"], own={"prob_ant": 0.7}
    )
    b = scored([Row("/1", (0.6, 0.4, 0.0)), Row("/2", (0.0, 0.1, 0.9))], ["fox", "cat", "fox.2"], own={"Uri": "x"})
    found = compare(publish(tmp_path / "a", a), publish(tmp_path / "b", b, model="m2"))
    assert (found.classes_gone, found.classes_added) == (['a "dog"', "eel"], ["fox", "fox.2"])
    assert [(change.column, round(change.max, 6)) for change in found.changes] == [
        ("confidence", 0.1),
        ("prob_cat", 0.1),
    ]
    assert [(flip.label_a, flip.label_b) for flip in found.flips] == [('a "dog"', "fox.2"), ("cat", "fox")]
    assert [(row.uri, round(row.change, 6)) for row in found.movers] == [("/1", 0.1)]


def test_runs_without_a_class_in_common_are_compared_by_label_alone(tmp_path: Path):
    a, b = scored([Row("/1", (0.5, 0.5))], ["cat", "dog"]), scored([Row("/1", (0.2, 0.8))], ["x", "y"])
    found = compare(publish(tmp_path / "a", a), publish(tmp_path / "b", b, model="m2"))
    assert ([change.column for change in found.changes], found.movers, found.num_flips) == (["confidence"], [], 1)
    assert found.notes == ["no class is known to be in both runs, so probabilities and movers are left out"]


def one_hot(place: int, prob: float, *, rest: int, num_classes: int = 40) -> list[float]:
    """`prob` at one place, what is left at another."""
    probs = [0.0] * num_classes
    probs[place], probs[rest] = prob, 1 - prob
    return probs


MANY = [f"class{i:02d}" for i in range(40)]


def test_what_else_a_run_says_of_its_answers_is_no_probability(tmp_path: Path):
    classes = ["cat", "dog"]
    plain = publish(tmp_path / "plain", scored(CATS_A, classes))
    abstaining = publish(tmp_path / "abstaining", scored(CATS_B, classes, layout=Layout(threshold=0.7)), model="m2")
    found, wanted = (
        compare(plain, abstaining),
        compare(plain, publish(tmp_path / "b", scored(CATS_B, classes), model="m2")),
    )
    assert found.changes == wanted.changes
    assert [change.column for change in found.changes] == ["confidence", "prob_cat", "prob_dog"]
    top = publish(tmp_path / "top", scored(CATS_B, classes, layout=Layout(top_k=1)))
    with pytest.raises(ValueError, match="is a run of `score` without probabilities: give runs of"):
        compare(plain, top)


def test_past_32_classes_one_model_is_compared_by_place(tmp_path: Path):
    a = scored([Row("/1", one_hot(3, 0.75, rest=17)), Row("/2", one_hot(5, 0.75, rest=3))], MANY)
    b = scored([Row("/1", one_hot(3, 0.625, rest=17)), Row("/2", None, "missing")], MANY)
    assert "probs" in a.column_names
    found = compare(publish(tmp_path / "a", a), publish(tmp_path / "b", b))
    assert (found.classes_gone, found.classes_added, found.notes) == ([], [], [])
    assert len(found.changes) == 41
    assert {change.column: change.max for change in found.changes if change.max} == {
        "confidence": 0.125, "prob_class03": 0.125, "prob_#17": 0.125,
    }  # fmt: skip
    assert "prob_class05" in [change.column for change in found.changes], (
        "a alone predicts it, by its place both have it"
    )
    assert [(row.uri, row.change) for row in found.movers] == [("/1", 0.125)]


def test_past_32_classes_two_models_are_compared_by_the_names_that_rows_tell(tmp_path: Path):
    turned = MANY[::-1]  # place p of a is place 39 - p of b
    a = [Row("/1", one_hot(3, 0.75, rest=17)), Row("/2", one_hot(5, 0.75, rest=3)), Row("/3", one_hot(6, 1, rest=0))]
    b = [
        Row("/1", one_hot(36, 0.5625, rest=0)),
        Row("/2", one_hot(34, 0.75, rest=36)),
        Row("/3", one_hot(0, 1, rest=1)),
    ]
    uri_a = publish(tmp_path / "a", scored(a, MANY))
    uri_b = publish(tmp_path / "b", scored(b, turned), model="m2")
    found = compare(uri_a, uri_b)
    assert [(change.column, change.max) for change in found.changes] == [
        ("confidence", 0.1875), ("prob_class03", 0.1875), ("prob_class05", 0),
    ]  # fmt: skip
    assert [(flip.label_a, flip.label_b) for flip in found.flips] == [("class06", "class39")]
    assert (found.classes_gone, found.classes_added) == ([], []), "what a run never predicts it may know all the same"
    assert len(found.notes) == 2
    assert f"37 of 40 classes of {uri_a} are left out" in found.notes[0]
    # Against named columns: a class that the list column tells and the columns lack is gone for sure.
    uri_c = publish(tmp_path / "c", scored([Row("/1", (0.5, 0.5))], ["class03", "new"]), model="m3")
    found = compare(uri_a, uri_c)
    assert (found.classes_gone, found.classes_added) == (["class05", "class06"], [])
    assert [(change.column, change.max) for change in found.changes] == [("confidence", 0.25), ("prob_class03", 0.25)]


def test_percentiles_of_many_rows_are_within_a_hundredth(tmp_path: Path):
    probs = np.random.default_rng(0).beta(0.2, 2, (2, 3000)).astype(np.float32)
    uris = []
    for side, model in enumerate(("m1", "m2")):
        rows = [Row(f"/{i}", (float(prob), 1 - float(prob))) for i, prob in enumerate(probs[side])]
        uris.append(publish(tmp_path / model, scored(rows, ["cat", "dog"]), model=model, shard_images=1000))
    change = compare(*uris).changes[1]
    deltas = np.abs(probs[1].astype(np.float64) - probs[0])
    assert (change.mean, change.max) == pytest.approx((deltas.mean(), deltas.max()), rel=1e-6)
    for share, figure in ((0.5, change.p50), (0.9, change.p90), (0.99, change.p99)):
        exact = np.quantile(deltas, share, method="inverted_cdf")
        assert exact * (1 - 1e-6) <= figure <= exact * 1.0101


def test_runs_of_other_images_have_nothing_in_both(tmp_path: Path):
    a, b = scored([Row("/a", (0.5, 0.5))], ["cat", "dog"]), scored([Row("/b", (0.5, 0.5))], ["cat", "dog"])
    found = compare(publish(tmp_path / "a", a), publish(tmp_path / "b", b))
    assert (found.num_both, found.num_labelled, found.flip_rate, found.changes, found.movers) == (0, 0, None, [], [])
    assert found.notes == [
        "no image is in both runs: they are joined on uri, so score the same prefix or manifest twice"
    ]


def test_what_is_no_scoring_run_is_refused(cats: tuple[str, str], tmp_path: Path):
    with pytest.raises(ValueError, match=rf"there is no published run under {tmp_path}/none: .* name the folder given"):
        compare(str(tmp_path / "none"), cats[0])
    Path(cats[1], published.MANIFEST).unlink()
    with pytest.raises(
        ValueError, match=rf"{cats[1]} is not a published run: _manifest.json is missing; run the command"
    ):
        compare(cats[0], cats[1])
    features = pa.table({"uri": ["/1"], "status": ["ok"], "error": ["x"], "features": [[0.5]]})
    uri = publish(tmp_path / "features", features, verb="features")
    with pytest.raises(
        ValueError, match=rf"{uri} is a run of `features` without the column 'etag': give runs of `score`"
    ):
        compare(cats[0], uri)
    listed = scored([Row("/1", (0.5, 0.5))], ["cat", "dog"]).drop_columns(["prob_cat", "prob_dog"])
    uri = publish(tmp_path / "index", listed, verb="index")
    with pytest.raises(ValueError, match=rf"{uri} is a run of `index` without probabilities: give runs of `score`"):
        compare(cats[0], uri)


def test_a_changed_part_and_an_image_that_stands_twice_are_refused(cats: tuple[str, str], tmp_path: Path):
    twice = publish(tmp_path / "twice", scored([Row("/1", (0.5, 0.5)), Row("/1", (0.4, 0.6))], ["cat", "dog"]))
    with pytest.raises(ValueError, match=r"published 2 images and 4 rows come of them: a uri stands twice"):
        compare(twice, twice)
    storage.put(f"{cats[0]}/parts/00000001.parquet", b"other")
    with pytest.raises(ValueError, match=r"00000001.parquet was changed since, though the run is published"):
        compare(*cats)


def test_ctrl_c_in_a_query_is_an_interruption(cats: tuple[str, str], monkeypatch: pytest.MonkeyPatch):
    def join_for_ever(db: duckdb.DuckDBPyConnection, *_: Any):
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        while True:
            db.execute("SELECT count(*) FROM range(20000000) WHERE range % 7 = 8")

    monkeypatch.setattr(pairs, "join_runs", join_for_ever)
    with pytest.raises(KeyboardInterrupt):
        compare(*cats)


def test_a_full_temporary_folder_is_no_bad_request(cats: tuple[str, str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dragonclf.engine.database.MEMORY_LIMIT", "1MB")
    with pytest.raises(storage.StorageError, match=r"cannot diff in .*: set TMPDIR to a folder with more room"):
        compare(*cats)


def test_the_command_prints_tables_and_json(cats: tuple[str, str], tmp_path: Path):
    result = CliRunner().invoke(cli.app, ["diff", *cats, "--movers", "1"])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["flip", "rate", "0.5000"] in lines
    table = lines[lines.index(["flips"]) + 1 :]
    assert table[:3] == [
        ["label", "a", "label", "b", "num", "images", "num", "replaced"], ["cat", "dog", "1", "0"], ["dog", "cat", "1", "1"],
    ]  # fmt: skip
    assert lines[lines.index(["movers"]) + 2 :] == [["/in/3", "dog", "cat", "0.4500", "True"]]
    result = CliRunner().invoke(cli.app, ["diff", *cats, "--json"])
    assert json.loads(result.stdout) == compare(*cats).model_dump()
    result = CliRunner().invoke(cli.app, ["diff", cats[0], str(tmp_path / "none")])
    assert (result.exit_code, "there is no published run under" in result.stderr) == (2, True)


def test_uris_are_printed_whole_and_as_they_are(tmp_path: Path):
    uri = "/in/[red]" + "long/" * 60 + "1.jpg"
    a, b = (publish(tmp_path / str(p), scored([Row(uri, (p, 1 - p))], ["cat", "dog"]), model=str(p)) for p in (0.75, 1))
    result = CliRunner().invoke(cli.app, ["diff", a, b])
    assert result.stdout.splitlines()[-1].split() == [uri, "cat", "cat", "0.2500", "False"]
