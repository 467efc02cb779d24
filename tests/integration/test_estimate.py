"""Before a bucket is scored: what it would take; and a run that stops where it was told to, and goes on."""

from pathlib import Path

import pyarrow as pa
import pytest

from dragonclf import storage
from dragonclf.data import tables
from dragonclf.demo.local_s3 import LocalS3
from tests.conftest import encoded
from tests.integration import commands
from tests.integration.commands import only_run, upload

pytestmark = pytest.mark.slow  # three scoring jobs

NUM_IMAGES, SHARD_IMAGES = 120, 1  # so many shards that a run cannot be done before its driver looks at the budget


def test_an_estimate_writes_nothing_and_a_budget_stops_a_run_that_goes_on(s3_env: LocalS3, small_bundle: str):
    images = {f"{i:03d}.jpg": encoded(seed=i) for i in range(NUM_IMAGES)} | {"broken.jpg": b"no image"}
    upload("s3://photos/estimate", images)
    out = "s3://work/estimate"
    options = ["score", small_bundle, "s3://photos/estimate", "--out", out, f"--shard-images={SHARD_IMAGES}", "--tta=2"]

    found = commands.result(*options, "--estimate", "--price-per-worker-hour", "2")
    assert found["num_images"] == found["num_gets"] == NUM_IMAGES + 1
    assert found["num_bytes"] == sum(map(len, images.values()))
    assert set(found["sample"]) == {"ok", "unsupported"}
    assert found["execution"] == "openvino on cpu in f32, 3 views of an image"
    low, high = found["images_per_s_per_worker_interval"]
    assert low < found["images_per_s_per_worker"] < high
    seconds = found["start_seconds"] + found["num_images"] / found["images_per_s_per_worker"] / found["num_workers"]
    assert found["hours"] == pytest.approx(seconds / 3600)
    assert found["cost"] == pytest.approx(2 * found["hours"] * found["num_workers"])
    assert found["cost_interval"][0] < found["cost"] < found["cost_interval"][1]
    assert not list(storage.list_objects(out))

    stopped = commands.run(*options, "--max-hours", "0.000001")
    assert stopped.returncode == 7, stopped.stderr
    assert "stopped after" in stopped.stderr
    assert "--max-hours 1e-06 asks: the same command goes on" in stopped.stderr
    run = only_run(out)
    kept = {part.uri: part.etag for part in storage.list_objects(f"{run}/parts")}
    assert 1 <= len(kept) < NUM_IMAGES // SHARD_IMAGES
    assert storage.stat(f"{run}/_manifest.json") is None

    done = commands.result(*options)
    assert (done["run"], done["counts"]) == (run, {"ok": NUM_IMAGES, "unsupported": 1})
    parts = {part.uri: part.etag for part in storage.list_objects(done["parts"])}
    assert kept.items() <= parts.items()
    _, footer = tables.read_footer(next(iter(parts)))
    assert '"precision": "f32"' in footer["dragonclf.spec"]
    assert '"tta": {"num_views": 2, "beta": 0.25}' in footer["dragonclf.spec"]
    scored = pa.concat_tables(tables.read(part) for part in parts).to_pylist()
    probs = {row["uri"]: {"blue": row["prob_blue"], "red": row["prob_red"]} for row in scored}
    uris = [f"s3://photos/estimate/{i:03d}.jpg" for i in range(4)]
    told = commands.result("predict", small_bundle, *uris, "--tta", "2")["predictions"]
    assert {row["uri"]: row["probs"] for row in told} == {uri: probs[uri] for uri in uris}


def test_what_cannot_be_estimated_is_refused(s3_env: LocalS3, small_bundle: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["s3://photos/estimate", "--since", "latest"], "--estimate is of a full run: leave out --since"),
        ([str(tmp_path / "empty")], "there is no object under"),
    ):
        line = commands.fails("score", small_bundle, *arguments, "--out", str(tmp_path / "out"), "--estimate", code=2)
        assert message in line
