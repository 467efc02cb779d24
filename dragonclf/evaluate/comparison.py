"""A comparison of training runs: what it found, and one page to read it on."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from pydantic import BaseModel, Field

from dragonclf import storage
from dragonclf.evaluate.charts import Chart, Series, axis_of
from dragonclf.evaluate.galleries import Gallery, read_pictures
from dragonclf.evaluate.html import render
from dragonclf.evaluate.paired import Difference
from dragonclf.evaluate.slices import SMALL

PAGE = "compare.html"
CURVES = (("valid_loss", "Validation loss"), ("valid_accuracy", "Validation accuracy"))  # columns of results.csv


class RunFigures(BaseModel):
    """One run. Figures are of the images that all compared runs have predicted, and None where there is none."""

    run: str = Field(description="Name of the run: its folder's, or its URI where two folders have one name.")
    uri: str
    model_version: str
    snapshot: str = Field(description="Id of the snapshot.")
    num_epochs: int = Field(description="Epochs that were trained.")
    epoch: int = Field(description="The one whose weights the model has.")
    metrics: dict[str, float] = Field(description="Of that epoch, as training saw them.")
    num_own_images: int | None = Field(
        description="Validation images with a prediction and a label. None: it has no report."
    )
    num_images: int | None = Field(description="Of these, the ones that all runs have.")
    accuracy: float | None
    accuracy_interval: tuple[float, float] | None = Field(description="95 %, Wilson.")
    auroc: float | None
    log_loss: float | None
    ece: float | None = Field(description="Expected calibration error, 0 to 1.")
    coverage: float | None = Field(
        description="Share of the images whose label the model's thresholds accept. None: it has none."
    )
    accepted_accuracy: float | None = Field(description="Of these images.")


class OptionValues(BaseModel):
    """An option, or the version of a package, that is not the same in all runs."""

    option: str
    values: dict[str, str] = Field(description="By name of the run.")


class Flip(BaseModel):
    """An image that one of a run and the reference has right and the other wrong."""

    run: str
    is_gain: bool = Field(description="Whether it is the run that has it right.")
    uri: str
    actual: str
    label_reference: str
    label: str = Field(description="The run's.")
    prob_reference: float = Field(description="The reference's probability of the true class.")
    prob: float = Field(description="The run's.")


class Comparison(BaseModel):
    """What `compare` found. Differences are the run's less the reference's, on images that all runs have predicted."""

    reference: str = Field(description="Name of the run that the others are compared with.")
    page: str | None = Field(description="URI of compare.html.")
    notes: list[str] = Field(description="What could not be compared, and why.")
    runs: list[RunFigures] = Field(description="The reference first.")
    options: list[OptionValues]
    differences: list[Difference] = Field(description="Of all images.")
    slices: list[Difference] = Field(description="By column of the manifest, in each column the worst first.")
    flips: list[Flip] = Field(
        description="By run, gains first; those whose probability changed most first, 20 each way."
    )


def write_page(found: Comparison, out_uri: str, *, epochs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Write compare.html under `out_uri`, replacing an earlier one, and return its URI. `epochs` has each run's rows of results.csv.

    Raises:
        StorageError: The store failed, other than an image being gone, which its tile says.
    """
    uris = pd.DataFrame({"uri": [flip.uri for flip in found.flips]})
    pictures = read_pictures([Gallery("flips", "Flips", "Flips", "", uris)])
    flips = [
        (run.run, is_gain, [flip for flip in found.flips if (flip.run, flip.is_gain) == (run.run, is_gain)])
        for run in found.runs[1:]
        for is_gain in (True, False)
    ]
    slices = [
        (run.run, [one for one in found.slices if one.run == run.run])
        for run in found.runs[1:]
    ]  # fmt: skip
    html = render(
        "compare.html.j2", pictures=pictures, found=found, charts=curves(epochs), flips=flips, slices=slices, small=SMALL,
        numbers=_numbers(found),
    )  # fmt: skip
    uri = storage.join(out_uri, PAGE)
    storage.put(uri, html)
    return uri


def curves(epochs: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Chart]:
    """Each curve of all runs in one chart, over the epochs."""
    charts = []
    for column, title in CURVES:
        series = [_series(name, rows, column) for name, rows in epochs.items()]
        best = {"valid_loss": min, "valid_accuracy": max}[column]
        told = ", ".join(f"{name} {best(row[column] for row in rows):.4f}" for name, rows in epochs.items())
        x = axis_of("epoch", np.concatenate([[0.0], *(one.x for one in series)]))
        y = axis_of(title.lower(), np.concatenate([one.y for one in series]))
        description = f"{title} of each run over the epochs; the best of each: {told}."
        charts.append(Chart(column.replace("_", "-"), title, description, x, y, series))
    return charts


def _series(name: str, rows: Sequence[Mapping[str, float]], column: str) -> Series:
    """A line, also of a run with one epoch: a dash there."""
    x, y = (np.array([row[key] for row in rows], dtype=float) for key in ("epoch", column))
    return Series(name, "line", *((x, y) if len(x) > 1 else (x[0] + np.array([-0.1, 0.1]), y.repeat(2))))


def _numbers(found: Comparison) -> dict[str, int]:
    """The place of each run, from 1, by which the page tells its line."""
    return {run.run: place for place, run in enumerate(found.runs, 1)}
