"""One class against the rest, as the page shows it: curves, the probabilities by true class, and a threshold to move.

For two classes it is the second one. For more, those with the most mistakes, one at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dragonclf.evaluate.charts import Chart, histogram_chart, precision_recall_chart, roc_chart
from dragonclf.evaluate.curves import Outcome, Ranking, outcome, ranking
from dragonclf.evaluate.galleries import MAX_GALLERY_CLASSES

NEVER = 1.001  # a threshold that no probability reaches, a thousandth above 1


@dataclass(frozen=True)
class OneClass:
    """A class against all others."""

    index: int
    name: str
    ranked: Ranking  # of all counted images
    threshold: float  # at which the page starts
    charts: list[Chart]

    @property
    def outcome(self) -> Outcome:
        """What comes of the threshold at which the page starts."""
        return outcome(self.ranked, threshold=self.threshold)


def one_class_each(
    targets: np.ndarray, *, probs: np.ndarray, classes: list[str], thresholds: Mapping[str, float]
) -> list[OneClass]:
    """The classes to look at, that with the most mistakes first, 12 at most.

    Args:
        targets: True classes, int (N,).
        probs: Probabilities, float (N, K).
        classes: Names of the K classes.
        thresholds: The model's own, by class, or none. Under 1/2 the label of two classes depends on them no more than on 1/2.
    """
    chosen = [1]
    if len(classes) > 2:
        num_wrong = np.bincount(targets[probs.argmax(axis=1) != targets], minlength=len(classes))
        chosen = np.argsort(-num_wrong, kind="stable")[:MAX_GALLERY_CLASSES].tolist()
    found = []
    for index in chosen:
        name, others = classes[index], classes[0] if len(classes) == 2 else "all others"
        ranked = ranking(probs[:, index], is_positive=targets == index)
        threshold = min(NEVER, max(0.5, thresholds.get(name, 0.5)))
        if len(classes) > 2:
            threshold = round(threshold, 3)
        found.append(
            OneClass(index, name, ranked, threshold, [
                roc_chart(ranked, name=name, slug=f"roc-{index}"),
                precision_recall_chart(ranked, name=name, slug=f"pr-{index}"),
                histogram_chart(ranked, name=name, others=others, slug=f"histogram-{index}"),
            ])
        )  # fmt: skip
    return found
