"""Scoring a bucket: exactly one row per object, resumable after kill -9, readable by anyone."""

import signal
import time
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest

from dragonclf import storage
from dragonclf.data import tables
from dragonclf.demo.local_s3 import LocalS3
from tests.conftest import encoded
from tests.integration import commands
from tests.integration.commands import upload
from tests.integration.counting_proxy import CountingProxy

pytestmark = pytest.mark.slow

NUM_IMAGES, SHARD_IMAGES = 300, 25


@pytest.fixture(scope="module")
def bucket(s3_server: LocalS3) -> dict[str, bytes]:
    return {
        f"{i % 7}/{i:04d}.jpg": encoded(colour=(i * 7 % 255, i * 13 % 255, i * 29 % 255), seed=i)
        for i in range(NUM_IMAGES)
    }


def local_copy(parts_uri: str, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for found in storage.list_objects(parts_uri):
        (folder / storage.name(found.uri)).write_bytes(storage.get(found.uri))
    return folder


def test_killed_driver_resumes_without_reading_finished_shards_again(
    s3_env: LocalS3, bucket: dict[str, bytes], small_bundle: str, tmp_path: Path
):
    upload("s3://photos/resume", bucket)
    host, port = s3_env.endpoint.removeprefix("http://").split(":")
    proxy = CountingProxy((host, int(port)), delay_s=0.02)
    slow = {"AWS_ENDPOINT_URL": proxy.endpoint}
    options = ["score", small_bundle, "s3://photos/resume", "--shard-images", str(SHARD_IMAGES)]
    undisturbed = commands.result(*options, "--out", "s3://work/undisturbed")
    assert undisturbed["counts"] == {"ok": NUM_IMAGES}

    driver = commands.start(*options, "--out", "s3://work/resumed", env=slow)
    deadline = time.monotonic() + 120
    while len(list(storage.list_objects("s3://work/resumed/runs"))) - _without_parts() < 3:
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # Two agents of Ray's may take a minute to notice; they touch no image and no part.
    started = [child for child in psutil.Process(driver.pid).children(recursive=True) if "Agent" not in child.name()]
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive, "Ray outlived its driver"

    run_uri = _only_run("s3://work/resumed")
    parts = [found.uri for found in storage.list_objects(f"{run_uri}/parts")]
    assert 3 <= len(parts) < NUM_IMAGES / SHARD_IMAGES
    assert storage.stat(f"{run_uri}/_manifest.json") is None
    assert storage.stat("s3://work/resumed/_latest.json") is None
    done = {uri for part in parts for uri in _uris(part)}
    before = {part: storage.stat(part) for part in parts}

    proxy.requests.clear()
    proxy.delay_s = 0
    resumed = commands.result(*options, "--out", "s3://work/resumed", env=slow)
    assert resumed["run"] == run_uri
    read = proxy.gets("/photos/resume/")
    assert set(read) == {f"/photos/{uri.removeprefix('s3://photos/')}" for uri in _all(bucket) - done}
    assert set(read.values()) == {1}
    assert {part: storage.stat(part) for part in parts} == before
    ours = _frame(resumed["parts"], tmp_path / "resumed")
    pd.testing.assert_frame_equal(ours, _frame(undisturbed["parts"], tmp_path / "undisturbed"), check_exact=True)
    proxy.close()


def test_killed_actor_costs_no_row(s3_env: LocalS3, bucket: dict[str, bytes], small_bundle: str):
    upload("s3://photos/actor", bucket)
    host, port = s3_env.endpoint.removeprefix("http://").split(":")
    proxy = CountingProxy((host, int(port)), delay_s=0.02)
    out = "s3://work/actor-killed"
    driver = commands.start(
        "score", small_bundle, "s3://photos/actor", "--shard-images", str(SHARD_IMAGES), "--out", out,
        env={"AWS_ENDPOINT_URL": proxy.endpoint},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not any("/parts/" in found.uri for found in storage.list_objects(f"{out}/runs")):
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (actor,) = [p for p in psutil.Process(driver.pid).children(recursive=True) if "ShardActor" in " ".join(p.cmdline())]
    actor.send_signal(signal.SIGKILL)
    _, errors = driver.communicate(timeout=200)
    assert driver.returncode == 0, errors
    parts = [found.uri for found in storage.list_objects(f"{_only_run(out)}/parts")]
    assert len(parts) == NUM_IMAGES // SHARD_IMAGES
    uris = [uri for part in parts for uri in _uris(part)]
    assert sorted(uris) == sorted(f"s3://photos/actor/{key}" for key in bucket)
    proxy.close()


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

    again = commands.result(*options)
    assert again["run"] == first["run"]
    assert again["images_per_s"] is None
    storage.put("s3://photos/odd/new.jpg", encoded(seed=1000))
    third = commands.result(*options)
    assert third["run"] != first["run"]
    assert third["num_images"] == first["num_images"] + 1


def _all(bucket: dict[str, bytes]) -> set[str]:
    return {f"s3://photos/resume/{key}" for key in bucket}


def _without_parts() -> int:
    """Objects of a run that are not parts."""
    return sum("/parts/" not in found.uri for found in storage.list_objects("s3://work/resumed/runs"))


def _only_run(out: str) -> str:
    (run,) = {found.uri.split("/runs/")[1].split("/")[0] for found in storage.list_objects(f"{out}/runs")}
    return f"{out}/runs/{run}"


def _uris(part: str) -> list[str]:
    return tables.read(part, columns=["uri"])["uri"].to_pylist()


def _frame(parts_uri: str, folder: Path) -> pd.DataFrame:
    return pd.read_parquet(local_copy(parts_uri, folder)).sort_values("uri", ignore_index=True)
