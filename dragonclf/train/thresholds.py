"""Thresholds by class: how probable a label must be to be accepted, for the precision or the recall that was asked for.

They are chosen on the validation images, by their calibrated probabilities, as the predictor will give them. A label is the most probable
class; it is accepted if its probability is not below that class's threshold.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
import torch

from dragonclf.train.recipe import Recipe

# Confidences are counted between these, each 1 % of the way to 1 from the one before it, from 0 to 0.99999: the size of what workers sum
# does not grow with the images. They are float32, as scored probabilities are, so a count tells exactly what a comparison will.
EDGES = torch.from_numpy((1 - 0.99 ** np.arange(1151)).astype(np.float32))
NEVER = 2.0  # above every probability
MAX_NAMED = 10  # classes in a line of the log


class Choice(TypedDict):
    """A class's threshold and what it comes to on the validation images."""

    threshold: float
    reached: float  # precision or recall, as was asked for; the best there is if that is less; NaN: no image tells
    accepted: int  # images whose label is this class and accepted
    labelled: int  # images whose label is this class


def choose(
    logits: torch.Tensor, targets: torch.Tensor, summed: Callable[[torch.Tensor], torch.Tensor], recipe: Recipe
) -> list[Choice]:
    """A choice for each class, in their order, the same on all workers; none if `recipe` asks for nothing.

    `logits` (N, K), calibrated, and classes `targets` (N,) are a worker's own share, perhaps none; `summed` adds a tensor up over all
    workers. For a precision it is the least threshold (of `EDGES`) with which the accepted labels of the class are right that often, on
    these very images, or `NEVER` where there is none. For a recall it is the greatest threshold with which so many of the class's
    images are labelled so and accepted, or 0.
    """
    if recipe.min_precision is None and recipe.min_recall is None:
        return []
    has_images = int(len(targets) > 0)
    width, num_workers = summed(torch.tensor([has_images * logits.shape[1], has_images], device=logits.device)).tolist()
    num_classes = width // num_workers
    confidence, labels = logits.double().softmax(1).float().max(1)
    bins = torch.bucketize(confidence, EDGES.to(logits.device), right=True) - 1
    is_right = (labels == targets).long()
    counts = torch.zeros(2, num_classes, len(EDGES), dtype=torch.int64, device=logits.device)  # wrong and right labels
    counts.index_put_((is_right, labels, bins), torch.ones_like(bins), accumulate=True)
    counts, totals = summed(counts), summed(targets.bincount(minlength=num_classes))
    wrong, right = counts.flip(2).cumsum(2).flip(2).cpu()  # from each edge on
    if recipe.min_precision is not None:
        return [_for_precision(*of_class, recipe.min_precision) for of_class in zip(right, wrong, strict=True)]
    assert recipe.min_recall is not None
    return [_for_recall(*of_class, recipe.min_recall) for of_class in zip(right, wrong, totals.tolist(), strict=True)]


def coverage(choices: Sequence[Choice]) -> float:
    """Share of the validation images whose label is accepted."""
    return sum(choice["accepted"] for choice in choices) / sum(choice["labelled"] for choice in choices)


def short_of(choices: Sequence[Choice], classes: Sequence[str], recipe: Recipe) -> str | None:
    """What is said where the precision or recall that was asked for is not reached, and what is. None where it is."""
    goal = recipe.min_precision or recipe.min_recall
    assert goal is not None
    short = [
        f"{name} ({'no validation image tells' if math.isnan(choice['reached']) else format(choice['reached'], '.4f')})"
        for name, choice in zip(classes, choices, strict=True)
        if not choice["reached"] >= goal
    ]
    if not short:
        return None
    what, then = ("precision", "never accepted") if recipe.min_precision else ("recall", "always accepted")
    more = f" and {len(short) - MAX_NAMED:,} more" if len(short) > MAX_NAMED else ""
    return f"no threshold reaches a {what} of {goal:g} for {', '.join(short[:MAX_NAMED])}{more}: such a label is {then}"


def _for_precision(right: torch.Tensor, wrong: torch.Tensor, goal: float) -> Choice:
    accepted = right + wrong
    precision = right.double() / accepted  # NaN where nothing is accepted
    enough = (precision >= goal).nonzero()
    if len(enough):
        first = int(enough[0])
        return _choice(float(EDGES[first]), float(precision[first]), accepted, first)
    best = precision[accepted > 0].max() if accepted[0] else math.nan
    return Choice(threshold=NEVER, reached=float(best), accepted=0, labelled=int(accepted[0]))


def _for_recall(right: torch.Tensor, wrong: torch.Tensor, total: int, goal: float) -> Choice:
    recall = right.double() / total if total else torch.full(right.shape, math.nan)
    enough = (recall >= goal).nonzero()
    last = int(enough[-1]) if len(enough) else 0
    return _choice(float(EDGES[last]), float(recall[last]), right + wrong, last)


def _choice(threshold: float, reached: float, accepted: torch.Tensor, edge: int) -> Choice:
    return Choice(threshold=threshold, reached=reached, accepted=int(accepted[edge]), labelled=int(accepted[0]))
