"""Training on a Ray cluster of this machine: the same result however many workers, and after one of them is killed."""

import contextlib
import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import psutil
import pytest
import torch

from dragonclf import session, storage
from dragonclf.engine import job, published
from dragonclf.model import bundle, zoo
from dragonclf.train import checkpoint, head
from tests.conftest import encoded, write_folder
from tests.integration import commands

pytestmark = pytest.mark.slow

EPOCHS = 3
PER_CLASS = 150  # images: enough that a temperature is fitted
KILLS = int(os.environ.get("DRAGONCLF_TEST_KILLS", "2"))  # each costs a start of the workers, about 10 s


@pytest.fixture
def local_ray() -> Iterator[None]:
    """A Ray of this process, for the commands that are run here."""
    with session.connect(session.LOCAL):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A snapshot of two classes, local."""
    root = tmp_path_factory.mktemp("data")
    source = write_folder(root / "photos", per_class=PER_CLASS)
    (source / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    made = commands.result("index", str(source), "--out", str(root / "snapshots"))
    assert made["counts"] == {"ok": 2 * PER_CLASS, "unreadable": 1}
    assert made["classes"] == ["blue", "red"]
    return str(root / "snapshots")


def history(run: str) -> list[dict[str, float]]:
    """results.csv without the times."""
    rows = csv.DictReader(io.StringIO(storage.get(f"{run}/results.csv").decode()))
    return [
        {key: float(value) for key, value in row.items() if key not in ("seconds", "waited", "workers")} for row in rows
    ]


def wait_for(happened: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_workers_killed_at_any_step_change_no_bit(data: str, tmp_path: Path):
    options = [
        "train", data, "--no-precompute", "--size", "64", "--epochs", str(EPOCHS), "--lr", "0.001", "--global-batch-size", "16",
        "--num-workers", "2", "--synthetic-canaries", "--mlflow-uri", f"sqlite:///{tmp_path}/mlflow.db",
        "--layer-decay", "0.9", "--label-smoothing", "0.1", "--accumulate", "2", "--flips", "both", "--policy", "trivial", "--erase", "0.2",
    ]  # fmt: skip
    undisturbed = commands.result(*options, "--out", str(tmp_path / "undisturbed"))

    survived = ["--checkpoint-every", "1", "--max-failures", str(KILLS)]
    driver = commands.start(*options, *survived, "--out", str(tmp_path / "killed"), "--name", "killed")
    run = str(tmp_path / "killed" / "killed")
    latest, draw = f"{run}/checkpoints/latest.pt", random.Random(0)
    for _ in range(KILLS):
        before = storage.stat(latest)
        wait_for(lambda before=before: storage.stat(latest) != before, seconds=120)
        time.sleep(draw.uniform(0, 0.3))
        draw.choice(training_workers(driver.pid)).send_signal(signal.SIGKILL)
    before = storage.stat(latest)
    wait_for(lambda: storage.stat(latest) != before, seconds=120)
    os.killpg(driver.pid, signal.SIGKILL)  # the driver, at some step; its workers notice when they like
    driver.communicate()
    assert not storage.stat(f"{run}/model/{bundle.INFO}")
    output = commands.result(*options, *survived, "--out", str(tmp_path / "killed"), "--name", "killed")
    assert output["run"] == run

    assert {path.name for path in Path(run).iterdir()} == {
        "args.toml", "checkpoints", "confusion_matrix.png", "evaluation", "mlflow_model_id", "mlflow_run_id", "model", "report.html",
        "results.csv", "results.png", "steps.csv", "train_batch0.jpg",
    }  # fmt: skip
    rows = history(run)
    assert [row["epoch"] for row in rows] == list(range(1, EPOCHS + 2))  # the first of them with a frozen backbone
    for row, expected in zip(rows, history(undisturbed["run"]), strict=True):
        assert row == pytest.approx(expected, rel=1e-6)  # a loss's sum is split where a checkpoint was
    weights = [storage.get(f"{model}/model.safetensors") for model in (f"{run}/model", undisturbed["model"])]
    assert weights[0] == weights[1]


def training_workers(pid: int) -> list[psutil.Process]:
    """Both of a driver's, once they are there."""
    found: list[psutil.Process] = []

    def are_there() -> bool:
        nonlocal found
        below = psutil.Process(pid).children(recursive=True)
        with contextlib.suppress(psutil.Error):  # one is just ending
            found = [p for p in below if "RayTrainWorker" in " ".join(p.cmdline())]
            return len(found) == 2
        return False

    wait_for(are_there, seconds=60)
    return found


@pytest.mark.filterwarnings("ignore")  # MLflow's own, in this process
def test_labels_of_test_images_decide_nothing(local_ray: None, tmp_path: Path):
    """Neither weights nor temperature nor thresholds, nor which labels of other images are doubted."""
    paths = sorted(write_folder(tmp_path / "photos", per_class=90).rglob("*.jpg"))
    other = {"blue": "red", "red": "blue"}
    made, found = [], []
    for number, are_flipped in enumerate((False, True)):
        folder = tmp_path / str(number)
        folder.mkdir()
        rows = []
        for place, path in enumerate(paths):
            split, label = ("train", "valid", "test")[place % 3], path.parent.name
            is_wrong = (place % 7 == 0) != (are_flipped and split == "test")
            rows.append({"uri": str(path), "label": other[label] if is_wrong else label, "split": split})
        pd.DataFrame(rows).to_csv(folder / "manifest.csv", index=False)
        commands.result_here("index", str(folder / "manifest.csv"), "--out", str(folder / "data"))
        trained = commands.result_here(
            "train", str(folder / "data"), "--out", str(folder / "models"), "--size", "64", "--min-precision", "0.8", "--no-log-model",
            "--no-report", "--mlflow-uri", f"sqlite:///{folder}/mlflow.db",
        )  # fmt: skip
        commands.result_here(
            "quality", str(folder / "data"), "--out", str(folder), "--features", str(folder / "models")
        )
        info = bundle.load_bundle(trained["model"]).info
        made.append((storage.get(f"{trained['model']}/model.safetensors"), info.temperature, info.thresholds))
        doubted = pd.read_parquet(folder / "quality.parquet")
        found.append(doubted[doubted["issue"].isin(["label_error", "label_doubt"])])
    assert made[0] == made[1]
    assert made[0][1] != 1
    assert set(made[0][2]) == {"blue", "red"}
    rest, rest_again = (one[one["split"] != "test"].reset_index(drop=True) for one in found)
    assert len(rest)
    pd.testing.assert_frame_equal(rest, rest_again)


@pytest.mark.filterwarnings("ignore")  # MLflow's own, in this process
def test_number_of_workers_changes_neither_order_nor_result(data: str, local_ray: None, tmp_path: Path):
    options = [
        "--out", str(tmp_path), "--size", "64", "--mlflow-uri", f"sqlite:///{tmp_path}/mlflow.db", "--min-precision", "0.9",
    ]  # fmt: skip
    one = commands.result_here("train", data, *options, "--name", "one", "--num-workers", "1")
    recipe = [
        "--recipe",
        f"{one['run']}/args.toml",
        "--out",
        str(tmp_path),
        "--mlflow-uri",
        f"sqlite:///{tmp_path}/mlflow.db",
    ]
    two = commands.result_here("train", data, *recipe, "--name", "two", "--num-workers", "2")
    assert [row["epoch"] for row in history(one["run"])] == [1, 2, 3]
    for a, b in zip(history(one["run"]), history(two["run"]), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert one["metrics"]["valid_accuracy"] >= 0.9  # two colours

    made, row, state = bundle.load_bundle(one["model"]), history(one["run"])[-1], checkpoint.load(one["run"])
    assert made.info.temperature == row["temperature"] != 1
    assert made.info.metrics["valid_ece_calibrated"] == row["valid_ece_calibrated"] < row["valid_ece"]
    assert state is not None
    assert made.info.thresholds == {
        name: choice["threshold"] for name, choice in zip(made.info.classes, state["thresholds"], strict=True)
    }
    assert all(choice["reached"] >= 0.9 and choice["accepted"] for choice in state["thresholds"])
    assert made.info.metrics["valid_coverage"] == row["valid_coverage"]
    assert "for a precision of 0.9 of each class" in storage.get(f"{one['model']}/README.md").decode()
    weight, bias = head.folded(state["model"])
    classifier = zoo.classifier(made.model)
    torch.testing.assert_close(classifier.weight.detach() * row["temperature"], weight)
    torch.testing.assert_close(classifier.bias.detach() * row["temperature"], bias)

    check_mlflow(f"sqlite:///{tmp_path}/mlflow.db", one, [str(_first(data, label)) for label in ("blue", "red")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features", "mlflow-models", "mlflow.db", "one", "two"]

    check_grown(data, tmp_path, options)

    shown = {name: (tmp_path / "two" / name).read_bytes() for name in ("results.png", "confusion_matrix.png")}
    evaluation = tmp_path / "two" / "evaluation" / "predictions.parquet"
    of_features = pd.read_parquet(evaluation).sort_values("uri")
    (tmp_path / "two" / "results.png").unlink()  # as if the driver had been killed before
    (tmp_path / "two" / "report.html").unlink()
    again = commands.here("train", data, *options, "--name", "two", "--num-workers", "1", "--json")
    assert again.exit_code == 0, again.stderr
    assert "nothing to do: the run at" in again.stderr
    assert {name: (tmp_path / "two" / name).read_bytes() for name in shown} == shown
    assert (tmp_path / "two" / "report.html").stat().st_size > 10_000
    of_images = pd.read_parquet(evaluation).sort_values("uri")
    for name in ("uri", "etag", "status", "label", "input_label"):
        assert of_features[name].tolist() == of_images[name].tolist()
    for name in ("confidence", "prob_blue", "prob_red"):
        assert of_features[name].to_numpy() == pytest.approx(of_images[name].to_numpy(), abs=1e-5, nan_ok=True)
    assert "other options" in commands.fails("train", data, *options, "--name", "two", "--epochs", "5", code=2)

    seen = commands.here(
        "predict", one["model"], str(_first(data, "blue")), str(_first(data, "red")), str(tmp_path / "none.jpg")
    )
    assert seen.exit_code == 1  # one image has no prediction; the others have theirs
    lines = [line.split() for line in seen.stdout.splitlines() if ".jpg" in line]
    assert [line[1:3] for line in lines[:2]] == [["ok", "blue"], ["ok", "red"]]
    assert "missing" in seen.stdout


def check_grown(data: str, out: Path, options: list[str]) -> None:
    """Two photographs more: of them alone features are computed, and then one view of all that are trained on."""
    photos = Path(data).parent / "photos"
    for name, colour in (("blue", (30, 30, 200)), ("red", (200, 30, 30))):
        (photos / name / "new.jpg").write_bytes(encoded(colour=colour, seed=9000))
    grown = commands.result_here("index", str(photos), "--out", str(out / "grown"))
    assert grown["counts"]["ok"] == 2 * PER_CLASS + 2
    done = commands.here(
        "train", str(out / "grown"), *options, "--name", "more", "--epochs", "2", "--views", "1", "--flips", "both", "--no-log-model",
        "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert f"features: {2 * PER_CLASS} of {2 * PER_CLASS + 2} images kept of run" in done.stderr
    runs = [published.read_latest(str(folder)) for folder in (out / "features").iterdir()]
    own, views = sorted(runs, key=lambda run: "views" in published.read_manifest(run).spec)
    assert published.read_manifest(own).num_kept == 2 * PER_CLASS
    told = json.loads(storage.get(f"{own}/{job.SUMMARY}"))
    assert (told["images"], told["read_by_this_call"]) == (2 * PER_CLASS + 2, 2)
    trained_on = {
        row["uri"] for table in published.read_parts(own) for row in table.to_pylist() if row["split"] == "train"
    }
    assert {row["uri"] for table in published.read_parts(views) for row in table.to_pylist()} == trained_on


LOADED = """
import json, sys
import mlflow, mlflow.pyfunc, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
paths = sys.argv[3:]
tables = {"uri": [*paths, "/none.jpg"], "image": [open(path, "rb").read() for path in paths] + [b"no image"]}
print(json.dumps({name: model.predict(pd.DataFrame({name: tables[name]})).to_dict("records") for name in tables}))
"""


def check_mlflow(uri: str, trained: dict[str, Any], paths: list[str]) -> None:
    """In a fresh process MLflow's copy of a model answers as `dragonclf predict` does, for URIs and for bytes."""
    client = mlflow.MlflowClient(uri)
    name, model_id = (storage.get(f"{trained['run']}/mlflow_{kind}_id").decode() for kind in ("run", "model"))
    assert client.get_run(name).data.metrics["valid_accuracy"] == trained["metrics"]["valid_accuracy"]
    steps = checkpoint.read_results(trained["run"], checkpoint.STEPS)
    assert [(m.step, m.value) for m in client.get_metric_history(name, "step_loss")] == [
        (row["step"], row["loss"]) for row in steps
    ]
    artifacts = {file.path for file in client.list_artifacts(name)}
    assert artifacts >= {"results.png", "confusion_matrix.png", "report.html"}
    [experiment] = client.search_experiments(filter_string="name = 'dragonclf'")
    assert len(client.search_runs([experiment.experiment_id])) == 2  # one for each training run
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADED, uri, f"models:/{model_id}", *paths], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected = commands.result_here("predict", trained["model"], *paths)["predictions"]
    for kind, status in (("uri", "missing"), ("image", "unsupported")):
        *rows, last = found[kind]
        assert last["status"] == status
        for row, wanted in zip(rows, expected, strict=True):
            assert (row["status"], row["label"], row["confidence"]) == ("ok", wanted["label"], wanted["confidence"])
            assert row["abstain"] is wanted["abstain"] is False
            assert {name: row[f"prob_{name}"] for name in wanted["probs"]} == wanted["probs"]


def _first(data: str, label: str) -> Path:
    return Path(data).parent / "photos" / label / "000.jpg"
