"""What README.md says can be done is done here, literally: its commands on a bucket, its three lines of Python."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dragonclf import storage
from dragonclf.demo.local_s3 import LocalS3
from tests.conftest import encoded
from tests.integration import commands

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

README = (commands.ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def dragons(s3_server: LocalS3) -> dict[str, str]:
    """The bucket that the README speaks of; the variables to reach it."""
    with s3_server.as_environment():
        for i in range(60):
            name, colour = (("drogon", (30, 30, 40)), ("viserion", (220, 210, 170)))[i % 2]
            commands.upload("s3://photos/dragons", {f"{name}/{i:03d}.jpg": encoded(colour=colour, seed=i)})
            commands.upload("s3://photos/new", {f"{i:03d}.jpg": encoded(colour=colour, seed=1000 + i)})
    return s3_server.environment("admin")


def test_commands(dragons: dict[str, str], s3_env: LocalS3, tmp_path: Path):
    lines = [
        line
        for block in blocks("bash")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("dragonclf ")
    ]
    verbs = [line.split()[1] for line in lines]
    assert verbs == ["index", "train", "evaluate", "score", "predict"]
    (tmp_path / "drogon.jpg").write_bytes(encoded(colour=(30, 30, 40), seed=5000))
    printed = {}
    for line in lines:
        done = commands.run(*shlex.split(line)[1:], env=dragons, cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        printed[line.split()[1]] = done.stdout
    assert "drogon" in printed["predict"]
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    assert "ok 60" in printed["score"]
    assert storage.stat("s3://work/models/first/model/model.json") is not None


def test_three_lines(dragons: dict[str, str], tmp_path: Path):
    (program,) = blocks("python")
    checks = "\nassert set(predictions['status']) == {'ok'}\nassert (predictions['label'] == predictions['input_label']).mean() > 0.9\n"
    done = subprocess.run(
        [sys.executable, "-c", program + checks], cwd=tmp_path, env=os.environ | dragons, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_demo_and_test_are_make_targets():
    makefile = (commands.ROOT / "Makefile").read_text()
    wanted = {line.split()[1] for block in blocks("bash") for line in block.splitlines() if line.startswith("make ")}
    assert {"demo", "test"} <= wanted
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in wanted)
