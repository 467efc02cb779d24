"""Read the bytes of images, and tell a fault of one image from a fault of its surroundings.

An image is blamed (`denied`, `timeout`) only if another one of the same store could be read right before and after it failed for the
second time, and a file is `missing` only if another one is not. If none can be read, the fault is the environment's: StorageError, which
stops the run with no row written for it.
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
                if not storage.is_s3(uri):  # a folder that was unmounted looks the same; a bucket that is gone does not
                    await self._check_others(uri, error)
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
            planned = [known] if known and known != uri else await asyncio.to_thread(self._elsewhere)
            others = [other for other in planned if other != uri and _store(other) == store]
            if not others and isinstance(cause, storage.ObjectMissingError):
                return  # the only image of its store: nothing tells more than the answer itself
            started_s = time.monotonic()
            if await self._can_read_one(others):
                self._checked_s[store] = started_s
                return
        self._readable.pop(store, None)
        raise storage.StorageError(f"{cause}; no other image there can be read either") from cause

    async def _can_read_one(self, uris: list[str]) -> bool:
        reads = [asyncio.ensure_future(self._answers(uri)) for uri in uris]
        try:
            for read in asyncio.as_completed(reads, timeout=CONTROL_S):
                if await read:
                    return True
        except TimeoutError:
            pass
        finally:
            for read in reads:
                read.cancel()
        return False

    async def _answers(self, uri: str) -> bool:
        try:
            await self._fetch(uri)
        except storage.ObjectMissingError:
            return storage.is_s3(uri)  # an answer to someone who may ask
        except storage.StorageError:
            return False
        return True


def _store(uri: str) -> str:
    """What fails as one: a bucket, or the file system."""
    return uri.split("/")[2] if storage.is_s3(uri) else ""
