"""Read, list and write objects under local paths and ``s3://`` URIs. The only module that knows S3 options.

A URI of an S3 object is ``"s3://" + bucket + "/" + key`` with the key's characters as they are: nothing is percent-encoded,
so every key round-trips byte for byte. A local URI is an absolute path.

boto3 lists, writes and owns the credentials chain (environment, profile, SSO, instance and pod roles; endpoint and region by the
standard ``AWS_*`` variables). obstore reads image bytes, at a third of boto3's CPU, wherever its normalised path equals the key;
boto3 reads the rest. All retries are bounded; what still fails is a `StorageError` that names operation, object and cause.
"""

import asyncio
import contextlib
import errno
import fcntl
import functools
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import botocore.exceptions
import obstore
from botocore.config import Config
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
MAX_ATTEMPTS = 6  # throttling and 5xx, with exponential backoff and jitter

_CREDENTIAL_CODES = {
    "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch",
    "UnrecognizedClientException",
}  # fmt: skip


class StorageError(Exception):
    """A storage operation failed for good. The message names the operation, the object, the cause and a remedy."""


class ObjectMissingError(StorageError):
    """The object does not exist."""


class AccessDeniedError(StorageError):
    """The credentials are valid but may not do this to this object."""


@dataclass(frozen=True)
class ObjectInfo:
    """One listed object. `etag` changes when the content does: S3's ETag, or mtime and size of a local file."""

    uri: str
    etag: str
    size: int  # bytes


def resolve(uri: str) -> str:
    """Return `uri` as an ``s3://`` URI or an absolute local path. ValueError for any other scheme."""
    if uri.startswith("s3://"):
        if not split_s3(uri)[0]:
            raise ValueError(f"{uri!r} names no bucket: write s3://BUCKET/PREFIX")
        return uri
    if uri.startswith("file://"):
        uri = uri.removeprefix("file://")
    if scheme := re.match(r"([a-z][a-z0-9+.-]*)://", uri):
        raise ValueError(f"{uri!r}: {scheme[1]}:// is not supported: use a local path or s3://BUCKET/PREFIX")
    path = Path(uri).expanduser()
    return uri if uri.startswith("/") else str(path if path.is_absolute() else Path.cwd() / path)


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def split_s3(uri: str) -> tuple[str, str]:
    """Split an ``s3://`` URI into (bucket, key)."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def join(base: str, *names: str) -> str:
    """Join names under a prefix or folder."""
    return "/".join([base.removesuffix("/"), *names])


def name(uri: str) -> str:
    """The part after the last slash."""
    return uri.rpartition("/")[2]


# Control plane: listing, small reads, conditional writes


def list_objects(uri: str) -> Iterator[ObjectInfo]:
    """Yield every object under a prefix or folder, in the store's key order, in constant memory.

    A prefix is a folder: ``s3://b/cats`` lists ``cats/...`` and never ``cats2/...``. Raises ObjectMissingError for a local folder
    that does not exist; an S3 prefix without objects yields nothing.
    """
    if not is_s3(uri):
        yield from _walk(uri.removesuffix("/") or "/", ())
        return
    bucket, prefix = split_s3(uri)
    if prefix and not prefix.endswith("/"):
        prefix += "/"
    pages = iter(_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix))
    while True:
        with _boto3_errors("list", uri):
            page = next(pages, None)
        if page is None:
            return
        for item in page.get("Contents", []):
            assert "Key" in item and "ETag" in item and "Size" in item
            yield ObjectInfo(f"s3://{bucket}/{item['Key']}", item["ETag"].strip('"'), item["Size"])


def stat(uri: str) -> ObjectInfo | None:
    """Return etag and size of one object, or None if there is none."""
    if not is_s3(uri):
        try:
            found = os.stat(uri)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return ObjectInfo(uri, _local_etag(found), found.st_size) if not os.path.isdir(uri) else None
    bucket, key = split_s3(uri)
    try:
        with _boto3_errors("read", uri):
            head = _client().head_object(Bucket=bucket, Key=key)
    except ObjectMissingError:
        return None
    return ObjectInfo(uri, head["ETag"].strip('"'), head["ContentLength"])


def get(uri: str, *, last_bytes: int | None = None) -> bytes:
    """Return the object's content, or only its `last_bytes` bytes. Raises ObjectMissingError, AccessDeniedError, StorageError."""
    return _get(uri, last_bytes)[0]


def get_if_exists(uri: str) -> tuple[bytes, str] | None:
    """Return (content, etag) read together, or None if there is no such object."""
    try:
        return _get(uri, None)
    except ObjectMissingError:
        return None


def put(uri: str, data: bytes) -> None:
    """Write the object whole or not at all, replacing what is there."""
    if is_s3(uri):
        bucket, key = split_s3(uri)
        with _boto3_errors("write", uri):
            _client().put_object(Bucket=bucket, Key=key, Body=data)
        return
    with _local_errors("write", uri), _aside(uri, data) as aside:
        os.replace(aside, uri)


def put_if_absent(uri: str, data: bytes) -> bool:
    """Write the object only if there is none. True if it now holds exactly `data`, False if it holds something else.

    A store may answer "exists" to the retry of a write of our own that it had kept, so the object is read back and compared.
    """
    try:
        if is_s3(uri):
            bucket, key = split_s3(uri)
            with _boto3_errors("write", uri):
                _client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        else:
            with _local_errors("write", uri), _aside(uri, data) as aside:
                os.link(aside, uri)
    except _PreconditionError:
        return get(uri) == data
    return True


def put_if_match(uri: str, data: bytes, etag: str) -> bool:
    """Replace the object only if its etag is still `etag`. False if it changed or is gone (unless it holds `data` already)."""
    try:
        if is_s3(uri):
            bucket, key = split_s3(uri)
            with _boto3_errors("write", uri):
                _client().put_object(Bucket=bucket, Key=key, Body=data, IfMatch=f'"{etag}"')
            return True
        with _local_errors("write", uri), _locked_folder(uri):
            found = stat(uri)
            if found is None or found.etag != etag:
                return False
            with _aside(uri, data) as aside:
                os.replace(aside, uri)
            return True
    except (_PreconditionError, ObjectMissingError):
        found = get_if_exists(uri)
        return found is not None and found[0] == data


# Data plane: image bytes


async def fetch(uri: str) -> tuple[bytes, str]:
    """Return (content, etag) of one object, without blocking the event loop. Raises as `get` does."""
    if is_s3(uri):
        bucket, key = split_s3(uri)
        if _obstore_keeps(key):
            try:
                found = await obstore.get_async(_obstore(bucket), key)
                return bytes(await found.bytes_async()), (found.meta["e_tag"] or "").strip('"')
            except FileNotFoundError as error:
                raise _missing("read", uri) from error
            except (PermissionDeniedError, UnauthenticatedError) as error:
                code = re.search(r"<Code>(\w+)</Code>", str(error))
                raise _denied("read", uri, code[1] if code else "AccessDenied") from error
            except Exception as error:  # noqa: BLE001  obstore's transport errors share no narrower class
                raise StorageError(f"cannot read {uri}: {_first_line(error)}") from error
    return await asyncio.to_thread(_get, uri, None)


def _obstore_keeps(key: str) -> bool:
    """Whether obstore's normalised path equals the key byte for byte (`a//b`, `./x`, `/lead`, `dir/`, control characters do not)."""
    return key.isprintable() and all(part not in ("", ".", "..") for part in key.split("/"))


@functools.cache
def _client() -> "S3Client":
    return boto3.Session().client(
        "s3",
        config=Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"mode": "standard", "total_max_attempts": MAX_ATTEMPTS},
            max_pool_connections=64,
        ),
    )


@functools.cache
def _obstore(bucket: str) -> S3Store:
    """One store per bucket, with boto3's credentials, endpoint and region. Asks once for the bucket's own region."""
    session, client = boto3.Session(), _client()
    endpoint = client.meta.endpoint_url
    is_aws = endpoint.removesuffix("/").endswith((".amazonaws.com", ".amazonaws.com.cn"))
    with _boto3_errors("find", f"s3://{bucket}"):
        region = client.head_bucket(Bucket=bucket).get("BucketRegion") or client.meta.region_name
    return S3Store(
        bucket,
        region=region,
        endpoint=None if is_aws else endpoint,
        credential_provider=Boto3CredentialProvider(session),
        client_options={
            "allow_http": not is_aws and endpoint.startswith("http://"),
            "connect_timeout": f"{CONNECT_TIMEOUT_S}s",
            "timeout": f"{READ_TIMEOUT_S}s",
        },
        retry_config={"max_retries": MAX_ATTEMPTS - 1, "retry_timeout": timedelta(seconds=2 * READ_TIMEOUT_S)},
    )


def _get(uri: str, last_bytes: int | None) -> tuple[bytes, str]:
    if is_s3(uri):
        bucket, key = split_s3(uri)
        span = {} if last_bytes is None else {"Range": f"bytes=-{last_bytes}"}
        with _boto3_errors("read", uri):
            found = _client().get_object(Bucket=bucket, Key=key, **span)
            return found["Body"].read(), found["ETag"].strip('"')
    with _local_errors("read", uri), open(uri, "rb") as file:
        info = os.fstat(file.fileno())
        if last_bytes is not None:
            file.seek(max(0, info.st_size - last_bytes))
        return file.read(), _local_etag(info)


# Errors


class _PreconditionError(Exception):
    """A conditional write found the object in another state."""


def _missing(operation: str, uri: str) -> ObjectMissingError:
    return ObjectMissingError(f"cannot {operation} {uri}: it does not exist")


def _denied(operation: str, uri: str, code: str) -> StorageError:
    if code in _CREDENTIAL_CODES:
        return StorageError(
            f"cannot {operation} {uri}: the store refuses the credentials ({code}): "
            "check AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or sign in again"
        )
    return AccessDeniedError(f"cannot {operation} {uri}: access denied ({code}): give this identity the right to {operation} it")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _boto3_errors(operation: str, uri: str) -> Iterator[None]:
    try:
        yield
    except botocore.exceptions.ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in ("PreconditionFailed", "ConditionalRequestConflict") or status == 412:
            raise _PreconditionError from error
        if code == "NoSuchBucket" or (code == "404" and not split_s3(uri)[1]):
            bucket = split_s3(uri)[0]
            raise StorageError(
                f"cannot {operation} {uri}: there is no bucket {bucket!r}: check its name, AWS_REGION and AWS_ENDPOINT_URL"
            ) from error
        if code in ("NoSuchKey", "404"):
            raise _missing(operation, uri) from error
        if code in _CREDENTIAL_CODES or status in (401, 403):
            raise _denied(operation, uri, code) from error
        raise StorageError(f"cannot {operation} {uri}: {_first_line(error)}") from error
    except botocore.exceptions.NoCredentialsError as error:
        raise StorageError(
            f"cannot {operation} {uri}: no AWS credentials found: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or run where a role is attached"
        ) from error
    except botocore.exceptions.BotoCoreError as error:
        raise StorageError(f"cannot {operation} {uri}: {_first_line(error)}") from error


# Local files


@contextlib.contextmanager
def _local_errors(operation: str, uri: str) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        raise _PreconditionError from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise _missing(operation, uri) from error
    except PermissionError as error:
        raise AccessDeniedError(f"cannot {operation} {uri}: permission denied: check the owner and mode of the file") from error
    except OSError as error:
        raise StorageError(f"cannot {operation} {uri}: {os.strerror(error.errno or errno.EIO)}") from error


def _local_etag(info: os.stat_result) -> str:
    return f"{info.st_mtime_ns:x}-{info.st_size:x}"


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[ObjectInfo]:
    """Depth first in the order of S3 keys: names compare as bytes, a folder's with its slash."""
    with _local_errors("list", folder):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in above:
            raise ValueError(f"{folder} is a symbolic link to a folder above it: remove the link")
        entries = [(entry.name + "/" * entry.is_dir(), entry) for entry in os.scandir(folder)]
    for name_, entry in sorted(entries, key=lambda item: os.fsencode(item[0])):
        if not entry.name.isascii() and entry.name != entry.name.encode("utf-8", "replace").decode():
            raise ValueError(f"the name of {entry.path!r} is not valid UTF-8: rename the file")
        if name_.endswith("/"):
            yield from _walk(entry.path, (*above, (here.st_dev, here.st_ino)))
        else:
            with _local_errors("list", entry.path):
                info = entry.stat()
            yield ObjectInfo(entry.path, _local_etag(info), info.st_size)


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
        _sync_folder(folder)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)


def _sync_folder(folder: str) -> None:
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
