"""Checkpoints of a training run: one object an epoch, written whole or not at all, so that the newest is always a good one."""

import csv
import io
from typing import Any

import torch

from dragonclf import storage

FOLDER, RESULTS = "checkpoints", "results.csv"


def save(run_uri: str, state: dict[str, Any]) -> None:
    """Write the state after `state["epoch"]` epochs, then results.csv from its ``history``."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    storage.put(_uri(run_uri, state["epoch"]), buffer.getvalue())
    write_results(run_uri, state["history"])


def write_results(run_uri: str, history: list[dict[str, float]]) -> None:
    """Write results.csv: one row per finished epoch."""
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    storage.put(storage.join(run_uri, RESULTS), table.getvalue().encode())


def load_newest(run_uri: str, *, num_epochs: int) -> dict[str, Any] | None:
    """The state after the greatest number of epochs, tensors on the CPU, or None if there is none. Loads no pickled code."""
    for epoch in range(num_epochs, 0, -1):
        found = storage.get_if_exists(_uri(run_uri, epoch))
        if found is not None:
            return torch.load(io.BytesIO(found[0]), map_location="cpu", weights_only=True)
    return None


def read_results(run_uri: str) -> list[dict[str, float]]:
    """The rows of results.csv: one per finished epoch."""
    found = storage.get_if_exists(storage.join(run_uri, RESULTS))
    if found is None:
        return []
    return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(io.StringIO(found[0].decode()))]


def _uri(run_uri: str, epoch: int) -> str:
    return storage.join(run_uri, FOLDER, f"epoch-{epoch:05d}.pt")
