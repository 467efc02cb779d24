"""From a snapshot to a mended one, by the commands and on S3: index, evaluate, review, corrections, index."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dragonclf import session, storage
from dragonclf.data import tables
from dragonclf.data.snapshot import open_snapshot
from dragonclf.demo.local_s3 import LocalS3
from tests.conftest import encoded
from tests.integration import commands

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's own, in this process

PHOTOS, OUT = "s3://photos/mend", "s3://work/mend"


@pytest.fixture
def local_ray(s3_env: LocalS3) -> Iterator[None]:
    """A Ray of this process, for the commands that are run here."""
    with session.connect(session.LOCAL):
        yield


def items_of(page: str) -> list[dict[str, str]]:
    """The pictures of a page, in its order."""
    found = re.search(r'id="data">(.*?)</script>', storage.get(page).decode(), re.DOTALL)
    assert found
    return json.loads(found[1])["items"]


def test_what_is_reviewed_is_mended_in_the_next_snapshot(local_ray: None, small_bundle: str, tmp_path: Path):
    for number in range(24):
        label, colour = (("blue", (20, 20, 220)), ("red", (220, 20, 20)))[number % 2]
        commands.upload(PHOTOS, {f"{label}/{number:02d} é.jpg": encoded(colour=colour, seed=number)})
    before = commands.result_here("index", PHOTOS, "--out", OUT, "--seed", "1")
    report = f"{OUT}/report"
    evaluated = commands.result_here("evaluate", small_bundle, OUT, "--out", report, "--split", "train")
    made = commands.result_here("review", report, "--out", str(tmp_path / "review"))
    assert (made["by"], made["num_pictures"], made["left_out"]) == ("loss", evaluated["num_images"], {})

    first, second = items_of(made["page"])[:2]
    other = {"blue": "red", "red": "blue"}
    rows = [
        ["uri", "etag", "old", "new", "reason"],
        [first["uri"], first["etag"], first["label"], other[first["label"]], "relabel"],
        [second["uri"], second["etag"], second["label"], "", "delete"],
    ]
    with (tmp_path / "corrections.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    storage.put_file(f"{OUT}/corrections.csv", tmp_path / "corrections.csv")
    mend = ["index", PHOTOS, "--out", OUT, "--seed", "1", "--corrections", f"{OUT}/corrections.csv"]
    after = commands.result_here(*mend)
    assert after["id"] != before["id"]
    assert after["counts"] == {"deleted": 1, "ok": 23}
    assert open_snapshot(OUT).info.id == after["id"], "the newest"
    assert commands.only_run(OUT), "no image was read again"
    assert commands.result_here(*mend) == after

    row = {row["uri"]: row for row in tables.read(f"{OUT}/snapshots/{after['id']}/images-00000.parquet").to_pylist()}
    assert (row[first["uri"]]["label"], row[first["uri"]]["corrected_from"]) == (other[first["label"]], first["label"])
    assert row[second["uri"]]["status"] == "deleted"
    again = commands.result_here("evaluate", small_bundle, OUT, "--out", report, "--split", "train")
    assert again["num_images"] == evaluated["num_images"] - 1
    labels = {item["uri"]: item["label"] for item in items_of(
        commands.result_here("review", report, "--out", str(tmp_path / "review"))["page"]
    )}  # fmt: skip
    assert labels[first["uri"]] == other[first["label"]]
    assert second["uri"] not in labels

    storage.put(first["uri"], encoded(seed=99))
    assert "was replaced since: its etag is" in commands.fails(*mend, code=2)
    assert open_snapshot(OUT).info.id == after["id"]
