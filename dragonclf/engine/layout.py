"""The columns of a scored row: which answers are written, and how.

``uri, etag, status, error`` come first and are always there; then ``label, confidence, prob_<class>..., width, height, model_version`` and
what was asked for.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

MAX_PROB_COLUMNS = 32  # more classes share one list column
FEATURES = "features"
ALWAYS = ("uri", "etag", "status", "error")
FACTS = ("width", "height", "model_version")


class Layout(BaseModel):
    """What of the answers is written. The default writes a probability for each class.

    `thresholds` below are a model's own, by class, or none.
    """

    model_config = ConfigDict(frozen=True)

    threshold: float | None = None  # adds the column abstain: whether the confidence is less; before the model's own
    top_k: int | None = None  # the most probable classes as two lists, in place of all probabilities
    columns: tuple[str, ...] | None = None  # of the row's own: only these, and ALWAYS

    def check(self, classes: list[str], *, thresholds: Mapping[str, float], embeddings: bool) -> None:
        """ValueError if the classes cannot be columns, or if a column that was asked for would not be there."""
        seen: dict[str, str] = {}
        for name in classes:
            twin = seen.setdefault(name.casefold(), name)
            if twin != name:
                raise ValueError(
                    f"classes {twin!r} and {name!r} differ in case only: rename one, their columns would collide in most readers"
                )
        if self.top_k is not None and self.top_k > len(classes):
            raise ValueError(
                f"--top-k {self.top_k} of a model of {len(classes)} classes: ask for {len(classes)} or fewer"
            )
        nothing = np.zeros((0, len(classes)), np.float32)
        answers = self.answers(classes, nothing, np.zeros(0, bool), thresholds=thresholds)
        there = [*answers, *FACTS, *([FEATURES] if embeddings else [])]
        unknown = [name for name in self.columns or () if name not in (*ALWAYS, *there)]
        if unknown:
            raise ValueError(f"--columns names {unknown[0]!r}: there are {', '.join([*ALWAYS, *there])}")

    def answers(
        self, classes: list[str], probs: np.ndarray, bad: np.ndarray, *, thresholds: Mapping[str, float]
    ) -> dict[str, pa.Array]:
        """Columns of probabilities float32 (N, K), null where `bad`, bool (N,)."""
        best = probs.argmax(axis=1)
        confidence = probs[np.arange(len(probs)), best]
        columns = {
            "label": pa.array([classes[i] for i in best], pa.string(), mask=bad),
            "confidence": pa.array(confidence, pa.float32(), mask=bad),
        }
        if self.threshold is not None or thresholds:
            least = np.array(
                [thresholds[name] if self.threshold is None else self.threshold for name in classes], np.float32
            )
            columns["abstain"] = pa.array(confidence < least[best], pa.bool_(), mask=bad)
        if self.top_k is not None:
            top = np.argsort(-probs, axis=1, kind="stable")[:, : self.top_k]
            columns["top_labels"] = lists(np.array(classes, dtype=object)[top], bad, pa.string())
            columns["top_probs"] = lists(np.take_along_axis(probs, top, axis=1), bad, pa.float32())
        elif len(classes) > MAX_PROB_COLUMNS:
            columns["probs"] = lists(probs, bad, pa.float32())
        else:
            columns |= {
                f"prob_{name}": pa.array(probs[:, index], pa.float32(), mask=bad) for index, name in enumerate(classes)
            }
        return columns

    def chosen(self, table: pa.Table) -> pa.Table:
        """Only the columns that were asked for, in the order of the table."""
        if self.columns is None:
            return table
        return table.select([name for name in table.column_names if name in ALWAYS or name in self.columns])


def lists(values: np.ndarray, bad: np.ndarray, kind: pa.DataType) -> pa.ListArray:
    """A column of lists out of (N, D), null where `bad`. Not of a fixed size: pyarrow does not read those back if some are null."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel(), kind), mask=pa.array(bad))
