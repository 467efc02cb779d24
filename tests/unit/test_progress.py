"""What is said of a job's progress without a terminal."""

import logging
import re

import pytest

from dragonclf import progress


def test_images_done_before_are_progress_and_no_part_of_the_rate(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(progress.log, "propagate", True)
    clock = iter([0.0, 1.0, 10.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, "dragonclf"), progress.images("score", 1000) as advance:
        advance(900, {})
        advance(100, {"ok": 97, "missing": 3})
    (line,) = caplog.messages
    assert re.fullmatch(r"score: 1,000 of 1,000 images, 10/s \(3 missing\)", line)
