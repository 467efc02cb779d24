"""Read, list and write objects under local paths and ``s3://`` URIs, by the same functions.

A URI of an S3 object is ``"s3://" + bucket + "/" + key`` with the key's characters as they are: nothing is percent-encoded,
so every key round-trips byte for byte. A local URI is an absolute path.

Every write is whole or not at all. What fails for good, after bounded retries, is a `StorageError` that names operation, object, cause.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from pyarrow import fs

from dragonclf.storage import local, s3
from dragonclf.storage.errors import (
    AccessDeniedError,
    CredentialsError,
    ObjectInfo,
    ObjectMissingError,
    PreconditionError,
    StorageError,
    UnconditionalStoreError,
)

__all__ = [
    "AccessDeniedError", "CredentialsError", "ObjectInfo", "ObjectMissingError", "StorageError", "UnconditionalStoreError",
    "arrow_files", "download", "fetch", "get", "get_if_exists", "is_s3", "join", "keeps_conditions", "list_objects",
    "name", "put", "put_file", "put_if_absent", "put_if_match", "resolve", "stat",
]  # fmt: skip

MAX_CONFLICTS = 10


def resolve(uri: str) -> str:
    """Return `uri` as an ``s3://`` URI or an absolute local path. ValueError for any other scheme."""
    if is_s3(uri):
        if not s3.split(uri)[0]:
            raise ValueError(f"{uri!r} names no bucket: write s3://BUCKET/PREFIX")
        return uri
    uri = uri.removeprefix("file://")
    if scheme := re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*)://", uri):
        raise ValueError(f"{uri!r}: {scheme[1]}:// is not supported: use a local path or s3://BUCKET/PREFIX")
    if not uri:
        raise ValueError("the path is empty: give a local path or s3://BUCKET/PREFIX")
    return uri if uri.startswith("/") else str(Path.cwd() / Path(uri).expanduser())


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def join(base: str, *names: str) -> str:
    """Join names under a prefix or folder."""
    return "/".join([base.removesuffix("/"), *names])


def name(uri: str) -> str:
    """The part after the last slash."""
    return uri.rpartition("/")[2]


def list_objects(uri: str) -> Iterator[ObjectInfo]:
    """Yield every object under a prefix or folder, each once, in the store's order, in constant memory.

    The order is that of the keys' bytes, also of a local folder, unless the store has another one (SeaweedFS, S3's directory buckets).
    An S3 prefix of more than a page is listed by 32 requests at once where the order is that of bytes (see `parallel_listing`). Until the
    listing ends, it takes about 100 bytes of the temporary folder a key then, and threads that end with the iterator.

    A prefix is a folder: ``s3://b/cats`` lists ``cats/...`` and never ``cats2/...``. Raises ObjectMissingError for a local folder
    that does not exist; an S3 prefix without objects yields nothing. Symbolic links are followed; one that leads nowhere is listed,
    so that it is accounted for as missing.
    """
    return _store(uri).list_objects(uri)


def stat(uri: str) -> ObjectInfo | None:
    """Return etag and size of one object, or None if there is none."""
    return _store(uri).stat(uri)


def get(uri: str, *, last_bytes: int | None = None) -> bytes:
    """Return the object's content, or only its `last_bytes` bytes. Raises ObjectMissingError, AccessDeniedError, StorageError."""
    return _store(uri).get(uri, last_bytes=last_bytes)[0]


def get_if_exists(uri: str) -> tuple[bytes, str] | None:
    """Return (content, etag) read together, or None if there is no such object."""
    try:
        return _store(uri).get(uri)
    except ObjectMissingError:
        return None


def download(uri: str, path: Path) -> None:
    """Copy an object to a local file in constant memory. Raises as `get` does; what was written of the file then stays."""
    _store(uri).download(uri, path)


def download_all(uri: str, folder: Path) -> None:
    """Copy every object under a folder or prefix into a local folder, under its name relative to `uri`."""
    for found in list_objects(uri):
        target = folder / found.uri.removeprefix(f"{uri}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        download(found.uri, target)


async def fetch(uri: str) -> tuple[bytes, str]:
    """Return (content, etag) without blocking the event loop: the way to read many images. Raises as `get` does."""
    return await _store(uri).fetch(uri)


def put(uri: str, data: bytes) -> None:
    """Write the object, replacing what is there."""
    _store(uri).put(uri, data)


def put_file(uri: str, path: Path) -> None:
    """Write a local file's content as the object, replacing what is there; in constant memory, whatever its size."""
    _store(uri).put_file(uri, path)


def put_if_absent(uri: str, data: bytes, *, atomic: bool = True) -> bool:
    """Write the object only if there is none. True if it now holds exactly `data`, False if it holds something else.

    A store may answer "exists" to the retry of a write of our own that it had kept, so the object is read back and compared.
    Without `atomic` the object is looked for and then written: for stores without conditional writes, and no more than one writer.
    """
    for _ in range(MAX_CONFLICTS):
        found = None if atomic else get_if_exists(uri)
        try:
            if found is None:
                (_store(uri).create if atomic else put)(uri, data)
                return True
        except PreconditionError:
            found = get_if_exists(uri)  # None: it was deleted since
        if found is not None:
            return found[0] == data
    raise StorageError(f"cannot write {uri}: other writes kept conflicting with it: run the command again")


def put_if_match(uri: str, data: bytes, etag: str, *, atomic: bool = True) -> bool:
    """Replace the object only if its etag is still `etag`. False if it changed or is gone (unless it holds `data` already)."""
    try:
        if atomic:
            _store(uri).replace(uri, data, etag=etag)
            return True
    except (PreconditionError, ObjectMissingError):
        found = get_if_exists(uri)
        return found is not None and found[0] == data
    found = stat(uri)
    if found is None or found.etag != etag:
        return False
    put(uri, data)
    return True


def keeps_conditions(uri: str, data: bytes) -> bool:
    """Whether the store refuses conditional writes whose condition does not hold; tried on an object that holds `data`, with the same."""
    store = _store(uri)
    for write in (lambda: store.create(uri, data), lambda: store.replace(uri, data, etag="0" * 32)):
        try:
            write()
        except PreconditionError:
            continue
        except UnconditionalStoreError:
            return False
        return False
    return True


def arrow_files(uris: list[str]) -> tuple[fs.FileSystem, list[str]]:
    """A pyarrow file system, and the paths in it of objects of one store."""
    if uris and is_s3(uris[0]):
        return s3.arrow_filesystem(uris[0]), [uri.removeprefix("s3://") for uri in uris]
    return fs.LocalFileSystem(), uris


def _store(uri: str):
    return s3 if is_s3(uri) else local
