"""Write an evaluation: figures, predictions, drawings, and one self-contained HTML page to read them on.

Everything is computed before anything is written, and the page is written last, so that a page that exists has its files
beside it.
"""

import io

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dragonclf import storage
from dragonclf.evaluate.galleries import draw_gallery, image_bytes, read_pictures, select_galleries
from dragonclf.evaluate.metrics import Metrics, classification_metrics, counted_rows
from dragonclf.evaluate.page import MAX_MATRIX_CLASSES, Counted, Origin, by_status, render
from dragonclf.evaluate.page_data import listed


def write_evaluation(
    frame: pd.DataFrame,
    *,
    classes: list[str],
    out_uri: str,
    title: str,
    origin: Origin,
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
        origin: What the report tells of the model and the data beside the rows themselves.
        seed: Seed of the pictures drawn at random.
        per_gallery: The most pictures in a gallery.

    Raises:
        ValueError: An `input_label` is not one of the classes, no row counts, or `per_gallery` is out of range. Nothing
            was written.
        StorageError: The store failed, other than an image being gone, which its tile says.
    """
    left_out = _left_out(frame)
    rows, targets, probs = counted_rows(frame, classes=classes)
    if len(targets) == 0:
        raise ValueError(
            f"no image to measure among {len(frame)} rows ({by_status(left_out)}): "
            "evaluate a split that holds labelled, readable images"
        )
    metrics = classification_metrics(targets, probs=probs, classes=classes)
    galleries = select_galleries(frame, classes=classes, per_gallery=per_gallery, seed=seed)
    images = listed(rows, targets=targets, probs=probs)
    pictures = read_pictures(galleries, others=images.uris_in_cells)
    counted = Counted(rows, targets, probs, metrics)
    html = render(
        counted, left_out=left_out, galleries=galleries, images=images, pictures=pictures, title=title, origin=origin
    )
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
