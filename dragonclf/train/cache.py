"""Images on the disk of a training node, so that each is read from storage once and not once an epoch.

FOLDER/ab/abcdef...-KIND    KIND names what was done to the bytes, so that an entry's content follows from its name

Entries are named by the SHA-256 of the object that they come from: equal images of different runs, snapshots or addresses share one. All
workers of a node, and later runs, share the folder. An entry appears whole or not at all; one that is damaged is as good as none.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import threading
from pathlib import Path

log = logging.getLogger("dragonclf")

MIN_FREE = 0.1  # of the disk: less is left to others
CHECKED_EVERY = 256  # entries between looks at the disk


def user_folder() -> Path:
    """Where this user's cache is on this node, if nobody says otherwise."""
    return Path(tempfile.gettempdir(), f"dragonclf-cache-{os.getuid()}")


class ImageCache:
    """A folder of entries. Made if need be, for this user alone; the entries used least lately are deleted where the disk is full."""

    def __init__(self, folder: Path, *, min_free: float = MIN_FREE):
        self._folder, self._min_free = folder, min_free
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise ValueError(f"the image cache {folder} belongs to another user: choose another --cache-dir")
        self._make_room()
        self._written, self._is_full = 0, False

    def has(self, name: str) -> bool:
        """Whether there is such an entry, sound or damaged."""
        return self._path(name).exists()

    def get(self, name: str) -> bytes | None:
        """The entry, or None."""
        path = self._path(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        with contextlib.suppress(OSError):  # it was deleted meanwhile
            os.utime(path)
        return data

    def put(self, name: str, data: bytes) -> None:
        """Keep the entry, if there is room."""
        if self._written % CHECKED_EVERY == 0:
            was_full, self._is_full = self._is_full, self._is_short()
            if self._is_full and not was_full:
                log.warning(
                    "the disk of %s is %.0f%% full: further images are read from storage every epoch: --cache-dir chooses another",
                    self._folder, 100 * (1 - self._min_free),
                )  # fmt: skip
        self._written += 1
        if self._is_full:
            return
        new, path = f"{self._folder}/new-{os.getpid()}-{threading.get_ident()}", self._path(name)
        try:
            _write(new, data)
            try:
                os.rename(new, path)
            except FileNotFoundError:  # the first of its two letters
                path.parent.mkdir(exist_ok=True)
                os.rename(new, path)
        except OSError:
            Path(new).unlink(missing_ok=True)
            raise

    def drop(self, name: str) -> None:
        """Forget an entry that turned out to be damaged."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / name

    def _is_short(self) -> bool:
        usage = shutil.disk_usage(self._folder)
        return usage.free < self._min_free * usage.total

    def _make_room(self) -> None:
        """Delete the entries that were not used for longest, until the disk is as free as wanted."""
        if not self._is_short():
            return
        with open(self._folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = [(found.stat().st_mtime, found) for found in self._folder.glob("??/*")]
            for number, (_, path) in enumerate(sorted(entries)):
                if number % CHECKED_EVERY == 0 and not self._is_short():
                    break
                path.unlink(missing_ok=True)


def _write(path: str, data: bytes) -> None:
    """With no more calls than it takes: each gives up the interpreter's lock, and waits for it again."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
    finally:
        os.close(file)
