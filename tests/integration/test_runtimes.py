"""torch and OpenVINO in f32 are one model: on every elpv photograph, under the steep head that precompute gives."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from dragonclf.data import images
from dragonclf.model import bundle, canaries, zoo
from dragonclf.model.execution import Execution
from dragonclf.model.predictor import Predictor, softmax
from dragonclf.train.head import Head, folded
from tests.integration.conftest import ARCH, WEIGHTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EVERY = int(os.environ.get("DRAGONCLF_EVERY", "4"))  # of the 2,624 photographs
NUM_THREADS = 2
OPENVINO, TORCH = (
    Execution.model_validate({"runtime": r, "device": "cpu", "precision": "f32"}) for r in ("openvino", "torch")
)


def run(predictor: Predictor, pixels: np.ndarray, output: int) -> np.ndarray:
    size = predictor.batch_size
    return np.concatenate([predictor(pixels[start : start + size])[output] for start in range(0, len(pixels), size)])


def test_openvino_equals_torch_on_elpv(elpv_files: list[tuple[Path, int]], tmp_path: Path):
    model = zoo.load_pretrained(ARCH, WEIGHTS)
    transform = zoo.transform_for(model)
    elpv_files = elpv_files[::EVERY]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        read = pool.map(lambda item: transform.for_eval(images.decode(item[0].read_bytes())).numpy(), elpv_files)
        pixels = np.stack(list(read))
    targets = torch.tensor([target for _, target in elpv_files])
    features = torch.from_numpy(run(Predictor(model, transform, OPENVINO, num_threads=NUM_THREADS), pixels, 1))

    head = Head(features, 2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(features), targets).backward()
        optimizer.step()
    weight, bias = folded(head.state_dict())
    zoo.classifier(zoo.with_new_head(model, 2)).load_state_dict({"weight": weight, "bias": bias})
    saved = bundle.save_bundle(
        str(tmp_path / "model"), model, arch=ARCH, classes=["defective", "functional"], transform=transform,
        canaries=canaries.synthetic(), pretrained=WEIGHTS, snapshot="elpv", config={}, metrics={},
    )  # fmt: skip

    probs = {
        execution.runtime: softmax(run(bundle.open_predictor(saved, execution, num_threads=NUM_THREADS), pixels, 0))
        for execution in (OPENVINO, TORCH)
    }
    assert len(probs["torch"]) == 2624 // EVERY
    assert (probs["torch"].argmax(axis=1) == targets.numpy()).mean() > 0.9  # steep: it fits what it was trained on
    agreement = (probs["openvino"].argmax(axis=1) == probs["torch"].argmax(axis=1)).mean()
    difference = np.abs(probs["openvino"] - probs["torch"]).max()
    print(f"label agreement {agreement:.5f}, greatest difference of a probability {difference:.2e}")
    assert agreement >= 0.999
    assert difference <= 1e-3
