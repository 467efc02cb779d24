"""Which Ray a command runs on: a private one on this machine, or, only if asked, a cluster that exists."""

import contextlib
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator

import ray
import ray.data
import torch
from ray._private import ray_constants, worker

from dragonclf.storage import StorageError

log = logging.getLogger("dragonclf")

LOCAL = "local"
RAYLET_GONE = 3  # exit code
RAYLET_POLL_S = 0.05
RAY_DATA_THREADS = ("StreamingExecutor-", "ray-data-metadata-prefetch", "iter_threaded")
RAY_DATA_END_S = 60
LOCAL_OBJECT_STORE_BYTES = 256 * 2**20  # pixels never cross it


@contextlib.contextmanager
def connect(address: str) -> Iterator[None]:
    """Run the body on a Ray: a fresh one on loopback that ends with it (``local``), the cluster at `address`, or the one here (``auto``).

    An enclosing `connect` or `ray.init` is reused. Ray and its workers log to stderr if dragonclf's log is at DEBUG.
    Raises ValueError if there is no Ray at the address.
    """
    if ray.is_initialized():
        yield
        return
    debug = log.isEnabledFor(logging.DEBUG)
    ending = threading.Event()
    try:
        _join(address, debug, ending)
        yield
    finally:
        ending.set()  # also when ray.init is interrupted: what ends then is not the raylet's doing
        try:
            _await_ray_data()
        finally:
            ray.shutdown()


def has_gpu(address: str) -> bool:
    """Whether the Ray that `connect(address)` gives has a GPU."""
    if address == LOCAL and not ray.is_initialized():
        return torch.cuda.is_available()
    with connect(address):
        return ray.cluster_resources().get("GPU", 0) > 0


def _join(address: str, debug: bool, ending: threading.Event) -> None:
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address == LOCAL:
            threading.Thread(target=_watch_raylet, args=(ending,), daemon=True, name="raylet").start()
            _start_local(debug)
        else:
            ray.init(address=address, log_to_driver=debug, logging_level=_level(debug))
    except Exception as error:  # Ray raises no less when a server of its own does not come up
        reason = (str(error).splitlines() or ["no answer"])[0]
        if address == LOCAL:
            raise StorageError(
                f"Ray does not start on this machine: {reason}; if it is about a path, set TMPDIR to a short one"
            ) from error
        raise ValueError(
            f"there is no Ray to join at {address!r}: {reason}; use --address local for this machine alone"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init puts its own there, which ends the process without a word
    where = "a private one on this machine" if address == LOCAL else f"the cluster at {address}"
    resources = ray.cluster_resources()
    log.info("Ray: %s, %g CPUs, %g GPUs", where, resources.get("CPU", 0), resources.get("GPU", 0))
    # A lost shard is an error to Ray Data, with a traceback; here it is work for the next pass.
    logging.getLogger("ray.data").setLevel(logging.INFO if debug else logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False


def _start_local(debug: bool) -> None:
    if "RAY_ADDRESS" in os.environ:
        log.info("RAY_ADDRESS=%s is set and not used: pass --address auto to join it", os.environ.pop("RAY_ADDRESS"))
    # ray.init turns token authentication on; without a token here it would write one to the home folder.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # else `uv run` ships the whole working folder
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray's switch for desktops makes every server of this Ray listen on 127.0.0.1 alone; children read it from the environment.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    if not debug:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with contextlib.nullcontext() if debug else _quiet_stderr():
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=debug,
            logging_level=_level(debug),
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
        )


def _watch_raylet(ending: threading.Event) -> None:
    """Say so and exit when the raylet ends: a moment later Ray would end this process with code 1 and no word."""
    while not ending.wait(RAYLET_POLL_S):
        node = worker._global_node
        started = node.all_processes.get(ray_constants.PROCESS_TYPE_RAYLET) if node else None
        if started:
            with contextlib.suppress(ChildProcessError):  # somebody was faster: it has ended
                os.waitid(os.P_PID, started[0].process.pid, os.WEXITED | os.WNOWAIT)
            if not ending.is_set():
                print(
                    "dragonclf: error: the Ray of this command has ended; the same command resumes",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(RAYLET_GONE)
            return


def _await_ray_data() -> None:
    """Wait for the threads of Ray Data that a closed iteration leaves behind: it waits 2 to 5 s for each, then gives up.

    One that still asks Ray for something while it shuts down ends this process with code 1 and no word, or, a moment later, starts
    another Ray.
    """
    deadline_s = time.monotonic() + RAY_DATA_END_S
    for thread in threading.enumerate():
        if thread.name.startswith(RAY_DATA_THREADS):
            thread.join(max(0.0, deadline_s - time.monotonic()))


def _level(debug: bool) -> int:
    return logging.INFO if debug else logging.ERROR


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drop what Ray's C++ core writes to file descriptor 2 at its start (that it will log little). Python's errors are raised."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
