"""How a model is run: runtime, device, precision; and the class of processor, on which it depends what a low precision comes to."""

import importlib.util
import platform
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

# What each runtime can do, f32 first.
PRECISIONS = {
    ("torch", "cpu"): ("f32", "bf16"),
    ("torch", "cuda"): ("f32", "fp16", "bf16"),
    ("inductor", "cpu"): ("f32", "bf16"),
    ("inductor", "cuda"): ("f32", "fp16", "bf16"),
    ("openvino", "cpu"): ("f32", "bf16", "int8"),
}
# Instructions by which runtimes choose the kernels of a low precision.
_INSTRUCTIONS = {
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16", "amx_fp16",
    "asimddp", "i8mm", "bf16", "sve", "sve2",
}  # fmt: skip


class Execution(BaseModel):
    """How a model is run: part of what a scored row depends on, so it is resolved once and recorded."""

    model_config = ConfigDict(frozen=True)

    runtime: Literal["torch", "inductor", "openvino"]
    device: Literal["cpu", "cuda"]
    precision: Literal["f32", "bf16", "fp16", "int8"]

    @property
    def key(self) -> str:
        return f"{self.runtime}/{self.precision}"

    def __str__(self) -> str:
        return f"{self.runtime} on {self.device} in {self.precision}"


def resolve_execution(runtime: str, device: str, precision: str, *, has_gpu: bool) -> Execution:
    """Choose once what ``auto`` means: torch on a GPU, else OpenVINO if it is installed, else torch.

    `has_gpu` says whether the machines that will run the model have one. ValueError for a choice that cannot be honoured.
    """
    device = ("cuda" if has_gpu and runtime != "openvino" else "cpu") if device == "auto" else device
    if device == "cuda" and not has_gpu:
        raise ValueError("device 'cuda' was asked for and there is no GPU here: use --device cpu or a node with a GPU")
    has_openvino = importlib.util.find_spec("openvino") is not None
    if runtime == "auto":
        runtime = "openvino" if device == "cpu" and has_openvino else "torch"
    if runtime == "openvino" and device == "cuda":
        raise ValueError("runtime 'openvino' runs on the CPU: use --device cpu, or --runtime torch")
    if runtime == "openvino" and not has_openvino:
        raise ValueError("runtime 'openvino' is not installed: pip install 'dragonclf[cpu]', or use --runtime torch")
    known = PRECISIONS[runtime, device]
    if precision not in known:
        raise ValueError(f"{runtime} on {device} has no precision {precision!r}: it has {', '.join(known)}")
    return Execution.model_validate({"runtime": runtime, "device": device, "precision": precision})


def processor(device: str) -> str:
    """The class of this machine's processor, as far as results in low precision depend on it: ``x86_64 avx2``, ``cuda sm_90``."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"cuda sm_{major}{minor}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    words = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    return " ".join([platform.machine(), *sorted(_INSTRUCTIONS & set(words))])
