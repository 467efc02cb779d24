"""What is wrong with a labelled set: each issue on rows whose answer is known, near copies against all pairs, and what the verb writes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

from dragonclf.config import QualityConfig
from dragonclf.data import quality
from dragonclf.data.quality import ISSUES, find_issues
from dragonclf.verbs.quality import QualitySummary
from dragonclf.verbs.quality import quality as run_quality
from tests.unit.evaluations import CLASSES, CONTRASTS, ODD_NAME, SCRIPT, opened, save_picture
from tests.unit.test_diff import publish
from tests.unit.test_snapshot import SCHEMA, Row, image, write

Found = dict[str, list[dict[str, Any]]]


def found_in(rows: Sequence[Row], *, batch: int = 1000) -> Found:
    """Each issue's rows, by rank."""
    given = [{**row, "split": row["split"] or "train"} for row in rows]
    tables = [pa.Table.from_pylist(given[i : i + batch], schema=SCHEMA) for i in range(0, len(given), batch)]
    with duckdb.connect() as db:
        find_issues(db, tables)
        rows_found = db.sql("FROM issue ORDER BY issue, rank").to_arrow_table().to_pylist()
    found: Found = {name: [row for row in rows_found if row["issue"] == name] for name in ISSUES}
    for issue in found.values():
        assert [row["rank"] for row in issue] == list(range(1, len(issue) + 1))
    return found


def uris(issue: list[dict[str, Any]]) -> list[str]:
    return [row["uri"].removeprefix("/in/") for row in issue]


def flipped(phash: object, *bits: int) -> str:
    return f"{int(str(phash), 16) ^ sum(1 << bit for bit in bits):064x}"


def test_a_set_with_nothing_wrong_has_no_issue():
    assert not any(found_in([image(f"{i}.jpg", "cat") for i in range(50)]).values())


def test_exact_copies_are_ranked_by_their_number_and_name_each_other():
    rows = [image(f"{i}.jpg", "cat") for i in range(9)]
    for one, other in (("0", "1"), ("2", "3"), ("2", "4")):
        rows[int(other)] |= {name: rows[int(one)][name] for name in ("sha256", "phash")}
    found = found_in(rows, batch=2)
    assert uris(found["exact_duplicate"]) == ["2.jpg", "3.jpg", "4.jpg", "0.jpg", "1.jpg"]
    assert [row["score"] for row in found["exact_duplicate"]] == [3, 3, 3, 2, 2]
    assert [row["other"] for row in found["exact_duplicate"]] == [f"/in/{n}.jpg" for n in (4, 2, 2, 1, 0)]
    assert not found["near_duplicate"]


def test_near_copies_by_the_bits_that_differ_and_their_conflicts():
    a, far = image("a.jpg", "cat"), image("far.jpg", "dog")
    same = image("same.jpg", "cat", phash=a["phash"], split="valid")  # other bytes, equal hash
    near = image("near.jpg", "dog", phash=flipped(a["phash"], 0, 17, 200))
    edge = image("edge.jpg", "cat", phash=flipped(a["phash"], *range(90, 100)))  # 10 bits of a, 13 of near
    beyond = image("beyond.jpg", "cat", phash=flipped(far["phash"], *range(0, 242, 22)))  # 11 bits
    found = found_in([a, same, near, edge, far, beyond])
    assert uris(found["near_duplicate"]) == ["a.jpg", "same.jpg", "near.jpg", "edge.jpg"]
    assert [row["score"] for row in found["near_duplicate"]] == [0, 0, 3, 10]
    assert [row["other"] for row in found["near_duplicate"]] == [f"/in/{n}.jpg" for n in ("same", "a", "a", "a")]
    assert uris(found["label_conflict"]) == ["a.jpg", "near.jpg", "same.jpg"]
    assert [(row["other"], row["detail"]) for row in found["label_conflict"]] == [
        ("/in/near.jpg", "labelled dog"), ("/in/a.jpg", "labelled cat"), ("/in/near.jpg", "labelled dog"),
    ]  # fmt: skip
    assert [(row["uri"], row["other"], row["score"], row["detail"]) for row in found["across_splits"]] == [
        ("/in/a.jpg", "/in/same.jpg", 0, "in valid"), ("/in/same.jpg", "/in/a.jpg", 0, "in train"),
        ("/in/near.jpg", "/in/same.jpg", 3, "in valid"), ("/in/edge.jpg", "/in/same.jpg", 10, "in valid"),
    ]  # fmt: skip


def test_copies_of_an_image_of_one_colour_conflict_too():
    one = image("one.jpg", "cat", phash=None, sharpness=None)
    other = image("other.jpg", "dog", phash=None, sharpness=None, sha256=one["sha256"], split="test")
    found = found_in([one, other, image("flat.jpg", "cat", phash=None, sharpness=None, brightness=0.9)])
    assert uris(found["exact_duplicate"]) == uris(found["label_conflict"]) == uris(found["across_splits"])
    assert uris(found["across_splits"]) == ["one.jpg", "other.jpg"]
    assert uris(found["flat"]) == ["one.jpg", "other.jpg", "flat.jpg"]
    assert not found["near_duplicate"]


def test_near_copies_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    centers = rng.integers(0, 2, (40, 256), dtype=np.uint8)
    bits = np.repeat(centers, 10, axis=0)
    for row in bits:
        row[rng.choice(256, rng.integers(0, 9), replace=False)] ^= 1
    rows = [
        image(f"{i:03d}.jpg", rng.choice(["cat", "dog"]), phash=np.packbits(row).tobytes().hex(), split=rng.choice(["train", "test"]))
        for i, row in enumerate(bits)
    ]  # fmt: skip
    distances = (bits[:, None] != bits[None]).sum(2)
    np.fill_diagonal(distances, 256)
    near = distances <= quality.MAX_DISTANCE
    found = found_in(rows)
    nearest = {str(rows[i]["uri"]): int(distances[i].min()) for i in range(len(rows)) if near[i].any()}
    assert len(nearest) > 300
    assert {row["uri"]: row["score"] for row in found["near_duplicate"]} == nearest
    for issue, column in (("label_conflict", "label"), ("across_splits", "split")):
        values = np.array([row[column] for row in rows])
        differ = near & (values[:, None] != values[None])
        expected = {str(rows[i]["uri"]): int(distances[i][differ[i]].min()) for i in np.flatnonzero(differ.any(1))}
        assert {row["uri"]: row["score"] for row in found[issue]} == expected


def test_dark_blurred_and_unreadable_images():
    rng = np.random.default_rng(1)
    rows = [image(f"{i:03d}.jpg", "cat", sharpness=float(np.exp(rng.normal(-3, 0.2)))) for i in range(200)]
    rows[3] |= {"brightness": 0.05}
    rows[5] |= {"brightness": 0.0999}
    rows[6] |= {"brightness": 0.1}
    rows[7] |= {"sharpness": 0.001}
    rows[8] |= {"sharpness": 0.0}
    rows[10] |= {"sharpness": None, "phash": None}
    rows[9] |= {
        "status": "unreadable",
        "error": "cut",
        "sharpness": None,
        "phash": None,
        "sha256": None,
        "brightness": None,
    }
    found = found_in(rows)
    assert uris(found["dark"]) == ["003.jpg", "005.jpg"]
    assert uris(found["blurred"]) == ["008.jpg", "007.jpg"]
    logs = np.log([max(float(str(row["sharpness"])), 1e-6) for row in rows if row["sharpness"] is not None])
    z = (np.log(0.001) - np.median(logs)) / (1.4826 * np.median(np.abs(logs - np.median(logs))))
    assert found["blurred"][1]["score"] == pytest.approx(z)
    assert [(row["uri"], row["detail"]) for row in found["unreadable"]] == [("/in/009.jpg", "unreadable: cut")]
    assert uris(found["flat"]) == ["010.jpg"]


def test_odd_sizes_and_aspects_by_the_rules_of_cleanvision():
    rng = np.random.default_rng(2)
    rows = [
        image(f"{i:03d}.jpg", "cat", width=int(side), height=200) for i, side in enumerate(rng.integers(180, 260, 99))
    ]
    rows += [
        image("tiny.jpg", "cat", width=20, height=20), image("huge.jpg", "cat", width=3000, height=2000),
        image("wide.jpg", "cat", width=360, height=120), image("tall.jpg", "cat", width=100, height=400),
        image("edge.jpg", "cat", width=200, height=70),
    ]  # fmt: skip
    side = np.sqrt([float(str(row["width"])) * float(str(row["height"])) for row in rows])
    q1, q3 = np.percentile(side, [25, 75])
    odd = (side < q1 - 3 * (q3 - q1)) | (side > q3 + 3 * (q3 - q1))
    found = found_in(rows)
    assert set(uris(found["odd_size"])) == {str(rows[i]["uri"]).removeprefix("/in/") for i in np.flatnonzero(odd)}
    assert uris(found["odd_size"])[:2] == ["huge.jpg", "tiny.jpg"]
    assert found["odd_size"][1]["score"] == pytest.approx(20 / np.median(side))
    assert found["odd_size"][0]["detail"] == "3000 x 2000"
    assert uris(found["odd_aspect"]) == ["tall.jpg", "wide.jpg"]


def test_the_verb_writes_every_issue_and_counts_them(tmp_path: Path):
    rows = [image(f"{label}/{i:03d}.jpg", label) for label in ("cat", "dog") for i in range(30)]
    rows[1] |= {"sha256": rows[0]["sha256"], "phash": rows[0]["phash"]}
    rows[2] |= {"brightness": 0.01}
    made = write(tmp_path / "data", rows)
    summary = run_quality(QualityConfig(data=made.uri, out=str(tmp_path / "out")))
    table = pq.read_table(summary.found)
    assert table.column_names == ["issue", "rank", "uri", "label", "split", "score", "other", "detail"]
    assert table["issue"].to_pylist() == ["exact_duplicate", "exact_duplicate", "dark"]
    assert table["uri"].to_pylist() == ["/in/cat/000.jpg", "/in/cat/001.jpg", "/in/cat/002.jpg"]
    assert [(count.issue, count.num_images, count.worst) for count in summary.issues] == [
        ("exact_duplicate", 2, "/in/cat/000.jpg"), ("dark", 1, "/in/cat/002.jpg"),
    ]  # fmt: skip
    assert (summary.num_images, summary.num_judged, summary.snapshot) == (60, 0, made.uri)


def labelled_rows() -> tuple[list[Row], pa.Table, dict[str, list[str]]]:
    """Images of two classes in three splits, their features, which tell the class, and the URIs in each split with a wrong label."""
    rng = np.random.default_rng(5)
    rows: list[Row] = []
    values: list[np.ndarray] = []
    wrong: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for split, count in (("train", 120), ("valid", 40), ("test", 40)):
        for i in range(count):
            truth = int(i % 2)
            is_wrong = i in (3, 10)
            label = ("cat", "dog")[truth ^ is_wrong]
            rows.append(image(f"{split}/{i:03d}.jpg", label, split=split, etag=f"e{i}"))
            values.append(rng.normal(0, 0.5, 6) + 2 * np.eye(2, 6)[truth])
            if is_wrong:
                wrong[split].append(str(rows[-1]["uri"]))
    features = pa.table(
        {
            "uri": [row["uri"] for row in rows], "etag": [row["etag"] for row in rows], "status": ["ok"] * len(rows),
            "error": pa.nulls(len(rows), pa.string()),
            "features": pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(values).astype(np.float32)), 6),
        }
    )  # fmt: skip
    return rows, features, wrong


def label_errors(rows: Sequence[Row], features: str, out: Path) -> dict[str, list[tuple[str, float, str]]]:
    """By split, by rank."""
    data = write(out / "data", rows).uri
    summary = run_quality(QualityConfig(data=data, out=str(out), features=features))
    table = pq.read_table(summary.found)
    found = [row for row in table.to_pylist() if row["issue"] == "label_error"]
    return {
        split: [(row["uri"], row["score"], row["detail"]) for row in found if row["split"] == split]
        for split in ("train", "valid", "test")
    }  # fmt: skip


def test_labels_are_judged_and_those_of_test_images_decide_nothing(tmp_path: Path):
    rows, features, wrong = labelled_rows()
    publish(tmp_path / "models/features/net-1", features, verb="features", shard_images=70)
    found = label_errors(rows, str(tmp_path / "models"), tmp_path / "a")
    for split, expected in wrong.items():
        assert {uri for uri, _, _ in found[split][:2]} == set(expected)
        assert {detail for _, _, detail in found[split][:2]} == {"rather cat", "rather dog"}
        assert [score for _, score, _ in found[split]] == sorted(score for _, score, _ in found[split])
    predicted = pq.read_table(tmp_path / "a/predictions.parquet").to_pandas()
    assert len(predicted) == len(rows)
    assert predicted[["prob_cat", "prob_dog"]].sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-6)
    margin = predicted.set_index("uri").apply(
        lambda row: row[f"prob_{row['input_label']}"] - row["prob_dog" if row["input_label"] == "cat" else "prob_cat"],
        axis=1,
    )
    for uri, score, _ in found["train"]:
        assert margin[uri] == pytest.approx(score, abs=1e-6)
    other = {"cat": "dog", "dog": "cat"}
    flipped_test = [{**row, "label": other[str(row["label"])]} if row["split"] == "test" else row for row in rows]
    again = label_errors(flipped_test, str(tmp_path / "models"), tmp_path / "b")
    assert (again["train"], again["valid"]) == (found["train"], found["valid"])
    assert again["test"] != found["test"]
    flipped_valid = [{**row, "label": other[str(row["label"])]} if row["split"] == "valid" else row for row in rows]
    assert label_errors(flipped_valid, str(tmp_path / "models"), tmp_path / "c")["train"] == found["train"]


def test_only_images_whose_features_are_theirs_are_judged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows, features, wrong = labelled_rows()
    run = publish(tmp_path / "features", features, verb="features")
    replaced = [{**row, "etag": "new"} if row["uri"] == wrong["train"][0] else row for row in rows]
    made = write(tmp_path / "data", replaced)
    with caplog.at_level("INFO", logger="dragonclf"):
        summary = run_quality(QualityConfig(data=made.uri, out=str(tmp_path / "out"), features=run))
    assert summary.num_judged == 199
    assert "199 of 200 labels are judged" in caplog.text
    assert wrong["train"][0] not in pq.read_table(summary.found)["uri"].to_pylist()
    foreign = write(tmp_path / "other", [{**row, "etag": "x"} for row in rows])
    with pytest.raises(ValueError, match=f"are of no image of snapshot {foreign.info.id}"):
        run_quality(QualityConfig(data=foreign.uri, out=str(tmp_path / "out"), features=run))


def test_features_that_are_none_or_several_are_refused(tmp_path: Path):
    rows, features, _ = labelled_rows()
    data = write(tmp_path / "data", rows).uri
    scores = publish(tmp_path / "scores", features, verb="score")
    for given, message in ((tmp_path / "nothing", "has no features under it"), (scores, "is no run of features")):
        with pytest.raises(ValueError, match=message):
            run_quality(QualityConfig(data=data, out=str(tmp_path / "out"), features=str(given)))
    publish(tmp_path / "models/features/net-9", features, verb="features", views={"count": 2})
    with pytest.raises(ValueError, match="has no features under it"):
        run_quality(QualityConfig(data=data, out=str(tmp_path / "out"), features=str(tmp_path / "models")))
    two = [publish(tmp_path / f"models/features/net-{i}", features, verb="features") for i in range(2)]
    with pytest.raises(ValueError, match=f"{two[0]}, {two[1]} features under it"):
        run_quality(QualityConfig(data=data, out=str(tmp_path / "out"), features=str(tmp_path / "models")))


def test_a_snapshot_without_measures_is_refused_by_name(tmp_path: Path):
    made = write(tmp_path, [image(f"{label}/{i}.jpg", label) for label in ("cat", "dog") for i in range(9)])
    path = Path(made.uri, "images-00000.parquet")
    pq.write_table(pq.read_table(path).drop_columns(["phash"]), path)
    with pytest.raises(ValueError, match=f"snapshot {made.info.id} has no column 'phash'.*index its source again"):
        run_quality(QualityConfig(data=made.uri, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_equal_rows_give_equal_issues_whatever_their_order():
    rows = [
        image(f"{i:02d}.jpg", "cat" if i % 3 else "dog", phash=hashlib.sha256(bytes([i % 7])).hexdigest())
        for i in range(60)
    ]
    first, second = found_in(rows), found_in(rows[::-1], batch=7)
    assert first == second
    assert len(first["label_conflict"]) == len(first["near_duplicate"]) == 60


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory: pytest.TempPathFactory) -> QualitySummary:
    """Forty pictures of two classes: 0 and 1 are copies, 2 is dark, 3 cannot be read, 4 was taken away since."""
    folder = tmp_path_factory.mktemp("quality")
    names = [ODD_NAME, *(f"{i:02}.jpg" for i in range(1, 40))]
    rows = []
    for number, name in enumerate(names):
        save_picture(folder / name, seed=number)
        rows.append(
            image(name, CLASSES[number % 2], uri=str(folder / name), split="valid" if number % 4 == 3 else "train")
        )
    rows[1] |= {name: rows[0][name] for name in ("sha256", "phash", "label")}
    rows[2]["brightness"], rows[4]["brightness"] = 0.05, 0.02
    rows[3] |= {"status": "unreadable", "error": "<b>cut</b>", "sha256": None, "width": None, "height": None}
    (folder / names[3]).write_bytes(b"no image")
    (folder / names[4]).unlink()
    return run_quality(QualityConfig(data=write(folder / "data", rows).uri, out=str(folder / "out")))


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (375, "light"), (375, "dark")])
def test_the_page_in_a_browser(looked_at: QualitySummary, browser: Browser, width: int, scheme: Any):
    found = pq.read_table(looked_at.found).to_pandas()
    with opened(browser, Path(looked_at.page), width=width, color_scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        issues = [text.split("\t")[:2] for text in page.locator("#issues tbody tr").all_inner_texts()]
        assert [int(count) for _, count in issues] == [one.num_images for one in looked_at.issues] == [1, 2, 2]
        assert (
            [name for name, _ in issues]
            == page.locator("section h2").all_inner_texts()
            == ["Unreadable", "Exact copies", "Dark"]
        )
        unreadable, copies, dark = page.locator("section").all()
        assert "<b>cut</b>" in unreadable.inner_text()
        assert copies.locator("li").count() == 1, "a pair is shown once"
        pair = found[found["issue"] == "exact_duplicate"].iloc[0]
        assert copies.locator(".uri").all_inner_texts() == [pair["uri"], pair["other"]]
        assert copies.locator("img").evaluate_all("all => all.every(one => one.naturalWidth > 0)")
        assert dark.locator(".uri").all_inner_texts() == found[found["issue"] == "dark"]["uri"].tolist()
        assert "no longer exists" in dark.locator(".missing").inner_text()
        assert SCRIPT in page.locator("main").inner_text()
        assert page.evaluate(CONTRASTS) == []
        assert Axe().run(page).response["violations"] == []


def test_of_a_set_with_nothing_wrong_the_page_says_so(tmp_path: Path):
    rows = [
        image(f"{label}/{i}.jpg", label, split=split)
        for label in CLASSES
        for i in range(9)
        for split in ("train", "valid")
    ]
    made = write(
        tmp_path / "data",
        [
            {
                **row,
                "uri": f"{row['uri']}{row['split']}",
                "sha256": f"{number}",
                "phash": hashlib.sha256(b"%d" % number).hexdigest(),
            }
            for number, row in enumerate(rows)
        ],
    )
    summary = run_quality(QualityConfig(data=made.uri, out=str(tmp_path)))
    assert summary.issues == []
    assert "none: no image has an issue" in Path(summary.page).read_text()
