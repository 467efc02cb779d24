"""Slices: the accuracy of images that have something in common, so that a weak spot does not hide in the whole."""

from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pandas as pd

from dragonclf.evaluate.metrics import wilson_interval

# Columns of a scored row that tell of the answer or of one image alone.
NOT_SLICED = {
    "uri", "etag", "size", "status", "error", "label", "confidence", "abstain", "features", "top_labels", "top_probs", "width", "height",
    "model_version", "input_label",
}  # fmt: skip
SMALL = 30  # fewer images say little
MAX_VALUES = 20  # of more, numbers come in quarters and others are the most frequent and the rest
MOST_FREQUENT = 10
MAX_COLUMNS = 40
MAX_SHOWN = 100  # characters of a value


@dataclass(frozen=True)
class Slice:
    """Images with one value in common."""

    value: str
    num_images: int
    accuracy: float
    interval: tuple[float, float]  # 95 %, Wilson

    @property
    def is_small(self) -> bool:
        return self.num_images < SMALL


@dataclass(frozen=True)
class Slicing:
    """All images, parted by one column or property: the slice with the lowest accuracy first, of equals the larger."""

    name: str
    slices: list[Slice]


def slicings(rows: pd.DataFrame, *, is_right: np.ndarray) -> list[Slicing]:
    """Part the counted `rows` by each column of their own (40 at most), by the size of the image and by the type of its file.

    `is_right`, bool (N,), tells whose label is the true one. What has one value for all images, or another for each, is left out.
    """
    own = [name for name in rows.columns if name not in NOT_SLICED and not name.startswith("prob_")][:MAX_COLUMNS]
    parted = {str(name): groups(rows[name]) for name in own if is_scalar(rows[name])}
    if {"width", "height"} <= set(rows.columns):
        parted["image size, in pixels"] = _size_groups(rows)
    types = pd.Series([PurePosixPath(uri).suffix.lower() or "none" for uri in rows["uri"].tolist()])
    parted["type of the file"] = groups(types)
    return [Slicing(name, _slices(groups, is_right)) for name, groups in parted.items() if len(groups) > 1]


def _slices(groups: list[tuple[str, np.ndarray]], is_right: np.ndarray) -> list[Slice]:
    found = []
    for value, members in groups:
        num_images, num_right = int(members.sum()), int(is_right[members].sum())
        interval = wilson_interval(num_right, num_trials=num_images)
        found.append(Slice(value, num_images, num_right / num_images, interval))
    return sorted(found, key=lambda one: (one.accuracy, -one.num_images, one.value))


def groups(values: pd.Series) -> list[tuple[str, np.ndarray]]:
    """Values as text, and which rows have them, bool (N,); none of what is all one or all different."""
    counts = values.value_counts()
    missing = values.isna().to_numpy()
    found = [("no value", missing)] if missing.any() else []
    if len(counts) <= MAX_VALUES:
        return [*found, *((_text(value), (values == value).to_numpy(bool)) for value in counts.index)]
    if pd.api.types.is_numeric_dtype(values):
        quarter = pd.qcut(values.astype(float), 4, labels=False, duplicates="drop").to_numpy()
        for number in range(int(np.nanmax(quarter)) + 1):
            members = quarter == number
            if members.any():
                within = values[members].astype(float)
                found.append((f"{within.min():g} to {within.max():g}", members))
        return found
    if counts.iloc[0] == 1:
        return []
    frequent = counts.index[:MOST_FREQUENT]
    found += [(_text(value), (values == value).to_numpy(bool)) for value in frequent]
    return [*found, (f"other ({len(counts) - MOST_FREQUENT:,} values)", ~values.isin(frequent).to_numpy() & ~missing)]


def _size_groups(rows: pd.DataFrame) -> list[tuple[str, np.ndarray]]:
    sizes = rows[["width", "height"]].astype(float)
    known = sizes.notna().all(axis=1)
    texts = pd.Series(
        [f"{w:.0f} × {h:.0f}" if ok else None for w, h, ok in zip(sizes["width"], sizes["height"], known, strict=True)]
    )
    if texts.nunique() <= MAX_VALUES:
        return groups(texts)
    return [(f"shorter side {text}", members) for text, members in groups(sizes.min(axis=1, skipna=False))]


def is_scalar(values: pd.Series) -> bool:
    return not values.map(lambda value: isinstance(value, (list, tuple, dict, set, bytes, np.ndarray))).any()


def _text(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"
