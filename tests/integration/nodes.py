"""Nodes of a Ray cluster on this machine, ended by their own processes alone: `ray stop` would end every Ray that it can see."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
from ray._private import ray_constants

RAY = str(Path(sys.executable).with_name("ray"))
START_S = 60


def start_node(log: Path, *arguments: str, **environment: str) -> psutil.Process:
    """Return when the node is up. What it says goes to `log`."""
    # What tells a private Ray of this process to keep to itself is not for a cluster.
    inherited = {name: value for name, value in os.environ.items() if name != ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR}
    with log.open("w") as output:
        node = psutil.Popen(
            [RAY, "start", "--block", *arguments], env=inherited | environment, stdout=output, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + START_S
    while "Ray runtime started" not in log.read_text():
        if not node.is_running() or time.monotonic() > deadline:
            end_node(node)
            raise AssertionError(log.read_text())
        time.sleep(0.2)
    return node


def end_node(node: psutil.Process) -> None:
    """End all of a node's processes at once."""
    processes = [node, *node.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes)
