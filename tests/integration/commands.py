"""Run dragonclf's commands as a user does, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from dragonclf import storage

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
