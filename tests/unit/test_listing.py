"""From a prefix or a manifest to rows: nothing lost, nothing guessed."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dragonclf import storage
from dragonclf.data import listing
from dragonclf.demo.local_s3 import LocalS3


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder or prefix."""
    if request.param == "local":
        return str(tmp_path)
    request.getfixturevalue("s3_env")
    return f"s3://work/{tmp_path.parent.name}/{tmp_path.name}"


def rows(source: str) -> pa.Table:
    return pa.concat_tables(listing.list_rows(source))


def manifest(folder: Path, text: str, name: str = "m.csv") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_prefix_gives_every_object(root: str):
    for name in ("a.jpg", "b/c.txt", "b/d e.png"):
        storage.put(f"{root}/in/{name}", name.encode())
    table = rows(f"{root}/in")
    assert table.schema == listing.SCHEMA
    assert table["uri"].to_pylist() == [f"{root}/in/{name}" for name in ("a.jpg", "b/c.txt", "b/d e.png")]
    assert table["size"].to_pylist() == [5, 7, 9]
    for uri, etag in zip(table["uri"].to_pylist(), table["etag"].to_pylist(), strict=True):
        info = storage.stat(uri)
        assert info is not None
        assert info.etag == etag


def test_an_empty_prefix_is_refused(s3_env: LocalS3, tmp_path: Path):
    for source in ("s3://photos/nothing-here", str(tmp_path)):
        with pytest.raises(ValueError, match=f"there is no object under {source}: check the name"):
            next(listing.list_rows(source))


def test_a_prefix_comes_in_tables_of_ten_thousand(tmp_path: Path):
    for i in range(listing.BATCH_ROWS + 1):
        (tmp_path / f"{i:05d}").touch()
    assert [table.num_rows for table in listing.list_rows(str(tmp_path))] == [listing.BATCH_ROWS, 1]


def test_a_manifest_anywhere_is_sorted_and_relative_to_itself(root: str):
    text = 'uri,label,weight\nz.jpg,dog,1\nsub/a b.jpg,cat,2\n"q,""uote.jpg",cat,3\n/abs/x.jpg,dog,4\ns3://other/k#1.jpg,dog,5\n'
    for name, data in (("m.csv", text.encode()), ("m.csv.gz", gzip.compress(text.encode()))):
        storage.put(f"{root}/{name}", data)
        table = rows(f"{root}/{name}")
        expected = {
            f"{root}/z.jpg": 1, f"{root}/sub/a b.jpg": 2, f'{root}/q,"uote.jpg': 3, "/abs/x.jpg": 4, "s3://other/k#1.jpg": 5,
        }  # fmt: skip
        assert dict(zip(table["uri"].to_pylist(), table["weight"].to_pylist(), strict=True)) == expected
        assert table["uri"].to_pylist() == sorted(expected, key=str.encode)
        assert table.schema.names == ["uri", "etag", "size", "label", "weight"]
        assert table["etag"].null_count == table["size"].null_count == 5


def test_types_of_further_columns_are_kept(tmp_path: Path):
    table = pa.table(
        {
            "n": pa.array([2, 1], pa.int16()), "uri": ["b", "a"], "size": pa.array([7, None], pa.int32()), "x": pa.array([0.5, None]),
            "flag": [True, False], "day": pa.array([1, 2], pa.date32()), "tags": [["p"], []],
        }
    )  # fmt: skip
    for name in ("m.parquet", "M.PARQUET"):
        pq.write_table(table, tmp_path / name)
        found = rows(str(tmp_path / name))
        assert found.schema.names == ["uri", "etag", "size", "n", "x", "flag", "day", "tags"]
        kinds = [pa.string(), pa.string(), pa.int64(), pa.int16(), pa.float64(), pa.bool_(), pa.date32()]
        assert found.schema.types[:7] == kinds
        assert found.drop_columns("uri").to_pylist() == [
            {**dict.fromkeys(["etag", "size"]), **row} for row in table.drop_columns("uri").to_pylist()[::-1]
        ]


def test_csv_types_are_those_of_the_whole_file_but_names_stay_text(tmp_path: Path):
    lines = [f"{i:05d},{label},{i},{i % 2}" for i, label in enumerate(["01", "02", "1.0", "true", "2024-01-01"])]
    source = manifest(tmp_path, "uri,label,group,mixed\n" + "\n".join(lines) + "\n00005,x,y,late text\n")
    table = rows(source)
    assert table["label"].to_pylist() == ["01", "02", "1.0", "true", "2024-01-01", "x"]
    assert table["uri"].to_pylist()[1] == f"{tmp_path}/00001"
    assert table["group"].to_pylist() == ["0", "1", "2", "3", "4", "y"]
    assert table["mixed"].to_pylist() == ["0", "1", "0", "1", "0", "late text"]
    for labels in (["1", "1.0", "01"], ["true", "True", "TRUE"], ["2024-01-01", "2024-1-1", "20240101"]):
        lines = [f"{i}.jpg,{label}" for i, label in enumerate(labels)]
        table = rows(manifest(tmp_path, "uri,label\n" + "\n".join(lines) + "\n"))
        assert table["label"].to_pylist() == labels, "classes that look alike as numbers or dates stay apart"


def test_csv_loses_no_row_to_a_guessed_dialect(tmp_path: Path):
    names = ["#1.jpg", "#2.jpg", "a;b.jpg", "tab\tbed.jpg", "it's.jpg", "'x'.jpg", "uri2.jpg", "100%.jpg", " lead.jpg"]
    table = rows(manifest(tmp_path, "uri\n" + "\n".join(names) + "\n"))
    assert sorted(table["uri"].to_pylist()) == sorted(f"{tmp_path}/{name}" for name in names)
    table = rows(manifest(tmp_path, 'uri,label\r\n"two\nlines.jpg",a\r\nb.jpg,b\r\n'))
    assert table["uri"].to_pylist() == [f"{tmp_path}/b.jpg", f"{tmp_path}/two\nlines.jpg"]


def test_a_manifest_name_with_pattern_characters_is_no_pattern(tmp_path: Path):
    (tmp_path / "data1.csv").write_text("uri\nwrong.jpg\n")
    for name in ("data[1].csv", "data*.csv", "data?.csv"):
        assert rows(manifest(tmp_path, "uri\nright.jpg\n", name))["uri"].to_pylist() == [f"{tmp_path}/right.jpg"]


def test_odd_column_names_are_carried(tmp_path: Path):
    names = ['we"ird', "select", "a b", "ünï", "x;--"]
    header = ",".join(f'"{name.replace(chr(34), chr(34) * 2)}"' for name in names)
    table = rows(manifest(tmp_path, f"{header},uri\n1,2,3,4,5,a.jpg\n"))
    assert table.schema.names == ["uri", "etag", "size", *names]
    assert [table[name][0].as_py() for name in names] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,path\ncat,a.jpg\n", "has no column 'uri': it has label, path"),
        ("URI,label\na.jpg,cat\n", "has no column 'uri': it has URI, label"),
        ("uri,Label\na.jpg,cat\n", "has a column 'Label': write 'label', or name it otherwise"),
        ("uri,label\n,cat\na.jpg,dog\n,dog\n", "has 2 rows without a uri: every row names an image"),
        ("uri,label\na.jpg,cat\nb.jpg,dog\na.jpg,dog\n", "names .*/a.jpg 2 times: every image has one row"),
        ("uri\nhttp://x/y.jpg\n", "names 'http://x/y.jpg': use local paths or s3://BUCKET/KEY"),
        ("uri\ns3://bucket/\n", "names 's3://bucket/': use local paths or s3://BUCKET/KEY"),
        ("uri\ns3://bucket\n", "names 's3://bucket': use local paths or s3://BUCKET/KEY"),
        ("uri,size\na.jpg,big\n", "cannot read the manifest .*Could not convert string 'big' to INT64"),
        ("uri,label\na,b.jpg,cat\nc.jpg,dog\n", "cannot read the manifest"),
        ("uri,label\n", "has no row: check the name"),
        ("", "has no column 'uri'"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(text: str, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message) as caught:
        rows(manifest(tmp_path, text))
    assert str(tmp_path / "m.csv") in str(caught.value)


def test_a_relative_and_an_absolute_name_of_one_image_are_twice(tmp_path: Path):
    for other in (f"{tmp_path}/a.jpg", f"file://{tmp_path}/a.jpg"):
        with pytest.raises(ValueError, match=f"names {tmp_path}/a.jpg 2 times"):
            rows(manifest(tmp_path, f"uri\na.jpg\n{other}\n"))


def test_what_is_no_manifest(tmp_path: Path):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "folder.csv" / "a.jpg").write_bytes(b"x")
    assert rows(f"{tmp_path}/folder.csv")["uri"].to_pylist() == [f"{tmp_path}/folder.csv/a.jpg"]
    (tmp_path / "m.parquet").write_bytes(b"no Parquet at all")
    with pytest.raises(ValueError, match=r"cannot read the manifest .*m\.parquet"):
        rows(f"{tmp_path}/m.parquet")
    with pytest.raises(storage.ObjectMissingError):
        rows(f"{tmp_path}/none.csv")
