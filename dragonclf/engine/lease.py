"""One driver at a time: a lease in the output that says who is at work, kept alive by a heartbeat.

The lease saves work; that rows are right does not rest on it. Whoever is late, frozen or cut off finds that what it may still write
is written conditionally and never replaces anything (docs/guarantees.md).

No two clocks are compared: a contender watches the lease for `TTL_S` by its own. If the heartbeat moves, the holder lives; if not, the
contender takes the lease over by If-Match, and the holder, should it wake, finds the lease changed and stops.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
import types
import uuid
from typing import Any

from pydantic import BaseModel, Field

from dragonclf import storage
from dragonclf.outcomes import BusyError

log = logging.getLogger("dragonclf")

HEARTBEAT_S = 5.0
TTL_S = 30.0  # more than an operation on the store takes before it fails
POLL_S = 1.0
INTERRUPT = signal.SIGUSR2  # not SIGINT: what a shell starts in the background ignores that
_LET_GO: set[str] = set()  # tokens of leases that this process held and could not release, for the store did not answer


class _Interrupt(BaseException):
    """Raised in the main thread when the lease is lost."""


class Holder(BaseModel):
    """The content of a lease."""

    fence: int = Field(description="Raised by each driver that takes the lease: later drivers have larger ones.")
    token: str = Field(description="Of this hold alone.")
    beat: int = Field(default=0, description="Heartbeats so far.")
    host: str
    pid: int
    process: str = Field(description="Tells the process from any other on any machine, as far as the system can.")
    released: bool = False


class Lease:
    """A lease on a URI. In a ``with`` it is released at the end, and the body is interrupted if it is lost after `acquire`.

    The body may then end in BusyError (another driver took the lease over) or StorageError (the store takes no heartbeat).
    """

    def __init__(self, uri: str, *, at_least_once: bool = False):
        self._uri, self._at_least_once = uri, at_least_once
        self._ours = Holder(
            fence=1, token=uuid.uuid4().hex, host=socket.gethostname(), pid=os.getpid(), process=_this_process()
        )
        self._etag = ""
        self._lock = threading.Lock()
        self._done, self._told = threading.Event(), threading.Event()
        self._lost: Exception | None = None
        self._beating: threading.Thread | None = None
        self._before: Any = None  # the main thread's handler of INTERRUPT, if it was the one to acquire
        self.atomic = True  # whether the store keeps conditional writes

    @property
    def fence(self) -> int:
        """Number of this hold: larger than any before on the same lease."""
        return self._ours.fence

    def ensure(self) -> None:
        """Renew the lease now, before what must not be done by two. Raises BusyError or StorageError."""
        if self._lost is None:
            self._renew()
        if self._lost is not None:
            raise self._lost

    def acquire(self) -> None:
        """Take the lease: at once if none holds it or its process on this host is gone, after `TTL_S` if it gives no heartbeat.

        Raises BusyError if the holder lives, ValueError if the store has no conditional writes and `at_least_once` is not accepted.
        """
        self._take()
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(INTERRUPT, self._interrupt)
        self._beating = threading.Thread(target=self._beat, daemon=True, name="lease")
        self._beating.start()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._done.set()
        if self._beating is None:
            return
        self._beating.join()
        if self._before is not None:
            signal.signal(INTERRUPT, self._before)
        _LET_GO.add(self._ours.token)
        if self._lost is None:
            with contextlib.suppress(storage.StorageError):  # for others it then runs out by itself
                self._renew(released=True)
        elif isinstance(error, _Interrupt):
            raise self._lost from None

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT_S):
            try:
                self._renew()
            except storage.StorageError as error:
                self._lost = error
            if self._lost is not None:
                # A real signal, so that it also ends a wait in a system call; again, if it came just before that wait began.
                while self._before is not None and not self._done.is_set():
                    signal.pthread_kill(threading.main_thread().ident or 0, INTERRUPT)
                    if self._told.wait(POLL_S):
                        break
                return

    def _interrupt(self, number: int, frame: types.FrameType | None) -> None:
        self._told.set()
        raise _Interrupt

    def _renew(self, *, released: bool = False) -> None:
        with self._lock:
            renewed = self._ours.model_copy(update={"beat": self._ours.beat + 1, "released": released})
            if not self._write(renewed, over=self._etag):
                self._lost = BusyError(
                    f"another driver took over {self._uri} while this one gave no sign of life: this one stops, its parts stand"
                )

    def _write(self, holder: Holder, *, over: str | None) -> bool:
        """Write the lease over the one with the etag `over`, or none. What is there after is ours, or it is lost."""
        data = holder.model_dump_json().encode()
        try:
            if over is None:
                storage.put_if_absent(self._uri, data, atomic=self.atomic)
            else:
                storage.put_if_match(self._uri, data, over, atomic=self.atomic)
        except storage.UnconditionalStoreError:
            self._do_without_conditions()
            return self._write(holder, over=over)
        found = storage.get_if_exists(self._uri)
        if found is None or found[0] != data:
            return False
        self._ours, self._etag = holder, found[1]
        return True

    def _take(self) -> None:
        deadline, seen = time.monotonic() + TTL_S, None
        while True:
            found = storage.get_if_exists(self._uri)
            fence = 1
            if found is not None:
                holder = Holder.model_validate_json(found[0])
                fence = holder.fence + 1
                if not (holder.released or holder.token in _LET_GO or _is_dead(holder)):
                    if seen is not None and seen != found[1]:
                        raise BusyError(
                            f"another driver is at work on this: process {holder.pid} on {holder.host} holds {self._uri}; "
                            "wait for its end, or stop it: the same command then goes on where it was"
                        )
                    if time.monotonic() < deadline:
                        if seen is None:
                            log.info("waiting: process %s on %s may be at work on this", holder.pid, holder.host)
                        seen = found[1]
                        time.sleep(POLL_S)
                        continue
                    log.info("process %s on %s gave no sign for %.0f s: taking over", holder.pid, holder.host, TTL_S)
            ours = self._ours.model_copy(update={"fence": fence})
            if self._write(ours, over=found[1] if found else None):
                break
            deadline, seen = time.monotonic() + TTL_S, None  # somebody else was faster: watch that one
        if self.atomic and not storage.keeps_conditions(self._uri, self._ours.model_dump_json().encode()):
            self._do_without_conditions()
            self._etag = (storage.get_if_exists(self._uri) or (b"", ""))[1]

    def _do_without_conditions(self) -> None:
        """The store cannot exclude a second driver: ValueError unless the user accepts that."""
        if not self._at_least_once:
            raise ValueError(
                f"the store of {self._uri} keeps no conditional writes (If-None-Match, If-Match), without which two drivers could write "
                "over each other: choose another --out, or accept that with --at-least-once and see that only one runs"
            )
        log.warning("this store keeps no conditional writes: nothing keeps a second driver from writing over this one")
        self.atomic = False


def _this_process() -> str:
    return _process(os.getpid()) or uuid.uuid4().hex


def _is_dead(holder: Holder) -> bool:
    """Whether the holder ran in this boot and process namespace, and is gone."""
    here = _process(os.getpid())
    same_place = here is not None and here.rsplit(":", 1)[0] == holder.process.rsplit(":", 1)[0]
    return same_place and _process(holder.pid) != holder.process


def _process(pid: int) -> str | None:
    """boot:namespace:start of a process, None where there is no such process or no /proc."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        with open(f"/proc/{pid}/stat") as file:
            state = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    if state[0] == "Z":
        return None
    return f"{boot}/{namespace}:{state[19]}"
