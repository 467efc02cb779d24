"""Progress of a job: a live bar on a terminal, a plain line every few seconds without one. All of it on stderr."""

import contextlib
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

log = logging.getLogger("dragonclf")

LINE_EVERY_S = 5.0

Advance = Callable[[int, dict[str, int]], None]


@contextlib.contextmanager
def images(verb: str, total: int) -> Iterator[Advance]:
    """Yield a function that takes (images just done, their counts by status). Says the rate and what was not ok.

    Images without counts were done before: they are progress, and no part of the rate.
    """
    started = time.monotonic()
    counts: Counter[str] = Counter()
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(verb, total=total)

            def advance(count: int, by_status: dict[str, int]) -> None:
                counts.update(by_status)
                bar.update(task, advance=count, description=f"{verb} {_not_ok(counts)}".strip())

            yield advance
        return
    done, last = 0, started

    def say(count: int, by_status: dict[str, int]) -> None:
        nonlocal done, last
        done += count
        counts.update(by_status)
        now = time.monotonic()
        if now - last >= LINE_EVERY_S or (done == total and count):
            rate = sum(counts.values()) / max(now - started, 1e-9)
            log.info("%s: %s of %s images, %.0f/s %s", verb, f"{done:,}", f"{total:,}", rate, _not_ok(counts))
            last = now

    yield say


def _not_ok(counts: Counter[str]) -> str:
    bad = [f"{count:,} {status}" for status, count in sorted(counts.items()) if status != "ok"]
    return f"({', '.join(bad)})" if bad else ""
