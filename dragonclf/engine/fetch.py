"""Read the bytes of images, and tell a fault of one image from a fault of its surroundings.

An image is blamed (`denied`, `timeout`) only if another one of the same store could be read right before and after it failed for the
second time. If none can be, the fault is the environment's: StorageError, which stops the run with no row written for it.
"""

import asyncio
import time
from collections.abc import Callable

from dragonclf import storage
from dragonclf.data.images import ImageError

CONTROL_S = 10.0  # for reading the other image; more than it takes where anything works


class ImageReader:
    """Reads for one event loop. `elsewhere` names other images of the plan, asked for only when none has been read yet."""

    def __init__(self, elsewhere: Callable[[], list[str]]):
        self._elsewhere = elsewhere
        self._readable: dict[str, str] = {}  # store -> an image that was read from it
        self._checked_s: dict[str, float] = {}
        self._lock = asyncio.Lock()

    async def read(self, uri: str) -> tuple[bytes, str]:
        """Return (content, etag).

        Raises:
            ImageError: `missing`, `denied`, or `timeout` (the store answers for others and, after all retries, not for this one).
            StorageError: the store does not answer or refuses all.
        """
        for is_last in (False, True):
            try:
                return await self._fetch(uri)
            except storage.ObjectMissingError as error:
                raise ImageError("missing", "the object is no longer there") from error
            except storage.StorageError as error:
                await self._check_others(uri, error)
                if is_last:
                    status = "denied" if isinstance(error, storage.AccessDeniedError) else "timeout"
                    raise ImageError(status, str(error)) from error
        raise AssertionError

    async def _fetch(self, uri: str) -> tuple[bytes, str]:
        found = await storage.fetch(uri)
        self._readable[_store(uri)] = uri
        return found

    async def _check_others(self, uri: str, cause: storage.StorageError) -> None:
        """Return if another image of the store can be read now; else raise `cause`, which then is not about this image."""
        if isinstance(cause, storage.CredentialsError):
            raise cause
        store, failed_s = _store(uri), time.monotonic()
        async with self._lock:
            if self._checked_s.get(store, 0.0) > failed_s:
                return
            known = self._readable.get(store)
            for other in [known] if known else await asyncio.to_thread(self._elsewhere):
                if other == uri or _store(other) != store:
                    continue
                started_s = time.monotonic()
                try:
                    await asyncio.wait_for(self._fetch(other), CONTROL_S)
                except storage.ObjectMissingError:
                    pass  # an answer to someone who may ask
                except (TimeoutError, storage.StorageError):
                    continue
                self._checked_s[store] = started_s
                return
        raise storage.StorageError(f"{cause}; no other image there can be read either") from cause


def _store(uri: str) -> str:
    """What fails as one: a bucket, or the file system."""
    return uri.split("/")[2] if storage.is_s3(uri) else ""
