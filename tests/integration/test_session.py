"""The Ray that a command starts and ends."""

import time
from typing import Any

import pytest
import ray
import ray.data
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from dragonclf import session

pytestmark = [
    pytest.mark.slow,  # a Ray of its own
    pytest.mark.filterwarnings("ignore"),  # Ray's own, in this process
]

RAY_DATA_WAITS_S = 2  # for the thread of a closed iteration


def test_ray_ends_only_after_the_threads_that_still_ask_it_for_something(monkeypatch: pytest.MonkeyPatch):
    step, asked = StreamingExecutor._scheduling_loop_step, []

    def starved_at_its_end(self: StreamingExecutor, topology: Any) -> bool:
        goes_on = step(self, topology)
        if self._shutdown:
            time.sleep(2 * RAY_DATA_WAITS_S)
            asked.append(ray.is_initialized())
        return goes_on

    monkeypatch.setattr(StreamingExecutor, "_scheduling_loop_step", starved_at_its_end)
    with session.connect("local"):
        unfinished = ray.data.range(100, override_num_blocks=100).map(lambda row: time.sleep(0.2) or row)
        rows: Any = iter(unfinished.iter_rows())
        next(rows)
        rows.close()
    assert asked == [True]
