"""jobs/*.py on a Ray cluster with token authentication, as `ray job submit` runs them there."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import write_folder
from tests.integration.commands import ROOT
from tests.integration.conftest import save_random_head
from tests.integration.nodes import end_node, start_node

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A head node on loopback, with a temporary folder of its own, where jobs find it; the variables that let a job in."""
    temporary = tempfile.mkdtemp(prefix="d-")  # short: Ray's sockets lie in it
    variables = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "HOME": str(tmp_path), "RAY_TMPDIR": temporary,
    }  # fmt: skip
    options = ["--head", "--port=0", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
    head = start_node(tmp_path / "head.log", *options, **variables)
    yield os.environ | variables
    end_node(head)
    shutil.rmtree(temporary)


def test_jobs_join_the_cluster_and_end_in_one_json_line(cluster: dict[str, str], tmp_path: Path):
    photos = write_folder(tmp_path / "photos", per_class=10)
    save_random_head(str(tmp_path / "model"), classes=["blue", "red"], size=64)

    def job(name: str, *arguments: str) -> dict:
        command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments]
        done = subprocess.run(command, env=cluster, capture_output=True, text=True, timeout=200, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "Ray: the cluster at auto" in done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    assert job("index", str(photos), "--out", str(tmp_path / "data"))["num_images"] == 20
    scored = job("score", str(tmp_path / "model"), str(photos), "--out", str(tmp_path / "scores"))
    assert scored["counts"] == {"ok": 20}

    wrong = cluster | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [sys.executable, str(ROOT / "jobs" / "index.py"), str(photos), "--out", str(tmp_path / "other")]
    refused = subprocess.run(command, env=wrong, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert refused.returncode == 2
    assert "there is no Ray to join at 'auto'" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("name", ["index", "train", "evaluate", "score", "rescore"])
def test_help_has_an_example(name: str):
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert f"Example: dragonclf {name}" in " ".join(done.stdout.split())
    assert "auto" in done.stdout
