"""Files of this machine, with the same guarantees as objects: written whole or not at all, and conditional writes that one caller wins."""

import asyncio
import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator

from dragonclf.storage.errors import AccessDeniedError, ObjectInfo, PreconditionError, StorageError, missing


def list_objects(uri: str) -> Iterator[ObjectInfo]:
    yield from _walk(uri.removesuffix("/") or "/", ())


def stat(uri: str) -> ObjectInfo | None:
    try:
        found = os.stat(uri)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return None if os.path.isdir(uri) else ObjectInfo(uri, _etag(found), found.st_size)


def get(uri: str, *, last_bytes: int | None = None) -> tuple[bytes, str]:
    with _errors("read", uri), open(uri, "rb") as file:
        info = os.fstat(file.fileno())
        if last_bytes is not None:
            file.seek(max(0, info.st_size - last_bytes))
        return file.read(), _etag(info)


async def fetch(uri: str) -> tuple[bytes, str]:
    return await asyncio.to_thread(get, uri)


def put(uri: str, data: bytes) -> None:
    with _errors("write", uri), _aside(uri, data) as aside:
        os.replace(aside, uri)


def create(uri: str, data: bytes) -> None:
    """Write by a hard link, which fails if the name is taken: PreconditionError."""
    with _errors("write", uri), _aside(uri, data) as aside:
        os.link(aside, uri)


def replace(uri: str, data: bytes, *, etag: str) -> None:
    """Replace the file under a lock on its folder. PreconditionError or ObjectMissingError if it is not as `etag` says."""
    with _errors("write", uri), _locked_folder(uri):
        found = stat(uri)
        if found is None:
            raise missing("write", uri)
        if found.etag != etag:
            raise PreconditionError
        with _aside(uri, data) as aside:
            os.replace(aside, uri)


@contextlib.contextmanager
def _errors(operation: str, uri: str) -> Iterator[None]:
    """Turn the system's errors into ours."""
    try:
        yield
    except FileExistsError as error:
        raise PreconditionError from error
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise missing(operation, uri) from error
    except PermissionError as error:
        raise AccessDeniedError(
            f"cannot {operation} {uri}: permission denied: check the owner and mode of the file"
        ) from error
    except OSError as error:
        raise StorageError(f"cannot {operation} {uri}: {os.strerror(error.errno or errno.EIO)}") from error


def _etag(info: os.stat_result) -> str:
    return f"{info.st_mtime_ns:x}-{info.st_size:x}"


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[ObjectInfo]:
    """Depth first in the order of S3 keys: names compare as bytes, a folder's with its slash."""
    with _errors("list", folder):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in above:
            raise ValueError(f"{folder} is a symbolic link to a folder above it: remove the link")
        entries = [(entry.name + "/" * entry.is_dir(), entry) for entry in os.scandir(folder)]
    for name, entry in sorted(entries, key=lambda item: os.fsencode(item[0])):
        if os.fsencode(entry.name).decode("utf-8", "replace") != entry.name:
            raise ValueError(f"the name of {entry.path!r} is not valid UTF-8: rename the file")
        if name.endswith("/"):
            yield from _walk(entry.path, (*above, (here.st_dev, here.st_ino)))
        else:
            with _errors("list", entry.path):
                info = entry.stat()
            yield ObjectInfo(entry.path, _etag(info), info.st_size)


@contextlib.contextmanager
def _aside(uri: str, data: bytes) -> Iterator[str]:
    """Write `data`, synced, to a hidden file beside `uri`; the caller moves or links it into place."""
    folder = os.path.dirname(uri)
    os.makedirs(folder, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(prefix=".aside-", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
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
