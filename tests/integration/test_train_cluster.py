"""Training on images in a bucket, on a cluster of two nodes: each image is read once by each node, and nodes come and go."""

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from dragonclf import options, storage
from dragonclf.config import TrainConfig
from dragonclf.data.snapshot import open_snapshot
from dragonclf.demo.local_s3 import LocalS3
from dragonclf.model import zoo
from dragonclf.model.predictor import Network
from dragonclf.train import checkpoint, loop, lr_find
from dragonclf.train.data import Images
from dragonclf.train.recipe import one_cycle
from dragonclf.verbs import train_workers
from tests.conftest import write_folder
from tests.integration import commands
from tests.integration.nodes import end_node, start_node
from tests.integration.s3_proxy import S3Proxy

pytestmark = [pytest.mark.alone, pytest.mark.slow]  # starts Ray, twice or more

PER_CLASS = 40
FEW_EPOCHS, MANY_EPOCHS = 3, 5_000  # many: nodes come and go meanwhile


@pytest.fixture(scope="module")
def data(s3_server: LocalS3, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    """A snapshot of images in a bucket, and how many they are."""
    folder = tmp_path_factory.mktemp("cluster")
    photos, snapshots = write_folder(folder / "photos", per_class=PER_CLASS), str(folder / "snapshots")
    with s3_server.as_environment():
        for path in photos.rglob("*.jpg"):
            storage.put(f"s3://photos/elastic/{path.relative_to(photos)}", path.read_bytes())
        made = commands.result("index", "s3://photos/elastic", "--out", snapshots)
    assert made["counts"] == {"ok": 2 * PER_CLASS}
    return snapshots, 2 * PER_CLASS


class Nodes:
    """A cluster of this machine: a head without CPUs, and nodes of one CPU with a temporary folder each."""

    def __init__(self, folder: Path):
        self._folder, self._started = folder, []
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self._start("--head", "--port", self.address.split(":")[1], "--include-dashboard", "false", "--num-cpus", "0")

    def add(self, name: str) -> psutil.Process:
        temporary = self._folder / name
        temporary.mkdir(exist_ok=True)
        return self._start("--address", self.address, "--num-cpus", "1", TMPDIR=str(temporary))

    def close(self) -> None:
        for node in reversed(self._started):
            if node.is_running():
                end_node(node)

    def _start(self, *arguments: str, **environment: str) -> psutil.Process:
        log = self._folder / f"node-{len(self._started)}.log"
        options = ["--node-ip-address", "127.0.0.1", "--object-store-memory", "100000000"]
        self._started.append(start_node(log, *options, *arguments, **environment))
        return self._started[-1]


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_proxy: S3Proxy) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv(
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30"
    )  # of the group that still counts on the lost node
    monkeypatch.setenv("RAY_health_check_period_ms", "500")  # a lost node is seen in seconds
    monkeypatch.setenv(train_workers.WORKER_POLL, "2")  # an epoch takes so long: there are few to be replayed
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_proxy.endpoint)  # of all nodes
    made = Nodes(tmp_path)
    yield made
    made.close()


@pytest.fixture
def s3_proxy(s3_env: LocalS3) -> Iterator[S3Proxy]:
    proxy = S3Proxy(s3_env.endpoint)
    yield proxy
    proxy.close()


TRAINING: dict[str, Any] = {
    "precompute": False, "size": 64, "lr": 0.001, "global_batch_size": 16, "arch": "test_efficientnet", "pretrained": "none",
}  # fmt: skip


def options_of(data: str, out: Path, epochs: int, **others: Any) -> list[str]:
    config = TrainConfig.model_validate(
        TRAINING
        | {"data": data, "out": str(out), "name": "run", "epochs": epochs, "num_workers": 2, "synthetic_canaries": True}
        | {"mlflow_uri": f"sqlite:///{out}.db", "log_model": False, "report": False}
        | others
    )
    return ["train", *options.arguments(config)]


def gets(proxy: S3Proxy) -> Counter[int]:
    """How many images were asked for how often."""
    return Counter(proxy.gets("/photos/elastic/").values())


def test_after_the_first_epoch_no_node_asks_for_an_image(
    data: tuple[str, int], nodes: Nodes, s3_proxy: S3Proxy, tmp_path: Path
):
    snapshot, count = data
    for name in ("one", "two"):
        nodes.add(name)
    made = commands.result(*options_of(snapshot, tmp_path / "runs", FEW_EPOCHS, lr="auto"), "--address", nodes.address)
    rows = checkpoint.read_results(made["run"])
    assert [row["workers"] for row in rows] == [2] * (FEW_EPOCHS + 1)
    swept = lr_find.Sweep.model_validate_json(storage.get(f"{made['run']}/{lr_find.FOUND}"))
    num_train = sum(open_snapshot(snapshot).info.splits["train"].values())
    num_steps = -(-num_train // TRAINING["global_batch_size"])
    # the last step of the epoch of the head alone
    assert rows[0]["lr"] == pytest.approx(swept.valley * one_cycle(num_steps - 1, total_steps=num_steps))
    assert gets(s3_proxy) == {1: count}
    kept = {name: entries(tmp_path / name) for name in ("one", "two")}
    assert len(kept["one"]) + len(kept["two"]) == count
    assert not kept["one"] & kept["two"]
    assert min(len(names) for names in kept.values()) > count / 4


def entries(temporary: Path) -> set[str]:
    return {path.name for path in temporary.glob("dragonclf-cache-*/??/*")}


@pytest.mark.timeout(
    600
)  # Ray takes 30 s each to give up a node and to look for a new one, and starts the workers three times
def test_nodes_come_and_go_and_the_steps_are_the_same(
    data: tuple[str, int], nodes: Nodes, s3_proxy: S3Proxy, tmp_path: Path
):
    """Two workers, one, two; then one alone goes the same way, from the checkpoint of the time when they were two.

    An image that was left out or counted twice in the steps that were kept would change what follows.
    """
    snapshot, _ = data
    nodes.add("one")
    second = nodes.add("two")
    survive = ["--min-workers", "1", "--checkpoint-every", "1", "--address", nodes.address]
    driver = commands.start(*options_of(snapshot, tmp_path / "runs", MANY_EPOCHS), *survive)
    run, replayed = str(tmp_path / "runs" / "run"), str(tmp_path / "replayed")
    wait_for_workers(driver, run, 2)
    storage.download(f"{run}/checkpoints/latest.pt", copy_of(replayed))
    end_node(second)
    wait_for_workers(driver, run, 1)
    nodes.add("two")
    wait_for_workers(driver, run, 2)
    driver.send_signal(signal.SIGINT)
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 130, errors
    rows = checkpoint.read_results(run)
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    assert re.fullmatch("2+1+2+", "".join(str(int(row["workers"])) for row in rows))
    assert gets(s3_proxy).keys() <= {1, 2}  # two caches

    config = TrainConfig.model_validate(TRAINING | {"data": snapshot, "out": str(tmp_path), "epochs": MANY_EPOCHS})
    replay(config, replayed, epochs=len(rows))
    for row, expected in zip(checkpoint.read_results(replayed), rows, strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3), (row, expected)


def copy_of(run: str) -> Path:
    path = Path(run, checkpoint.FOLDER, checkpoint.LATEST)
    path.parent.mkdir(parents=True)
    return path


class EnoughError(Exception):
    """The replay has come as far as it should."""


def replay(config: TrainConfig, run: str, *, epochs: int) -> None:
    """Train on in this process from the checkpoint in `run`."""
    snapshot = open_snapshot(config.data)
    model = zoo.load_pretrained(config.arch, config.pretrained)
    transform = zoo.transform_for(model, size=config.size)
    recipe = train_workers.recipe(config)
    learned, valid = (
        Images.of_split(snapshot, split, transform, num_threads=2, seed=seed) for split, seed in (("train", recipe.seed), ("valid", None))
    )  # fmt: skip

    def report(row: dict[str, float]) -> None:
        if row["epoch"] == epochs:
            raise EnoughError

    with contextlib.suppress(EnoughError):
        loop.fit(
            Network(zoo.with_new_head(model, 2), transform), learned, valid, recipe, run_uri=run, rank=0, world_size=1,
            device=torch.device("cpu"), wrap=lambda model: model, report=report,
        )  # fmt: skip


def wait_for_workers(driver: subprocess.Popen[str], run: str, count: int) -> None:
    """Return when the newest finished epoch ended with so many workers."""
    deadline = time.monotonic() + 150
    while not (rows := checkpoint.read_results(run)) or rows[-1]["workers"] != count:
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline, (count, rows[-3:], os.listdir(run))
        time.sleep(0.2)
