"""Recipe files: options of `train` as TOML, to be kept, handed on and given back.

    [about]             a record for people: data, accuracy, time, command
    [train]             options by their names in Python: crop_pct, not crop-pct

A recipe says what is trained and how, not on which data, where and under which name. A run's args.toml is one.
"""

import difflib
import json
import tomllib
from collections.abc import Iterable
from importlib import resources
from typing import Any

from pydantic import BaseModel

from dragonclf import storage

SUFFIX = ".toml"
_PLACES = {"data", "out", "name", "address", "recipe"}  # options of `train` that no recipe has

Value = str | int | float | bool | list[Any]


class Recipe(BaseModel):
    """A recipe file's two tables."""

    about: dict[str, Any] = {}
    train: dict[str, Any] = {}


def read(recipe: str, options: Iterable[str]) -> Recipe:
    """Return the recipe at a path or URI, or the one of that name that comes with this package.

    ValueError if there is none, it is no TOML, or it has what is not among `options`, the fields of `train`; StorageError.
    """
    found = None if recipe in shipped() else storage.get_if_exists(storage.resolve(recipe))
    if recipe in shipped():
        content = resources.files("dragonclf").joinpath("recipes", recipe + SUFFIX).read_bytes()
    elif found:
        content = found[0]
    else:
        raise ValueError(f"there is no recipe {recipe!r}: give a TOML file, or one of {', '.join(shipped())}")
    try:
        tables = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the recipe {recipe!r} is no TOML: {error}") from error
    _check(recipe, tables, set(options))
    return Recipe.model_validate(tables)


def shipped() -> list[str]:
    """Names of the recipes that come with this package."""
    folder = resources.files("dragonclf").joinpath("recipes")
    return sorted(path.name.removesuffix(SUFFIX) for path in folder.iterdir() if path.name.endswith(SUFFIX))


def as_toml(recipe: Recipe) -> str:
    """The file that `read` gives back as it was. An option that is None, for which TOML has no word, is left out."""
    blocks = []
    for name, table in recipe.model_dump().items():
        lines = [f"{key} = {_text(value)}" for key, value in table.items() if value is not None]
        blocks.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def _check(recipe: str, tables: dict[str, Any], options: set[str]) -> None:
    known = Recipe.model_fields
    for name, table in tables.items():
        if name not in known or not isinstance(table, dict):
            raise ValueError(f"the recipe {recipe!r} has {name!r} beside its tables {' and '.join(known)}: remove it")
    for name in tables.get("train", {}):
        if name in _PLACES:
            raise ValueError(f"the recipe {recipe!r} has {name!r}, which is for the command to say: remove it")
        if name not in options:
            close = difflib.get_close_matches(name, options - _PLACES, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else "see `dragonclf train --help`, with underscores"
            raise ValueError(f"the recipe {recipe!r} has {name!r}, which is no option of train: {hint}")


def _text(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):  # JSON's escapes are TOML's, but for one character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"[{', '.join(map(_text, value))}]" if isinstance(value, list) else repr(value)
