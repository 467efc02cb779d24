"""Run dragonclf's commands as a user does, in processes of their own, or `here`."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from dragonclf import cli, storage
from dragonclf.data import tables
from dragonclf.storage import s3
from tests.conftest import use_identity

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "dragonclf"]


def run(
    *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, whatever its exit code."""
    return subprocess.run(
        [*COMMAND, *arguments], env=os.environ | (env or {}), cwd=cwd, capture_output=True, text=True, timeout=timeout
    )  # fmt: skip


def result(*arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> dict[str, Any]:
    """Run a command with --json that must succeed; return its result."""
    done = run(*arguments, "--json", env=env, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def here(*arguments: str, env: dict[str, str] | None = None) -> Result:
    """Run a command in this process, by the Ray that it is connected to if the command needs one: this saves their starts."""
    handlers = cli.log.handlers
    with pytest.MonkeyPatch.context() as patch:
        use_identity(env or {}, patch)
        done = CliRunner().invoke(cli.app, arguments)
    s3.forget_clients()
    cli.log.handlers = handlers  # its own writes to what it printed to
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.stderr
    return done


def result_here(*arguments: str) -> dict[str, Any]:
    """Run `here` a command with --json that must succeed; return its result."""
    done = here(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def fails(*arguments: str, code: int, env: dict[str, str] | None = None) -> str:
    """Run `here` a command that must fail with `code`; return its one line."""
    done = here(*arguments, env=env)
    assert (done.exit_code, done.stdout) == (code, ""), done.output
    lines = done.stderr.splitlines()
    [line] = [line for line in lines if line.startswith("dragonclf: error: ")]
    assert lines[-1] == line
    return line


def start(*arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start a command in a session of its own, to be signalled."""
    return subprocess.Popen(
        [*COMMAND, *arguments, "--json"], env=os.environ | (env or {}), cwd=cwd,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def upload(prefix: str, images: dict[str, bytes]) -> None:
    """Put objects under a prefix, by their keys below it."""
    for key, data in images.items():
        storage.put(f"{prefix}/{key}", data)


def only_run(out: str) -> str:
    """URI of the one run under an output."""
    (claim,) = [found.uri for found in storage.list_objects(f"{out}/runs") if found.uri.endswith("/run.json")]
    return claim.removesuffix("/run.json")


def wait_for_parts(driver: subprocess.Popen[str], out: str, count: int) -> None:
    """Return when a running command has written so many parts."""
    deadline = time.monotonic() + 120
    while len([found for found in storage.list_objects(out) if "/parts/" in found.uri]) < count:
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def uris_of(part: str) -> list[str]:
    """The images of a part."""
    return tables.read(part, columns=["uri"])["uri"].to_pylist()


def local_copy(parts_uri: str, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for found in storage.list_objects(parts_uri):
        (folder / storage.name(found.uri)).write_bytes(storage.get(found.uri))
    return folder


def frame_of(parts_uri: str, folder: Path) -> pd.DataFrame:
    """All rows of a folder of parts, by uri. They are copied to `folder` first: a reader that knows nothing of us."""
    return pd.read_parquet(local_copy(parts_uri, folder)).sort_values("uri", ignore_index=True)
