"""What `--include`, `--exclude`, `--limit` and `--sample` choose, and that a run's spec tells."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pydantic import ValidationError

from dragonclf import options
from dragonclf.config import IndexConfig, ListingConfig, ScoreConfig
from dragonclf.data import listing, selection
from dragonclf.storage import globs
from dragonclf.verbs import index

KEYS = [
    "a.jpg",
    "a.JPG",
    "cats/1.jpg",
    "cats/2.png",
    "cats/tmp/3.jpg",
    "cats/",
    "2024/01/x.jpg",
    "tmp/4.jpg",
    "new\nline.jpg",
    "a,b.jpg",
]


def matching(pattern: str, keys: list[str] = KEYS) -> list[str]:
    found = pc.match_substring_regex(pa.array(keys), globs.regex(pattern)).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
    return [key for key, is_found in zip(keys, found, strict=True) if is_found]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", [key for key in KEYS if key.endswith(".jpg")]),
        ("/*.jpg", ["a.jpg", "new\nline.jpg", "a,b.jpg"]),
        ("cats/*.jpg", ["cats/1.jpg"]),
        ("cats/**", ["cats/1.jpg", "cats/2.png", "cats/tmp/3.jpg", "cats/"]),
        ("cats/", ["cats/1.jpg", "cats/2.png", "cats/tmp/3.jpg", "cats/"]),
        ("**/tmp/", ["cats/tmp/3.jpg", "tmp/4.jpg"]),
        ("tmp/", ["tmp/4.jpg"]),
        ("2024/**/x.jpg", ["2024/01/x.jpg"]),
        ("2024/**/01/*", ["2024/01/x.jpg"]),
        ("?.jpg", ["a.jpg", "cats/1.jpg", "cats/tmp/3.jpg", "2024/01/x.jpg", "tmp/4.jpg"]),
        ("?*", [key for key in KEYS if key != "cats/"]),
        ("[0-2].*", ["cats/1.jpg", "cats/2.png"]),
        ("[!0-9].jpg", ["a.jpg", "2024/01/x.jpg"]),
        ("*.{png,JPG}", ["a.JPG", "cats/2.png"]),
        ("{cats,tmp}/*.jpg", ["cats/1.jpg", "tmp/4.jpg"]),
        ("a,b.jpg", ["a,b.jpg"]),
        ("a.jp", []),
        ("A.jpg", []),
        ("**", KEYS),
    ],
)
def test_a_pattern(pattern: str, expected: list[str]):
    assert matching(pattern) == expected


def test_characters_of_regular_expressions_mean_themselves():
    for key in ("a+b(c)|d^e$f.jpg", "a\\b", "[x]{y}", "*?", "-]^", "日 本"):
        pattern = "".join(f"\\{c}" if c in "\\*?[{},]" else c for c in key)
        assert matching(pattern, [key, f"{key}x", f"x{key}", "abcdefghij", "xy"]) == [key]
    assert matching("[]x].[\\^]", ["].^", "x.\\", "a.^"]) == ["].^", "x.\\"]


@pytest.mark.parametrize("pattern", ["", "/", "a[b", "{a,b", "[", "[!"])
def test_a_pattern_that_cannot_be_is_refused_by_its_name(pattern: str):
    with pytest.raises(ValidationError) as caught:
        ListingConfig(include=[pattern])
    assert f"the pattern {pattern!r}" in options.explain(caught.value)
    assert "--include: " in options.explain(caught.value)


@pytest.mark.parametrize("given", [{"limit": 1, "sample": 1}, {"sample_seed": 1}])
def test_options_that_do_not_go_together_are_refused(given: dict[str, int]):
    with pytest.raises(ValidationError, match=r"give one|give both"):
        ListingConfig.model_validate(given)


def table(uris: list[str]) -> pa.Table:
    return pa.table(
        {"uri": uris, "etag": ["e"] * len(uris), "size": pa.array(range(len(uris)), pa.int64())}, schema=listing.SCHEMA
    )


def chosen(uris: list[str], source: str = "s3://b/p", cut: int = 7, **given: Any) -> list[str]:
    tables = (table(uris[start : start + cut]) for start in range(0, len(uris), cut))
    return [
        uri for found in selection.select(tables, source, ListingConfig(**given)) for uri in found["uri"].to_pylist()
    ]


def test_patterns_match_below_the_source_and_exclude_wins():
    uris = [f"s3://b/p/{key}" for key in KEYS]
    for source in ("s3://b/p", "s3://b/p/"):
        assert chosen(uris, source, include=["cats/", "/*.JPG"], exclude=["*.png", "**/tmp/"]) == [
            "s3://b/p/a.JPG", "s3://b/p/cats/1.jpg", "s3://b/p/cats/",
        ]  # fmt: skip
    assert chosen(uris) == uris


def test_keys_of_a_manifest_that_lie_elsewhere_match_from_their_bucket(tmp_path: Path):
    manifest = tmp_path / "m.csv"
    manifest.write_text("uri\n")
    uris = [f"{tmp_path}/cats/1.jpg", "s3://other/cats/2.jpg", "/elsewhere/cats/3.jpg"]
    assert chosen(uris, str(manifest), include=["cats/*"]) == uris[:2]
    assert chosen(uris, str(manifest), include=["elsewhere/**"]) == uris[2:]


def test_limit_takes_the_first_and_lists_no_further():
    uris = [f"s3://b/p/{i:03d}.{'jpg' if i % 2 else 'png'}" for i in range(100)]
    assert chosen(uris, limit=10) == uris[:10]
    assert chosen(uris, limit=10, include=["*.jpg"]) == uris[1:20:2]
    assert chosen(uris, limit=1000) == uris

    def endless() -> Iterator[pa.Table]:
        while True:
            yield table(uris)

    found = list(selection.select(endless(), "s3://b/p", ListingConfig(limit=250)))
    assert [one.num_rows for one in found] == [100, 100, 50]


def test_a_sample_depends_on_uris_and_seed_alone():
    uris = [f"s3://b/p/{i:05d}" for i in range(5000)]
    for count in (1, 10, 700, 4999):
        found = chosen(uris, sample=count, cut=1000)
        assert len(found) == count
        assert found == sorted(found), "in the listing's order"
        assert found == chosen(uris, sample=count, cut=13) == sorted(chosen(uris[::-1], sample=count))
        assert set(found) <= set(chosen(uris, sample=count + 1))
    assert chosen(uris, sample=5000) == chosen(uris, sample=10**9) == uris
    assert chosen(uris, sample=50) != chosen(uris, sample=50, sample_seed=1)
    assert 900 < sum(int(uri[-5:]) < 2500 for uri in chosen(uris, sample=2000)) < 1100


def test_nothing_left_names_the_filters():
    with pytest.raises(
        ValueError, match=r"nothing of s3://b/p is left by --include '\*\.jpeg' --exclude 'x/': patterns"
    ):
        chosen(["s3://b/p/a.jpg"], include=["*.jpeg"], exclude=["x/"])


def test_only_what_was_given_is_in_the_spec():
    assert selection.selection_id(ScoreConfig(model="m", source="s3://b/p", out="s3://b/o")) == {}
    config = IndexConfig(source="s3://b/p", out="s3://b/o", include=["b", "a", "b"], sample=3)
    assert selection.selection_id(config) == {"include": ["a", "b"], "sample": 3}
    assert options.arguments(config) == [
        "s3://b/p", "--include", "b", "--include", "a", "--include", "b", "--sample", "3", "--out", "s3://b/o",
    ]  # fmt: skip


def test_a_class_whose_images_are_all_excluded_is_no_class(tmp_path: Path):
    for key in ("a/1.jpg", "b/1.jpg", "junk/1.txt"):
        (tmp_path / "in" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / key).write_bytes(b"x")
    (tmp_path / "in" / "empty").mkdir()
    config = IndexConfig(source=str(tmp_path / "in"), out=str(tmp_path / "out"), include=["*.jpg"])
    with index._stage(config) as staged:
        assert staged.summary.num_images == 2
    with pytest.raises(ValueError, match="class 'empty' has no image"):
        index._stage(config.model_copy(update={"include": []}))
