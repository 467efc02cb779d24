"""The page: everything that a template needs, and the template filled in.

It needs no network. Its content security policy allows no request, and no script but the page's own, by its hash. Without scripts every
figure can be read; with them cells, thresholds and galleries answer.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd

from dragonclf.evaluate import curves
from dragonclf.evaluate.charts import reliability_chart
from dragonclf.evaluate.galleries import MAX_GALLERY_CLASSES, Gallery, Picture, captions
from dragonclf.evaluate.html import data_uri, filled, script_hash, source
from dragonclf.evaluate.metrics import Metrics
from dragonclf.evaluate.one_class import one_class_each
from dragonclf.evaluate.page_data import Listed, page_data
from dragonclf.evaluate.slices import SMALL, slicings
from dragonclf.evaluate.training import Training, training_charts

MAX_MATRIX_CLASSES = 20  # with more, the page lists the most frequent confusions instead of a table of K x K cells
MAX_LISTED = 20  # rows of the lists that could be long: images left out, confusions
MAX_TABLE_ROWS = 100  # of the tables of classes and of epochs
THUMBNAILS = ((224, 82), (160, 78), (112, 72), (64, 60))  # (longest side in pixels, JPEG quality); the first that fits


@dataclass(frozen=True)
class Origin:
    """Where predictions came from."""

    facts: Mapping[str, str | Mapping[str, str]] = field(
        default_factory=dict
    )  # by name: model, data set, split and the like
    splits: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # split -> class -> labelled images
    temperature: float = 1.0  # by which the logits were divided
    thresholds: Mapping[str, float] = field(default_factory=dict)  # the model's own, by class, or none
    training: Training | None = None  # where the report is of a run of training


@dataclass(frozen=True)
class Counted:
    """The images that figures count, as `counted_rows` gives them, and the figures."""

    rows: pd.DataFrame
    targets: np.ndarray  # int64 (N,)
    probs: np.ndarray  # float64 (N, K)
    metrics: Metrics


def render(
    counted: Counted,
    *,
    left_out: pd.DataFrame,
    galleries: list[Gallery],
    images: Listed,
    pictures: Mapping[str, Picture],
    title: str,
    origin: Origin,
) -> bytes:
    """Return the page, with the largest thumbnails that keep it under `MAX_PAGE_BYTES`.

    `left_out` has uri, status and error of the rows that no figure counts; `pictures` those of the galleries and of the cells of `images`.
    ValueError if the page is too large with the smallest thumbnails.
    """
    metrics, classes = counted.metrics, [one.name for one in counted.metrics.per_class]
    weakest_first = sorted(metrics.per_class, key=lambda one: 2 if one.f1 is None else one.f1)
    chosen = one_class_each(counted.targets, probs=counted.probs, classes=classes, thresholds=origin.thresholds)
    reliability, before = _reliability(counted, origin.temperature)
    in_galleries = {uri for gallery in galleries for uri in gallery.rows["uri"].tolist()}
    script = source("report.js")
    is_right = counted.probs.argmax(axis=1) == counted.targets
    known = {
        "title": title, "facts": origin.facts, "metrics": metrics, "num_correct": int(np.trace(metrics.confusion)),
        "temperature": origin.temperature, "ece_before": before, "sizes": _sizes(origin.splits), "training": _training(origin.training),
        "left_out": left_out.head(MAX_LISTED).to_dict("records"), "num_left_out": len(left_out),
        "left_out_by_status": by_status(left_out), "classes": classes,
        "matrix": _matrix(metrics) if len(classes) <= MAX_MATRIX_CLASSES else None, "confusions": _confusions(metrics),
        "per_class": metrics.per_class if len(classes) <= MAX_TABLE_ROWS else weakest_first[:MAX_TABLE_ROWS],
        "chosen": chosen, "reliability": reliability, "slicings": slicings(counted.rows, is_right=is_right),
        "small": SMALL, "max_gallery_classes": MAX_GALLERY_CLASSES, "script": script, "script_hash": script_hash(script),
    }  # fmt: skip

    def with_pictures(side: int, quality: int) -> dict[str, Any]:
        sources = {uri: data_uri(one, side, quality) for uri, one in pictures.items() if not isinstance(one, str)}
        sections = _sections(galleries, images, classes=classes, pictures=pictures, sources=sources)
        shown = {tile["actual_index"] for section in sections for one in section["galleries"] for tile in one["tiles"]}
        data = page_data(chosen, images, classes=classes, sources=sources, elsewhere=in_galleries)
        return known | {"sections": sections, "shown_classes": sorted(shown), "data": data}

    return filled("report.html.j2", THUMBNAILS, with_pictures)


def by_status(left_out: pd.DataFrame) -> str:
    """Counts of rows by status, most first, in words."""
    counts = Counter(left_out["status"].tolist())
    most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {status}" for status, count in most_first)


def _sections(
    galleries: list[Gallery],
    images: Listed,
    *,
    classes: list[str],
    pictures: Mapping[str, Picture],
    sources: Mapping[str, str],
) -> list[dict]:
    """The galleries by kind, each with its tiles: a caption, a uri, its place among `images` if any, and a picture or why there is none."""
    place_of = {uri: place for place, uri in enumerate(images.uris)}
    sections = []
    for name, members in groupby(galleries, key=lambda gallery: gallery.section):
        with_tiles = []
        for gallery in members:
            uris, said = gallery.rows["uri"].tolist(), captions(gallery.rows, classes=classes)
            tiles = [
                {"uri": uri, "caption": one, "place": place_of.get(uri), "actual_index": classes.index(one.actual)}
                | ({"source": sources[uri]} if uri in sources else {"reason": pictures[uri]})
                for uri, one in zip(uris, said, strict=True)
            ]
            with_tiles.append({"gallery": gallery, "tiles": tiles})
        sections.append({"name": name, "galleries": with_tiles})
    return sections


def _matrix(metrics: Metrics) -> list[list[dict]]:
    """Cells of the confusion table: images, and their share of the row, 0 to 1 (0 in a row without images)."""
    return [
        [{"num_images": count, "share": count / max(1, sum(row)), "is_right": i == j} for j, count in enumerate(row)]
        for i, row in enumerate(metrics.confusion)
    ]


def _confusions(metrics: Metrics) -> list[dict]:
    """The most frequent pairs of a true and a wrongly predicted class."""
    wrong = np.array(metrics.confusion)
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MAX_LISTED]
    pairs = [(i, j) for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True) if wrong[i, j]]
    names = [one.name for one in metrics.per_class]
    return [
        {
            "actual": names[i], "predicted": names[j], "num_images": int(wrong[i, j]), "actual_index": int(i), "predicted_index": int(j),
        }
        for i, j in pairs
    ]  # fmt: skip


def _reliability(counted: Counted, temperature: float) -> tuple[dict, float | None]:
    """Chart and table of the reliability; the calibration error before calibration, where there was one."""
    now = curves.reliability(counted.targets, probs=counted.probs)
    before = None
    if temperature != 1:
        before = curves.reliability(counted.targets, probs=curves.uncalibrated(counted.probs, temperature=temperature))
    edges = np.linspace(0, 1, curves.NUM_BINS + 1).tolist()
    table = [
        {
            "low": edges[place], "high": edges[place + 1], "num_images": int(count),
            "confidence": float(now.confidence[place]), "accuracy": float(now.accuracy[place]),
        }
        for place, count in enumerate(now.num_images) if count
    ]  # fmt: skip
    return {"chart": reliability_chart(now, before), "rows": table}, before.error if before else None


def _sizes(splits: Mapping[str, Mapping[str, int]]) -> dict | None:
    """The table of a data set's classes, the largest first, by split."""
    names = {
        name: sum(counts.get(name, 0) for counts in splits.values()) for counts in splits.values() for name in counts
    }
    largest_first = sorted(names, key=lambda name: (-names[name], name))[:MAX_TABLE_ROWS]
    return {
        "splits": list(splits), "num_classes": len(names), "totals": [sum(counts.values()) for counts in splits.values()],
        "rows": [(name, [counts.get(name, 0) for counts in splits.values()]) for name in largest_first],
    } if names else None  # fmt: skip


def _training(training: Training | None) -> dict | None:
    if training is None:
        return None
    return {
        "charts": training_charts(training), "columns": list(training.epochs[0]), "epochs": training.epochs[-MAX_TABLE_ROWS:],
        "num_epochs": len(training.epochs),
    }  # fmt: skip
