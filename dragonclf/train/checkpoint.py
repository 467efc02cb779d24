"""Checkpoints of a training run: its newest state and its best weights, each one object that is replaced whole.

RUN/checkpoints/latest.pt    all that the next step depends on: after each epoch, and every `--checkpoint-every` steps
                best.pt      weights and thresholds of the epoch with the best validation accuracy
    results.csv              a row for each finished epoch
    steps.csv                the losses of their steps, up to 100 rows an epoch
"""

import csv
import hashlib
import io
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch

from dragonclf import storage

AGREE_TRIES, AGREE_S = 10, 1.0
FOLDER, LATEST, BEST, RESULTS, STEPS = "checkpoints", "latest.pt", "best.pt", "results.csv", "steps.csv"

Row = dict[str, float]


class Writer:
    """Writes checkpoints while training goes on, one at a time, in order. What failed is raised by the next call, or at the end.

    A state is serialised before `save` returns, so it may change afterwards.
    """

    def __init__(self, run_uri: str):
        self._run_uri = run_uri
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: dict[str, Any], *, best: bool = False) -> None:
        """Make `state` the newest, then bring results.csv and steps.csv to its history. `best`: its weights are the best so far."""
        self.wait()
        latest = _serialised(state)
        weights = None
        if best:
            weights = _serialised({"model": weights_of(state)} | {key: state[key] for key in ("thresholds", "history")})
        self._pending = self._pool.submit(self._write, latest, weights, list(state["history"]), list(state["curve"]))

    def wait(self) -> None:
        """Return once everything is written."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _write(self, latest: bytes, weights: bytes | None, history: list[Row], curve: list[Row]) -> None:
        if weights is not None:
            storage.put(storage.join(self._run_uri, FOLDER, BEST), weights)
        storage.put(storage.join(self._run_uri, FOLDER, LATEST), latest)
        if history:
            write_results(self._run_uri, history, curve)


def since_best(history: list[Row]) -> int:
    """Epochs since the one with the best validation accuracy, by lower validation loss if equal; the first of equals counts."""
    figures = [(row["valid_accuracy"], -row["valid_loss"]) for row in history]
    return len(figures) - 1 - figures.index(max(figures)) if figures else 0


def weights_of(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a checkpoint's run gives: the average of its weights if it keeps one, else the weights."""
    return state.get("average") or state["model"]


def load(run_uri: str, name: str = LATEST) -> dict[str, Any] | None:
    """A checkpoint, its tensors on the CPU, or None if there is none yet. Loads no pickled code."""
    return _opened(_read(run_uri, name))


def load_agreed(run_uri: str, agree: Callable[[int], bool]) -> dict[str, Any] | None:
    """As `load`, the same on all workers: `agree` tells whether they all call it with the same number, here that of the content.

    StorageError if they see different ones for long: something still writes there.
    """
    for _ in range(AGREE_TRIES):
        data = _read(run_uri, LATEST)
        if agree(int.from_bytes(hashlib.sha256(data or b"").digest()[:7], "big")):
            return _opened(data)
        time.sleep(AGREE_S)
    raise storage.StorageError(
        f"the checkpoint under {run_uri} keeps changing while workers start from it: end the other command that trains this run"
    )


def _read(run_uri: str, name: str) -> bytes | None:
    found = storage.get_if_exists(storage.join(run_uri, FOLDER, name))
    return found[0] if found else None


def _opened(data: bytes | None) -> dict[str, Any] | None:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True) if data else None


def write_results(run_uri: str, history: list[Row], curve: list[Row]) -> None:
    """Write steps.csv, then results.csv: one row per finished epoch."""
    for name, rows in ((STEPS, curve), (RESULTS, history)):
        table = io.StringIO()
        writer = csv.DictWriter(table, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        storage.put(storage.join(run_uri, name), table.getvalue().encode())


def read_results(run_uri: str, name: str = RESULTS) -> list[Row]:
    """The rows of results.csv, one per finished epoch, or of steps.csv."""
    found = storage.get_if_exists(storage.join(run_uri, name))
    if found is None:
        return []
    return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(io.StringIO(found[0].decode()))]


def _serialised(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
