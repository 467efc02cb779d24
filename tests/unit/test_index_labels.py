"""How rows get labels and splits: from folders as torchvision's ImageFolder, from a manifest's columns."""

from collections import Counter

import pyarrow as pa
import pytest

from dragonclf.verbs.index import _label_manifest, _label_prefix


def listed(*uris: str) -> pa.Table:
    sizes = [0 if uri.endswith("/") else 10 for uri in uris]
    return pa.table({"uri": list(uris), "etag": ["e"] * len(uris), "size": pa.array(sizes, pa.int64())})


def test_the_first_folder_is_the_class_and_split_folders_are_respected():
    labels: Counter[str] = Counter()
    uris = [
        "s3://b/p/cat/1.jpg", "s3://b/p/cat/deep/2.jpg", "s3://b/p/train/dog/3.jpg", "s3://b/p/val/dog/4.jpg",
        "s3://b/p/train/5.jpg", "s3://b/p/loose.jpg", "s3://b/p/empty/",
    ]  # fmt: skip
    table = _label_prefix(listed(*uris), "s3://b/p", labels)
    rows = list(zip(table["uri"].to_pylist(), table["label"].to_pylist(), table["split"].to_pylist(), strict=True))
    assert rows == [
        (uris[0], "cat", None), (uris[1], "cat", None), (uris[2], "dog", "train"), (uris[3], "dog", "valid"),
        (uris[4], "train", None), (uris[5], None, None),
    ]  # fmt: skip
    assert labels == {"cat": 2, "dog": 2, "train": 1, "empty": 0}
    assert "empty" in labels


def test_a_manifests_own_columns_are_kept_beside_ours():
    given = listed("/a.jpg").append_column("label", pa.array(["x"])).append_column("width", pa.array([7]))
    given = given.append_column("brightness", pa.array(["low"]))
    table = _label_manifest(given.append_column("cell", pa.array(["mono"])), "m.csv", Counter())
    assert table["input_width"].to_pylist() == [7]
    assert table["input_brightness"].to_pylist() == ["low"]
    assert table["cell"].to_pylist() == ["mono"]
    assert "width" not in table.column_names
    with pytest.raises(ValueError, match="'width' and 'input_width'"):
        _label_manifest(given.append_column("input_width", pa.array([8])), "m.csv", Counter())


def test_a_wrong_split_or_no_label_column_is_refused():
    given = listed("/a.jpg").append_column("label", pa.array(["x"]))
    with pytest.raises(ValueError, match="split 'dev'"):
        _label_manifest(given.append_column("split", pa.array(["dev"])), "m.csv", Counter())
    with pytest.raises(ValueError, match="no column 'label'"):
        _label_manifest(listed("/a.jpg"), "m.csv", Counter())
