"""The model bundle: a folder that holds a classifier with all that is needed to trust it, and nothing that can run code.

``model.safetensors`` (weights), ``model.json`` (classes, transform, lineage, checksums; written last, so that its presence means whole),
``canaries/`` (encoded images with the pixels and logits they must give) and ``README.md`` (a model card). Whoever opens a bundle runs
its canaries first, on the very runtime that will be used, and refuses the bundle if they do not come out.
"""

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from torch import nn

from dragonclf import storage
from dragonclf.data.augment import Augment
from dragonclf.data.images import ImageError, decode
from dragonclf.data.transforms import Transform
from dragonclf.model import precision
from dragonclf.model.execution import PRECISIONS, Execution
from dragonclf.model.predictor import Predictor
from dragonclf.storage.errors import first_line

WEIGHTS, EXPECTED, CARD, INFO = "model.safetensors", "canaries/expected.safetensors", "README.md", "model.json"
PIXEL_BOUND = (
    0.5  # mean absolute difference of a canary's pixels, in 8-bit levels: room for another release of a decoder
)
LOGIT_BOUND = 1e-3  # of the largest canary logit, at least 1: other kernels add in another order


class BundleInfo(BaseModel):
    """``model.json``: everything of a bundle but its tensors."""

    model_config = ConfigDict(extra="forbid")

    format: int = Field(default=1, ge=1, le=1, description="Version of this layout.")
    arch: str = Field(description="timm's name of the architecture.")
    classes: list[str] = Field(min_length=2, description="Class names; the index is the model's output.")
    transform: Transform
    pretrained: str = Field(description="Where the backbone's first weights came from.")
    snapshot: str = Field(description="URI of the snapshot that it was trained on.")
    config: dict[str, Any] = Field(description="The training configuration.")
    temperature: float = Field(
        default=1.0, gt=0, description="By which the trained logits were divided; it is in the head's weights."
    )
    thresholds: dict[str, float] = Field(
        default={},
        description="Class -> probability from which on its label is accepted, chosen on validation images; above 1: never. Empty: always.",
    )
    metrics: dict[str, float] = Field(description="Of the epoch that the weights are of, on the validation split.")
    logit_bounds: dict[str, float] = Field(
        description="runtime/precision -> greatest allowed difference of a canary's logit."
    )
    num_canaries: int = Field(ge=1)
    created: str = Field(description="UTC time, ISO 8601.")
    versions: dict[str, str] = Field(description="Of the packages that made it.")
    files: dict[str, str] = Field(description="File -> SHA-256 of its content.")

    @field_validator("thresholds")
    @classmethod
    def _check_thresholds(cls, thresholds: dict[str, float], given: ValidationInfo) -> dict[str, float]:
        if thresholds and thresholds.keys() != set(given.data.get("classes", thresholds)):
            raise ValueError("they are of other classes than the model's")
        return thresholds

    @property
    def augment(self) -> Augment:
        """How its training varied images, or would have, had it seen images and not features."""
        return Augment.model_validate({key: self.config[key] for key in Augment.model_fields if key in self.config})


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle. `version` is twelve hex digits of the SHA-256 of ``model.json``, which covers every other file."""

    uri: str
    version: str
    info: BundleInfo
    model: nn.Module
    canary_images: list[bytes]
    canary_pixels: np.ndarray  # uint8 (C, 3, S, S)
    canary_logits: np.ndarray  # float32 (C, K)


def save_bundle(
    uri: str,
    model: nn.Module,
    *,
    arch: str,
    classes: Sequence[str],
    transform: Transform,
    canaries: Sequence[bytes],
    pretrained: str,
    snapshot: str,
    config: dict[str, Any],
    metrics: dict[str, float],
    temperature: float = 1.0,
    thresholds: Mapping[str, float] | None = None,
    atomic: bool = True,
) -> Bundle:
    """Write a bundle, ``model.json`` last, and return it as loaded back. `canaries` are encoded images that can be decoded.

    If the same model (weights, classes, transform, thresholds) is there already, it stays as it is. ValueError, with nothing changed, if
    another one is; or if the model's logits are not finite. `atomic` as in `storage.put_if_absent`.
    """
    pixels = np.stack([transform.for_eval(decode(image, min_side=transform.min_side)).numpy() for image in canaries])
    f32 = Execution(runtime="torch", device="cpu", precision="f32")
    logits, _ = Predictor(
        model.cpu().eval(), transform, f32, batch_size=len(canaries), num_threads=torch.get_num_threads()
    )(pixels)
    if not np.isfinite(logits).all():
        raise ValueError(f"the model gives logits that are not finite: it is not written to {uri}; lower --lr")
    bound = LOGIT_BOUND * max(1.0, float(np.abs(logits).max()))
    metrics = {key: float(value) for key, value in metrics.items()}
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    files = {
        WEIGHTS: safetensors.torch.save(state),
        # Which writes memory as it lies.
        EXPECTED: safetensors.numpy.save({"pixels": np.ascontiguousarray(pixels), "logits": logits}),
        CARD: _model_card(arch, classes, transform, pretrained, snapshot, config, metrics, thresholds or {}).encode(),
    } | {f"canaries/{index}": image for index, image in enumerate(canaries)}
    info = BundleInfo(
        format=1, arch=arch, classes=list(classes), transform=transform, pretrained=pretrained, snapshot=snapshot,
        config=config, temperature=temperature, thresholds=dict(thresholds or {}), metrics=metrics,
        logit_bounds={f"{runtime}/f32": bound for runtime, _ in PRECISIONS}, num_canaries=len(canaries),
        created=datetime.now(UTC).isoformat(timespec="seconds"), versions=versions(),
        files={name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    )  # fmt: skip
    if storage.stat(storage.join(uri, INFO)):
        there = load_bundle(uri)
        if _identity(there.info) != _identity(info):
            raise _taken(uri)
        return there
    for name, data in files.items():
        storage.put(storage.join(uri, name), data)
    if not storage.put_if_absent(storage.join(uri, INFO), info.model_dump_json(indent=2).encode(), atomic=atomic):
        raise _taken(uri)
    return load_bundle(uri)


def load_bundle(uri: str) -> Bundle:
    """Read a bundle and check every file against ``model.json``. ValueError if there is none or it was damaged."""
    uri = storage.resolve(uri)
    info, version = read_info(uri)
    names = [WEIGHTS, EXPECTED, *(f"canaries/{index}" for index in range(info.num_canaries))]
    files = {name: _checked(uri, name, info) for name in names}
    expected = safetensors.numpy.load(files[EXPECTED])
    try:
        model = timm.create_model(info.arch, pretrained=False, num_classes=len(info.classes))
        model.load_state_dict(safetensors.torch.load(files[WEIGHTS]))
    except RuntimeError as error:
        raise ValueError(
            f"the weights of {uri} do not fit timm's {info.arch!r} with {len(info.classes)} classes here: "
            f"{first_line(error)}: install the package versions named in its {INFO}"
        ) from error
    images = [files[f"canaries/{index}"] for index in range(info.num_canaries)]
    return Bundle(uri, version, info, model.eval(), images, expected["pixels"], expected["logits"])


def read_info(uri: str) -> tuple[BundleInfo, str]:
    """What ``model.json`` of a bundle says, and the bundle's version. ValueError if there is none or it is damaged."""
    found = storage.get_if_exists(storage.join(uri, INFO))
    if found is None:
        raise ValueError(
            f"there is no model bundle at {uri}: {INFO} is missing; give the folder that `dragonclf train` names as its model"
        )
    try:
        info = BundleInfo.model_validate_json(found[0])
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{uri}/{INFO} is not valid: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return info, hashlib.sha256(found[0]).hexdigest()[:12]


def copy_bundle(uri: str, to_uri: str) -> str:
    """Copy a bundle and what is proven of it, ``model.json`` last, and return `to_uri`. A copy that is there already stays.

    ValueError, with nothing changed, if another model is there.
    """
    info = storage.get(storage.join(uri, INFO))
    there = storage.get_if_exists(storage.join(to_uri, INFO))
    if there and there[0] != info:
        raise _taken(to_uri)
    for found in list(storage.list_objects(uri)):
        name = found.uri.removeprefix(storage.join(uri, ""))
        if name != INFO:
            storage.put(storage.join(to_uri, name), storage.get(found.uri))
    if not storage.put_if_absent(storage.join(to_uri, INFO), info):
        raise _taken(to_uri)
    return to_uri


def open_predictor(bundle: Bundle, execution: Execution, *, batch_size: int = 32, num_threads: int = 1) -> Predictor:
    """Return a predictor that has just reproduced the bundle's canaries, or raise ValueError saying by how much it missed.

    A low precision also needs its proof: `precision.find`.
    """
    quantized = None
    if execution.precision == "f32":
        bound = bundle.info.logit_bounds.get(execution.key)
        if bound is None:
            raise ValueError(
                f"the bundle at {bundle.uri} does not admit {execution.key}: it admits {', '.join(bundle.info.logit_bounds)}"
            )
    else:
        admission = precision.find(bundle.uri, bundle.version, execution)
        bound = admission.logit_bound
        quantized = precision.open_quantized(bundle.uri, admission) if execution.precision == "int8" else None
    transform = bundle.info.transform
    for index, (image, wanted) in enumerate(zip(bundle.canary_images, bundle.canary_pixels, strict=True)):
        try:
            got = transform.for_eval(decode(image, min_side=transform.min_side)).numpy()
        except ImageError as error:
            raise ValueError(f"canary {index} of {bundle.uri} cannot be decoded here: {error.reason}") from error
        missed = float(np.abs(got.astype(np.float32) - wanted).mean())
        if missed > PIXEL_BOUND:
            raise ValueError(
                f"canary {index} of {bundle.uri} decodes to other pixels here: {missed:.2f} levels apart on average, "
                f"{PIXEL_BOUND} allowed: install the package versions named in its {INFO}"
            )
    predictor = Predictor(
        bundle.model, transform, execution, batch_size=batch_size, num_threads=num_threads, quantized=quantized,
        cache_key=bundle.version,
    )  # fmt: skip
    starts = range(0, bundle.info.num_canaries, batch_size)
    logits = np.concatenate([predictor(bundle.canary_pixels[start : start + batch_size])[0] for start in starts])
    missed = float(np.abs(logits - bundle.canary_logits).max())
    if not missed <= bound:
        raise ValueError(
            f"the canaries of {bundle.uri} come out otherwise with {execution}: a logit is {missed:.2g} off, {bound:.2g} allowed: "
            f"use another --runtime, or the package versions named in its {INFO}"
        )
    return predictor


def _identity(info: BundleInfo) -> tuple[object, ...]:
    return info.arch, info.classes, info.transform, info.thresholds, info.files[WEIGHTS]


def _taken(uri: str) -> ValueError:
    return ValueError(f"there is another model at {uri}: bundles are never changed; choose another name")


def _checked(uri: str, name: str, info: BundleInfo) -> bytes:
    data = storage.get(storage.join(uri, name))
    if hashlib.sha256(data).hexdigest() != info.files.get(name):
        raise ValueError(
            f"{storage.join(uri, name)} was changed since the bundle was written: its SHA-256 is not the one in {INFO}"
        )
    return data


def versions() -> dict[str, str]:
    """Of Python and the packages that a model's results depend on."""
    packages = ("dragonclf", "torch", "torchvision", "timm", "pillow", "numpy")
    return {"python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in packages
    }


def _model_card(
    arch: str, classes: Sequence[str], transform: Transform, pretrained: str, snapshot: str, config: dict[str, Any],
    metrics: dict[str, float], thresholds: Mapping[str, float],
) -> str:  # fmt: skip
    figures = "\n".join(f"| {key} | {value:.4f} |" for key, value in metrics.items())
    return f"""# Image classifier: {" / ".join(classes)}

A {arch} fine-tuned by dragonclf. It takes any image and gives a probability for each of {len(classes)} classes.

- Backbone weights: {pretrained}
- Training data: {snapshot}
- Input: short side to {int(transform.size / transform.crop_pct)} px ({transform.interpolation}), centre {transform.size} x {transform.size}

On its validation split:

| metric | value |
| --- | --- |
{figures}
{_thresholds_of_card(thresholds, config)}
`model.json` holds classes, transform, configuration and checksums; `canaries/` holds images with the logits they must give.
"""


def _thresholds_of_card(thresholds: Mapping[str, float], config: dict[str, Any]) -> str:
    if not thresholds:
        return ""
    goals = [f"{name} of {config[f'min_{name}']:g}" for name in ("precision", "recall") if config.get(f"min_{name}")]
    rows = "\n".join(f"| {name} | {f'{least:.4f}' if least <= 1 else 'never'} |" for name, least in thresholds.items())
    return f"""
A label is accepted from this probability on, chosen on the same images for a {" and ".join(goals) or "use of its own"} of each class where
it is reached:

| class | accepted from |
| --- | --- |
{rows}
"""
