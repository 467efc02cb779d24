"""Write an evaluation: figures, predictions, drawings, and one self-contained HTML page to read them on.

The page needs no network and runs no script; its content security policy forbids both. Everything is computed before
anything is written, and the page is written last, so that a page that exists has its files beside it.
"""

import base64
import io
from collections import Counter
from collections.abc import Mapping
from itertools import groupby

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from dragonclf import storage
from dragonclf.evaluate.galleries import (
    MAX_GALLERY_CLASSES,
    Gallery,
    Picture,
    captions,
    draw_gallery,
    image_bytes,
    read_pictures,
    select_galleries,
)
from dragonclf.evaluate.metrics import Metrics, classification_metrics, counted_rows

MAX_REPORT_BYTES = 3_000_000
MAX_MATRIX_CLASSES = 20  # with more, the page lists the most frequent confusions instead of a table of K x K cells
MAX_LISTED = 20  # rows of the lists that could be long: images left out, confusions
MAX_TABLE_CLASSES = 100  # rows of the table of classes
THUMBNAILS = ((224, 82), (160, 78), (112, 72), (64, 60))  # (longest side in pixels, JPEG quality); the first that fits


def write_evaluation(
    frame: pd.DataFrame,
    *,
    classes: list[str],
    out_uri: str,
    title: str,
    facts: Mapping[str, str],
    seed: int = 0,
    per_gallery: int = 8,
) -> Metrics:
    """Write `metrics.json`, `predictions.parquet`, `confusion_matrix.png`, `galleries/<slug>.png`, last `report.html`.

    Args:
        frame: One row per image of the evaluated split: `uri`, `status` ("ok" or a reason), `error` (str or null),
            `input_label` (the true class, may be null), `prob_<class>` (null where status is not ok); further columns
            are kept in the predictions. Figures and galleries use the rows with status ok and a true class; the report
            counts and lists the others.
        classes: Names of the K >= 2 classes, in the model's order.
        out_uri: Folder or prefix to write under. What an earlier evaluation wrote there is replaced.
        title: Heading of the report.
        facts: What was evaluated: model, data set, split and the like, by name.
        seed: Seed of the pictures drawn at random.
        per_gallery: The most pictures in a gallery.

    Raises:
        ValueError: An `input_label` is not one of the classes, no row counts, or `per_gallery` is out of range. Nothing
            was written.
        StorageError: The store failed, other than an image being gone, which its tile says.
    """
    left_out = _left_out(frame)
    _, targets, probs = counted_rows(frame, classes=classes)
    if len(targets) == 0:
        raise ValueError(
            f"no image to measure among {len(frame)} rows ({_by_status(left_out)}): "
            "evaluate a split that holds labelled, readable images"
        )
    metrics = classification_metrics(targets, probs=probs, classes=classes)
    galleries = select_galleries(frame, classes=classes, per_gallery=per_gallery, seed=seed)
    pictures = read_pictures(galleries)
    html = _html(metrics, left_out=left_out, galleries=galleries, pictures=pictures, title=title, facts=facts)
    files = {
        "metrics.json": metrics.model_dump_json(indent=2).encode(),
        "predictions.parquet": _parquet(frame),
        "confusion_matrix.png": image_bytes(draw_confusion(metrics)),
    }
    for gallery in galleries:
        files[f"galleries/{gallery.slug}.png"] = image_bytes(draw_gallery(gallery, pictures=pictures, classes=classes))
    for name, data in {**files, "report.html": html}.items():
        storage.put(storage.join(out_uri, name), data)
    return metrics


def _left_out(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that no figure counts, as text: uri, status ("no true label" where that is all they lack), error."""
    rows = frame[(frame["status"] != "ok") | frame["input_label"].isna()]
    status = rows["status"].where(rows["status"] != "ok", "no true label")
    return pd.DataFrame({"uri": rows["uri"], "status": status, "error": rows["error"].astype(object).fillna("")})


def _by_status(left_out: pd.DataFrame) -> str:
    counts = Counter(left_out["status"].tolist())
    most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {status}" for status, count in most_first)


# The page


def _html(
    metrics: Metrics,
    *,
    left_out: pd.DataFrame,
    galleries: list[Gallery],
    pictures: Mapping[str, Picture],
    title: str,
    facts: Mapping[str, str],
) -> bytes:
    """Render the page with the largest thumbnails that keep it under `MAX_REPORT_BYTES`."""
    environment = Environment(
        loader=PackageLoader("dragonclf.evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "decimal": _decimal}
    template = environment.get_template("report.html.j2")
    classes = [one.name for one in metrics.per_class]
    weakest_first = sorted(metrics.per_class, key=lambda one: 2 if one.f1 is None else one.f1)
    for side, quality in THUMBNAILS:
        shown = {
            uri: {"reason": picture} if isinstance(picture, str) else {"source": _data_uri(picture, side, quality)}
            for uri, picture in pictures.items()
        }
        html = template.render(
            title=title,
            facts=facts,
            metrics=metrics,
            num_correct=int(np.trace(metrics.confusion)),
            left_out=left_out.head(MAX_LISTED).to_dict("records"),
            num_left_out=len(left_out),
            left_out_by_status=_by_status(left_out),
            classes=classes,
            matrix=_matrix(metrics) if len(classes) <= MAX_MATRIX_CLASSES else None,
            confusions=_confusions(metrics),
            per_class=metrics.per_class if len(classes) <= MAX_TABLE_CLASSES else weakest_first[:MAX_TABLE_CLASSES],
            sections=_sections(galleries, classes=classes, shown=shown),
            max_gallery_classes=MAX_GALLERY_CLASSES,
        ).encode()
        if len(html) <= MAX_REPORT_BYTES:
            return html
    raise ValueError(f"the report is over {MAX_REPORT_BYTES:,} bytes with the smallest thumbnails: lower per_gallery")


def _sections(galleries: list[Gallery], *, classes: list[str], shown: Mapping[str, dict]) -> list[dict]:
    """The galleries by kind, each with its tiles: a caption, a uri, and what `shown` has for the uri."""
    sections = []
    for name, members in groupby(galleries, key=lambda gallery: gallery.section):
        with_tiles = []
        for gallery in members:
            uris, said = gallery.rows["uri"].tolist(), captions(gallery.rows, classes=classes)
            tiles = [{"uri": uri, "caption": one, **shown[uri]} for uri, one in zip(uris, said, strict=True)]
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
    return [
        {"actual": metrics.per_class[i].name, "predicted": metrics.per_class[j].name, "num_images": int(wrong[i, j])}
        for i, j in pairs
    ]


def _data_uri(picture: np.ndarray, side: int, quality: int) -> str:
    thumbnail, buffer = Image.fromarray(picture), io.BytesIO()
    thumbnail.thumbnail((side, side))
    thumbnail.save(buffer, format="JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _percent(share: float) -> str:
    """One decimal, on one line, and never 0.0 or 100.0 % for a share that is neither."""
    if 0 < share < 0.0005:
        return "<\N{NO-BREAK SPACE}0.1\N{NO-BREAK SPACE}%"
    if 0.9995 <= share < 1:
        return ">\N{NO-BREAK SPACE}99.9\N{NO-BREAK SPACE}%"
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


# The other files


def _parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def draw_confusion(metrics: Metrics) -> Figure:
    """Return the confusion matrix as a figure, shaded by share of the row; with numbers and names while they can be read."""
    counts = np.array(metrics.confusion)
    num_classes = len(counts)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    side = min(16.0, 3.2 + 0.55 * num_classes)
    figure = Figure(figsize=(side + 0.6, side), dpi=120, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="actual", xticks=range(num_classes), yticks=range(num_classes))
    if num_classes <= MAX_MATRIX_CLASSES:
        names = [one.name if len(one.name) <= 24 else f"{one.name[:23]}…" for one in metrics.per_class]
        axes.set_xticklabels(names, rotation=30, ha="right", parse_math=False)
        axes.set_yticklabels(names, parse_math=False)
        for (i, j), count in np.ndenumerate(counts):
            axes.text(j, i, f"{count:,}", ha="center", va="center", color="white" if shares[i, j] > 0.55 else "black")
    else:
        axes.set(xticks=[], yticks=[], title=f"{num_classes} classes, in the model's order")
    return figure
