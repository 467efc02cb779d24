"""What can go wrong with storage, for good: retries are over when one of these is raised."""

from dataclasses import dataclass


class StorageError(Exception):
    """A storage operation failed for good. The message names the operation, the object, the cause and a remedy."""


class ObjectMissingError(StorageError):
    """The object does not exist."""


class AccessDeniedError(StorageError):
    """The credentials are valid but may not do this to this object."""


class CredentialsError(StorageError):
    """There are no credentials, or the store refuses them: no other object would fare better."""


class UnconditionalStoreError(StorageError):
    """The store says that it has no conditional writes."""


class PreconditionError(Exception):
    """A conditional write found the object in another state. Stays inside this package."""


@dataclass(frozen=True)
class ObjectInfo:
    """One listed object. `etag` changes when the content does: S3's ETag, or mtime and size of a local file."""

    uri: str
    etag: str
    size: int  # bytes


def missing(operation: str, uri: str) -> ObjectMissingError:
    return ObjectMissingError(f"cannot {operation} {uri}: it does not exist")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
