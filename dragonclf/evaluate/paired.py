"""Two models on the same images: what each has right that the other has wrong, and how sure that makes their difference.

Images that both have right, or both wrong, say nothing about which is better; so a difference is surer than its two accuracies are.
"""

import math

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from dragonclf.evaluate.metrics import Z_95
from dragonclf.evaluate.slices import MAX_COLUMNS, NOT_SLICED, SMALL, groups, is_scalar


class Difference(BaseModel):
    """How much better a run is than the reference, on images that both have predicted."""

    model_config = ConfigDict(frozen=True)

    run: str = Field(description="Name of the run that is compared with the reference.")
    column: str | None = Field(default=None, description="Of a slice: the column of the manifest. None: all images.")
    value: str | None = Field(default=None, description="Of a slice: the value that its images have.")
    num_images: int
    num_gained: int = Field(description="Images that the run has right and the reference wrong.")
    num_lost: int = Field(description="Images that the reference has right and the run wrong.")
    difference: float = Field(description="Accuracy of the run less that of the reference, -1 to 1.")
    interval: tuple[float, float] = Field(description="95 % interval of the difference, by Agresti and Min.")
    p_value: float = Field(description="McNemar's exact test, two-sided: of a split as uneven, were both as good.")
    is_small: bool = Field(description="Whether there are fewer than 30 images.")


def paired_difference(
    reference: np.ndarray, candidate: np.ndarray, *, run: str, column: str | None = None, value: str | None = None
) -> Difference:
    """Return the difference of two models on the same N >= 1 images; `reference` and `candidate`, bool (N,), tell which each has right."""
    num_images, num_gained, num_lost = len(reference), int((candidate & ~reference).sum()), int((reference & ~candidate).sum())  # fmt: skip
    return Difference(
        run=run, column=column, value=value, num_images=num_images, num_gained=num_gained, num_lost=num_lost,
        difference=(num_gained - num_lost) / num_images, interval=agresti_min_interval(num_gained, num_lost, num_images=num_images),
        p_value=mcnemar_p_value(num_gained, num_lost), is_small=num_images < SMALL,
    )  # fmt: skip


def agresti_min_interval(num_gained: int, num_lost: int, *, num_images: int, z: float = Z_95) -> tuple[float, float]:
    """Return the bounds of the difference of two paired proportions, -1 to 1; 95 % by default.

    Wald's interval for (gained - lost) / n with half an image added to each of the four cells of the paired table: A. Agresti and Y. Min,
    "Simple improved confidence intervals for comparing matched proportions", Statistics in Medicine 24 (2005) 729-740. It holds its
    coverage for few images and few discordant ones. It takes images as independent: those of one group are not.
    """
    gained, lost, total = num_gained + 0.5, num_lost + 0.5, num_images + 2
    centre = (gained - lost) / total
    half = z * math.sqrt(gained + lost - (gained - lost) ** 2 / total) / total
    return max(-1.0, centre - half), min(1.0, centre + half)


def mcnemar_p_value(num_gained: int, num_lost: int) -> float:
    """Return the two-sided p-value of McNemar's exact test: twice the smaller binomial tail of the discordant images, at most 1."""
    total = num_gained + num_lost
    tail = sum(
        math.exp(math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2))
        for k in range(min(num_gained, num_lost) + 1)
    )
    return min(1.0, 2 * tail)


def slice_differences(
    rows: pd.DataFrame, *, reference: np.ndarray, candidate: np.ndarray, run: str
) -> list[Difference]:
    """Return the difference in each slice by the own columns of the N `rows` (40 columns at most), by column, in each the worst first.

    What has one value for all images, or another for each, is left out.
    """
    own = [name for name in rows.columns if name not in NOT_SLICED and not str(name).startswith("prob_")]
    found: list[Difference] = []
    for name in [name for name in own if is_scalar(rows[name])][:MAX_COLUMNS]:
        parts = groups(rows[name])
        if len(parts) > 1:
            made = [
                paired_difference(reference[members], candidate[members], run=run, column=str(name), value=value)
                for value, members in parts
            ]
            found += sorted(made, key=lambda one: (one.difference, -one.num_images, one.value))
    return found
