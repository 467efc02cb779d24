"""Pictures of a training run: its curves, and images as the network sees them."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dragonclf import storage
from dragonclf.evaluate.galleries import image_bytes
from dragonclf.train.checkpoint import Row
from dragonclf.train.data import Batch, Samples
from dragonclf.train.lr_find import Sweep

RESULTS, BATCH, SWEEP = "results.png", "train_batch0.jpg", "lr_find.png"
MAX_IMAGES, COLUMNS = 16, 4


class FirstBatch:
    """Samples as they are; of the first ones that training takes, a picture is put at `uri`: varied, and not blended yet."""

    def __init__(self, samples: Samples, classes: list[str], uri: str):
        self._samples, self._classes, self._uri = samples, classes, uri
        self.targets = samples.targets

    def __len__(self) -> int:
        return len(self._samples)

    def batches(self, indices: Iterable[np.ndarray], *, epoch: int) -> Iterator[Batch]:
        for number, (inputs, targets) in enumerate(self._samples.batches(indices, epoch=epoch)):
            if epoch == number == 0 and not storage.stat(self._uri):
                labels = [self._classes[target] for target in targets.tolist()]
                storage.put(self._uri, image_bytes(draw_images(inputs, labels), "jpg"))
            yield inputs, targets


def draw_images(pixels: torch.Tensor, labels: Sequence[str]) -> Figure:
    """The first sixteen of uint8 (N, 3, S, S), each below its label, four a row."""
    shown = list(zip(pixels, labels, strict=True))[:MAX_IMAGES]
    num_rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(2.4 * COLUMNS, 2.7 * num_rows), layout="constrained", facecolor="white")
    for number, (image, label) in enumerate(shown):
        axes = figure.add_subplot(num_rows, COLUMNS, number + 1)
        axes.axis("off")
        axes.set_title(label if len(label) <= 26 else f"{label[:25]}…", fontsize=9, parse_math=False)
        axes.imshow(image.permute(1, 2, 0).numpy())
    return figure


def plot_results(rows: list[Row], curve: list[Row]) -> Figure:
    """Losses, accuracy and the head's learning rate over the epochs: of the rows of results.csv, and of those of steps.csv."""
    figure = Figure(figsize=(12, 3.6), layout="constrained", facecolor="white")
    losses, accuracy, rates = figure.subplots(1, 3)
    epochs, per_step = [row["epoch"] for row in rows], rows[-1]["epoch"] / curve[-1]["step"]
    places = [row["step"] * per_step for row in curve]
    losses.plot(places, [row["loss"] for row in curve], color="0.8", label="train loss of steps")
    for axes, name in ((losses, "train_loss"), (losses, "valid_loss"), (accuracy, "valid_accuracy")):
        axes.plot(epochs, [row[name] for row in rows], marker="o", label=name.replace("_", " "))
    rates.plot(places, [row["lr"] for row in curve], label="learning rate of the head")
    for axes in (losses, accuracy, rates):
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    return figure


def plot_sweep(found: Sweep) -> Figure:
    """The loss and the smoothed loss over the rate, with the suggestions."""
    figure = Figure(figsize=(6, 4), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.plot(found.lrs, found.losses, color="0.8", label="loss")
    axes.plot(found.lrs, found.smoothed, label="smoothed")
    for name, lr in (("valley", found.valley), ("steep", found.steep)):
        axes.plot([lr], [found.smoothed[found.lrs.index(lr)]], "o", label=f"{name}: {lr:.2g}")
    axes.set(xscale="log", xlabel="learning rate of the head", ylabel="training loss")
    axes.legend()
    return figure
