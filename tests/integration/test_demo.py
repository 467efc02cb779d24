"""The demo leaves pages to look at, and stops cleanly: whatever ends it, nothing that it started is left."""

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
from playwright.sync_api import sync_playwright

from tests.integration import commands
from tests.unit.conftest import CHROMIUM, CHROMIUM_ARGS
from tests.unit.evaluations import opened

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


def test_its_pages_open_from_disk(tmp_path: Path):
    """On a screen, a phone and in the dark; pictures of them are left in the test's folder."""
    made = commands.result("demo", "--out", str(tmp_path / "run"), "--limit", "240")
    assert (made["num_scored"], made["num_lost"]) == (240, 0)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        for name in ("report", "quality", "review"):
            for variant, width, scheme in (("screen", 1280, "light"), ("phone", 375, "light"), ("dark", 1280, "dark")):
                with opened(browser, Path(made[name]), width=width, color_scheme=scheme) as page:
                    assert page.evaluate("document.documentElement.scrollWidth") <= width
                    assert page.locator("img").count() >= 8
                    assert page.locator(
                        "img"
                    ).evaluate_all(
                        "all => all.slice(0, 3).every(one => one.naturalWidth > 0)"  # others are decoded when they are scrolled to
                    )
                    page.screenshot(path=tmp_path / f"{name}-{variant}.png", full_page=True)
        with opened(browser, Path(made["report"])) as page:
            accuracy = float(page.get_attribute("#accuracy", "value") or "nan")
            assert accuracy == pytest.approx(made["accuracy"], abs=1e-6)
            assert "cell: 2 slices" in page.inner_text("main")
        browser.close()


def test_failure_says_what_failed(tmp_path: Path):
    """No photographs to train on: the installed package is hidden."""
    hidden = tmp_path / "hide"
    hidden.mkdir()
    (hidden / "elpv_dataset.py").write_text("")
    done = commands.run("demo", "--out", str(tmp_path / "run"), env={"PYTHONPATH": str(hidden)})
    assert done.returncode == 2
    assert "dragonclf: error: the demo's photographs are not installed: pip install 'dragonclf[demo]'" in done.stderr
    assert not (tmp_path / "run").exists()
