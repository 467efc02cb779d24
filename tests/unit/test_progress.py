"""What is said of a job's progress without a terminal, and what it says would make it faster."""

import logging

import pytest

from dragonclf import progress
from dragonclf.busy import Busy


class Lines(logging.Handler):
    """What is logged; other tests may have left handlers of their own on the logger."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_the_line_tells_rates_what_is_left_what_failed_and_who_is_busy(monkeypatch: pytest.MonkeyPatch):
    lines = Lines()
    for name, value in (("handlers", [lines]), ("propagate", False), ("level", logging.INFO)):
        monkeypatch.setattr(progress.log, name, value)
    progress.log.setLevel(logging.INFO)  # which also forgets what was decided about the level before
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.images("score", 2000) as tally:
        now = 1.0
        tally.add(900)  # done before: no part of a rate
        now = 10.0
        tally.add(
            100, read=100, counts={"ok": 97, "missing": 3}, busy=Busy(wall_s=8, threads_s=32, decode_s=16, model_s=2)
        )
        now = 12.0
        tally.add(200, read=100, counts={"ok": 200})  # half of them kept of an earlier run
        now = 20.0
        tally.add(800, read=800, counts={"ok": 800}, busy=Busy(wall_s=10, threads_s=40, decode_s=40, fetch_s=90))
    assert lines.messages == [
        "score: 1,000 of 2,000 images, 10/s now, 10/s overall, 100 s left (3 missing) [decode 50%, model 25%, 0 GETs a worker]".replace(
            "100 s", "2 min"
        ),
        "score: 2,000 of 2,000 images, 90/s now, 50/s overall (3 missing) [decode 78%, model 11%, 5 GETs a worker]",
    ]


@pytest.mark.parametrize(
    ("busy", "said"),
    [
        (Busy(), "nothing was read"),
        (Busy(wall_s=10, threads_s=20, decode_s=9, model_s=9), "the model (busy 90% of the time): GPUs, more workers"),
        (Busy(wall_s=10, threads_s=20, decode_s=18, model_s=3), "decoding (threads busy 90% of the time): more CPUs"),
        (
            Busy(wall_s=10, threads_s=20, decode_s=4, model_s=3, fetch_s=500, num_bytes=10 * 2**20),
            "the store (1.0 MiB/s and 50 GETs a worker, all else mostly idle)",
        ),
        (Busy(wall_s=10, threads_s=20, decode_s=13, model_s=6), "nothing alone"),
    ],
)
def test_the_verdict_names_what_all_else_waits_for(busy: Busy, said: str):
    assert busy.verdict.startswith(said)
