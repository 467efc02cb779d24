"""Which of the listed rows a run is about: `--include`, `--exclude`, `--limit`, `--sample`."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dragonclf.config import ListingConfig
from dragonclf.data import listing
from dragonclf.storage import globs

FIELDS = tuple(ListingConfig.model_fields)


def selection_id(config: ListingConfig) -> dict[str, Any]:
    """What of the selection belongs into a run's spec: the options that were given. The order of patterns does not count."""
    given = config.model_dump(include=set(FIELDS), exclude_defaults=True)
    return {name: sorted(set(value)) if isinstance(value, list) else value for name, value in given.items()}


def select(tables: Iterator[pa.Table], source: str, config: ListingConfig) -> Iterator[pa.Table]:
    """Yield the rows that the options choose, in their order. Equal rows and options give equal results.

    Memory is constant; `sample` holds at most three times as many rows as it chooses. With `limit` the listing ends early. Raises
    ValueError if nothing is chosen.
    """
    chosen = _matching(tables, source, config) if config.include or config.exclude else tables
    if config.limit is not None:
        chosen = _first(chosen, config.limit)
    if config.sample is not None:
        chosen = _sample(chosen, config.sample, config.sample_seed)
    is_empty = True
    for table in chosen:
        is_empty = False
        yield table
    if is_empty:
        filters = [f"--{name} {value!r}" for name in ("include", "exclude") for value in getattr(config, name)]
        raise ValueError(
            f"nothing of {source} is left by {' '.join(filters)}: patterns match keys below it, case counts"
        )


def relative_keys(uris: pa.ChunkedArray | pa.Array, base: str) -> pa.Array:
    """Keys as patterns see them: below `base`; what lies elsewhere, by its key in its bucket, or its path without the first slash."""
    if isinstance(uris, pa.ChunkedArray):
        uris = uris.combine_chunks()
    start = f"{base.removesuffix('/')}/"
    elsewhere = pc.replace_substring_regex(uris, r"^(?:s3://[^/]*/|/)", "")  # pyright: ignore[reportAttributeAccessIssue]
    below = pc.utf8_slice_codeunits(uris, len(start))  # pyright: ignore[reportAttributeAccessIssue]
    return pc.if_else(pc.starts_with(uris, start), below, elsewhere)  # pyright: ignore[reportAttributeAccessIssue]


def _matching(tables: Iterator[pa.Table], source: str, config: ListingConfig) -> Iterator[pa.Table]:
    base = listing.base(source)
    for table in tables:
        keys = relative_keys(table["uri"], base)
        keep = _any_of(config.include, keys) if config.include else pa.array(np.ones(len(keys), dtype=bool))
        if config.exclude:
            keep = pc.and_not(keep, _any_of(config.exclude, keys))  # pyright: ignore[reportAttributeAccessIssue]
        table = table.filter(keep)
        if table.num_rows:
            yield table


def _any_of(patterns: list[str], keys: pa.Array) -> pa.Array:
    whole = "|".join(f"(?:{globs.regex(pattern)})" for pattern in patterns)
    return pc.match_substring_regex(keys, whole)  # pyright: ignore[reportAttributeAccessIssue]


def _first(tables: Iterator[pa.Table], count: int) -> Iterator[pa.Table]:
    for table in tables:
        yield table.slice(0, count)
        count -= table.num_rows
        if count <= 0:
            return


def _sample(tables: Iterator[pa.Table], count: int, seed: int) -> Iterator[pa.Table]:
    """The rows whose uris have the `count` least hashes: what is chosen does not depend on what else was nearly chosen."""
    kept: list[pa.Table] = []
    ranks = np.empty(0, np.uint64)
    for table in tables:
        found = _ranks(table["uri"].to_pylist(), seed)
        if len(ranks) >= count:
            near = found < ranks.max()
            table, found = table.filter(pa.array(near)), found[near]
        kept.append(table)
        ranks = np.concatenate([ranks, found])
        if len(ranks) > 2 * count:
            kept, ranks = _least(kept, ranks, count)
    if kept:
        yield from _least(kept, ranks, count)[0]


def _least(tables: list[pa.Table], ranks: np.ndarray, count: int) -> tuple[list[pa.Table], np.ndarray]:
    places = np.sort(np.argsort(ranks, kind="stable")[:count])
    return [pa.concat_tables(tables).take(pa.array(places))], ranks[places]


def _ranks(uris: list[str], seed: int) -> np.ndarray:
    start = hashlib.blake2b(f"{seed}\n".encode(), digest_size=8)
    ranks = np.empty(len(uris), np.uint64)
    for place, uri in enumerate(uris):
        one = start.copy()
        one.update(uri.encode())
        ranks[place] = int.from_bytes(one.digest(), "little")
    return ranks
