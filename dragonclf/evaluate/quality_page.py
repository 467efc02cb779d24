"""quality.html: what is wrong with a labelled set, issue by issue, with the images that have it most.

One file that needs no network and runs no script.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dragonclf.evaluate.galleries import read_pictures
from dragonclf.evaluate.html import render

TITLES = {
    "label_error": ("Suspected label errors", "Held out, the model is confident of another class. Start here."),
    "unreadable": ("Unreadable", "Never trained on."),
    "label_conflict": ("Copies with other labels", "Of two images that look the same at most one label is right."),
    "across_splits": ("Copies in other splits", "What the model saw in training tells nothing when it is measured."),
    "exact_duplicate": ("Exact copies", "The same bytes under several addresses, most copies first."),
    "near_duplicate": ("Near copies", "The same picture, encoded or sized anew."),
    "flat": ("Of one colour", "There is nothing to see."),
    "dark": ("Dark", "The darkest first."),
    "blurred": ("Blurred", "Beside the other images of the set, the most blurred first."),
    "odd_size": ("Of an odd size", "Far from the sizes of most."),
    "odd_aspect": ("Of an odd shape", "Long and narrow: a square crop shows little of it."),
    "label_doubt": ("Labels in doubt", "Held out, another class is likelier, and the model is confident of none."),
}


@dataclass(frozen=True)
class Finding:
    """An image with an issue."""

    uri: str
    label: str
    split: str
    detail: str | None  # in words
    other: str | None  # URI of another image that it is about


@dataclass(frozen=True)
class Section:
    """One issue: how many images have it, and those that have it most."""

    issue: str  # a key of `TITLES`
    num_images: int
    worst: Sequence[Finding]


def quality_page(sections: Sequence[Section], *, title: str, num_images: int, num_judged: int) -> bytes:
    """Return the page. `num_images` were looked at, and the labels of `num_judged` of them compared with what a model says.

    Raises StorageError if the store fails, other than an image being gone or broken, which its tile says.
    """
    uris = {one.uri for section in sections for one in section.worst}
    others = {one.other for section in sections for one in section.worst if one.other}
    return render(
        "quality.html.j2", pictures=read_pictures([], others=uris | others), title=title, sections=sections, titles=TITLES,
        num_images=num_images, num_judged=num_judged,
    )  # fmt: skip
