"""Scoring a bucket: exactly one row per object, readable by anyone, and not done twice."""

from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from dragonclf import storage
from dragonclf.demo.local_s3 import LocalS3
from tests.conftest import encoded
from tests.integration import commands
from tests.integration.commands import local_copy, upload

pytestmark = pytest.mark.slow

NUM_IMAGES, SHARD_IMAGES = 300, 25


@pytest.fixture(scope="module")
def bucket(s3_server: LocalS3) -> dict[str, bytes]:
    return {
        f"{i % 7}/{i:04d}.jpg": encoded(colour=(i * 7 % 255, i * 13 % 255, i * 29 % 255), seed=i)
        for i in range(NUM_IMAGES)
    }


def test_parts_read_anywhere_and_an_unchanged_bucket_is_not_scored_again(
    s3_env: LocalS3, bucket: dict[str, bytes], small_bundle: str, tmp_path: Path
):
    odd = {
        "2/text.jpg": b"not an image", "2/empty.jpg": b"", "2/cut.jpg": bucket["0/0000.jpg"][:400],
        "2/sp ace #%2F+ü.jpg": encoded(seed=999), "a//b.jpg": encoded(seed=998),
    }  # fmt: skip
    upload("s3://photos/odd", {key: data for key, data in bucket.items() if key.startswith("1/")} | odd)
    listed = {found.uri for found in storage.list_objects("s3://photos/odd")}
    options = ["score", small_bundle, "s3://photos/odd", "--out", "s3://work/odd"]
    first = commands.result(*options)
    folder = local_copy(first["parts"], tmp_path / "parts")

    by_pandas = pd.read_parquet(folder)
    by_pyarrow = pq.read_table(folder).to_pandas()
    by_duckdb = duckdb.execute(f"SELECT * FROM '{folder}/*.parquet' ORDER BY uri").df()
    pd.testing.assert_frame_equal(by_pandas, by_pyarrow)
    assert set(by_pandas["uri"]) == set(by_duckdb["uri"]) == listed
    assert len(by_pandas) == len(listed) == first["num_images"]
    ok = by_pandas[by_pandas["status"] == "ok"]
    assert (ok["prob_blue"] + ok["prob_red"] - 1).abs().max() < 1e-4
    assert (ok["label"] == np.where(ok["prob_blue"] > ok["prob_red"], "blue", "red")).all()
    bad = by_pandas[by_pandas["status"] != "ok"].set_index("uri")["status"].to_dict()
    assert bad == {
        "s3://photos/odd/2/text.jpg": "unsupported", "s3://photos/odd/2/empty.jpg": "unreadable", "s3://photos/odd/2/cut.jpg": "unreadable",
    }  # fmt: skip
    assert by_pandas.loc[by_pandas["status"] != "ok", ["label", "confidence", "prob_blue"]].isna().all(axis=None)

    again = commands.result_here(*options)
    assert again["run"] == first["run"]
    assert again["images_per_s"] is None
    storage.put("s3://photos/odd/new.jpg", encoded(seed=1000))
    third = commands.result(*options)
    assert third["run"] != first["run"]
    assert third["num_images"] == first["num_images"] + 1
