"""Figures of a classifier on labelled images: accuracy with its interval, AUROC, log loss, confusion, each class.

Only figures that need no threshold: the predicted class is the most probable one, everywhere in an evaluation, so that
the report, the galleries and `metrics.json` cannot disagree.
"""

import math

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field
from torchmetrics.functional.classification import multiclass_confusion_matrix

from dragonclf.evaluate import curves

MIN_PROB = float(np.finfo(np.float32).eps)  # keeps the log loss finite, as scikit-learn does for float32 probabilities
Z_95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


class ClassMetrics(BaseModel):
    """One class against all others. A figure whose denominator is 0 is None, not 0."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="The class.")
    precision: float | None = Field(
        description="Share of the images predicted as the class that are; None if none was."
    )
    recall: float | None = Field(
        description="Share of the class's images that were predicted as it; None if it has none."
    )
    f1: float | None = Field(
        description="Harmonic mean of precision and recall; None if the class was neither met nor predicted."
    )
    support: int = Field(description="Images whose true class this is.")


class Metrics(BaseModel):
    """Figures of one evaluation. `model_dump_json` is what `metrics.json` holds."""

    model_config = ConfigDict(frozen=True)

    num_images: int = Field(description="Images counted: decoded, scored and labelled.")
    accuracy: float = Field(description="Share of images whose most probable class is the true one, 0 to 1.")
    accuracy_interval: tuple[float, float] = Field(
        description="95 % Wilson interval of the accuracy, for independent images."
    )
    auroc: float | None = Field(
        description="Two classes: of the second class's probability. More: mean over the classes present, each against "
        "the rest. None if all images are of one class."
    )
    log_loss: float = Field(description="Mean negative natural logarithm of the true class's probability.")
    ece: float = Field(
        description="Expected calibration error: mean distance of the label's probability and the accuracy, over 15 equal bins."
    )
    confusion: list[list[int]] = Field(
        description="Images by true class (rows) and predicted class (columns), in class order."
    )
    per_class: list[ClassMetrics] = Field(description="Each class against all others, in class order.")


def classification_metrics(targets: np.ndarray, *, probs: np.ndarray, classes: list[str]) -> Metrics:
    """Return the figures of predictions against the truth.

    Args:
        targets: True classes, int (N,), indices into `classes`.
        probs: Probabilities, float (N, K), rows summing to 1. Equal ones: the first class is the predicted one.
        classes: Names of the K >= 2 classes.

    Raises:
        ValueError: There is no image, or a probability is not finite.
    """
    if len(targets) == 0:
        raise ValueError("there is no image to measure: evaluate a split that holds labelled, readable images")
    if num_bad := int((~np.isfinite(probs)).any(axis=1).sum()):
        raise ValueError(f"{num_bad} of {len(targets)} images have a probability that is not finite: score them again")
    probs = np.clip(probs.astype(np.float64), 0, 1)
    truth = torch.from_numpy(targets.astype(np.int64))
    confusion = multiclass_confusion_matrix(
        torch.from_numpy(probs.argmax(axis=1)), truth, num_classes=len(classes)
    ).numpy()
    num_correct, num_images = int(confusion.trace()), len(targets)
    prob_of_truth = probs[np.arange(num_images), targets]  # (N,)
    return Metrics(
        num_images=num_images,
        accuracy=num_correct / num_images,
        accuracy_interval=wilson_interval(num_correct, num_trials=num_images),
        auroc=_auroc(targets, probs),
        log_loss=float(-np.log(prob_of_truth.clip(MIN_PROB)).mean()),
        ece=curves.reliability(targets, probs=probs).error,
        confusion=confusion.tolist(),
        per_class=[_class_metrics(confusion, index, name) for index, name in enumerate(classes)],
    )


def wilson_interval(num_successes: int, *, num_trials: int, z: float = Z_95) -> tuple[float, float]:
    """Return the bounds of a proportion, 0 to 1; 95 % by default. Sound for few trials and for shares near 0 or 1.

    Wilson's score interval: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    Journal of the American Statistical Association 22 (1927) 209-212. It takes the trials as independent: images of
    one group are not, and the true interval is then wider.
    """
    share, shrink = num_successes / num_trials, 1 + z**2 / num_trials
    centre = (share + z**2 / (2 * num_trials)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / num_trials + z**2 / (4 * num_trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def counted_rows(frame: pd.DataFrame, *, classes: list[str]) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Return the rows that figures count, their targets and their probabilities.

    Args:
        frame: Scored rows with `status`, `input_label` (the true class, may be null) and `prob_<class>` for each class.
        classes: Names of the K classes.

    Returns:
        The rows with status "ok" and a true class, in their order; targets, int64 (N,); probs, float64 (N, K).
        N may be 0.

    Raises:
        ValueError: An `input_label` is not one of the classes.
    """
    index_of = {name: index for index, name in enumerate(classes)}
    labels = frame["input_label"]
    unknown = [label for label in labels.dropna().unique().tolist() if label not in index_of]
    if unknown:
        names = ", ".join(repr(label) for label in sorted(map(str, unknown))[:5])
        raise ValueError(
            f"input_label {names} ({len(unknown)} in all) is not among the model's classes {classes}: "
            "correct the labels, or evaluate a model trained on these classes"
        )
    rows = frame[(frame["status"] == "ok") & labels.notna()]
    targets = np.array([index_of[label] for label in rows["input_label"].tolist()], dtype=np.int64)
    return rows, targets, probabilities(rows, classes=classes)


def probabilities(rows: pd.DataFrame, *, classes: list[str]) -> np.ndarray:
    """Return the `prob_<class>` columns as float64 (N, K), in class order."""
    return rows[[f"prob_{name}" for name in classes]].to_numpy(dtype=np.float64)


def _auroc(targets: np.ndarray, probs: np.ndarray) -> float | None:
    present = np.unique(targets).tolist()
    if len(present) < 2:
        return None
    positives = [1] if probs.shape[1] == 2 else present
    areas = [curves.ranking(probs[:, index], is_positive=targets == index).auroc for index in positives]
    return min(1.0, float(np.mean(np.array(areas, dtype=float))))


def _class_metrics(confusion: np.ndarray, index: int, name: str) -> ClassMetrics:
    num_right, support, num_predicted = (
        int(count) for count in (confusion[index, index], confusion[index].sum(), confusion[:, index].sum())
    )
    return ClassMetrics(
        name=name,
        precision=num_right / num_predicted if num_predicted else None,
        recall=num_right / support if support else None,
        f1=2 * num_right / (support + num_predicted) if support + num_predicted else None,
        support=support,
    )
