"""The curves of the training that a model came from, as charts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dragonclf.evaluate.charts import Axis, Chart, Series, axis_of

Row = Mapping[str, float]


@dataclass(frozen=True)
class Sweep:
    """A search of the learning rate: rates, losses (N,), the losses smoothed, and the rates that it suggests, by name."""

    lrs: Sequence[float]
    losses: Sequence[float]
    smoothed: Sequence[float]
    suggested: Mapping[str, float]


@dataclass(frozen=True)
class Training:
    """What a run of training wrote down."""

    epochs: Sequence[Row]  # rows of results.csv, one or more
    steps: Sequence[Row]  # rows of steps.csv, one or more
    sweep: Sweep | None


def training_charts(training: Training) -> list[Chart]:
    """Losses, accuracy and learning rate over the epochs; the sweep if there was one."""
    epochs, steps = training.epochs, training.steps
    at = _column(epochs, "epoch")
    places = _column(steps, "step") * (at[-1] / steps[-1]["step"])
    x = axis_of("epoch", np.append(at, 0))
    losses = [
        Series("training, of steps", "line", places, _column(steps, "loss"), "quiet"),
        Series("training", "line", at, _column(epochs, "train_loss")),
        Series("validation", "line", at, _column(epochs, "valid_loss"), "second"),
        Series("", "dots", at, _column(epochs, "train_loss")),
        Series("", "dots", at, _column(epochs, "valid_loss"), "second"),
    ]
    accuracy, rates = _column(epochs, "valid_accuracy"), _column(steps, "lr")
    charts = [
        Chart(
            "losses", "Losses", f"Training and validation loss by epoch; {losses[1].y[-1]:.3f} and {losses[2].y[-1]:.3f} in the last.",
            x, axis_of("loss", np.concatenate([series.y for series in losses])), losses,
        ),
        Chart(
            "valid-accuracy", "Validation accuracy", f"Validation accuracy over the epochs; the best is {accuracy.max():.3f}.",
            x, axis_of("accuracy", accuracy),
            [Series("", "line", at, accuracy, "second"), Series("validation", "dots", at, accuracy, "second")],
        ),
        Chart(
            "lr", "Learning rate", f"Learning rate of the head over the epochs; the highest is {rates.max():.2g}.",
            x, axis_of("learning rate", np.append(rates, 0)), [Series("learning rate", "line", places, rates)],
        ),
    ]  # fmt: skip
    return [*charts, *([_sweep_chart(training.sweep)] if training.sweep else [])]


def _sweep_chart(sweep: Sweep) -> Chart:
    lrs, losses, smoothed = (np.array(values) for values in (sweep.lrs, sweep.losses, sweep.smoothed))
    rates = np.array(list(sweep.suggested.values()))
    told = ", ".join(f"{name} {rate:.2g}" for name, rate in sweep.suggested.items())
    x: Axis = axis_of("learning rate of the head", lrs, is_log=True)
    return Chart(
        "lr-find", "Learning-rate finder", f"Training loss over the learning rate; suggested: {told}.",
        x, axis_of("training loss", np.concatenate([losses, smoothed])),
        [
            Series("loss", "line", lrs, losses, "quiet"), Series("smoothed", "line", lrs, smoothed),
            Series(f"suggested: {told}", "dots", rates, np.interp(rates, lrs, smoothed), "second"),
        ],
    )  # fmt: skip


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=float)
