"""What the page's script gets: the ranking of each class that it can show, and the images that it can name, compactly.

An array is {"type", "base64"}: little-endian numbers of the smallest type that holds them exactly.
"""

import base64
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dragonclf.evaluate.curves import Ranking
from dragonclf.evaluate.galleries import MAX_GALLERY_CLASSES
from dragonclf.evaluate.one_class import OneClass

MAX_LISTED_BYTES = 1_500_000  # of the addresses and figures of images
PER_CELL = 8  # images of a cell of the confusion matrix that are shown as pictures
MAX_CELL_PICTURES = 96
TYPES = ("<u1", "<u2", "<u4", "<f4", "<f8")


@dataclass(frozen=True)
class Listed:
    """The M images, of the N counted, that the script can name: the wrong ones first, then by the truth's probability, least first."""

    uris: list[str]
    targets: np.ndarray  # int (M,)
    predicted: np.ndarray  # int (M,)
    probs: np.ndarray  # float64 (M, K)
    in_cells: list[int]  # places of those that are shown as pictures of a cell of the confusion matrix

    @property
    def uris_in_cells(self) -> list[str]:
        return [self.uris[place] for place in self.in_cells]


def listed(rows: pd.DataFrame, *, targets: np.ndarray, probs: np.ndarray) -> Listed:
    """Choose images of the counted rows, as many as `MAX_LISTED_BYTES` hold. Does not depend on the order of the rows."""
    uris, predicted = rows["uri"].to_numpy(dtype=object), probs.argmax(axis=1)
    is_right, of_truth = predicted == targets, probs[np.arange(len(rows)), targets]
    by_uri = np.argsort(uris, kind="stable")
    order = by_uri[np.lexsort((of_truth[by_uri], is_right[by_uri]))]
    # Classes that have a threshold.
    num_shown = 1 if probs.shape[1] == 2 else min(probs.shape[1], MAX_GALLERY_CLASSES)
    shared = len(_shared_prefix(uris.tolist()))
    sizes = np.array([len(uri.encode()) - shared + 16 + 6 * num_shown for uri in uris[order]])
    order = order[: int(np.searchsorted(sizes.cumsum(), MAX_LISTED_BYTES, side="right"))]
    cells = pd.DataFrame({"cell": targets[order] * probs.shape[1] + predicted[order], "is_right": is_right[order]})
    cells["turn"] = cells.groupby("cell").cumcount()
    turns = cells[cells["turn"] < PER_CELL].sort_values(["turn", "is_right"], kind="stable")
    return Listed(
        uris[order].tolist(), targets[order], predicted[order], probs[order], turns.index[:MAX_CELL_PICTURES].tolist()
    )  # fmt: skip


def page_data(
    chosen: Sequence[OneClass], images: Listed, *, classes: list[str], sources: Mapping[str, str], elsewhere: set[str]
) -> str:
    """JSON that may stand in an HTML script element, whatever the names are.

    `sources` are the data URIs of pictures by the uri of their image; those of `elsewhere` are in the page already.
    """
    prefix = _shared_prefix(images.uris)
    confidence = images.probs[np.arange(len(images.uris)), images.predicted]
    pictures = {
        place: sources[images.uris[place]]
        for place in images.in_cells
        if images.uris[place] in sources and images.uris[place] not in elsewhere
    }
    data = {
        "classes": classes,
        "prefix": prefix,
        "uris": [uri[len(prefix) :] for uri in images.uris],
        "targets": packed(images.targets),
        "predicted": packed(images.predicted),
        "confidence": packed(confidence),
        "chosen": [
            {
                "threshold": one.threshold,
                "probs": packed(images.probs[:, one.index]),
                **_ranking(one.ranked, len(classes)),
            }
            for one in chosen
        ],
        "pictures": pictures,
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def packed(values: np.ndarray) -> dict[str, str]:
    """An array (N,) as the script unpacks it."""
    kind = next(kind for kind in TYPES if np.array_equal(values.astype(kind), values))
    return {"type": kind[1:], "base64": base64.b64encode(values.astype(kind).tobytes()).decode()}


def _shared_prefix(uris: list[str]) -> str:
    """The letters that all begin with, whatever folders they are of."""
    return os.path.commonprefix(uris)  # noqa: RUF071


def _ranking(ranked: Ranking, num_classes: int) -> dict[str, object]:
    """Exact at every threshold for two classes, at thousandths for more."""
    ranked = ranked if num_classes == 2 else ranked.on_grid()
    return {"at": packed(ranked.at), "positives": packed(ranked.positives), "negatives": packed(ranked.negatives)}
