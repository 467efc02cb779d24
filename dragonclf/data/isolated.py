"""Decode in a process of its own, so that what kills or hangs a decoder costs that process and names the image.

Slower than `images.read` by the copy of the pixels, so it is for images near one that killed a process. The child runs `images.read`
and nothing else; bytes go in and pixels come out through pipes, each message a line of JSON and then as many bytes as it says.

An image that fails in a child which others share, or have used before, is not blamed: it is tried once more in a fresh one, with more
memory, while no other image of this process is tried so. What it does there is its own doing.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from typing import IO, Any

import torch

from dragonclf.config import MAX_PIXELS
from dragonclf.data import images
from dragonclf.data.images import ImageError, Picture

NO_MEMORY = "no memory"  # a child's answer, no status of a row
_ALONE = threading.Lock()  # held by the one image of this process that is tried with all memory


class _CrashError(Exception):
    """The child ended, or had not enough memory, over an image."""

    def __init__(self, reason: str, code: int | None = None):
        super().__init__(reason)
        self.code = code


class Decoder:
    """A child process, started when needed and again after its death. One image at a time; not for several threads."""

    def __init__(self, *, max_pixels: int = MAX_PIXELS, max_bytes: int, max_s: float, share: int = 1):
        """`max_bytes` is the memory for all decoders of this process, `max_s` the seconds for an image.

        Half of the memory is for an image that is tried alone, half for the first tries of `share` decoders.
        """
        self._max_pixels, self._max_s = max_pixels, max_s
        self._alone_bytes, self._first_bytes = max_bytes // 2, max_bytes // (2 * share)
        self._child: subprocess.Popen[bytes] | None = None

    def read(self, data: bytes, *, min_side: int | None = None) -> Picture:
        """Return what `images.read` does.

        Raises:
            ImageError: as `images.read`; `timeout` (took longer than `max_s`), `decoder_crash` (ended the process twice, or needs more
                memory than there is for an image alone).
            OSError: no child can be started, or something outside ends them.
        """
        with contextlib.suppress(_CrashError):
            return self._read(data, min_side, self._first_bytes)
        with _ALONE:
            self.close()
            try:
                return self._read(data, min_side, self._alone_bytes)
            except _CrashError as crash:
                if crash.code == -signal.SIGKILL:  # no codec does that: the kernel, for want of memory, or a person
                    raise OSError(
                        "the process that decodes an image alone was killed from outside, twice: if this machine is short of memory, "
                        "lower --max-actor-bytes or run fewer --num-actors"
                    ) from crash
                raise ImageError("decoder_crash", str(crash)) from crash
            finally:
                self.close()

    def _read(self, data: bytes, min_side: int | None, max_bytes: int) -> Picture:
        child = self._started(max_bytes)
        hung = threading.Event()
        alarm = threading.Timer(self._max_s, _end, (child, hung))
        alarm.start()
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            _send(child.stdin, {"min_side": min_side}, data)
            answer, pixels = _receive(child.stdout)
        except (OSError, EOFError):
            code = child.wait()
            self.close()
            if hung.is_set():
                raise ImageError("timeout", f"could not be decoded in {self._max_s:g} s") from None
            raise _CrashError(f"ends the process that decodes it ({_name(code)})", code) from None
        finally:
            alarm.cancel()
        if answer.get("status") == NO_MEMORY:
            raise _CrashError(answer["reason"])
        if "status" in answer:
            raise ImageError(answer["status"], answer["reason"])
        return Picture(torch.frombuffer(pixels, dtype=torch.uint8).reshape(answer["shape"]), *answer["whole"])

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _started(self, max_bytes: int) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._child = subprocess.Popen(
                [sys.executable, "-m", __spec__.name, str(self._max_pixels), str(max_bytes), str(self._max_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"},
            )
            assert self._child.stdout is not None
            try:
                _receive(self._child.stdout)  # it is ready: its start does not count as the image's time
            except EOFError:
                code = self._child.wait()
                self.close()
                raise OSError(f"the process that decodes alone does not start: it ended with {_name(code)}") from None
        return self._child


def _end(child: subprocess.Popen[bytes], hung: threading.Event) -> None:
    hung.set()
    child.kill()


def _name(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def _send(pipe: IO[bytes], header: dict[str, Any], payload: bytes | memoryview = b"") -> None:
    pipe.write(json.dumps(header | {"num_bytes": len(payload)}).encode() + b"\n")
    pipe.write(payload)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[dict[str, Any], bytearray]:
    line = pipe.readline()
    if not line:
        raise EOFError
    header = json.loads(line)
    payload = bytearray(header["num_bytes"])
    view = memoryview(payload)
    while view:
        count = pipe.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        view = view[count:]
    return header, payload


def _serve(max_pixels: int, max_bytes: int, max_s: float) -> None:
    torch.set_num_threads(1)
    with open("/proc/self/status") as file:
        now = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + max_bytes, now + max_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a codec prints is no answer
    _send(answers, {})
    while True:
        try:
            asked, data = _receive(sys.stdin.buffer)
        except EOFError:
            return
        # If the parent is gone it cannot end a decode that hangs: SIGALRM's own action does, whatever the decoder holds.
        signal.setitimer(signal.ITIMER_REAL, 2 * max_s)
        _answer(answers, bytes(data), asked["min_side"], max_pixels, max_bytes)
        signal.setitimer(signal.ITIMER_REAL, 0)
        del data  # the next image has all the memory


def _answer(answers: IO[bytes], data: bytes, min_side: int | None, max_pixels: int, max_bytes: int) -> None:
    try:
        pixels, *whole = images.read(data, max_pixels=max_pixels, min_side=min_side)
        _send(answers, {"shape": list(pixels.shape), "whole": whole}, pixels.numpy().reshape(-1).data)
    except ImageError as error:
        _send(answers, {"status": error.status, "reason": error.reason})
    except MemoryError:
        reason = f"needs more than {max_bytes / 2**20:,.0f} MiB of memory to be decoded"
        _send(answers, {"status": NO_MEMORY, "reason": reason})


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
