"""The numbers behind the charts: one class against the rest at every threshold, and probabilities against how often they hold."""

from dataclasses import dataclass

import numpy as np

NUM_BINS = 15  # of the calibration error, C. Guo et al., https://arxiv.org/abs/1706.04599
GRID = 1000  # steps from 0 to 1 of a ranking on a grid
LEAST_PROB = 1e-12  # stands for 0 where a logarithm is taken back


@dataclass(frozen=True)
class Ranking:
    """How many images of one class, and of all others, have each probability of the class."""

    at: np.ndarray  # float64 (U,), ascending, distinct
    positives: np.ndarray  # int64 (U,), of the class
    negatives: np.ndarray  # int64 (U,), of the others

    @property
    def auroc(self) -> float | None:
        """Area under the ROC curve. None where there is no image of the class, or none of the others."""
        if not (self.positives.any() and self.negatives.any()):
            return None
        false_rate, true_rate = self.roc()
        return float(np.trapezoid(true_rate, false_rate))

    @property
    def average_precision(self) -> float | None:
        """Sum of the precisions, each weighed by what its threshold adds to the recall. None without an image of the class."""
        if not self.positives.any():
            return None
        recall, precision = self.precision_recall()
        return float((np.diff(recall, prepend=0) * precision).sum())

    def roc(self) -> tuple[np.ndarray, np.ndarray]:
        """False and true positive rates, (U + 1,), from the threshold that nothing reaches to the one that all do."""
        taken = [np.append(0, counts[::-1].cumsum()) for counts in (self.negatives, self.positives)]
        return taken[0] / max(1, taken[0][-1]), taken[1] / max(1, taken[1][-1])

    def precision_recall(self) -> tuple[np.ndarray, np.ndarray]:
        """Recall and precision, (U,), from the highest probability to the lowest."""
        right, wrong = self.positives[::-1].cumsum(), self.negatives[::-1].cumsum()
        return right / max(1, right[-1]), right / (right + wrong)

    def on_grid(self) -> "Ranking":
        """The same images with their probabilities cut to thousandths: what is counted from a thousandth on stays exact."""
        at = np.arange(GRID + 1) / GRID
        bins = np.searchsorted(at, self.at, side="right") - 1
        sums = (np.bincount(bins, weights=counts, minlength=GRID + 1) for counts in (self.positives, self.negatives))
        return Ranking(at, *(total.astype(np.int64) for total in sums))


@dataclass(frozen=True)
class Outcome:
    """What a threshold comes to. A figure whose denominator is 0 is None, not 0."""

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int

    @property
    def precision(self) -> float | None:
        return _share(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float | None:
        return _share(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> float | None:
        return _share(2 * self.true_positives, 2 * self.true_positives + self.false_positives + self.false_negatives)


@dataclass(frozen=True)
class Reliability:
    """The most probable class of each image: how probable it was thought, and how often it was right, by bins of its probability."""

    num_images: np.ndarray  # int64 (B,)
    confidence: np.ndarray  # float64 (B,), mean, NaN where the bin is empty
    accuracy: np.ndarray  # float64 (B,), NaN where the bin is empty

    @property
    def error(self) -> float:
        """Expected calibration error: the mean distance of confidence and accuracy, bins weighed by their images."""
        distance = np.nan_to_num(np.abs(self.confidence - self.accuracy))
        return float((distance * self.num_images).sum() / self.num_images.sum())


def ranking(scores: np.ndarray, *, is_positive: np.ndarray) -> Ranking:
    """Rank images by `scores`, float (N,); `is_positive`, bool (N,), are those of the class."""
    at, place = np.unique(scores, return_inverse=True)
    positives = np.bincount(place[is_positive], minlength=len(at))
    return Ranking(at, positives, np.bincount(place, minlength=len(at)) - positives)


def outcome(ranked: Ranking, *, threshold: float) -> Outcome:
    """What comes of taking for the class what has a probability of `threshold` or more."""
    first = np.searchsorted(ranked.at, threshold, side="left")
    (missed, true_positives), (true_negatives, false_positives) = (
        (int(counts[:first].sum()), int(counts[first:].sum())) for counts in (ranked.positives, ranked.negatives)
    )
    return Outcome(true_positives, false_positives, missed, true_negatives)


def reliability(targets: np.ndarray, *, probs: np.ndarray) -> Reliability:
    """Bin images by the probability of their most probable class: 15 equal bins, each with its lower edge; the last one with 1, too.

    `targets` are true classes, int (N,), and `probs` float (N, K); N >= 1.
    """
    confidence, is_right = probs.max(axis=1), probs.argmax(axis=1) == targets
    bins = (np.searchsorted(np.linspace(0, 1, NUM_BINS + 1), confidence, side="right") - 1).clip(0, NUM_BINS - 1)
    counts, sure, right = (
        np.bincount(bins, weights=weights, minlength=NUM_BINS) for weights in (None, confidence, is_right)
    )
    with np.errstate(invalid="ignore"):
        return Reliability(counts, sure / counts, right / counts)


def uncalibrated(probs: np.ndarray, *, temperature: float) -> np.ndarray:
    """Return the probabilities, float (N, K), that the logits gave before they were divided by `temperature`."""
    raw = probs.clip(LEAST_PROB) ** temperature
    return raw / raw.sum(axis=1, keepdims=True)


def thinned(x: np.ndarray, y: np.ndarray, *, columns: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """The points of a line that a chart of that many columns can show: in each the first, the lowest, the highest and the last."""
    if len(x) <= 2 * columns:
        return x, y
    column = ((x - x.min()) / np.ptp(x) * columns).astype(int) if np.ptp(x) else np.zeros(len(x), int)
    starts = np.flatnonzero(np.diff(column, prepend=-1))
    keep = set()
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(x)], strict=True):
        part = y[start:end]
        keep |= {start, start + int(part.argmin()), start + int(part.argmax()), end - 1}
    kept = sorted(keep)
    return x[kept], y[kept]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
