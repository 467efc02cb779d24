"""The order of training: the same global batches for any number of workers, each sample once an epoch."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dragonclf.train.order import Order

sizes = st.tuples(st.integers(1, 200), st.integers(1, 40), st.integers(0, 5), st.integers(0, 3))


def global_batches(order: Order, epoch: int, world_size: int) -> list[list[int]]:
    """The samples of each step over all workers, sorted."""
    by_rank = [order.batches(epoch, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert all(len(batches) == order.num_steps for batches in by_rank)
    return [sorted(np.concatenate(step).tolist()) for step in zip(*by_rank, strict=True)]


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(2, 50))
def test_global_batches_do_not_depend_on_the_number_of_workers(size: tuple[int, int, int, int], world_size: int):
    num_samples, global_batch_size, seed, epoch = size
    order = Order(num_samples, global_batch_size, seed)
    alone = global_batches(order, epoch, 1)
    assert global_batches(order, epoch, world_size) == alone
    assert sorted(sample for step in alone for sample in step) == list(range(num_samples))
    assert [len(step) for step in alone] == [order.global_count(step) for step in range(order.num_steps)]


@settings(max_examples=50, deadline=None)
@given(sizes, st.integers(1, 9))
def test_a_worker_meets_its_own_samples_and_no_others_in_every_epoch(size: tuple[int, int, int, int], world_size: int):
    num_samples, global_batch_size, seed, _ = size
    order = Order(num_samples, global_batch_size, seed)
    owned = [order.own(rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(owned).tolist()) == list(range(num_samples))
    for rank in range(world_size):
        for epoch in (0, 1):
            batches = order.batches(epoch, rank=rank, world_size=world_size)
            assert all(batch.dtype == np.int64 for batch in batches)
            assert sorted(np.concatenate(batches).tolist()) == owned[rank].tolist()


def test_epochs_and_seeds_differ_and_repeat():
    draws = [(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    orders = [Order(500, 32, seed).batches(epoch, rank=0, world_size=1) for seed, epoch in draws]
    flat = [tuple(np.concatenate(order).tolist()) for order in orders]
    assert len(set(flat)) == 4
    again = Order(500, 32, 1).batches(1, rank=0, world_size=1)
    assert tuple(np.concatenate(again).tolist()) == flat[-1]
    first_step = {sample for order in orders for sample in order[0].tolist()}
    assert len(first_step) > 64, "samples of an epoch are not always in the same step"


def test_the_last_step_is_as_short_as_it_must_be():
    order = Order(10, 4, 0)
    assert (order.num_steps, [order.global_count(step) for step in range(3)]) == (3, [4, 4, 2])
    assert [len(batch) for batch in order.batches(0, rank=3, world_size=4)] == [1, 1, 0]
    assert (Order(8, 4, 0).num_steps, Order(8, 4, 0).global_count(1)) == (2, 4)
