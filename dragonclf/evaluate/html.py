"""Pages that stand alone: a template filled in, in the look that all share, with its pictures as small as the page needs them.

They need no network, and their content security policy allows none. All text is escaped.
"""

import base64
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from dragonclf.evaluate.galleries import Picture

MAX_PAGE_BYTES = 6_000_000
THUMBNAILS = ((160, 78), (112, 72), (64, 60))  # (longest side in pixels, JPEG quality); the first that fits


def render(template: str, *, pictures: Mapping[str, Picture], **known: Any) -> bytes:
    """Return the page that a template makes of what is `known`, under `MAX_PAGE_BYTES` by the size of its pictures.

    The template also has `shown`, by uri {"source": a data URI} or {"reason": why there is none}. Raises as `filled` does.
    """

    def with_pictures(side: int, quality: int) -> dict[str, Any]:
        shown = {
            uri: {"reason": picture} if isinstance(picture, str) else {"source": data_uri(picture, side, quality)}
            for uri, picture in pictures.items()
        }
        return known | {"shown": shown}

    return filled(template, THUMBNAILS, with_pictures)


def filled(template: str, sizes: Sequence[tuple[int, int]], known: Callable[[int, int], dict[str, Any]]) -> bytes:
    """Return the page with the largest pictures that keep it under `MAX_PAGE_BYTES`.

    `known` gives what the template needs, with pictures of a longest side, in pixels, and a JPEG quality: those of `sizes`, in turn. The
    template also has `style`, the sheet of all pages. ValueError if the page is too large with the smallest pictures.
    """
    made, style = environment().get_template(template), source("report.css")
    for side, quality in sizes:
        html = made.render(known(side, quality), style=style).encode()
        if len(html) <= MAX_PAGE_BYTES:
            return html
    raise ValueError(f"the page is over {MAX_PAGE_BYTES:,} bytes with the smallest pictures: ask for fewer")


def environment() -> Environment:
    """Where all templates come from: what they show is escaped, and what they do not know is an error."""
    made = Environment(
        loader=PackageLoader("dragonclf.evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"percent": percent, "decimal": decimal, "exact": exact, "short": short, "points": points}
    return made


def source(name: str) -> str:
    """A sheet or script beside the templates."""
    return resources.files("dragonclf.evaluate").joinpath(f"templates/{name}").read_text()


def script_hash(script: str) -> str:
    """As a content security policy names the one script that it allows."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def data_uri(picture: np.ndarray, side: int, quality: int) -> str:
    """A picture, uint8 (H, W, 3), as a JPEG of that longest side, in pixels, or less."""
    thumbnail, buffer = Image.fromarray(picture), io.BytesIO()
    thumbnail.thumbnail((side, side))
    thumbnail.save(buffer, format="JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def percent(share: float | None) -> str:
    """One decimal, on one line, and never 0.0 or 100.0 % for a share that is neither."""
    if share is None:
        return "–"
    if 0 < share < 0.0005:
        return "<\N{NO-BREAK SPACE}0.1\N{NO-BREAK SPACE}%"
    if 0.9995 <= share < 1:
        return ">\N{NO-BREAK SPACE}99.9\N{NO-BREAK SPACE}%"
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign."""
    rounded = round(100 * difference, 1)
    return f"{'+' if rounded > 0 else '−' if rounded < 0 else ''}{abs(rounded):.1f}"


def decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def exact(value: float | None) -> str:
    """For programs that read the page: all digits."""
    return "" if value is None else repr(float(value))


def short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"
