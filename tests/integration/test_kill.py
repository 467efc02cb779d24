"""Kill anything, run the same command again: the rows are those of an undisturbed run, and what was done is not done again."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest

from dragonclf import storage
from dragonclf.demo.local_s3 import LocalS3
from tests.conftest import encoded, use_identity
from tests.integration import commands
from tests.integration.commands import frame_of, only_run, upload, uris_of, wait_for_parts
from tests.integration.conftest import save_random_head
from tests.integration.s3_proxy import S3Proxy

pytestmark = [pytest.mark.alone, pytest.mark.slow]  # each kills and restarts whole scoring jobs, 30 to 90 s

NUM_IMAGES, SHARD_IMAGES = 200, 10
IN_FLIGHT = 2 * SHARD_IMAGES  # one actor, two shards
VICTIMS = ("driver", "actor", "raylet", "server")
NUM_RUNS = int(os.environ.get("DRAGONCLF_KILL_RUNS", str(len(VICTIMS))))
NUM_KILLS = 1 if len(VICTIMS) >= NUM_RUNS else 2  # in one run; the gate's are short
FIRST_SEED = int(os.environ.get("DRAGONCLF_KILL_SEED", "0"))


@pytest.fixture(scope="module")
def server() -> Iterator[LocalS3]:
    """A server of this module's own, to be killed."""
    with LocalS3() as made, pytest.MonkeyPatch.context() as patch:
        for bucket in ("photos", "work"):
            made.create_bucket(bucket)
        use_identity(made.environment("admin"), patch)
        save_random_head("s3://work/bundle", classes=["blue", "red"], size=64)
        upload(
            "s3://photos/kill", {f"{i:04d}.jpg": encoded(colour=(i, 90, 255 - i), seed=i) for i in range(NUM_IMAGES)}
        )
        yield made


@pytest.fixture(scope="module")
def undisturbed(server: LocalS3, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    done = commands.result(*scoring("s3://work/undisturbed"))
    return frame_of(done["parts"], tmp_path_factory.mktemp("undisturbed") / "parts")


def scoring(out: str) -> list[str]:
    return ["score", "s3://work/bundle", "s3://photos/kill", "--shard-images", str(SHARD_IMAGES), "--out", out]


def kill(victim: str, driver: subprocess.Popen[str], server: LocalS3, pause_s: float) -> bool:
    """kill -9. False if there is no such process now."""
    if victim == "server":
        server.kill()
        time.sleep(pause_s)
        server.start()
        return True
    name = {"actor": "ShardActor", "raylet": "raylet/raylet"}.get(victim)
    children = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
    found = [driver.pid]
    if name is not None:
        found = [child.pid for child in children if name in " ".join(child.cmdline()[:1])]
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    if victim == "driver":
        driver.communicate()
        # Two agents of Ray's, and a worker that was only just starting, may take minutes to notice; they touch no image and no part.
        deadline = time.monotonic() + 60
        while (alive := [child for child in children if _works(child)]) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not alive, "Ray outlived its driver"
    return bool(found)


def _works(process: psutil.Process) -> bool:
    try:
        return "Agent" not in process.name() and process.name() != "ray::IDLE" and process.status() != "zombie"
    except psutil.NoSuchProcess:
        return False


def done_uris(out: str) -> set[str]:
    return {uri for found in storage.list_objects(out) if "/parts/" in found.uri for uri in uris_of(found.uri)}


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + NUM_RUNS))
def test_rows_survive_any_kill(seed: int, server: LocalS3, undisturbed: pd.DataFrame, tmp_path: Path):
    chance = random.Random(seed)
    proxy = S3Proxy(server.endpoint, delay_s=0.4)
    out = f"s3://work/killed-{seed}"
    kills = [(VICTIMS[seed % len(VICTIMS)], chance.uniform(5, 15)), (chance.choice(VICTIMS), chance.uniform(3, 15))]
    for victim, after_s in kills[:NUM_KILLS]:
        driver = commands.start(*scoring(out), env={"AWS_ENDPOINT_URL": proxy.endpoint})
        started_s = time.monotonic()
        while driver.poll() is None and time.monotonic() - started_s < after_s:
            time.sleep(0.02)
        before = proxy.gets("/photos/kill/")
        if driver.poll() is not None or not kill(victim, driver, server, chance.uniform(0.2, 4)):
            _, errors = driver.communicate(timeout=120)
            assert driver.returncode == 0, errors
            continue
        done = done_uris(out)
        read_in_vain = {path for path, _ in before.items()} - {f"/{uri.removeprefix('s3://')}" for uri in done}
        assert len(read_in_vain) <= IN_FLIGHT
        proxy.requests.clear()
        if victim != "driver":
            _, errors = driver.communicate(timeout=120)
            # 1: where Ray was faster to end the driver of a raylet that is gone than the driver was to say so
            expected = {"actor": (0,), "server": (0, 3), "raylet": (0, 3, 1)}[victim]
            assert driver.returncode in expected, f"{victim}: {driver.returncode}: {errors}"
        again = proxy.gets("/photos/kill/")
        assert not set(again) & {f"/{uri.removeprefix('s3://')}" for uri in done}, "a finished shard was read again"
    proxy.requests.clear()
    done = done_uris(out)
    proxy.delay_s = 0
    finished = commands.result(*scoring(out), env={"AWS_ENDPOINT_URL": proxy.endpoint})
    assert finished["counts"] == {"ok": NUM_IMAGES}
    assert finished["run"] == only_run(out)
    assert not set(proxy.gets("/photos/kill/")) & {f"/{uri.removeprefix('s3://')}" for uri in done}
    pd.testing.assert_frame_equal(frame_of(finished["parts"], tmp_path / "parts"), undisturbed, check_exact=True)
    proxy.close()


def test_of_two_drivers_one_works_and_the_other_says_so(server: LocalS3, undisturbed: pd.DataFrame, tmp_path: Path):
    proxy = S3Proxy(server.endpoint, delay_s=0.4)
    out = "s3://work/two-drivers"
    drivers = [commands.start(*scoring(out), env={"AWS_ENDPOINT_URL": proxy.endpoint}) for _ in range(2)]
    ends = sorted(((driver.communicate(timeout=120), driver.returncode) for driver in drivers), key=lambda end: end[1])
    assert [code for _, code in ends] == [0, 4], ends
    (winner, _), _ = ends[0]
    _, (_, errors) = None, ends[1][0]
    assert "another driver is at work on this: process " in errors.splitlines()[-1]
    assert "the same command then goes on where it was" in errors
    done = json.loads(winner.splitlines()[-1])
    assert set(proxy.gets("/photos/kill/").values()) == {1}, "both read images"
    pd.testing.assert_frame_equal(frame_of(done["parts"], tmp_path / "parts"), undisturbed, check_exact=True)
    proxy.close()


def test_a_driver_that_was_frozen_cannot_damage_what_its_successor_made(
    server: LocalS3, undisturbed: pd.DataFrame, tmp_path: Path
):
    proxy = S3Proxy(server.endpoint, delay_s=0.4)
    out = "s3://work/frozen"
    frozen = commands.start(*scoring(out), env={"AWS_ENDPOINT_URL": proxy.endpoint})
    wait_for_parts(frozen, out, 2)
    family = [psutil.Process(frozen.pid), *psutil.Process(frozen.pid).children(recursive=True)]
    for process in family:  # its actors too, in the middle of their shards
        process.suspend()
    done = commands.result(*scoring(out), env={"AWS_ENDPOINT_URL": proxy.endpoint})
    before = {found.uri: found.etag for found in storage.list_objects(out)}
    for process in family:
        process.resume()
    _, errors = frozen.communicate(timeout=60)
    assert frozen.returncode == 4, errors
    assert "another driver took over" in errors.splitlines()[-1]
    assert {found.uri: found.etag for found in storage.list_objects(out)} == before
    rows = frame_of(done["parts"], tmp_path / "parts")
    pd.testing.assert_frame_equal(rows, undisturbed, check_exact=True)
    proxy.close()
