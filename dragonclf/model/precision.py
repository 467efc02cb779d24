"""Low precision by proof: a bundle admits bf16, fp16 or int8 only where a comparison with f32, on real images, is kept beside it.

MODEL/precisions/RUNTIME-PRECISION/PROCESSOR/proof.json         the figures, for one class of processor; written last
                                             model.xml, .bin    int8 only: the quantized body, in OpenVINO's format
"""

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from dragonclf import storage
from dragonclf.model import quantize
from dragonclf.model.execution import PRECISIONS, Execution, processor

if TYPE_CHECKING:
    import openvino

FOLDER, PROOF = "precisions", "proof.json"
MIN_AGREEMENT = 0.99  # of labels with f32's
MAX_ACCURACY_DROP = 0.005
MIN_IMAGES = 100  # fewer prove nothing


class Comparison(BaseModel):
    """A low precision beside f32, on the same images."""

    num_images: int
    agreement: float = Field(description="Share of images that keep their label.")
    accuracy_f32: float
    accuracy: float = Field(description="In the low precision.")
    logit_bound: float = Field(description="Twice the greatest difference of a logit: what a canary may miss by.")
    speedup: float = Field(description="Of the model's own time, in the same process, turn about.")

    @property
    def passes(self) -> bool:
        drop = round(self.accuracy_f32 - self.accuracy, 9)  # 1 - 0.995 is a little more than 0.005
        return self.agreement >= MIN_AGREEMENT and drop <= MAX_ACCURACY_DROP

    def __str__(self) -> str:
        return (
            f"{self.agreement:.2%} of {self.num_images:,} validation images keep their label ({MIN_AGREEMENT:.0%} needed), accuracy "
            f"{self.accuracy_f32:.2%} in f32 and {self.accuracy:.2%} ({100 * MAX_ACCURACY_DROP:g} points less allowed), "
            f"{self.speedup:.2f} times f32's speed"
        )


class Admission(Comparison):
    """``proof.json``: the proof that a bundle may be run in a low precision on a class of processors."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    model_version: str
    execution: Execution
    processor: str
    snapshot: str = Field(description="URI of the data set whose validation images were compared.")
    files: dict[str, str] = Field(description="int8: file of the quantized body -> SHA-256 of its content.")
    created: str = Field(description="UTC time, ISO 8601.")
    versions: dict[str, str] = Field(description="Of the packages that made it.")


@dataclass
class Tally:
    """Compares logits batch by batch, in constant memory."""

    num_images: int = 0
    same: int = 0
    right: list[int] = field(default_factory=lambda: [0, 0])  # f32, low
    difference: float = 0.0
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def add(self, f32: np.ndarray, low: np.ndarray, targets: np.ndarray, seconds: tuple[float, float]) -> None:
        """Note logits (N, K) of the same images, their true classes (N,), and what each took to compute."""
        labels = f32.argmax(axis=1), low.argmax(axis=1)
        self.num_images += len(targets)
        self.same += int((labels[0] == labels[1]).sum())
        for index in range(2):
            self.right[index] += int((labels[index] == targets).sum())
            self.seconds[index] += seconds[index]
        self.note_difference(f32, low)

    def note_difference(self, f32: np.ndarray, low: np.ndarray) -> None:
        self.difference = max(self.difference, float(np.abs(f32 - low).max()))

    def comparison(self) -> Comparison:
        return Comparison(
            num_images=self.num_images, agreement=self.same / self.num_images, accuracy_f32=self.right[0] / self.num_images,
            accuracy=self.right[1] / self.num_images, logit_bound=2 * self.difference, speedup=self.seconds[0] / self.seconds[1],
        )  # fmt: skip


def choose(uri: str, version: str, f32: Execution, precision: str) -> Execution:
    """The execution that ``--precision`` means: ``auto`` is the fastest that the bundle admits on this class of processor.

    ValueError for a precision that it does not admit here.
    """
    if precision != "auto":
        chosen = f32.model_copy(update={"precision": precision})
        if precision != "f32":
            find(uri, version, chosen)
        return chosen
    admitted = [
        _read(uri, version, f32.model_copy(update={"precision": low}))
        for low in PRECISIONS[f32.runtime, f32.device][1:]
    ]
    best = max(filter(None, admitted), key=lambda admission: admission.speedup, default=None)
    return best.execution if best and best.speedup > 1 else f32


def find(uri: str, version: str, execution: Execution) -> Admission:
    """The proof for an execution on this machine's class of processor. ValueError if there is none."""
    found = _read(uri, version, execution)
    if found is None:
        raise ValueError(
            f"the bundle at {uri} does not admit {execution.precision} by {execution.runtime} on this processor "
            f"({processor(execution.device)}): prove it with `dragonclf export {uri} DATA --precision {execution.precision} "
            f"--runtime {execution.runtime} --device {execution.device}` on such a machine, or use --precision f32"
        )
    return found


def write(uri: str, admission: Admission, files: dict[str, bytes]) -> str:
    """Keep a proof beside its bundle, and the quantized body; the proof last. Returns its URI."""
    folder = _folder(uri, admission.execution)
    for name, data in files.items():
        storage.put(storage.join(folder, name), data)
    proof = _proof(uri, admission.execution)
    storage.put(proof, admission.model_dump_json(indent=2).encode())
    return proof


def open_quantized(uri: str, admission: Admission) -> "openvino.Model":
    """The quantized body that was proven. ValueError if it was changed since."""
    files = {name: storage.get(storage.join(_folder(uri, admission.execution), name)) for name in quantize.FILES}
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != admission.files.get(name):
            raise ValueError(
                f"{storage.join(_folder(uri, admission.execution), name)} was changed since it was proven: its SHA-256 is not the one in "
                f"{PROOF}; prove it again with `dragonclf export`"
            )
    return quantize.load(files)


def _read(uri: str, version: str, execution: Execution) -> Admission | None:
    found = storage.get_if_exists(_proof(uri, execution))
    if found is None:
        return None
    admission = Admission.model_validate_json(found[0])
    return admission if (admission.model_version, admission.execution) == (version, execution) else None


def _folder(uri: str, execution: Execution) -> str:
    return storage.join(
        uri, FOLDER, f"{execution.runtime}-{execution.precision}", processor(execution.device).replace(" ", "-")
    )


def _proof(uri: str, execution: Execution) -> str:
    return storage.join(_folder(uri, execution), PROOF)
