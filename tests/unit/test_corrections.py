"""Corrections: what a file must be, what it does to the rows of a snapshot, and what is refused with nothing written."""

import csv
import json
import logging
from pathlib import Path

import pyarrow as pa
import pytest

from dragonclf import storage
from dragonclf.config import IndexConfig
from dragonclf.data.corrections import COLUMNS, read_corrections
from dragonclf.data.snapshot import SPLITS, Snapshot, read_rows
from dragonclf.data.tables import read
from dragonclf.engine import published
from dragonclf.verbs import index as verb
from tests.unit.test_snapshot import Row, image, images, split_of, write

Cells = tuple[str, ...]


def save(path: Path, *rows: Cells, header: Cells = COLUMNS) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def correct(out: Path, rows: list[Row], *files: str) -> Snapshot:
    return write(out, rows, corrected_by=[read_corrections(uri) for uri in files])


def rows_of(made: Snapshot) -> dict[str, Row]:
    """Every row, also those that are never trained on."""
    tables = [read(f"{made.uri}/images-{number:05d}.parquet") for number in range(made.info.num_files)]
    return {row["uri"]: row for row in pa.concat_tables(tables).to_pylist()}


def relabel(name: str, old: str, new: str, etag: str = "e") -> Cells:
    return (f"/in/{name}", etag, old, new, "relabel")


def delete(name: str, old: str, etag: str = "e") -> Cells:
    return (f"/in/{name}", etag, old, "", "delete")


def test_labels_change_and_rows_are_left_out_and_nothing_else_does(tmp_path: Path):
    rows = [*images(20), image("stray.jpg", None)]
    before = write(tmp_path, rows)
    file = save(
        tmp_path / "c.csv",
        relabel("cat/003.jpg", "cat", "dog"),
        delete("dog/005.jpg", "dog"),
        relabel("stray.jpg", "", "cat"),
    )
    made = correct(tmp_path, rows, file)
    assert made.info.id != before.info.id
    assert correct(tmp_path / "again", rows, file).info.model_dump() == made.info.model_dump()

    lines = Path(file).read_bytes().splitlines(keepends=True)
    (tmp_path / "other.csv").write_bytes(b"".join([lines[0], *lines[:0:-1]]))
    other = correct(tmp_path, rows, str(tmp_path / "other.csv"))
    assert (rows_of(other), other.info.id != made.info.id) == (rows_of(made), True), "provenance is content too"

    changed = {
        "/in/cat/003.jpg": {"label": "dog", "corrected_from": "cat"},
        "/in/dog/005.jpg": {"status": "deleted", "error": "left out by a correction"},
        "/in/stray.jpg": {"label": "cat", "corrected_from": ""},
    }
    wanted = {uri: row | {"corrected_from": None} | changed.get(uri, {}) for uri, row in rows_of(before).items()}
    assert rows_of(made) == wanted, "splits among them"

    assert (made.info.num_images, made.info.counts, made.info.unlabelled) == (41, {"deleted": 1, "ok": 40}, 0)
    [done] = made.info.corrections
    assert (done.num_relabelled, done.num_deleted, done.num_test) == (2, 1, 0)
    assert done.sha256 == read_corrections(file).sha256
    counts = [sum(made.info.splits[split][label] for split in made.info.splits) for label in ("cat", "dog")]
    assert counts == [20, 20]
    for usable_only in (True, False):
        found = pa.concat_tables(read_rows(made, splits=SPLITS, usable_only=usable_only))["uri"].to_pylist()
        assert sorted(found) == sorted({*wanted} - {"/in/dog/005.jpg"})


def test_a_second_file_goes_on_from_the_first(tmp_path: Path):
    rows = [*images(20), *(image(f"emu/{i:02d}.jpg", "emu") for i in range(20))]
    first = save(tmp_path / "1.csv", relabel("cat/000.jpg", "cat", "dog"), delete("cat/001.jpg", "cat"))
    second = save(tmp_path / "2.csv", relabel("cat/000.jpg", "dog", "emu"))
    made = correct(tmp_path, rows, first, second)
    row = rows_of(made)["/in/cat/000.jpg"]
    assert (row["label"], row["corrected_from"]) == ("emu", "cat"), "what the source says"
    assert [file.uri for file in made.info.corrections] == [first, second]
    with pytest.raises(ValueError, match=r"row 2: '/in/cat/000.jpg' is labelled 'cat' now, not 'dog'"):
        correct(tmp_path / "wrong", rows, second, first)
    third = save(tmp_path / "3.csv", relabel("cat/000.jpg", "dog", "cat"), delete("cat/001.jpg", "cat"))
    with pytest.raises(ValueError, match=r"row 3: '/in/cat/001.jpg' was left out by an earlier file"):
        correct(tmp_path / "wrong", rows, first, third)
    assert not (tmp_path / "wrong").exists()


def test_a_class_may_vanish_and_no_image_of_another_moves(tmp_path: Path):
    rows = [*images(20), image("emu/1.jpg", "emu"), image("emu/2.jpg", "emu", status="ok")]
    file = save(tmp_path / "c.csv", delete("emu/1.jpg", "emu"), relabel("emu/2.jpg", "emu", "cat"))
    made = correct(tmp_path, rows, file)
    assert made.info.classes == ["cat", "dog"]
    assert {uri: split for uri, split in split_of(made).items() if "emu" not in uri} == split_of(
        write(tmp_path, images(20))
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (relabel("cat/000.jpg", "cat", "dog", etag="old"), "row 2: '/in/cat/000.jpg' was replaced since: its etag is e, not old"),
        (relabel("cat/000.jpg", "dog", "cat"), "row 2: '/in/cat/000.jpg' is labelled 'cat' now, not 'dog'"),
        (relabel("stray.jpg", "dog", "cat"), "row 2: '/in/stray.jpg' is not labelled now, not 'dog'"),
        (relabel("cat/000.jpg", "", "dog"), "row 2: '/in/cat/000.jpg' is labelled 'cat' now, not ''"),
        (relabel("cat/gone.jpg", "cat", "dog"), "row 2: '/in/cat/gone.jpg' is not in the source, or its filters leave it out"),
        (relabel("cat/000.jpg", "cat", "Dog"), "row 2: '/in/cat/000.jpg' cannot become 'Dog', which is no class of the source"),
    ],
)  # fmt: skip
def test_what_does_not_hold_is_refused_with_nothing_written(row: Cells, message: str, tmp_path: Path):
    file = save(tmp_path / "c.csv", row, delete("dog/001.jpg", "dog"))
    with pytest.raises(ValueError, match="nothing was corrected") as caught:
        correct(tmp_path / "out", [*images(20), image("stray.jpg", None)], file)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_refusal_names_the_first_rows_and_counts_the_others(tmp_path: Path):
    file = save(tmp_path / "c.csv", *(relabel(f"cat/x{i}.jpg", "cat", "dog") for i in range(7)))
    with pytest.raises(
        ValueError, match=r"row 2: .*row 3: .*row 4: '/in/cat/x2.jpg' is not in the source, .*; and 4 more"
    ):
        correct(tmp_path / "out", images(20), file)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("/a", "e", "cat", "dog")], "row 2: 4 cells, and the header has 5"),
        ([("/a", "e", "cat", "", "relabel")], "row 2: reason is 'relabel' and new is ''"),
        ([("/a", "e", "cat", "dog", "delete")], "row 2: reason is 'delete' and new is 'dog'"),
        ([("/a", "e", "cat", "dog", "")], "row 2: reason is '' and new is 'dog'"),
        ([("/a", "e", "cat", "cat", "relabel")], "row 2: old and new are both 'cat'"),
        ([("", "e", "cat", "dog", "relabel")], "row 2: its uri is empty"),
        (
            [("/a", "e", "cat", "dog", "relabel"), ("/b", "e", "", "", "delete"), ("/a", "f", "cat", "", "delete")],
            "row 4: '/a' stands in row 2 too",
        ),
    ],
)
def test_a_row_that_cannot_be_is_named(rows: list[Cells], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"c\.csv") as caught:
        read_corrections(save(tmp_path / "c.csv", *rows))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has the columns none"),
        (b"uri,etag,old,new\r\n", "has the columns uri, etag, old, new: it needs uri, etag, old, new, reason"),
        (b"uri,etag,old,new,reason,who\r\n", "reason, who: it needs"),
        (b"uri,uri,old,new,reason\r\n", "it needs"),
        (b'uri,etag,old,new,reason\r\n"/a,e,cat,dog,relabel\r\n', "is not a CSV in UTF-8"),
        (b"uri,etag,old,new,reason\r\n/caf\xe9,e,cat,dog,relabel\r\n", "is not a CSV in UTF-8"),
    ],
)
def test_what_is_no_file_of_corrections_is_refused(data: bytes, message: str, tmp_path: Path):
    (tmp_path / "c.csv").write_bytes(data)
    with pytest.raises(ValueError, match=r"c\.csv") as caught:
        read_corrections(str(tmp_path / "c.csv"))
    assert message in str(caught.value)


def test_a_file_that_is_not_there_is_asked_for(tmp_path: Path):
    with pytest.raises(ValueError, match=r"there is no .*/c\.csv: give --corrections the file that review\.html saved"):
        read_corrections(str(tmp_path / "c.csv"))


def test_uris_of_any_kind_and_a_spreadsheets_ways(tmp_path: Path):
    """Columns in another order, a byte order mark, lines that end in LF alone; uris with all that CSV quotes."""
    names = ['cat/a "b", c.jpg', "cat/two\nlines.jpg", "cat/cr\rlf\r\n.jpg", "cat/дракон 龍 🐉.jpg", "cat/ =1+1 '.jpg"]
    file = tmp_path / "c.csv"
    with file.open("w", encoding="utf-8-sig", newline="") as opened:
        writer = csv.DictWriter(opened, ["reason", "new", "old", "uri", "etag"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(dict(zip(COLUMNS, relabel(name, "cat", "dog"), strict=True)) for name in names)
    made = correct(tmp_path, [*images(20), *(image(name, "cat") for name in names)], str(file))
    assert [rows_of(made)[f"/in/{name}"]["label"] for name in names] == ["dog"] * 5


def test_a_file_without_rows_corrects_nothing_and_is_told(tmp_path: Path):
    made = correct(tmp_path, images(20), save(tmp_path / "c.csv"))
    assert made.info.corrections[0].num_relabelled == 0
    assert made.info.counts == {"ok": 40}


def test_touching_the_test_split_is_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tests = [image(f"cat/t{i}.jpg", "cat", split="test") for i in range(5)]
    file = save(
        tmp_path / "c.csv",
        relabel("cat/t0.jpg", "cat", "dog"),
        delete("cat/t1.jpg", "cat"),
        delete("cat/001.jpg", "cat"),
    )
    made = correct(tmp_path, [*images(20), *tests], file)
    assert made.info.corrections[0].num_test == 2
    assert made.info.splits["test"] == {"cat": 3, "dog": 1}
    with caplog.at_level(logging.INFO, "dragonclf"):
        verb._say_corrected(made.info.corrections)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"index: {file} touches 2 images of the test split: figures on it are of another test than before"
    ]


def test_the_pointer_follows_the_last_command_on_one_listing(tmp_path: Path):
    """A corrected snapshot is planned when the one before it was: it is of the same run."""
    uri = str(tmp_path / "_latest.json")
    for name, planned_s in (("plain", 5.0), ("corrected", 5.0), ("stale", 4.0)):
        published.advance_pointer(uri, {"snapshot": name, "planned_s": planned_s})
    assert json.loads(storage.get(uri))["snapshot"] == "corrected"


def test_files_are_looked_for_where_the_command_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = IndexConfig(source="s", out="o", corrections=["a.csv", "s3://b/c.csv"])
    assert config.corrections == [f"{tmp_path}/a.csv", "s3://b/c.csv"]
