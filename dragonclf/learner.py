"""The Python API, in the three lines of the notebook that this grew out of.

data = ImageData.from_folder("s3://photos/dragons", size=224)
learn = Learner("tf_efficientnet_lite0", data, precompute=True)
learn.fit(0.01, 3)

notebooks/drogon_or_viserion.ipynb goes on from there.
"""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from matplotlib.figure import Figure

from dragonclf import storage
from dragonclf.config import EvaluateConfig, IndexConfig, TrainConfig
from dragonclf.data.snapshot import Snapshot, open_snapshot
from dragonclf.evaluate.galleries import (
    Gallery,
    draw_gallery,
    random_images,
    read_pictures,
    select_galleries,
    top_losses,
)
from dragonclf.evaluate.metrics import classification_metrics, counted_rows
from dragonclf.evaluate.report import draw_confusion
from dragonclf.model import bundle
from dragonclf.train.lr_find import Sweep
from dragonclf.train.pictures import draw_images, plot_sweep
from dragonclf.verbs.evaluate import EvaluateSummary, evaluate, predict_split
from dragonclf.verbs.index import index
from dragonclf.verbs.run_pictures import EVALUATION, SHARED, first_images, results_figure
from dragonclf.verbs.train import TrainSummary, find_lr, train

OUT = "dragonclf-runs"


@dataclass(frozen=True)
class ImageData:
    """Labelled images, indexed: which there are, of which class, in which split. `size` is the model's input in pixels."""

    snapshot: Snapshot
    size: int | None

    @classmethod
    def from_folder(cls, uri: str, *, size: int | None = None, out: str = OUT, **options: Any) -> "ImageData":
        """Index a folder or ``s3://`` prefix with one folder per class (under train/ and valid/, if it likes), or a manifest.

        `out` gets the snapshot; `size` None means the size that the model was pretrained at; `options` are further ones of
        `dragonclf index`, such as ``valid_fraction=0.2`` and ``seed=0``. ValueError for a source that cannot be trained on.
        """
        config = IndexConfig(source=uri, out=storage.join(storage.resolve(out), "data"), **options)
        return cls(index(config), size)

    @classmethod
    def from_snapshot(cls, uri: str, *, size: int | None = None) -> "ImageData":
        """Open what `dragonclf index` wrote."""
        return cls(open_snapshot(storage.resolve(uri)), size)

    @property
    def classes(self) -> list[str]:
        """Class names, in the order of the model's outputs."""
        return self.snapshot.info.classes


class Learner:
    """An architecture to fine-tune on some data.

    Each call that trains begins at the pretrained weights, not where the last one ended, and is a run of its own under
    ``OUT/models/``. `precompute` None is True unless a recipe says otherwise; `options` are further ones of `dragonclf train`, such as
    ``num_workers=2`` or ``recipe="elpv-finetune"``. Plots are matplotlib figures.
    """

    def __init__(self, arch: str, data: ImageData, *, precompute: bool | None = None, out: str = OUT, **options: Any):
        self.arch, self.data = arch, data
        self.out, self.options = storage.resolve(out), {"precompute": precompute} | options
        self.trained: TrainSummary | None = None
        self.sweep: Sweep | None = None
        self._predicted: dict[str, pd.DataFrame] = {}

    # Training

    def fit(self, lr: float | Literal["auto"] | None = None, epochs: int | None = None, **options: Any) -> TrainSummary:
        """Train from the pretrained weights, for `epochs` passes at a one-cycle schedule up to `lr`. Says metrics as it goes.

        `lr` "auto" is found by a sweep, which ``lr_find.png`` in the run's folder shows; None means the recipe's number or the
        default. `options` are for this call. The same call again, also in a new process, resumes a run that was killed and returns
        one that is finished. ValueError for options that do not fit each other or the data.
        """
        self.trained = train(self._training(lr=lr, epochs=epochs, **options))
        self._predicted.clear()
        return self.trained

    def fine_tune(
        self, epochs: int, *, lr: float | Literal["auto"] = 2e-3, freeze_epochs: int = 1, **options: Any
    ) -> TrainSummary:
        """Train the head alone for `freeze_epochs` at up to `lr`, then every layer for `epochs` at up to half of it, as fastai does.

        ``layer_decay=0.8`` among the `options` trains each layer more slowly the farther it is from the head. Images are varied, and
        read in every epoch: this wants a GPU, or patience.
        """
        return self.fit(lr, epochs, **{"freeze_epochs": freeze_epochs, "freeze_to": 0, "precompute": False} | options)

    def freeze(self) -> None:
        """Let `fit` train the head alone from here on, on images that are varied. With precompute it does that anyway, and faster."""
        self.freeze_to(-1)

    def unfreeze(self) -> None:
        """Let `fit` train every layer from here on."""
        self.freeze_to(0)

    def freeze_to(self, n: int) -> None:
        """Let `fit` train the layers from timm's group `n` on: 0 the stem, so all; -1 the head's; -2 also the last stage."""
        self.options |= {"precompute": False, "freeze_to": n, "freeze_epochs": 0}

    def lr_find(self, **options: Any) -> Sweep:
        """Try learning rates on Ray's workers and train nothing: the losses, and two rates that they suggest, `valley` and `steep`.

        Kept under ``OUT/models/lr_find/``. ValueError if the loss diverges at once.
        """
        self.sweep = find_lr(self._training(**options))
        return self.sweep

    # What the model says

    def predict(self, *, split: str = "valid") -> pd.DataFrame:
        """Probabilities of every image of a split: uri, status, label (predicted), confidence, prob_<class>, input_label (true)."""
        if split not in self._predicted:
            self._predicted[split] = self._scored(split)
        return self._predicted[split].copy()

    def tta(self, n: int = 4, *, split: str = "valid") -> pd.DataFrame:
        """As `predict`, with test-time augmentation: `n` more looks at each image, varied as in training, in n + 1 times the time."""
        return self._scored(split, tta=n)

    def report(self, *, split: str = "valid") -> EvaluateSummary:
        """Metrics, and report.html with the right, the wrong and the uncertain pictures."""
        return evaluate(self._evaluation(split))

    def export(self, uri: str) -> str:
        """Copy the model's bundle to a folder or ``s3://`` prefix and return its URI. ValueError if another model is there."""
        return bundle.copy_bundle(self._trained().model, storage.resolve(uri))

    # Pictures

    def show_batch(self, n: int = 8, **options: Any) -> Figure:
        """Training images with their labels: varied as in the first step without precompute, else as the model scores them."""
        return draw_images(*first_images(self._training(**options), n))

    def show_results(self, n: int = 8, *, split: str = "valid", seed: int = 0) -> Figure:
        """Images of a split drawn at random, each with its predicted and true class and the probability of the predicted one."""
        return self._drawn(
            random_images(self.predict(split=split), classes=self.data.classes, per_gallery=n, seed=seed)
        )

    def plot_top_losses(self, n: int = 8, *, split: str = "valid") -> Figure:
        """The images whose true class the model thought least probable."""
        return self._drawn(top_losses(self.predict(split=split), classes=self.data.classes, per_gallery=n))

    def plot_correct(self, n: int = 8, *, split: str = "valid", seed: int = 0) -> Figure:
        """Some that were predicted right, drawn at random."""
        return self._gallery("Random correct", n, split, seed)

    def plot_incorrect(self, n: int = 8, *, split: str = "valid", seed: int = 0) -> Figure:
        """Some that were predicted wrong, drawn at random."""
        return self._gallery("Random incorrect", n, split, seed)

    def plot_most_correct(self, label: str, n: int = 8, *, split: str = "valid") -> Figure:
        """Of the images of class `label` those that were predicted right with the most certainty."""
        return self._gallery("Most correct", n, split, label=label)

    def plot_most_incorrect(self, label: str, n: int = 8, *, split: str = "valid") -> Figure:
        """Of the images of class `label` those that the model was surest are of another."""
        return self._gallery("Most incorrect", n, split, label=label)

    def plot_uncertain(self, n: int = 8, *, split: str = "valid") -> Figure:
        """The images with the closest call between the two most probable classes."""
        return self._gallery("Most uncertain", n, split)

    def plot_confusion_matrix(self, *, split: str = "valid") -> Figure:
        """Images by true and by predicted class."""
        _, targets, probs = counted_rows(self.predict(split=split), classes=self.data.classes)
        return draw_confusion(classification_metrics(targets, probs=probs, classes=self.data.classes))

    def plot_results(self) -> Figure:
        """Losses, accuracy and learning rate of the last training, by epoch."""
        return results_figure(self._trained().run)

    def plot_lr_find(self) -> Figure:
        """The last sweep. ValueError if there was none."""
        if self.sweep is None:
            raise ValueError("there is no sweep yet: call lr_find first")
        return plot_sweep(self.sweep)

    def _drawn(self, gallery: Gallery) -> Figure:
        return draw_gallery(gallery, pictures=read_pictures([gallery]), classes=self.data.classes)

    def _gallery(self, section: str, n: int, split: str, seed: int = 0, *, label: str | None = None) -> Figure:
        frame, classes = self.predict(split=split), self.data.classes
        if label is not None and label not in classes:
            raise ValueError(f"there is no class {label!r}: there are {', '.join(classes)}")
        only = None if label is None else [classes.index(label)]
        galleries = select_galleries(frame, classes=classes, per_gallery=n, seed=seed, own=only)
        return self._drawn(next(gallery for gallery in galleries if gallery.section == section))

    # Configs

    def _trained(self) -> TrainSummary:
        if self.trained is None:
            raise ValueError("there is no trained model yet: call fit first")
        return self.trained

    def _training(self, **given: Any) -> TrainConfig:
        where = {"data": self.data.snapshot.uri, "out": storage.join(self.out, "models"), "arch": self.arch}
        chosen = itertools.chain({"size": self.data.size}.items(), self.options.items(), given.items())
        return TrainConfig.model_validate(where | {name: value for name, value in chosen if value is not None})

    def _evaluation(self, split: str, **options: Any) -> EvaluateConfig:
        trained = self._trained()
        what = {"model": trained.model, "data": self.data.snapshot.uri, "out": storage.join(trained.run, EVALUATION)}
        shared = {name: value for name, value in self.options.items() if name in SHARED}
        return EvaluateConfig.model_validate(shared | what | {"split": split} | options)

    def _scored(self, split: str, **options: Any) -> pd.DataFrame:
        config = self._evaluation(split, **options)
        return predict_split(config, bundle.load_bundle(config.model), self.data.snapshot)[1]
