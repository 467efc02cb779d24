"""Charts as the page draws them, in SVG: axes and series in numbers of the data, turned into pixels."""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from matplotlib.ticker import MaxNLocator

from dragonclf.evaluate.curves import NUM_BINS, Ranking, Reliability, thinned

WIDTH, HEIGHT = 340, 276  # pixels
LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT = 62, 12, 264, 212
QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
HISTOGRAM_BINS = 20


@dataclass(frozen=True)
class Axis:
    """What one axis says, and which of the data's numbers lie at its ends."""

    label: str
    ticks: tuple[float, ...] = QUARTERS
    low: float = 0.0
    high: float = 1.0
    is_log: bool = False

    def share(self, values: np.ndarray) -> np.ndarray:
        """Places of values on the axis: 0 at its low end, 1 at its high one."""
        low, high = self.low, self.high
        if self.is_log:
            values, low, high = np.log10(values), math.log10(low), math.log10(high)
        return (values - low) / (high - low)


@dataclass(frozen=True)
class Series:
    """Values (N,) to draw at `x` (N,) in one style. Bars of a chart share the width that `x` leaves to each."""

    name: str
    kind: Literal["line", "dots", "bars", "guide"]
    x: np.ndarray
    y: np.ndarray
    style: Literal["first", "second", "quiet"] = "first"


@dataclass(frozen=True)
class Chart:
    """One chart. `slug` is its id in the page; `description` says in words what its numbers show."""

    slug: str
    title: str
    description: str
    x: Axis
    y: Axis
    series: list[Series]
    has_marker: bool = False  # a point that the page's script moves
    bar_width: float = field(default=0.0)  # in the data's numbers, of all the bars at one x

    plot = f"{LEFT} {TOP} {PLOT_WIDTH} {PLOT_HEIGHT}"
    width, height, bottom, right = WIDTH, HEIGHT, TOP + PLOT_HEIGHT, LEFT + PLOT_WIDTH

    def points(self, series: Series) -> list[tuple[float, float]]:
        """Pixels of a series, those left out that are not finite."""
        is_finite = np.isfinite(series.x) & np.isfinite(series.y)
        x, y = series.x[is_finite], series.y[is_finite]
        if series.kind == "line":
            x, y = thinned(x, y)
        return [(round(LEFT + PLOT_WIDTH * a, 1), round(TOP + PLOT_HEIGHT * (1 - b), 1)) for a, b in zip(
            self.x.share(x).tolist(), self.y.share(y).tolist(), strict=True
        )]  # fmt: skip

    def line(self, series: Series) -> str:
        """`points` of an SVG polyline."""
        return " ".join(f"{x:g},{y:g}" for x, y in self.points(series))

    def bars(self, series: Series) -> list[tuple[float, float, float, float]]:
        """x, y, width and height of each bar in pixels."""
        kinds = [one for one in self.series if one.kind == "bars"]
        width = PLOT_WIDTH * self.bar_width / (self.x.high - self.x.low) / len(kinds)
        shift = width * (kinds.index(series) - len(kinds) / 2)
        return [
            (round(x + shift + 0.5, 1), y, round(width - 1, 1), round(self.bottom - y, 1))
            for x, y in self.points(series)
            if y < self.bottom
        ]

    def ticks(self, axis: Axis) -> list[tuple[float, str]]:
        """Pixels and texts of an axis's ticks."""
        shares = axis.share(np.array(axis.ticks)).tolist()
        if axis is self.x:
            places = [LEFT + PLOT_WIDTH * share for share in shares]
        else:
            places = [TOP + PLOT_HEIGHT * (1 - share) for share in shares]
        return [(round(place, 1), f"{value:g}") for place, value in zip(places, axis.ticks, strict=True)]


def axis_of(label: str, values: np.ndarray, *, is_log: bool = False) -> Axis:
    """An axis with room for all finite values."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    if is_log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        last = max(last, first + 1)
        every = -(-(last - first) // 5)
        return Axis(label, tuple(10.0**power for power in range(first, last + 1, every)), 10.0**first, 10.0**last, True)
    ticks = MaxNLocator(5).tick_values(low, high if high > low else low + 1)
    return Axis(label, tuple(round(float(tick), 12) for tick in ticks), float(ticks[0]), float(ticks[-1]))


def roc_chart(ranked: Ranking, *, name: str, slug: str) -> Chart:
    """The ROC curve of one class."""
    false_rate, true_rate = ranked.roc()
    area = "undefined" if ranked.auroc is None else f"{ranked.auroc:.3f}"
    chance = np.array([0.0, 1.0])
    return Chart(
        slug, f"ROC curve of {name}", f"True positive rate over false positive rate; the area under it is {area}.",
        Axis("false positive rate"), Axis("true positive rate"),
        [Series("chance", "guide", chance, chance, "quiet"), Series(name, "line", false_rate, true_rate)], has_marker=True,
    )  # fmt: skip


def precision_recall_chart(ranked: Ranking, *, name: str, slug: str) -> Chart:
    """The precision-recall curve of one class, in steps, as its average precision sums it."""
    recall, precision = ranked.precision_recall()
    x, y = np.stack([np.append(0, recall[:-1]), recall], axis=1).ravel(), np.repeat(precision, 2)
    found = "undefined" if ranked.average_precision is None else f"{ranked.average_precision:.3f}"
    share = ranked.positives.sum() / (ranked.positives.sum() + ranked.negatives.sum())
    return Chart(
        slug, f"Precision-recall curve of {name}", f"Precision over recall; the average precision is {found}.",
        Axis("recall"), Axis("precision"),
        [Series("chance", "guide", np.array([0.0, 1.0]), np.array([share, share]), "quiet"), Series(name, "line", x, y)], has_marker=True,
    )  # fmt: skip


def histogram_chart(ranked: Ranking, *, name: str, others: str, slug: str) -> Chart:
    """Shares of a class's images, and of the others', by the probability of the class."""
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    shares = [
        np.histogram(ranked.at, bins=edges, weights=counts)[0] / max(1, counts.sum())
        for counts in (ranked.positives, ranked.negatives)
    ]
    middles = (edges[1:] + edges[:-1]) / 2
    return Chart(
        slug, f"Probabilities of {name} by true class", f"Shares of the images of {name}, and of {others}, by the probability of {name}.",
        Axis(f"probability of {name}"), axis_of("share of the images", np.concatenate([*shares, [0]])),
        [Series(name, "bars", middles, shares[0]), Series(others, "bars", middles, shares[1], "second")], bar_width=1 / HISTOGRAM_BINS,
    )  # fmt: skip


def reliability_chart(now: Reliability, before: Reliability | None) -> Chart:
    """Accuracy over confidence; `before` is of the probabilities before calibration."""
    edges = np.linspace(0, 1, NUM_BINS + 1)
    series = [
        Series("accuracy in the bin", "bars", (edges[1:] + edges[:-1]) / 2, now.accuracy),
        Series("as sure as right", "guide", np.array([0.0, 1.0]), np.array([0.0, 1.0]), "quiet"),
        Series("at the bin's mean probability", "dots", now.confidence, now.accuracy),
    ]
    if before is not None:
        series.append(Series("before calibration", "dots", before.confidence, before.accuracy, "second"))
    return Chart(
        "reliability", "Reliability diagram", f"How often labels are right over how probable they are; the error is {now.error:.3f}.",
        Axis("probability of the label"), Axis("share that is right"), series, bar_width=1 / NUM_BINS,
    )  # fmt: skip
