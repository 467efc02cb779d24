"""Processes for tests of several workers, forked off one that has loaded what they need: each would take seconds to load it itself."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing

PRELOAD = ["dragonclf.train.lr_find", "timm", "torchmetrics.functional.classification", "scipy.optimize", "pytest"]


def run_in_processes(function: Callable[..., None], *arguments: Any, count: int) -> None:
    """Call ``function(rank, *arguments)`` in `count` processes at once; raise what one of them raises."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    torch.multiprocessing.start_processes(function, arguments, count, start_method="forkserver")  # pyright: ignore[reportPrivateImportUsage]
