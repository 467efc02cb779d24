"""review.html: pictures to decide on, by keyboard, one file that needs no network and ends in corrections.csv.

The page's one script is `templates/review.js`, which its content security policy admits by hash; the policy forbids all else.
"""

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from PIL import Image

from dragonclf import storage
from dragonclf.data.images import ImageError, decode
from dragonclf.evaluate.html import MAX_PAGE_BYTES, environment, script_hash, source

KEYS = 9  # 1 to 9 choose a class; of more classes, the likeliest of the picture
SIZES = ((384, 84), (320, 82), (256, 80), (192, 76), (128, 70), (96, 60), (64, 50))  # (longest side, JPEG quality)
READ_THREADS = 8


@dataclass(frozen=True)
class Candidate:
    """An image to decide on."""

    uri: str
    etag: str | None  # of the bytes that were predicted
    label: str | None  # what it is labelled now
    predicted: str
    prob_predicted: float  # 0 to 1
    prob_label: float | None  # of `label`; None: it has none, or the model does not know it
    likeliest: list[str]  # up to `KEYS` classes, the likeliest first


def read_thumbnails(images: Sequence[tuple[str, str | None]]) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return a JPEG of each image by uri, its longest side at most 384 pixels, and for those without one the reason.

    `images` are (uri, etag). One that is gone, was replaced since or cannot be decoded gives a reason; every other error of the store is
    raised. Memory: a few decoded images at a time.
    """
    with ThreadPoolExecutor(READ_THREADS) as pool:
        found = dict(zip((uri for uri, _ in images), pool.map(lambda one: _thumbnail(*one), images), strict=True))
    return (
        {uri: one for uri, one in found.items() if isinstance(one, bytes)},
        {uri: one for uri, one in found.items() if isinstance(one, str)},
    )


def render_review(
    candidates: Sequence[Candidate], *, thumbnails: Mapping[str, bytes], classes: list[str], run: str, order: str
) -> bytes:
    """Return the page with the largest pictures that keep it under `MAX_PAGE_BYTES`.

    Args:
        candidates: What to decide on, one or more, in the order to show it.
        thumbnails: A JPEG of each, by uri, as `read_thumbnails` gives them.
        classes: What a label can become.
        run: Where the predictions are. The browser keeps progress under this name.
        order: How the pictures were chosen, to end the sentence "200 pictures, ...".

    Raises:
        ValueError: There are too many pictures for the page.
    """
    script, template = source("review.js"), environment().get_template("review.html.j2")
    data = {"run": run, "classes": classes, "items": [asdict(one) for one in candidates]}
    for sources in _sources([thumbnails[one.uri] for one in candidates]):
        html = template.render(
            script=script,
            script_hash=script_hash(script),
            data=json.dumps(data).replace("<", r"\u003c"),  # no tag can begin in it
            candidates=list(zip(candidates, sources, strict=True)),
            labels=sorted({one.label or one.predicted for one in candidates}),
            classes=classes,
            has_more=len(classes) > KEYS,
            has_unlabelled=any(one.label is None for one in candidates),
            run=run,
            order=order,
        ).encode()
        if len(html) <= MAX_PAGE_BYTES:
            return html
    raise ValueError(f"{len(candidates):,} pictures are over {MAX_PAGE_BYTES:,} bytes however small: lower --worst")


def _thumbnail(uri: str, etag: str | None) -> bytes | str:
    side, quality = SIZES[0]
    found = storage.get_if_exists(uri)
    if found is None:
        return "missing: the object no longer exists"
    if etag is not None and found[1] != etag:
        return "replaced: it is not what was scored; score it again"
    try:
        pixels = decode(found[0], min_side=side)
    except ImageError as error:
        return f"{error.status}: {error.reason}"
    return _jpeg(Image.fromarray(pixels.permute(1, 2, 0).numpy()), side, quality)


def _sources(jpegs: list[bytes]) -> Iterator[list[str]]:
    """The pictures as data URIs in each size, the largest first, but for sizes in which they alone are more than a page."""
    for side, quality in SIZES:
        sources: list[str] = []
        room = MAX_PAGE_BYTES
        for jpeg in jpegs:
            sources.append(_data_uri(jpeg, side, quality))
            room -= len(sources[-1])
            if room < 0:
                break  # so that many pictures are neither all encoded nor all held in each size
        else:
            yield sources


def _data_uri(jpeg: bytes, side: int, quality: int) -> str:
    if side != SIZES[0][0]:
        with Image.open(io.BytesIO(jpeg)) as image:
            jpeg = _jpeg(image, side, quality)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _jpeg(image: Image.Image, side: int, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.thumbnail((side, side))
    image.save(buffer, format="JPEG", quality=quality, optimize=True)
    return buffer.getvalue()
