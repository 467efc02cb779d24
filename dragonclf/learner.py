"""The Python API, in the three lines of the notebook that this grew out of.

data = ImageData.from_folder("s3://photos/dragons", size=224)
learn = Learner("tf_efficientnet_lite0", data, precompute=True)
learn.fit(0.01, 3)
"""

from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from dragonclf import storage
from dragonclf.config import EvaluateConfig, IndexConfig, TrainConfig
from dragonclf.data.snapshot import Snapshot, open_snapshot
from dragonclf.model import bundle
from dragonclf.verbs.evaluate import EvaluateSummary, evaluate, predict_split
from dragonclf.verbs.index import index
from dragonclf.verbs.train import TrainSummary, train

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
    """An architecture to fine-tune on some data. `options` are further ones of `dragonclf train`, such as ``num_workers=2``."""

    def __init__(self, arch: str, data: ImageData, *, precompute: bool = True, out: str = OUT, **options: Any):
        self.arch, self.data, self.precompute = arch, data, precompute
        self.out, self.options = storage.resolve(out), options
        self.trained: TrainSummary | None = None

    def fit(self, lr: float | Literal["auto"], epochs: int) -> TrainSummary:
        """Train from the pretrained weights, for `epochs` passes at a one-cycle schedule up to `lr`. Says metrics as it goes.

        `lr` "auto" is found by a sweep, which ``lr_find.png`` in the run's folder shows. The same call again, also in a
        new process, resumes a run that was killed and returns one that is finished.
        """
        config = TrainConfig(
            data=self.data.snapshot.uri, out=storage.join(self.out, "models"), arch=self.arch, size=self.data.size,
            precompute=self.precompute, lr=lr, epochs=epochs, **self.options,
        )  # fmt: skip
        self.trained = train(config)
        return self.trained

    def predict(self, *, split: str = "valid") -> pd.DataFrame:
        """Probabilities of every image of a split: uri, status, label (predicted), confidence, prob_<class>, input_label (true)."""
        config = self._evaluation(split)
        return predict_split(config, bundle.load_bundle(config.model), self.data.snapshot)[1]

    def report(self, *, split: str = "valid") -> EvaluateSummary:
        """Metrics, and report.html with the right, the wrong and the uncertain pictures."""
        return evaluate(self._evaluation(split))

    def _evaluation(self, split: str) -> EvaluateConfig:
        if self.trained is None:
            raise ValueError("there is no trained model yet: call fit first")
        out = storage.join(self.trained.run, "evaluation")
        return EvaluateConfig.model_validate(
            {"model": self.trained.model, "data": self.data.snapshot.uri, "out": out, "split": split}
        )  # fmt: skip
