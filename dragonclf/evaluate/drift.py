"""How far two distributions over the same bins are apart."""

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

MODERATE, LARGE = 0.1, 0.25
PSEUDO_COUNT = 0.5  # images more in each bin, so that an empty one is far away and not infinitely far


class Drift(BaseModel):
    """How far what was scored is from what the model was made from: the population stability index over classes or bins."""

    model_config = ConfigDict(frozen=True)

    what: str = Field(description="What is counted: predicted classes, or confidences in 20 bins.")
    reference: str = Field(description="With which images it is compared.")
    num_reference: int = Field(description="Of these images.")
    psi: float = Field(description="Population stability index, 0 or more.")
    by_chance: float = Field(description="What chance alone makes of it, on average, where nothing has changed.")
    reading: str = Field(description="small under 0.1, moderate under 0.25, else large.")


def population_stability(counts: np.ndarray, reference: np.ndarray, *, what: str, name: str) -> Drift:
    """Return the drift from `reference` to `counts`, images in the same B >= 2 bins, int (B,) each, neither empty.

    PSI = sum of (p - q) ln(p / q) over the bins, with its usual reading: N. Siddiqi, "Credit Risk Scorecards", Wiley 2006. Chosen before
    the Jensen-Shannon distance as people know how to read it. Where nothing has changed it is (1/n + 1/m) times a chi-squared variable
    with B - 1 degrees of freedom: B. Yurdakul, "Statistical Properties of Population Stability Index", Western Michigan University 2018.
    """
    p, q = ((one + PSEUDO_COUNT) / (one.sum() + PSEUDO_COUNT * len(one)) for one in (counts, reference))
    psi = float(((p - q) * np.log(p / q)).sum())
    by_chance = (len(counts) - 1) * (1 / int(counts.sum()) + 1 / int(reference.sum()))
    reading = "small" if psi < MODERATE else "moderate" if psi < LARGE else "large"
    return Drift(
        what=what, reference=name, num_reference=int(reference.sum()), psi=psi, by_chance=by_chance, reading=reading
    )


def confidence_bins(confidences: np.ndarray, num_bins: int) -> np.ndarray:
    """Return how many of the finite `confidences`, float (N,), 0 to 1, lie in each of as many equal bins, int64 (B,)."""
    finite = confidences[np.isfinite(confidences)].astype(np.float64)
    bins = np.minimum(np.floor(finite * num_bins), num_bins - 1).astype(np.int64)
    return np.bincount(bins, minlength=num_bins)
