"""What fails is blamed on what failed: an image that kills its decoder is a row, a store that is gone is not."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray

import dragonclf
from dragonclf import session, storage
from dragonclf.config import RayConfig, RescoreConfig, RunConfig, ScoreConfig
from dragonclf.data import images, listing
from dragonclf.demo.local_s3 import LocalS3
from dragonclf.engine import execute, job, plan
from dragonclf.engine.pipeline import Limits
from dragonclf.storage import s3
from dragonclf.verbs import index, rescore, score
from tests import codec
from tests.conftest import encoded, use_identity
from tests.integration import commands
from tests.integration.commands import frame_of, only_run, upload
from tests.integration.conftest import save_random_head
from tests.integration.s3_proxy import Faults, S3Proxy

pytestmark = [
    pytest.mark.alone,
    pytest.mark.slow,  # each runs a whole scoring job or two, 10 to 40 s
    pytest.mark.filterwarnings("ignore"),  # Ray's own, in this process
]

NUM_IMAGES, SHARD_IMAGES = 200, 20
MOST_S = 60
FAULT_SEED = 1


@pytest.fixture(scope="module")
def bucket() -> dict[str, bytes]:
    return {
        f"{i:04d}.jpg": encoded(colour=(i * 7 % 255, i * 13 % 255, i * 29 % 255), seed=i) for i in range(NUM_IMAGES)
    }


@pytest.fixture(scope="module")
def proxy(s3_server: LocalS3, small_bundle: str) -> Iterator[S3Proxy]:
    """A Ray for this module, in this process, whose workers and driver reach the store through the proxy, and have the test codec."""
    made = S3Proxy(s3_server.endpoint)
    environment = s3_server.environment("admin") | {"AWS_ENDPOINT_URL": made.endpoint} | codec.ENVIRONMENT
    with pytest.MonkeyPatch.context() as patch:
        use_identity(environment, patch)
        with session.connect("local"):
            yield made
    made.close()
    s3.forget_clients()


@pytest.fixture(autouse=True)
def healthy(proxy: S3Proxy):
    proxy.faults, proxy.delay_s = Faults(), 0.0
    proxy.requests.clear()


def scored(model: str, source: str, out: str, **options: Any) -> score.ScoreSummary:
    return score.score(ScoreConfig(model=model, source=source, out=out, shard_images=SHARD_IMAGES, **options))


@pytest.fixture(scope="module")
def undisturbed(
    proxy: S3Proxy, bucket: dict[str, bytes], small_bundle: str, tmp_path_factory: pytest.TempPathFactory
) -> pd.DataFrame:
    """The rows of a run that nothing disturbs."""
    upload("s3://photos/failures", bucket)
    done = scored(small_bundle, "s3://photos/failures", "s3://work/failures-undisturbed")
    return frame_of(done.parts, tmp_path_factory.mktemp("undisturbed") / "parts")


def after_parts(out: str, count: int, action: Callable[[], object]) -> threading.Thread:
    """Do `action` once there are so many parts under `out`."""

    def wait() -> None:
        deadline = time.monotonic() + MOST_S
        while len([found for found in storage.list_objects(out) if "/parts/" in found.uri]) < count:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_images_that_kill_starve_or_hang_their_decoder_cost_only_themselves(
    small_bundle: str, bucket: dict[str, bytes], undisturbed: pd.DataFrame, tmp_path: Path
):
    planted = {
        "0030-die.png": codec.picture("die"),
        "0075-eat.png": codec.picture("eat", mib=2048),
        "0150-hang.png": codec.picture("hang"),
    }
    upload("s3://photos/killers", bucket | planted)
    done = scored(
        small_bundle, "s3://photos/killers", "s3://work/killers", max_actor_bytes=1700 * 2**20, max_image_s=12
    )
    assert done.counts == {"ok": NUM_IMAGES, "decoder_crash": 2, "timeout": 1}
    frame = frame_of(done.parts, tmp_path / "parts")
    frame["key"] = frame["uri"].str.removeprefix("s3://photos/killers/")
    by_key = frame.set_index("key")
    assert by_key.loc["0030-die.png", "error"] == "ends the process that decodes it (SIGSEGV)"
    assert re.fullmatch(r"needs more than [\d,]+ MiB of memory to be decoded", str(by_key.loc["0075-eat.png", "error"]))
    assert by_key.loc["0150-hang.png", "error"] == "could not be decoded in 12 s"
    others = by_key.drop(list(planted)).drop(columns="uri").reset_index(drop=True)
    expected = undisturbed.drop(columns="uri")
    # In other batches than without the three: equal but for the last bits of the arithmetic. Nulls make integers floats in pandas.
    pd.testing.assert_frame_equal(others, expected, check_dtype=False, check_exact=False, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["credentials expire", "rights are revoked", "endpoint is gone"])
def test_an_environment_that_fails_stops_the_run_and_blames_no_image(
    how: str, proxy: S3Proxy, small_bundle: str, undisturbed: pd.DataFrame, tmp_path: Path
):
    out = f"s3://work/environment-{how.replace(' ', '-')}"
    failed_s = 0.0

    def fail() -> None:
        nonlocal failed_s
        failed_s = time.monotonic()
        if how == "endpoint is gone":
            proxy.close()
        else:
            proxy.faults = Faults(denied="ExpiredToken" if how == "credentials expire" else "AccessDenied")

    told = {
        "credentials expire": r"the store refuses the credentials \(ExpiredToken\)",
        "rights are revoked": r"access denied \(AccessDenied\)",
        "endpoint is gone": r"cannot (read|write|list) s3://",
    }[how]
    proxy.delay_s = 1.0
    after_parts(out, 2, fail)
    with pytest.raises(storage.StorageError, match=told):
        scored(small_bundle, "s3://photos/failures", out)
    assert 0 < time.monotonic() - failed_s < MOST_S
    proxy.faults, proxy.delay_s = Faults(), 0
    if how == "endpoint is gone":
        proxy.open()
    run_uri = only_run(out)
    assert storage.stat(f"{run_uri}/_manifest.json") is None
    assert 2 <= len(list(storage.list_objects(f"{run_uri}/parts"))) < NUM_IMAGES / SHARD_IMAGES
    resumed = scored(small_bundle, "s3://photos/failures", out)
    assert resumed.run == run_uri
    pd.testing.assert_frame_equal(frame_of(resumed.parts, tmp_path / "parts"), undisturbed, check_exact=True)


def test_a_store_with_faults_gives_the_rows_of_a_store_without(
    proxy: S3Proxy, small_bundle: str, undisturbed: pd.DataFrame, tmp_path: Path
):
    proxy.faults = Faults(
        slow_down=0.1, reset=0.02, truncated=0.01, stalled=0.001, error_after_put=0.1, seed=FAULT_SEED
    )
    proxy.failures.clear()
    done = scored(small_bundle, "s3://photos/failures", "s3://work/faulty")
    assert done.counts == {"ok": NUM_IMAGES}
    assert all(proxy.failures[name] for name in ("slow_down", "reset", "truncated", "error_after_put")), proxy.failures
    proxy.faults = Faults()
    pd.testing.assert_frame_equal(frame_of(done.parts, tmp_path / "parts"), undisturbed, check_exact=True)


FULL_DISK = """
    import json, subprocess, sys
    from dragonclf import session, storage
    from dragonclf.config import ScoreConfig
    from dragonclf.verbs import score
    folder, model, source, shard_images, rows = sys.argv[1:]
    config = ScoreConfig(model=model, source=source, out=folder, shard_images=int(shard_images))
    def mount(option):
        subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", folder], check=True)
    mount("size=128k")
    with session.connect("local"):
        try:
            score.score(config)
        except storage.StorageError as error:
            full = str(error)
        mount("remount,size=64m")
        done = score.score(config)
    import pandas as pd
    pd.read_parquet(done.parts).sort_values("uri", ignore_index=True).to_parquet(rows)
    print(json.dumps({"full": full, "counts": done.counts}))
"""


def test_a_full_disk_stops_the_run(small_bundle: str, undisturbed: pd.DataFrame, tmp_path: Path):
    """A disk of 128 kB, mounted in a name space of the test's own, then made larger."""
    (tmp_path / "disk").mkdir()
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path / "disk"),
         small_bundle, "s3://photos/failures", str(SHARD_IMAGES), str(tmp_path / "rows.parquet")],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert re.fullmatch(r"cannot write .*/disk/.*: No space left on device", told["full"])
    assert told["counts"] == {"ok": NUM_IMAGES}
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "rows.parquet"), undisturbed, check_exact=True)


class DeadlyTask(index.IndexTask):
    """An index whose process dies over an image of 13 pixels width, outside of the decoder: nothing can blame the image."""

    def open(self, num_threads: int) -> "DeadlyWorker":
        return DeadlyWorker()


class DeadlyWorker(index.IndexWorker):
    def read(self, data: bytes, picture: images.Picture) -> tuple[dict[str, Any], None]:
        if picture.width == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(data, picture)


def test_a_shard_that_ends_every_process_is_named_and_all_others_are_done(
    proxy: S3Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(execute, "MAX_TASK_RETRIES", 0)
    monkeypatch.setattr(execute, "MAX_PASSES", 2)
    for i in range(30):
        (tmp_path / f"{i:02d}.jpg").write_bytes(encoded(size=(13 if i == 17 else 40, 30), seed=i))
    rows = list(listing.list_prefix(str(tmp_path)))
    out = str(tmp_path / "out")
    with pytest.raises(storage.StorageError, match=r"1 shards of .* \(the first: 3\) ended every worker process"):
        job.run(
            out, "index", {}, lambda: plan.stage_plan(rows, shard_images=5), DeadlyTask(Limits(2**20, 10**6, 60.0)),
            ray_config=RayConfig(), run_config=RunConfig(),
        )  # fmt: skip
    parts = {storage.name(found.uri) for found in storage.list_objects(f"{only_run(out)}/parts")}
    assert parts == {f"{shard:08d}.parquet" for shard in (0, 1, 2, 4, 5)}


def test_objects_replaced_and_deleted_after_the_listing(
    proxy: S3Proxy, small_bundle: str, bucket: dict[str, bytes], undisturbed: pd.DataFrame, tmp_path: Path
):
    source, out = "s3://photos/moving", "s3://work/moving"
    upload(source, bucket)

    def move() -> None:
        storage.put(f"{source}/0190.jpg", bucket["0000.jpg"])
        s3._client().delete_object(Bucket="photos", Key="moving/0195.jpg")

    proxy.delay_s = 1.0
    after_parts(out, 1, move)
    done = scored(small_bundle, source, out)
    proxy.delay_s = 0
    assert done.counts == {"ok": NUM_IMAGES - 2, "changed": 1, "missing": 1}
    frame = frame_of(done.parts, tmp_path / "parts").set_index("uri")
    replaced, deleted = (frame.loc[f"{source}/{key}.jpg"].to_dict() for key in ("0190", "0195"))
    now = storage.stat(f"{source}/0190.jpg")
    assert now is not None
    assert (replaced["status"], replaced["etag"]) == ("changed", now.etag)
    assert "the object was replaced after it was listed" in replaced["error"]
    assert replaced["prob_red"] == pytest.approx(undisturbed.iloc[0]["prob_red"], abs=1e-5)
    assert (deleted["status"], deleted["error"]) == ("missing", "the object is no longer there")

    storage.put(f"{source}/0195.jpg", bucket["0195.jpg"])
    proxy.requests.clear()
    retried = scored(small_bundle, source, out, retry_errors=True)
    assert retried.run != done.run
    assert retried.counts == {"ok": NUM_IMAGES - 1, "changed": 1}
    assert dict(proxy.gets("/photos/moving/")) == {"/photos/moving/0195.jpg": 1}
    again = frame_of(retried.parts, tmp_path / "again").set_index("uri")
    others = again.index != f"{source}/0195.jpg"
    pd.testing.assert_frame_equal(again[others], frame[others], check_dtype=False, check_exact=True)
    rows = dragonclf.read_scores(out).to_table(columns=["uri", "status"]).to_pandas()
    pd.testing.assert_frame_equal(
        rows.sort_values("uri", ignore_index=True), again.reset_index()[["uri", "status"]], check_dtype=False
    )
    assert dragonclf.read_scores(out, run=storage.name(done.run)).count_rows() == NUM_IMAGES


def test_since_the_latest_run_only_what_changed_is_read(
    proxy: S3Proxy, small_bundle: str, bucket: dict[str, bytes], tmp_path: Path
):
    source, out = "s3://photos/since", "s3://work/since"
    upload(source, bucket)
    first = scored(small_bundle, source, out, since="latest")
    assert (first.num_kept, first.num_deleted) == (0, 0)
    told = json.loads(storage.get(f"{first.run}/summary.json"))
    assert (told["images"], told["read_by_this_call"], told["counts_of_this_call"]) == (200, 200, {"ok": 200})
    assert told["busy"]["num_bytes"] == sum(map(len, bucket.values()))
    assert told["bottleneck"] == first.bottleneck
    assert 0 < told["busy"]["model_s"] < told["busy"]["wall_s"] < told["seconds"]
    upload(source, {"0007.jpg": encoded(seed=907), "0111.jpg": b"no image any more"})  # replaced
    upload(source, {"0050a.jpg": encoded(seed=950), "9999.jpg": encoded(seed=999)})  # new
    for key in ("0001.jpg", "0199.jpg"):
        s3._client().delete_object(Bucket="photos", Key=f"since/{key}")
    proxy.requests.clear()
    second = scored(small_bundle, source, out, since="latest")
    read = {f"/photos/since/{key}.jpg": 1 for key in ("0007", "0111", "0050a", "9999")}
    assert dict(proxy.gets("/photos/since/")) == read
    assert (second.num_images, second.num_kept, second.num_deleted) == (NUM_IMAGES, NUM_IMAGES - 4, 2)
    assert second.counts == {"ok": NUM_IMAGES - 1, "unsupported": 1}
    deleted = storage.get(f"{second.run}/deleted.parquet")
    assert pd.read_parquet(io.BytesIO(deleted))["uri"].tolist() == [f"{source}/0001.jpg", f"{source}/0199.jpg"]

    full = scored(small_bundle, source, "s3://work/since-full")
    kept, made = (frame_of(done.parts, tmp_path / done.run[-18:]) for done in (second, full))
    pd.testing.assert_frame_equal(kept, made, check_exact=False, rtol=1e-4, atol=1e-6)
    assert scored(small_bundle, source, out, since="latest").run == second.run


def test_rows_are_counted_in_rays_metrics(proxy: S3Proxy, small_bundle: str, undisturbed: pd.DataFrame):
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    deadline, found = time.monotonic() + MOST_S, 0.0
    while not found and time.monotonic() < deadline:
        with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics") as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith("ray_dragonclf_images")]
        found = sum(
            float(line.rpartition(" ")[2]) for line in lines if 'status="ok"' in line and 'verb="score"' in line
        )
        time.sleep(0.5)
    assert found >= NUM_IMAGES


def test_rescoring_applies_another_head_without_reading_an_image(
    proxy: S3Proxy, small_bundle: str, bucket: dict[str, bytes], tmp_path: Path
):
    source, out = "s3://photos/embedded", "s3://work/embedded"
    upload(source, bucket | {"0100.jpg": b"broken", "0150.jpg": bucket["0150.jpg"][:300]})
    save_random_head("s3://work/other-head", classes=["drogon", "rhaegal", "viserion"], size=64, seed=1)
    embedded = scored(small_bundle, source, out, embeddings=True)
    proxy.requests.clear()
    rescored = rescore.rescore(RescoreConfig(model="s3://work/other-head", features=out, out="s3://work/rescored"))
    assert not proxy.gets("/photos/")
    full = scored("s3://work/other-head", source, "s3://work/rescored-full")
    ours, theirs = (frame_of(done.parts, tmp_path / str(i)) for i, done in enumerate((rescored, full)))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=False, rtol=0, atol=1e-3)
    assert (rescored.counts, rescored.num_images) == (
        {"ok": NUM_IMAGES - 2, "unreadable": 1, "unsupported": 1},
        NUM_IMAGES,
    )
    assert dragonclf.read_scores("s3://work/rescored").count_rows() == NUM_IMAGES
    again = rescore.rescore(
        RescoreConfig(model="s3://work/other-head", features=embedded.run, out="s3://work/rescored")
    )
    assert (again.run, again.images_per_s) == (rescored.run, None)

    save_random_head("s3://work/other-size", classes=["a", "b"], size=96)
    with pytest.raises(ValueError, match=r"are of another transform .* score with the model, reading the images"):
        rescore.rescore(RescoreConfig(model="s3://work/other-size", features=out, out="s3://work/rescored"))
    with pytest.raises(ValueError, match="has no embeddings: score with --embeddings"):
        rescore.rescore(RescoreConfig(model="s3://work/other-head", features=full.run, out="s3://work/rescored"))


def test_too_many_errors_are_published_and_not_made_the_latest(small_bundle: str, tmp_path: Path):
    upload(
        "s3://photos/errors", {f"{i}.jpg": encoded(seed=i) for i in range(6)} | {f"{i}.txt": b"text" for i in range(4)}
    )
    done = commands.here("score", small_bundle, "s3://photos/errors", "--out", str(tmp_path / "out"), "--json")
    assert done.exit_code == 5, done.stderr
    assert re.search(
        r"4 of 10 images have no result \(4 unsupported\), more than --max-error-rate 0.2 allows", done.stderr
    )
    run_uri = only_run(str(tmp_path / "out"))
    assert (Path(run_uri) / "_manifest.json").exists()
    assert not (tmp_path / "out/_latest.json").exists()
    with pytest.raises(ValueError, match="there is no published run"):
        dragonclf.read_scores(str(tmp_path / "out"))
    assert dragonclf.read_scores(run_uri).count_rows() == 10
    accepted = score.score(
        ScoreConfig(model=small_bundle, source="s3://photos/errors", out=str(tmp_path / "out"), max_error_rate=0.4)
    )
    assert (accepted.run, accepted.images_per_s) == (run_uri, None)
    assert dragonclf.read_scores(str(tmp_path / "out")).count_rows() == 10
