"""List one prefix by many requests at once, with the result and in the order of a serial listing.

The keys that are not listed yet are cut into ranges, each from a start (exclusive) to an end (inclusive), which cover them without a gap
or an overlap whatever the cuts are. A worker pages through its range. A worker without one takes the upper half of the range that is
thought to have most left, and begins there by ListObjectsV2's StartAfter: if nothing is there, the halved range has merely lost
emptiness. So keys decide only how fast it goes. Where to cut is guessed from the characters of the keys seen so far.

Pages go through a temporary folder, about 100 bytes a key, which is deleted when the listing ends. Memory holds the ranges: fewer than
there are pages.
"""

import concurrent.futures
import contextlib
import json
import logging
import os
import tempfile
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from dragonclf.storage.key_space import KeySpace, is_ordered

log = logging.getLogger("dragonclf")

NUM_REQUESTS = 32  # at once
MIN_BEGINNINGS = 4  # of 2, 3, 4, 8 the quickest for keys named by numbers, hashes, dates and classes

Entry = tuple[str, str, int]  # key, etag, size in bytes


@dataclass(frozen=True)
class Page:
    """One answer of ListObjectsV2."""

    entries: list[Entry]
    token: str | None  # continues after it; None: it was the last page
    may_split: bool = True  # False: the store is known not to list by key, or not to honour StartAfter


class ListPage(Protocol):
    """Lists one page: the first, the one after a key (which need not exist), or the one that a token continues with."""

    def __call__(self, *, start_after: str | None = None, token: str | None = None) -> Page: ...


class _DisorderError(Exception):
    """The store's order is not that of the keys' bytes."""


def list_entries(list_page: ListPage, prefix: str, *, num_requests: int = NUM_REQUESTS) -> Iterator[Entry]:
    """Yield what a serial listing yields, in its order, each key once, in memory that does not grow with the number of keys.

    A listing of one page costs one request. After the first page `num_requests` go on at once.

    That is exact in a store that lists by the keys' bytes and begins after any StartAfter, as S3 promises. Whether this one does is tried
    within the first page, whose order must be that of the bytes and whose rest StartAfter must give; if not, or if the store is known
    not to, the listing is serial, in the store's own order, and as exact. After a later page out of order it is serial too; the keys
    yielded before are then held in memory, so as not to be yielded again. Not noticed is only a store that passes all that and yet
    skips keys after a StartAfter.

    Objects that are written or deleted meanwhile are listed or not, as in a serial listing. Raises what `list_page` raises.
    """
    first = list_page()
    yield from first.entries
    if first.token is None:
        return
    seen: set[str] = set()
    if first.may_split and first.entries and is_ordered([key for key, _, _ in first.entries]):
        num_yielded = 0
        with _Parallel(list_page, prefix, first.entries, num_requests) as parallel:
            try:
                parallel.wait_for_trials()
                for entry in parallel.entries():
                    num_yielded += 1
                    yield entry
                return
            except _DisorderError:
                log.info("listing serially: the store does not list by the bytes of the keys")
                seen.update(key for key, _, _ in islice(parallel.entries(), num_yielded))
    token: str | None = first.token
    while token is not None:
        page = list_page(token=token)
        yield from (entry for entry in page.entries if entry[0] not in seen)
        token = page.token


@dataclass(eq=False)
class _Range:
    """The keys after one key, to `end` (None: to the prefix's last), as far as they are listed."""

    path: str  # of the pages that wait for the consumer, a line each
    after: str  # the last key that is listed; before the first page, where it begins
    end: str | None
    next: "_Range | None" = None
    left: float = 0.0  # pages that it is thought to have left; 0 if nothing is known yet
    token: str | None = None
    num_pages: int = 0
    is_done: bool = False


class _Parallel:
    """The ranges of one listing and the workers on them. Use it as a context manager: leaving it ends workers and deletes files.

    Leaving waits for the requests under way: in a store that does not answer, as long as a request is tried again.
    """

    def __init__(self, list_page: ListPage, prefix: str, first: list[Entry], num_requests: int):
        self._list_page, self._prefix, self._num_requests = list_page, prefix, num_requests
        self._first = [key for key, _, _ in first]
        self._changed = threading.Condition()  # guards everything below
        self._stopped = False
        self._num_ranges = 0
        self._space = KeySpace(prefix)
        self._space.learn(self._first)
        self._exit = contextlib.ExitStack()
        self._folder = self._exit.enter_context(tempfile.TemporaryDirectory(prefix="dragonclf-listing-"))
        self._unlisted: deque[_Range] = deque()
        self._listing: list[_Range] = []
        self._head = self._new(self._first[-1], None, None)
        self._cut_by_beginnings(self._head, self._first[0])
        self._head.left = self._space.pages_left(self._first[0], self._first[-1], self._head.end)
        self._unlisted.appendleft(self._head)
        pool = self._exit.enter_context(concurrent.futures.ThreadPoolExecutor(num_requests, "dragonclf-listing"))
        self._trials = [pool.submit(self._try, cut) for cut in self._trial_cuts()]
        self._workers = [pool.submit(self._work) for _ in range(num_requests)]
        for future in (*self._trials, *self._workers):
            future.add_done_callback(lambda _: self._notify())

    def __enter__(self) -> "_Parallel":
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._exit.close()

    def wait_for_trials(self) -> None:
        """Raises _DisorderError if StartAfter does not do what the ranges need."""
        for trial in self._trials:
            trial.result()

    def entries(self) -> Iterator[Entry]:
        """Yield all keys after the first page; the same ones first if it is called again. Raises what a worker raised."""
        part: _Range | None = self._head
        while part is not None:
            yield from self._entries_of(part)
            part = part.next

    def _entries_of(self, part: _Range) -> Iterator[Entry]:
        num_read = offset = 0
        while True:
            with self._changed:
                while part.num_pages == num_read and not part.is_done:
                    for worker in self._workers:
                        if worker.done():
                            worker.result()
                    self._changed.wait()
                num_pages = part.num_pages
            if num_pages == num_read:
                break
            with open(part.path, "rb") as file:
                file.seek(offset)
                for _ in range(num_read, num_pages):
                    yield from map(tuple, json.loads(file.readline()))
                offset = file.tell()
            num_read = num_pages

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # --- workers

    def _work(self) -> None:
        while (part := self._take()) is not None:
            while not part.is_done and not self._stopped:
                self._list(part)

    def _take(self) -> _Range | None:
        """A range to list, as soon as there is one; None: all is listed, or under way and too little to share."""
        with self._changed:
            while not self._stopped:
                part = self._unlisted.popleft() if self._unlisted else self._halve()
                if part is not None:
                    self._listing.append(part)
                    return part
                if not self._listing:
                    break
                self._changed.wait()
            return None

    def _halve(self) -> _Range | None:
        """Take the upper half of the range with most left; None if there is not more than a page."""
        while True:
            part = max(self._listing, key=lambda part: part.left, default=None)
            if part is None or part.left <= 1:
                return None
            cut = self._space.middle(part.after, part.end)
            if cut is not None:
                half = self._new(cut, part.end, part.next)
                part.end, part.next = cut, half
                half.left = part.left = part.left / 2
                return half
            part.left = 0

    def _list(self, part: _Range) -> None:
        """List one more page of a range."""
        page = self._list_page(token=part.token) if part.token else self._list_page(start_after=part.after)
        keys = [key for key, _, _ in page.entries]
        if not is_ordered(keys) or (keys and keys[0] <= part.after):
            raise _DisorderError
        with self._changed:
            self._space.learn(keys)
            # The end may have come down since the request: what is beyond it belongs to another range by now.
            num_own = len(keys) if part.end is None else bisect_right(keys, part.end)
            is_last = page.token is None or num_own < len(keys) or (num_own > 0 and keys[num_own - 1] == part.end)
            is_first, part.token = part.token is None, page.token
            if num_own:
                part.after = keys[num_own - 1]  # from here on the range is cut after this key only
            if num_own and not is_last:
                if is_first:
                    self._cut_by_beginnings(part, keys[0])
                part.left = self._space.pages_left(keys[0], part.after, part.end)
            else:
                part.left = 0
            self._changed.notify_all()
        entries = page.entries[:num_own]
        if entries:
            with open(part.path, "ab") as file:
                file.write(json.dumps(entries).encode() + b"\n")
        with self._changed:
            part.num_pages += bool(entries)
            if is_last:
                part.is_done = True
                self._listing.remove(part)
            self._changed.notify_all()

    def _new(self, after: str, end: str | None, following: _Range | None) -> _Range:
        self._num_ranges += 1
        return _Range(os.path.join(self._folder, str(self._num_ranges)), after, end, following)

    def _cut_by_beginnings(self, part: _Range, first: str) -> None:
        """Cut what the first page of a range, from `first` to `part.after`, leaves of it, for the workers that are idle and a few more."""
        num_idle = self._num_requests - len(self._listing) - len(self._unlisted)
        cuts = self._space.beginnings(first, part.after, part.end, count=max(MIN_BEGINNINGS, num_idle))
        for cut in reversed(cuts):
            part.next = self._new(cut, part.end, part.next)
            part.end = cut
            self._unlisted.appendleft(part.next)

    # --- trials

    def _trial_cuts(self) -> list[str]:
        """Where to try StartAfter, within the first page: between two keys, and just before a folder, by its name without the slash."""
        keys, start = self._first, len(self._prefix) + 1
        middle = len(keys) // 2
        cuts = [self._space.middle(keys[middle - 1], keys[middle])] if len(keys) > 1 else []
        cuts.append(next((key[: key.index("/", start)] for key in keys if "/" in key[start:]), None))
        return [cut for cut in cuts if cut is not None]

    def _try(self, cut: str) -> None:
        expected = [key for key in self._first if key > cut]
        found = [key for key, _, _ in self._list_page(start_after=cut).entries][: len(expected)]
        if not found or found != expected[: len(found)]:
            raise _DisorderError
