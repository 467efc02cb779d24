"""Training on a Ray cluster of this machine: the same result however many workers, and after one of them is killed."""

import csv
import io
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dragonclf import storage
from tests.conftest import write_folder
from tests.integration import commands

pytestmark = pytest.mark.slow

EPOCHS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A snapshot of 2 x 40 images, local."""
    root = tmp_path_factory.mktemp("data")
    source = write_folder(root / "photos", per_class=40)
    (source / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    made = commands.result("index", str(source), "--out", str(root / "snapshots"))
    assert made["counts"] == {"ok": 80, "unreadable": 1}
    assert made["classes"] == ["blue", "red"]
    return str(root / "snapshots")


def history(run: str) -> list[dict[str, float]]:
    """results.csv without the times."""
    rows = csv.DictReader(io.StringIO(storage.get(f"{run}/results.csv").decode()))
    return [{key: float(value) for key, value in row.items() if key != "seconds"} for row in rows]


def wait_for(happened: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_killed_worker_costs_no_epoch_and_changes_no_number(data: str, tmp_path: Path):
    options = [
        "train", data, "--no-precompute", "--size", "64", "--epochs", str(EPOCHS), "--lr", "0.001", "--global-batch-size", "16",
        "--num-workers", "2", "--synthetic-canaries", "--mlflow-uri", f"sqlite:///{tmp_path}/mlflow.db",
    ]  # fmt: skip
    undisturbed = commands.result(*options, "--out", str(tmp_path / "undisturbed"))

    driver = commands.start(*options, "--out", str(tmp_path / "killed"), "--name", "killed")
    run = str(tmp_path / "killed" / "killed")
    wait_for(lambda: storage.stat(f"{run}/checkpoints/epoch-00001.pt") is not None, seconds=120)
    workers = [
        p for p in psutil.Process(driver.pid).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())
    ]
    assert len(workers) == 2, [p.cmdline() for p in psutil.Process(driver.pid).children(recursive=True)]
    workers[1].send_signal(signal.SIGKILL)
    output, errors = driver.communicate(timeout=200)
    assert driver.returncode == 0, errors
    assert f'"run":"{run}"' in output

    assert [row["epoch"] for row in history(run)] == [1, 2, 3]
    expected = history(undisturbed["run"])
    assert len(expected) == EPOCHS
    for ours, theirs in zip(history(run), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_number_of_workers_changes_neither_order_nor_result(data: str, tmp_path: Path):
    options = ["train", data, "--out", str(tmp_path), "--size", "64", "--mlflow-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    one = commands.result(*options, "--name", "one", "--num-workers", "1")
    two = commands.result(*options, "--name", "two", "--num-workers", "2")
    assert [row["epoch"] for row in history(one["run"])] == [1, 2, 3]
    for a, b in zip(history(one["run"]), history(two["run"]), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert one["metrics"]["valid_accuracy"] >= 0.9  # two colours

    again = commands.run(*options, "--name", "two", "--num-workers", "1", "--json")
    assert again.returncode == 0
    assert "nothing to do" in again.stderr
    other = commands.run(*options, "--name", "two", "--epochs", "5")
    assert other.returncode == 2
    assert "other options" in other.stderr

    seen = commands.run(
        "predict", one["model"], str(_first(data, "blue")), str(_first(data, "red")), str(tmp_path / "none.jpg")
    )
    assert seen.returncode == 1  # one image has no prediction; the others have theirs
    lines = [line.split() for line in seen.stdout.splitlines() if ".jpg" in line]
    assert [line[1:3] for line in lines[:2]] == [["ok", "blue"], ["ok", "red"]]
    assert "missing" in seen.stdout


def _first(data: str, label: str) -> Path:
    return Path(data).parent / "photos" / label / "000.jpg"
