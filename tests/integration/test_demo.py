"""The demo stops cleanly: whatever ends it, nothing that it started is left. (That it succeeds, `make demo` shows.)"""

import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.integration import commands

pytestmark = [pytest.mark.alone, pytest.mark.slow]


def wait_for_line(process: subprocess.Popen[str], wanted: str, *, seconds: float) -> None:
    assert process.stderr is not None
    lines: list[str] = []
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(process.stderr, selectors.EVENT_READ)
        while selector.select(timeout=deadline - time.monotonic()):
            lines.append(process.stderr.readline())
            if wanted in lines[-1]:
                return
            assert lines[-1], f"ended early: {lines}"
    raise AssertionError(f"{wanted!r} not said in {seconds} s: {lines}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_demo(number: signal.Signals, tmp_path: Path):
    temporary = Path(tempfile.mkdtemp(prefix="d-"))  # short: Ray's sockets lie in it
    env = {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    process = commands.start("demo", "--out", str(tmp_path / "run"), "--limit", "100", env=env)
    wait_for_line(process, "dragonclf train", seconds=100)
    time.sleep(2)
    children = psutil.Process(process.pid).children(recursive=True)
    names = {child.name() for child in children}
    assert "weed" in names
    assert "raylet" in names
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=180)
    if number == signal.SIGKILL:  # two agents of Ray's take a minute to notice
        children = [child for child in children if child.is_running() and "Agent" not in child.name()]
    else:
        assert process.returncode == 128 + number
        assert "Traceback" not in errors
        assert "dragonclf: interrupted" in errors
        assert [path.name for path in temporary.iterdir()] == ["ray"], "only Ray keeps its logs"
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    shutil.rmtree(temporary)


def test_failure_says_what_failed(tmp_path: Path):
    """No photographs to train on: the installed package is hidden."""
    hidden = tmp_path / "hide"
    hidden.mkdir()
    (hidden / "elpv_dataset.py").write_text("")
    done = commands.run("demo", "--out", str(tmp_path / "run"), env={"PYTHONPATH": str(hidden)})
    assert done.returncode == 2
    assert "dragonclf: error: the demo's photographs are not installed: pip install 'dragonclf[demo]'" in done.stderr
    assert not (tmp_path / "run").exists()
