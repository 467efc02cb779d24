"""A sample of a plan has its mixture of sizes, and its rate and interval are those of its steady part."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from dragonclf.config import BudgetConfig, ScoreConfig
from dragonclf.engine import budget, plan, probe
from dragonclf.engine.budget import Budget
from dragonclf.outcomes import BudgetSpentError


def staged(sizes: list[int | None]) -> plan.StagedPlan:
    rows = {"uri": [f"s3://b/{i:06d}" for i in range(len(sizes))], "etag": ["e"] * len(sizes), "size": sizes}
    schema = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("size", pa.int64())])
    return plan.stage_plan([pa.table(rows, schema=schema)])


def test_each_chunk_has_the_mixture_of_sizes_of_the_whole():
    sizes: list[int | None] = [int(size) for size in np.random.default_rng(0).lognormal(10, 1, 30_000)]
    with staged(sizes) as made:
        chunks = probe._sample(made)
    assert len(chunks) == probe.NUM_CHUNKS
    assert all(len(chunk) == probe.CHUNK_IMAGES for chunk in chunks)
    wanted = np.median(np.array(sizes, float))
    for chunk in chunks:
        assert np.median(chunk["size"].to_numpy()) == pytest.approx(wanted, rel=0.2)
    uris = [uri for chunk in chunks for uri in chunk["uri"].to_pylist()]
    assert len(set(uris)) == len(uris)


@pytest.mark.parametrize("count", [1, 50])
def test_a_small_plan_comes_more_than_once_and_sizes_may_be_unknown(count: int):
    with staged([None] * count) as made:
        chunks = probe._sample(made)
    uris = [uri for chunk in chunks for uri in chunk["uri"].to_pylist()]
    assert len(uris) == probe.NUM_CHUNKS * probe.CHUNK_IMAGES
    assert len(set(uris)) == count


def test_the_rate_is_of_the_steady_part():
    # Two at a time: they end in pairs, the first pair late by the warm-up, the last early as it has the worker for itself.
    ends = [10.0, 10.0, *itertools.chain.from_iterable((10.0 + 2 * i, 10.0 + 2 * i) for i in range(1, 6)), 20.1, 20.1]
    image_s, interval = probe._rate(ends)
    assert image_s == pytest.approx(2 / (2 * probe.CHUNK_IMAGES))
    assert interval == pytest.approx((image_s, image_s))
    ends = [10.0, 10.0, 11.0, 11.0, 14.0, 14.0, 16.0, 16.0, 17.0, 17.0, 20.0, 20.0, 20.1, 20.1]  # 1, 3, 2, 1, 3
    image_s, (least, most) = probe._rate(ends)
    assert image_s == pytest.approx(2 / (2 * probe.CHUNK_IMAGES))
    assert most - image_s == pytest.approx(2.78 * 1.0 / 5**0.5 / (2 * probe.CHUNK_IMAGES))
    assert image_s - least == pytest.approx(most - image_s)


def test_few_chunks_leave_a_wide_interval():
    image_s, (least, most) = probe._rate([1.0, 1.0, 3.0, 3.0, 4.0, 4.0])
    assert image_s == pytest.approx(2 / (2 * probe.CHUNK_IMAGES))
    assert (least, most) == (0, 2 * image_s)


def test_a_budget_counts_hours_from_the_start_and_money_from_the_workers(monkeypatch: pytest.MonkeyPatch):
    now_s = 100.0
    monkeypatch.setattr(budget.time, "monotonic", lambda: now_s)
    hours = Budget(BudgetConfig(max_hours=1))
    money = Budget(BudgetConfig(max_cost=6, price_per_worker_hour=1.5))
    now_s = 100 + 1800.0
    for one in (hours, money):
        one.hire(4)
        one.ensure()
    now_s = 100 + 3600.0
    with pytest.raises(
        BudgetSpentError, match=r"stopped after 1 hours, as --max-hours 1 asks: the same command goes on"
    ):
        hours.ensure()
    money.ensure()
    now_s = 100 + 1800 + 3600.0
    with pytest.raises(BudgetSpentError, match=r"stopped after 4 workers have cost 6, as --max-cost 6 asks"):
        money.ensure()
    Budget(BudgetConfig()).ensure()


def test_a_cost_needs_a_price():
    with pytest.raises(ValueError, match="--max-cost needs --price-per-worker-hour"):
        ScoreConfig(model="m", source="s", out="o", max_cost=3)
