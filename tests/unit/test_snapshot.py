"""Snapshots: splits are functions of content, the id of every row, and classes that cannot be trained on are refused."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dragonclf import storage
from dragonclf.data import snapshot
from dragonclf.data.snapshot import Snapshot, open_snapshot, read_rows, write_snapshot

SCHEMA = pa.schema(
    [("uri", pa.string()), ("etag", pa.string()), ("size", pa.int64()), ("label", pa.string()), ("split", pa.string()),
     ("group", pa.string()), ("camera", pa.int64()), ("width", pa.int32()), ("height", pa.int32()), ("sha256", pa.string()),
     ("phash", pa.string()), ("brightness", pa.float64()), ("sharpness", pa.float64()), ("status", pa.string()), ("error", pa.string())]
)  # fmt: skip

Row = dict[str, object]


def image(name: str, label: str | None, **changes: object) -> Row:
    content = hashlib.sha256(name.encode()).hexdigest()
    return {
        "uri": f"/in/{name}", "etag": "e", "size": 9, "label": label, "split": None, "group": None, "camera": 3, "width": 4,
        "height": 5, "sha256": content, "phash": content, "brightness": 0.5, "sharpness": 0.1, "status": "ok", "error": None, **changes,
    }  # fmt: skip


def images(count: int, *, prefix: str = "") -> list[Row]:
    return [image(f"{label}/{prefix}{i:03d}.jpg", label) for label in ("cat", "dog") for i in range(count)]


def write(out: Path | str, rows: Sequence[Row], *, batch: int = 1000, **options: object) -> Snapshot:
    ordered = sorted(rows, key=lambda row: str(row["uri"]))
    tables = [pa.Table.from_pylist(list(ordered[i : i + batch]), schema=SCHEMA) for i in range(0, len(ordered), batch)]
    given = {"source": "/in", "valid_fraction": 0.25, "seed": 0} | options
    return write_snapshot(str(out), tables, **given)  # pyright: ignore[reportArgumentType]


def split_of(made: Snapshot) -> dict[str, str]:
    table = pa.concat_tables(read_rows(made, splits=snapshot.SPLITS, usable_only=False))
    return dict(zip(table["uri"].to_pylist(), table["split"].to_pylist(), strict=True))


def test_every_row_is_kept_with_its_columns_in_order(tmp_path: Path):
    rows = [
        *images(40),
        image("a-broken.jpg", "cat", status="unreadable", error="cut", sha256=None, width=None, height=None),
    ]
    made = write(tmp_path, rows, batch=7)
    table = pa.concat_tables(read_rows(made, splits=snapshot.SPLITS, usable_only=False))
    assert table.column_names == [*snapshot.COLUMNS, "camera"]
    assert table["uri"].to_pylist() == sorted(str(row["uri"]) for row in rows)
    assert made.info.counts == {"ok": 80, "unreadable": 1}
    assert made.info.num_images == 81
    assert made.info.classes == ["cat", "dog"]
    usable = pa.concat_tables(read_rows(made, splits=["train", "valid"], columns=["uri", "label"]))
    assert (usable.num_rows, usable.column_names) == (80, ["uri", "label"])
    assert sum(count for by_class in made.info.splits.values() for count in by_class.values()) == 80
    for split in ("train", "valid"):
        found = pa.concat_tables(read_rows(made, splits=[split]))["label"].to_pylist()
        assert made.info.splits[split] == {"cat": found.count("cat"), "dog": found.count("dog")}
    assert 8 <= sum(made.info.splits["valid"].values()) <= 34  # of 80 at a quarter: 20, four deviations around it


def test_adding_images_moves_none_and_renaming_one_neither(tmp_path: Path):
    few, more = images(30), [*images(30), *images(200, prefix="new-")]
    before, after = split_of(write(tmp_path, few)), split_of(write(tmp_path, more))
    assert {uri: after[uri] for uri in before} == before
    renamed = [{**row, "uri": f"/in/moved{row['uri']}", "etag": "f"} for row in few]
    moved = split_of(write(tmp_path, renamed))
    assert {uri.removeprefix("/in/moved"): split for uri, split in moved.items()} == before


def test_another_seed_draws_others_and_a_greater_fraction_only_adds(tmp_path: Path):
    rows = images(200)
    base = split_of(write(tmp_path, rows))
    other = split_of(write(tmp_path, rows, seed=1))
    assert sum(base[uri] != other[uri] for uri in base) > 80
    wider = split_of(write(tmp_path, rows, valid_fraction=0.5))
    assert all(wider[uri] == "valid" for uri, split in base.items() if split == "valid")
    assert 150 < list(wider.values()).count("valid") < 250


def test_copies_of_an_image_and_members_of_a_group_lie_in_one_split(tmp_path: Path):
    copies = [image(f"cat/copy-{i}-{j}.jpg", "cat", sha256=f"{i:064d}") for i in range(40) for j in range(3)]
    groups = [image(f"dog/g-{i}-{j}.jpg", "dog", group=f"patient {i}") for i in range(40) for j in range(3)]
    splits = split_of(write(tmp_path, [*images(20), *copies, *groups]))
    for kind in ("cat/copy", "dog/g"):
        found = [{splits[f"/in/{kind}-{i}-{j}.jpg"] for j in range(3)} for i in range(40)]
        assert all(len(one) == 1 for one in found)
        assert {"train"} in found
        assert {"valid"} in found


def test_an_empty_group_is_none(tmp_path: Path):
    rows = images(40)
    assert split_of(write(tmp_path, [{**row, "group": ""} for row in rows])) == split_of(write(tmp_path, rows))


def test_a_split_that_the_source_gives_is_kept(tmp_path: Path):
    given = [image(f"cat/t{i}.jpg", "cat", split=split) for i, split in enumerate(["train", "valid", "test"] * 20)]
    made = write(tmp_path, [*images(20), *given])
    splits = split_of(made)
    assert [splits[str(row["uri"])] for row in given] == [row["split"] for row in given]
    assert made.info.splits["test"] == {"cat": 20, "dog": 0}
    assert list(write(tmp_path, images(20)).info.splits) == ["train", "valid"], "no test split where nothing is in it"


def test_the_id_is_of_the_content(tmp_path: Path):
    rows = images(20)
    made = write(tmp_path / "a", rows)
    assert write(tmp_path / "b", rows, batch=3).info.id == made.info.id
    assert made.info.id == write(tmp_path / "a", rows).info.id
    changes = [
        {"label": "dog"},
        {"etag": "f"},
        {"camera": 4},
        {"status": "denied"},
        {"split": "test"},
        {"uri": "/in/cat/0000.jpg"},
    ]
    ids = [write(tmp_path / "c", [{**rows[0], **change}, *rows[1:]]).info.id for change in changes]
    assert len({made.info.id, *ids}) == len(changes) + 1
    rounded = [{**rows[0], "phash": "f" * 64, "brightness": 0.5001, "sharpness": None}, *rows[1:]]
    assert write(tmp_path / "e", rounded).info.id == made.info.id, "measures follow from the content"
    tables = [pa.Table.from_pylist(rows, schema=SCHEMA).rename_columns({"camera": "lens"})]
    renamed = write_snapshot(str(tmp_path / "d"), tables, source="/in", valid_fraction=0.25, seed=0)
    assert renamed.info.id != made.info.id, "a column of another name"


def test_unlabelled_images_are_listed_and_never_trained_on(tmp_path: Path):
    rows = [*images(20), image("stray.jpg", None), image("stray-bad.jpg", None, status="unreadable")]
    made = write(tmp_path, rows)
    assert (made.info.unlabelled, made.info.num_images, made.info.classes) == (1, 42, ["cat", "dog"])
    assert "/in/stray.jpg" not in split_of(made)
    table = pa.concat_tables([pq.read_table(path) for path in Path(made.uri).glob("*.parquet")])
    assert table.num_rows == 42


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [image("cat/1", "cat"), image("cat/2", "cat")],
            "/in has only one class, 'cat': a classifier needs two or more",
        ),
        ([image("1", None)], "/in has no labelled image"),
        ([*images(20), image("emu/1", "emu", status="unreadable")], "class 'emu' has no image that can be read"),
        ([*images(20), image("emu/1", "emu", split="valid")], r"class 'emu' has no training image \(1 in all\)"),
        (
            [image("cat/1", "cat", split="train"), image("emu/1", "emu", split="train")],
            "/in has no validation image: add images",
        ),
        ([*images(20), image("emu/1", "emu", split="test")], r"class 'emu' has no training image \(1 in all\)"),
    ],
)
def test_classes_that_cannot_be_trained_on_are_refused_with_nothing_written(
    rows: list[Row], message: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, rows)
    assert list(tmp_path.iterdir()) == []


def test_a_class_without_a_validation_image_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [image(f"{name}/1", name, split="train") for name in ("emu", "gnu", "hen", "jay", "kea", "owl")]
    with caplog.at_level(logging.WARNING, logger="dragonclf"):
        made = write(tmp_path, [*images(20), *rows])
    assert made.info.splits["valid"]["emu"] == 0
    assert "how well 6 of 8 classes are learnt ('emu', 'gnu', 'hen', 'jay', 'kea', ...): add images" in caplog.text


def test_open_by_folder_or_by_pointer(tmp_path: Path):
    made = write(tmp_path, images(20))
    assert open_snapshot(made.uri) == made
    with pytest.raises(ValueError, match=r"there is no snapshot at .*: make one with `dragonclf index SOURCE --out"):
        open_snapshot(str(tmp_path))
    pointer = {"snapshot": made.info.id, "planned_s": 1.0}
    storage.put(f"{tmp_path}/snapshots/_latest.json", json.dumps(pointer).encode())
    assert open_snapshot(str(tmp_path)) == made


def test_many_rows_fill_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(snapshot, "BATCH_ROWS", 10)
    monkeypatch.setattr(snapshot, "FILE_BATCHES", 2)
    made = write(tmp_path, images(40))
    names = sorted(path.name for path in Path(made.uri).iterdir())
    assert names == [*(f"images-{i:05d}.parquet" for i in range(made.info.num_files)), "snapshot.json"]
    assert made.info.num_files > 1
    assert list(split_of(made)) == sorted(str(row["uri"]) for row in images(40))
