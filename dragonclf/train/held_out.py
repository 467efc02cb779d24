"""Probabilities of images by heads that were not trained on them: cross-validation on the features of a frozen backbone.

What else the labels of training images could be judged by has seen them. A head here is the best one there is (regularised softmax
regression, by L-BFGS), so it has no learning rate or number of epochs to choose; its weight decay is the one that predicts best.
"""

import hashlib
from collections import defaultdict

import numpy as np
import torch
from torch.nn import functional as F

from dragonclf.train.head import Head

NUM_FOLDS = 5
WEIGHT_DECAYS = (1.0, 0.1, 0.01, 0.001)  # of standardised features and the mean loss
MAX_ITERATIONS = 50


def held_out_probs(
    features: torch.Tensor, labels: torch.Tensor, groups: list[str], others: torch.Tensor, *, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities float32 (N, K) of training images, each by the head of all folds but its own, and (M, K) of `others` by a head of all.

    `features` float32 (N, F), `labels` int64 (N,), `groups` N names: images of one group are held out together. Rows of a class that has
    one group only are NaN. `others`, float32 (M, F), decide nothing. Equal inputs give equal results.
    """
    fold = torch.from_numpy(folds(labels.tolist(), groups))
    judged = fold >= 0
    numbers = [number for number in fold.unique().tolist() if number >= 0]
    found: dict[float, tuple[float, torch.Tensor]] = {}  # by weight decay: the log loss, the probabilities
    for weight_decay in WEIGHT_DECAYS:
        probs = torch.full((len(labels), num_classes), torch.nan)
        for number in numbers:
            own = fold == number
            probs[own] = _probs(_fit(features[~own], labels[~own], num_classes, weight_decay), features[own])
        loss = F.nll_loss(probs[judged].clamp_min(1e-7).log(), labels[judged], reduction="sum")
        found[weight_decay] = float(loss), probs
    best = min(found, key=lambda weight_decay: found[weight_decay][0])
    return found[best][1].numpy(), _probs(_fit(features, labels, num_classes, best), others).numpy()


def folds(labels: list[int], groups: list[str], *, seed: int = 0) -> np.ndarray:
    """The fold of each image, int (N,), 0 to 4: that of its group, dealt within the class of the group's first image by a hash.

    -1, in no fold, where a class has one group: without it the class cannot be learned.
    """
    of_class: dict[int, dict[str, None]] = defaultdict(dict)
    first: dict[str, int] = {}
    for label, group in zip(labels, groups, strict=True):
        of_class[first.setdefault(group, label)][group] = None
    dealt: dict[str, int] = {}
    for _, found in sorted(of_class.items()):
        ordered = sorted(found, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
        start = len(dealt)
        dealt |= {group: (start + i) % NUM_FOLDS if len(ordered) > 1 else -1 for i, group in enumerate(ordered)}
    return np.array([dealt[group] for group in groups], np.int64)


def _fit(features: torch.Tensor, labels: torch.Tensor, num_classes: int, weight_decay: float) -> Head:
    head = Head(features, num_classes)
    inputs = (features - head.mean) / head.std
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        value = F.cross_entropy(head.linear(inputs), labels) + weight_decay / 2 * head.linear.weight.square().sum()
        value.backward()
        return float(value.detach())

    optimizer.step(loss)
    return head


def _probs(head: Head, features: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return head(features).softmax(1)
