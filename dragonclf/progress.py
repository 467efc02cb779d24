"""Progress of a job: a live bar on a terminal, a plain line every few seconds without one. All of it on stderr."""

import contextlib
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from dragonclf.busy import Busy

log = logging.getLogger("dragonclf")

LINE_EVERY_S = 5.0


class Tally:
    """What a job has come to so far. Images done before it began, or kept of an earlier run, are no part of its rates."""

    def __init__(self, verb: str, total: int):
        self.verb, self.total = verb, total
        self.started_s = self._said_s = time.monotonic()
        self.done = self.read = self._said_read = (
            0  # images with a row; of these, read by this call; of these, at the last line
        )
        self.counts: Counter[str] = Counter()
        self.busy = Busy()
        self.show: Callable[[int], None] = self._say

    def add(
        self, num_images: int, *, read: int = 0, counts: dict[str, int] | None = None, busy: Busy | None = None
    ) -> None:
        """Note `num_images` more that have a row, `read` of them read, their `counts` by status and what workers did meanwhile."""
        self.done += num_images
        self.read += read
        self.counts.update(counts or {})
        self.busy += busy or Busy()
        self.show(num_images)

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.started_s, 1e-9)

    @property
    def not_ok(self) -> str:
        return ", ".join(f"{count:,} {status}" for status, count in sorted(self.counts.items()) if status != "ok")

    def _say(self, num_images: int) -> None:
        now = time.monotonic()
        if now - self._said_s < LINE_EVERY_S and not (self.done == self.total and num_images):
            return
        current = (self.read - self._said_read) / max(now - self._said_s, 1e-9)
        overall = self.read / max(now - self.started_s, 1e-9)
        self._said_s, self._said_read = now, self.read
        left = f", {_duration((self.total - self.done) / overall)} left" if overall and self.done < self.total else ""
        bad = f" ({self.not_ok})" if self.not_ok else ""
        busy = f" [{self.busy}]" if self.busy.wall_s else ""
        log.info(
            "%s: %s of %s images, %.0f/s now, %.0f/s overall%s%s%s",
            self.verb, f"{self.done:,}", f"{self.total:,}", current, overall, left, bad, busy,
        )  # fmt: skip


@contextlib.contextmanager
def images(verb: str, total: int) -> Iterator[Tally]:
    """Yield a tally of a job over `total` images that shows itself whenever something is added."""
    tally = Tally(verb, total)
    if not sys.stderr.isatty():
        yield tally
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(verb, total=total)

        def show(num_images: int) -> None:
            rate = f"{tally.read / tally.seconds:.0f}/s"
            words = [
                verb,
                rate,
                f"({tally.not_ok})" if tally.not_ok else "",
                f"{tally.busy}" if tally.busy.wall_s else "",
            ]
            bar.update(task, advance=num_images, description=" ".join(filter(None, words)))

        tally.show = show
        yield tally


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
