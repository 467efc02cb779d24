"""The pictures worth looking at: what the model got right, what it got wrong, and where it could not tell.

The five kinds of the fastai lesson's "looking at pictures": a few correct ones at random, a few incorrect ones at
random, the most correct and the most incorrect of each class, and the most uncertain.
"""

import io
import re
import textwrap
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from dragonclf import storage
from dragonclf.data.images import ImageError, decode
from dragonclf.evaluate.metrics import counted_rows, probabilities

MAX_PER_GALLERY = 24
MAX_GALLERY_CLASSES = 12  # with more, only the classes with the most mistakes get galleries of their own
PICTURE_SIDE = 224  # pixels of a picture's longest side
READ_THREADS = 8
PNG_COLUMNS = 4


@dataclass(frozen=True)
class Gallery:
    """A few images of one kind. `rows` are rows of the evaluated frame, in the order to show them, maybe none."""

    slug: str  # lower-case ASCII letters, digits and hyphens; unique in an evaluation, whatever the classes are called
    section: str  # the kind: one of the five
    title: str  # the section, and the class for the two kinds that have a gallery per class
    description: str  # one sentence
    rows: pd.DataFrame


@dataclass(frozen=True)
class Caption:
    """What to say under one picture."""

    predicted: str
    actual: str
    prob_predicted: float  # 0 to 1
    prob_actual: float  # 0 to 1; equal to `prob_predicted` where the prediction is right


Picture = np.ndarray | str  # uint8 (H, W, 3), or the reason why there is no picture


def select_galleries(
    frame: pd.DataFrame, *, classes: list[str], per_gallery: int = 8, seed: int = 0, own: list[int] | None = None
) -> list[Gallery]:
    """Choose the images of the five kinds, kind by kind: 3 + 2 K galleries for K classes.

    Past `MAX_GALLERY_CLASSES` classes, only those with the most mistakes get their own two. The choice is a function of
    the rows and the seed: it does not depend on the order of the rows. Ties go by uri. A gallery for which there is no
    image is kept, with no rows.

    Args:
        frame: Scored rows, as `counted_rows` takes them; those that it leaves out are not shown either.
        classes: Names of the K >= 2 classes.
        per_gallery: The most images in a gallery, 1 to `MAX_PER_GALLERY`.
        seed: Seed of the random ones.
        own: Indices of the classes with galleries of their own. None: all, or those with the most mistakes.

    Raises:
        ValueError: `per_gallery` is out of range, or an `input_label` is not one of the classes.
    """
    if not 1 <= per_gallery <= MAX_PER_GALLERY:
        raise ValueError(f"per_gallery is {per_gallery}: choose 1 to {MAX_PER_GALLERY}")
    rows, targets, probs = counted_rows(frame.sort_values("uri", kind="stable"), classes=classes)
    correct = probs.argmax(axis=1) == targets
    prob_of_truth = probs[np.arange(len(rows)), targets]
    top_two = np.partition(probs, -2, axis=1)[:, -2:]

    def drawn(mask: np.ndarray, stream: int) -> pd.DataFrame:
        return rows.iloc[np.random.default_rng((seed, stream)).permutation(np.flatnonzero(mask))[:per_gallery]]

    def first(mask: np.ndarray, score: np.ndarray) -> pd.DataFrame:
        found = np.flatnonzero(mask)
        return rows.iloc[found[np.argsort(score[found], kind="stable")[:per_gallery]]]

    galleries = [
        _gallery("Random correct", drawn(correct, 0), correct, what="predicted right", order="drawn at random"),
        _gallery("Random incorrect", drawn(~correct, 1), ~correct, what="predicted wrong", order="drawn at random"),
    ]
    for section, is_kind, score, what, order in (
        ("Most correct", correct, -prob_of_truth, "predicted right", "the most certain first"),
        ("Most incorrect", ~correct, prob_of_truth, "predicted wrong", "the worst first"),
    ):
        for index in own or classes_shown(targets, correct=correct, num_classes=len(classes)):
            mask = is_kind & (targets == index)
            galleries.append(
                _gallery(section, first(mask, score), mask, what=what, order=order, of_class=(index, classes[index]))
            )
    everything = np.ones(len(rows), dtype=bool)
    uncertain = first(everything, top_two[:, 1] - top_two[:, 0])
    order = "the closest call between the two most probable classes first"
    return [*galleries, _gallery("Most uncertain", uncertain, everything, what="evaluated", order=order)]


def top_losses(frame: pd.DataFrame, *, classes: list[str], per_gallery: int = 8) -> Gallery:
    """Return the images whose true class was thought least probable, right or wrong, the worst first. `frame` as above."""
    rows, targets, probs = counted_rows(frame.sort_values("uri", kind="stable"), classes=classes)
    worst = np.argsort(probs[np.arange(len(rows)), targets], kind="stable")[:per_gallery]
    everything = np.ones(len(rows), dtype=bool)
    order = "the least probable true class first"
    return _gallery("Top losses", rows.iloc[worst], everything, what="evaluated", order=order)


def random_images(frame: pd.DataFrame, *, classes: list[str], per_gallery: int = 8, seed: int = 0) -> Gallery:
    """Return some images, right or wrong. `frame` and `seed` as above."""
    rows, _, _ = counted_rows(frame.sort_values("uri", kind="stable"), classes=classes)
    drawn = np.random.default_rng(seed).permutation(len(rows))[:per_gallery]
    everything = np.ones(len(rows), dtype=bool)
    return _gallery("Random", rows.iloc[drawn], everything, what="evaluated", order="drawn at random")


def classes_shown(targets: np.ndarray, *, correct: np.ndarray, num_classes: int) -> list[int]:
    """Return the indices of the classes with galleries of their own, ascending: all, or those with the most mistakes.

    Args:
        targets: True classes, int (N,).
        correct: Whether each prediction is right, bool (N,).
        num_classes: Number of classes.
    """
    num_wrong = np.bincount(targets[~correct], minlength=num_classes)
    return sorted(np.argsort(-num_wrong, kind="stable")[:MAX_GALLERY_CLASSES].tolist())


def captions(rows: pd.DataFrame, *, classes: list[str]) -> list[Caption]:
    """Return what to say under each of a gallery's rows."""
    return [
        Caption(classes[probs.argmax()], actual, float(probs.max()), float(probs[classes.index(actual)]))
        for probs, actual in zip(probabilities(rows, classes=classes), rows["input_label"].tolist(), strict=True)
    ]


def read_pictures(galleries: Iterable[Gallery], *, others: Iterable[str] = ()) -> dict[str, Picture]:
    """Return the picture of every uri in the galleries and in `others`, each read once, its longest side at most `PICTURE_SIDE` pixels.

    An image that is gone or cannot be decoded gives the reason instead. Every other error of the store is raised.
    """
    uris = sorted({uri for gallery in galleries for uri in gallery.rows["uri"].tolist()} | set(others))
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return dict(zip(uris, pool.map(_read_picture, uris), strict=True))


def draw_gallery(gallery: Gallery, *, pictures: Mapping[str, Picture], classes: list[str]) -> Figure:
    """Return the gallery as a figure, each picture titled "predicted / actual / probability" (of the predicted class)."""
    num_rows = max(1, -(-len(gallery.rows) // PNG_COLUMNS))
    height = 2.75 * num_rows + 0.9  # inches
    figure = Figure(figsize=(2.4 * PNG_COLUMNS, height), dpi=100, facecolor="white")
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.12 / num_rows, top=1 - 1.25 / height, hspace=0.3)
    figure.suptitle(_short(gallery.title, 60), x=0.02, y=1 - 0.15 / height, ha="left", weight="bold", parse_math=False)
    figure.text(0.02, 1 - 0.45 / height, "predicted / actual / probability", va="top", fontsize=9, color="dimgray")
    if gallery.rows.empty:
        figure.text(0.5, 0.4, "none", ha="center", fontsize=14, color="dimgray")
    for index, (uri, caption) in enumerate(
        zip(gallery.rows["uri"].tolist(), captions(gallery.rows, classes=classes), strict=True)
    ):
        axes = figure.add_subplot(num_rows, PNG_COLUMNS, index + 1)
        axes.axis("off")
        is_right = caption.predicted == caption.actual
        axes.set_title(
            f"{_short(caption.predicted, 26)} /\n{_short(caption.actual, 26)} / {caption.prob_predicted:.3f}",
            fontsize=9, color="black" if is_right else "firebrick", parse_math=False,
        )  # fmt: skip
        picture = pictures[uri]
        if isinstance(picture, str):
            axes.imshow(np.full((1, 1, 3), 236, dtype=np.uint8))
            axes.text(0, 0, textwrap.fill(picture, 26), ha="center", va="center", fontsize=8, parse_math=False)
        else:
            axes.imshow(picture)
    return figure


def image_bytes(figure: Figure, kind: Literal["png", "jpg"] = "png") -> bytes:
    """Return a figure as a file. A character that matplotlib's font lacks is drawn as a box, without a warning."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # classes may be named in any script
        figure.savefig(buffer, format=kind)
    return buffer.getvalue()


def _gallery(
    section: str,
    rows: pd.DataFrame,
    mask: np.ndarray,
    *,
    what: str,
    order: str,
    of_class: tuple[int, str] | None = None,
) -> Gallery:
    slug, title = section.lower().replace(" ", "-"), section
    if of_class is not None:
        index, name = of_class
        letters = re.sub(r"[^a-z0-9]+", "-", name.lower())[:40].strip("-")
        slug = f"{slug}-{index}-{letters}".rstrip("-")  # with the index, as two names may share all their letters
        title, what = f"{section}: {name}", f"of {name} {what}"
    num_found = int(mask.sum())
    if num_found == 0:
        return Gallery(slug, section, title, f"None: no image {what}.", rows)
    images = "image" if num_found == 1 else "images"
    return Gallery(slug, section, title, f"{len(rows)} of {num_found:,} {images} {what}, {order}.", rows)


def _read_picture(uri: str) -> Picture:
    try:
        pixels = decode(storage.get(uri))
    except ImageError as error:
        return f"{error.status}: {error.reason}"
    except storage.ObjectMissingError:
        return "missing: the object no longer exists"
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return np.asarray(picture)


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
