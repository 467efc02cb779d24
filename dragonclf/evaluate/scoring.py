"""The report of a scoring run: what there is to say, and one page to read it on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, Field

from dragonclf import storage
from dragonclf.evaluate.charts import HISTOGRAM_BINS, Axis, Chart, Series, axis_of
from dragonclf.evaluate.drift import Drift
from dragonclf.evaluate.galleries import Gallery, read_pictures
from dragonclf.evaluate.html import render

PAGE = "scoring.html"
MAX_TABLE_ROWS = 100  # of the table of classes
SHORT_S = 120  # a run that took less is drawn over seconds, others over minutes


class StatusCount(BaseModel):
    """Rows of one status."""

    status: str
    num_images: int
    share: float = Field(description="Of all rows, 0 to 1.")


class ClassCount(BaseModel):
    """Images with one label."""

    label: str
    num_images: int
    share: float = Field(description="Of the images with a label, 0 to 1.")
    mean_confidence: float | None = Field(description="None if no confidence is finite.")
    num_abstained: int | None = Field(
        description="Images of these that the model abstains from. None: the run has no such column."
    )
    valid_share: float | None = Field(description="Share of the validation images that the model predicts as this.")
    train_share: float | None = Field(description="Share of the training images that are this.")


class Example(BaseModel):
    """A row that is not simply ok."""

    status: str
    uri: str
    error: str | None


class ScoringReport(BaseModel):
    """What a published scoring run came to."""

    page: str = Field(description="URI of scoring.html.")
    run: str = Field(description="URI of the run.")
    notes: list[str] = Field(description="What could not be told, and why.")
    num_images: int = Field(description="Rows.")
    num_labelled: int = Field(description="Rows with a label.")
    num_abstained: int | None = Field(
        description="Of these, the ones that the model abstains from. None: the run has no such column."
    )
    mean_confidence: float | None = Field(description="Of the labels, 0 to 1.")
    confidence_histogram: list[int] = Field(
        description="Images with a label in 20 equal bins of the confidence, from 0 to 1."
    )
    images_per_s: float | None = Field(
        description="Images read from the first part's writing to the last's, pauses included. None: too few parts, or a copy of the run."
    )
    statuses: list[StatusCount] = Field(description="Most frequent first.")
    classes: list[ClassCount] = Field(description="Most frequent first.")
    drift: list[Drift] = Field(description="Against what the model was made from; empty without --model.")
    examples: list[Example] = Field(description="A few rows of each status but ok, the first by uri.")


@dataclass(frozen=True)
class Evidence:
    """What the page shows beside the report's figures."""

    facts: Mapping[str, str]  # by name
    class_histograms: Mapping[str, Sequence[int]]  # images in 20 bins, of each class where they are few
    valid_histogram: np.ndarray | None  # validation images in 20 bins
    galleries: list[Gallery]  # rows with uri, label, confidence
    part_times: list[tuple[float, int]]  # (seconds since the listing, images read) in the order of time


def write_page(report: ScoringReport, evidence: Evidence) -> None:
    """Write the page where `report` says, over an earlier one.

    Raises:
        StorageError: The store failed, other than an image being gone, which its tile says.
    """
    galleries = [(one, one.rows.to_dict("records")) for one in evidence.galleries]
    html = render(
        "scoring.html.j2", pictures=read_pictures(evidence.galleries), report=report, facts=evidence.facts,
        charts=_charts(report, evidence), throughput=_throughput_chart(evidence.part_times), galleries=galleries, max_rows=MAX_TABLE_ROWS,
    )  # fmt: skip
    storage.put(report.page, html)


def _charts(report: ScoringReport, evidence: Evidence) -> list[Chart]:
    """The histogram of all confidences, beside that of validation images if there is one, and those of classes."""
    valid = [] if evidence.valid_histogram is None else [("validation images", evidence.valid_histogram)]
    charts = [_histogram("confidences", "All images", [("this run", np.array(report.confidence_histogram)), *valid])]
    return charts + [
        _histogram(f"confidences-{place}", label, [("this run", np.array(counts))])
        for place, (label, counts) in enumerate(evidence.class_histograms.items())
    ]


def _histogram(slug: str, title: str, counted: list[tuple[str, np.ndarray]]) -> Chart:
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    middles, shares = (edges[1:] + edges[:-1]) / 2, [counts / max(1, counts.sum()) for _, counts in counted]
    most = int(shares[0].argmax())
    told = f"the most, {shares[0][most]:.1%}, lie from {edges[most]:.2f} to {edges[most + 1]:.2f}"
    return Chart(
        slug, title, f"Shares of the images by the confidence of their label; {told}.",
        Axis("confidence"), axis_of("share of the images", np.concatenate([*shares, [0]])),
        [
            Series(name, "bars", middles, share, style)
            for (name, _), share, style in zip(counted, shares, ("first", "second"), strict=False)
        ],
        bar_width=1 / HISTOGRAM_BINS,
    )  # fmt: skip


def _throughput_chart(part_times: list[tuple[float, int]]) -> Chart | None:
    """Images read over the time since the listing. Each part adds its images when it is written."""
    if len(part_times) < 2:
        return None
    unit, unit_s = ("minutes", 60) if part_times[-1][0] >= SHORT_S else ("seconds", 1)
    taken = np.array([0, *(seconds / unit_s for seconds, _ in part_times)])
    done = np.cumsum([0, *(count for _, count in part_times)])
    return Chart(
        "throughput", "Images read", f"Images read over {taken[-1]:.1f} {unit} since the listing began, {done[-1]:,} in all.",
        axis_of(f"{unit} since the listing began", taken), axis_of("images", done.astype(float)),
        [Series("images read", "line", taken, done.astype(float))],
    )  # fmt: skip
