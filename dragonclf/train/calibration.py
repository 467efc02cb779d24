"""Temperature scaling: one number that makes a classifier as sure as it is right, fitted on validation images.

C. Guo et al., "On calibration of modern neural networks", https://arxiv.org/abs/1706.04599. Labels stay as they are.
"""

import math
from collections.abc import Callable

import torch

MIN_IMAGES = 50  # fewer say too little: the temperature is then 1
MAX_IMAGES = 20_000  # of more, every second, third, ... is kept: they come class by class
HOTTEST = 4.0  # and 1/4 the coldest: images that are all right would ask for 0
NUM_HALVINGS = 40
NUM_BINS = 15


def calibrate(
    logits: torch.Tensor, targets: torch.Tensor, summed: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, float]:
    """Return ``temperature``, and the expected calibration error before (``valid_ece``) and after dividing by it.

    `logits` (N, K) and classes `targets` (N,) are a worker's own share, perhaps none; `summed` adds a tensor up over all workers. The
    temperature has the least cross-entropy on these very images; it lies between 1/4 and 4.
    """
    logits = logits.double()
    before = _error(logits, targets, summed)
    temperature = 1.0
    if int(summed(torch.tensor(len(targets), device=logits.device))) >= MIN_IMAGES:
        temperature = _temperature(logits, targets, summed)
    after = _error(logits / temperature, targets, summed)
    return {"temperature": temperature, "valid_ece": before, "valid_ece_calibrated": after}


def _temperature(logits: torch.Tensor, targets: torch.Tensor, summed: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Halve the interval in which the cross-entropy, convex in the inverse temperature, stops falling."""
    of_truth = logits.gather(1, targets[:, None]).sum()
    low, high = -math.log(HOTTEST), math.log(HOTTEST)  # of the inverse temperature
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        slope = ((math.exp(middle) * logits).softmax(1) * logits).sum() - of_truth
        if float(summed(slope)) > 0:
            high = middle
        else:
            low = middle
    return math.exp(-(low + high) / 2)


def _error(logits: torch.Tensor, targets: torch.Tensor, summed: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Mean distance of confidence and accuracy of the label, over 15 equal bins of confidence weighed by their images."""
    confidence, labels = logits.softmax(1).max(1)
    bins = (confidence * NUM_BINS).long().clamp_max(NUM_BINS - 1)
    sums = torch.zeros(3, NUM_BINS, dtype=torch.float64, device=logits.device)
    for row, values in zip(sums, (confidence, (labels == targets).double(), torch.ones_like(confidence)), strict=True):
        row.index_add_(0, bins, values)
    sure, right, count = summed(sums)
    return float((sure - right).abs().sum() / count.sum())
