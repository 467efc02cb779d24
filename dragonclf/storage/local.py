"""Files of this machine, with the same guarantees as objects: written whole or not at all, and conditional writes that one caller wins."""

import asyncio
import contextlib
import errno
import fcntl
import io
import os
import shutil
import stat as modes
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dragonclf.storage.errors import (
    AccessDeniedError,
    ObjectInfo,
    ObjectMissingError,
    PreconditionError,
    StorageError,
    missing,
)

ASIDE = ".dragonclf-aside-"  # begins the name of a file that is being written
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def list_objects(uri: str) -> Iterator[ObjectInfo]:
    yield from _walk(uri.removesuffix("/") or "/", ())


def stat(uri: str) -> ObjectInfo | None:
    try:
        with _errors("read", uri):
            found = os.stat(uri)
    except ObjectMissingError:
        return None
    return None if modes.S_ISDIR(found.st_mode) else ObjectInfo(uri, _etag(found), found.st_size)


def get(uri: str, *, last_bytes: int | None = None) -> tuple[bytes, str]:
    with _errors("read", uri), open(uri, "rb") as file:
        info = os.fstat(file.fileno())
        if last_bytes is not None:
            file.seek(max(0, info.st_size - last_bytes))
        return file.read(), _etag(info)


def download(uri: str, path: Path) -> None:
    with _errors("read", uri), open(uri, "rb") as source, path.open("wb") as target:
        shutil.copyfileobj(source, target)


async def fetch(uri: str) -> tuple[bytes, str]:
    return await asyncio.to_thread(get, uri)


def put(uri: str, data: bytes) -> None:
    with _errors("write", uri), _aside(uri, io.BytesIO(data)) as aside:
        os.replace(aside, uri)


def put_file(uri: str, path: Path) -> None:
    with open(path, "rb") as source, _errors("write", uri), _aside(uri, source) as aside:
        os.replace(aside, uri)


def create(uri: str, data: bytes) -> None:
    """Write by a hard link, which fails if the name is taken: PreconditionError."""
    with _errors("write", uri), _aside(uri, io.BytesIO(data)) as aside:
        try:
            os.link(aside, uri)
        except FileExistsError as error:
            if os.path.isdir(uri):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)) from error
            raise PreconditionError from error


def replace(uri: str, data: bytes, *, etag: str) -> None:
    """Replace the file under a lock on its folder. PreconditionError or ObjectMissingError if it is not as `etag` says."""
    with _errors("write", uri), _locked_folder(uri):
        found = stat(uri)
        if found is None:
            raise missing("write", uri)
        if found.etag != etag:
            raise PreconditionError
        with _aside(uri, io.BytesIO(data)) as aside:
            # Two writes within a tick of the file system's clock must not have one etag.
            before, now = os.stat(uri).st_mtime_ns, os.stat(aside).st_mtime_ns
            os.utime(aside, ns=(now, max(now, before + 1)))
            os.replace(aside, uri)


@contextlib.contextmanager
def _errors(operation: str, uri: str) -> Iterator[None]:
    """Turn the system's errors into ours."""
    try:
        yield
    except PermissionError as error:
        raise AccessDeniedError(
            f"cannot {operation} {uri}: permission denied: check the owner and mode of the file"
        ) from error
    except IsADirectoryError as error:
        kind = StorageError if operation == "write" else ObjectMissingError
        raise kind(f"cannot {operation} {uri}: it is a folder: give the path of a file") from error
    except (NotADirectoryError, FileExistsError) as error:
        if operation == "read":
            raise missing(operation, uri) from error
        raise StorageError(f"cannot {operation} {uri}: it, or what its path calls a folder, is a file") from error
    except OSError as error:
        if error.errno in _ABSENT:
            raise missing(operation, uri) from error
        raise StorageError(f"cannot {operation} {uri}: {os.strerror(error.errno or errno.EIO)}") from error


def _etag(info: os.stat_result) -> str:
    return f"{info.st_mtime_ns:x}-{info.st_size:x}"


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[ObjectInfo]:
    """Depth first in the order of S3 keys: names compare as bytes, a folder's with its slash."""
    with _errors("list", folder):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in above:
            raise ValueError(f"{folder} is a symbolic link to a folder above it: remove the link")
        with os.scandir(folder) as scan:
            entries = [(entry.name + "/" * _is_folder(entry), entry) for entry in scan]
    for name, entry in sorted(entries, key=lambda item: os.fsencode(item[0])):
        if os.fsencode(entry.name).decode("utf-8", "replace") != entry.name:
            raise ValueError(f"the name of {entry.path!r} is not valid UTF-8: rename the file")
        if name.endswith("/"):
            yield from _walk(entry.path, (*above, (here.st_dev, here.st_ino)))
        elif not name.startswith(ASIDE) and (info := _file_info(entry)) is not None:
            yield ObjectInfo(entry.path, _etag(info), info.st_size)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _file_info(entry: os.DirEntry[str]) -> os.stat_result | None:
    """None for what went away since the folder was read, and for pipes, sockets and devices: reading one may never end."""
    with _errors("list", entry.path):
        try:
            info = entry.stat()
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
            try:
                info = os.lstat(entry.path)  # a link that leads nowhere
            except FileNotFoundError:
                return None
    return info if modes.S_ISREG(info.st_mode) or modes.S_ISLNK(info.st_mode) else None


@contextlib.contextmanager
def _aside(uri: str, source: IO[bytes]) -> Iterator[str]:
    """Write what `source` holds, synced, to a hidden file beside `uri`; the caller moves or links it into place."""
    folder = os.path.dirname(uri)
    os.makedirs(folder, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(prefix=ASIDE, dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            shutil.copyfileobj(source, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        yield aside
        _sync(folder)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)


def _sync(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked_folder(uri: str) -> Iterator[None]:
    descriptor = os.open(os.path.dirname(uri), os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
