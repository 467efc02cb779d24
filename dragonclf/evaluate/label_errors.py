"""Suspected label errors by confident learning (Northcutt, Jiang, Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels",
JAIR 2021, https://arxiv.org/abs/1911.00068).

A class is confidently an image's if its probability is at least the mean one among the images with that label: a class that the model is
rarely sure of needs less. Images whose confident class is not their label are suspected: the off-diagonal of the paper's confident joint.
The suspects are cleanlab's with filter_by="confident_learning" (2.9.0, compared by hand). The library itself is not used: a module that it
ships is under the AGPL by its header.
"""

from typing import NamedTuple

import numpy as np

EPSILON = 1e-6  # probabilities that are as near to a threshold reach it


class Suspects(NamedTuple):
    """Of N images."""

    order: np.ndarray  # int (N,): indices, the most suspicious first, all suspects before the others
    is_suspect: np.ndarray  # bool (N,)
    suggested: np.ndarray  # int (N,): the confident class, or the most probable one where there is none
    margin: np.ndarray  # float (N,): the label's probability less the largest other, -1 to 1; the lower the worse


def suspects(probs: np.ndarray, labels: np.ndarray) -> Suspects:
    """Rank the labels of images by how little their probabilities bear them out.

    `probs` float (N, K) must be held out: of a model that was not trained on the image. `labels` int (N,) are the given classes.
    """
    probs, rows = probs.astype(np.float64), np.arange(len(labels))
    given = probs[rows, labels]
    counts = np.bincount(labels, minlength=probs.shape[1])
    sums = np.bincount(labels, weights=given, minlength=probs.shape[1])
    thresholds = np.divide(sums, counts, out=np.full(len(counts), np.inf), where=counts > 0)
    confident = np.where(probs >= thresholds - EPSILON, probs, -1.0)
    found, likeliest = confident.argmax(axis=1), probs.argmax(axis=1)
    is_confident = confident.max(axis=1, initial=-1.0) >= 0
    others = probs.copy()
    others[rows, labels] = -np.inf
    margin = given - others.max(axis=1, initial=-np.inf)
    is_suspect = is_confident & (found != labels) & (likeliest != labels)
    return Suspects(
        order=np.lexsort((margin, ~is_suspect)),
        is_suspect=is_suspect,
        suggested=np.where(is_confident, found, likeliest),
        margin=margin,
    )
