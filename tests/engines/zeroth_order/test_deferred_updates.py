"""What a stored block lacks, against a walk through the steps that rounds where the schedule says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.base import Update
from engines.costs.zo2 import folds
from engines.noise.visits import LOG_CAPACITY
from engines.settings.zeroth_order import MezoSettings
from engines.zeroth_order.block_visit import Task
from engines.zeroth_order.deferred_updates import DeferredUpdates

BLOCKS = 4
CPU = torch.device("cpu")


def made(settings: MezoSettings, trained: range = range(BLOCKS)) -> DeferredUpdates:
    return DeferredUpdates(settings, 7, BLOCKS, trained, CPU)


def take_step(deferred: DeferredUpdates, step: int, queries: int = 1) -> None:
    for query in range(queries):
        deferred.append(
            Update(
                step=step,
                learning_rate=1e-3,
                projected_gradient=1.0,
                weight_decay=0.0,
                query=query,
                queries=queries,
            )
        )


def store(deferred: DeferredUpdates, block: int) -> None:
    """As a visit does that applies everything and writes the block."""
    deferred.mark_stored(block, Task(how=deferred.lacking(block), store=True, perturb=False))


@given(st.lists(st.sets(st.integers(0, BLOCKS - 1)), min_size=1, max_size=12), st.integers(1, 3))
def test_a_block_lacks_what_came_since_it_was_stored(stored: list[set[int]], queries: int) -> None:
    deferred, lacking = made(MezoSettings(queries=queries), range(1, BLOCKS)), dict.fromkeys(range(BLOCKS), 0)
    for step, blocks in enumerate(stored):
        assert deferred.step == step
        take_step(deferred, step, queries)
        lacking = {block: count + queries if block else 0 for block, count in lacking.items()}
        for block in blocks:
            store(deferred, block)
            lacking[block] = 0
        for block, count in lacking.items():
            assert deferred.num_deferred(block) == count
            how = deferred.lacking(block)
            assert (how.first, how.last) == (deferred.log.length - count, deferred.log.length)
            assert deferred.split(block, step + 1) == ((), how)  # a full base takes them at any time
        assert deferred.most_deferred(range(BLOCKS)) == max(lacking.values())
    assert deferred.none().first == deferred.none().last == deferred.log.length
    assert deferred.latest(2).first == max(0, deferred.log.length - 2)
    assert deferred.to_save(deferred.step) == ([], [])
    deferred.mark_applied(1)
    assert deferred.num_deferred(1) == 0
    deferred.mark_all_applied()
    assert deferred.most_deferred(range(BLOCKS)) == 0


def test_a_visit_that_does_not_store_applies_nothing_for_good() -> None:
    deferred = made(MezoSettings())
    take_step(deferred, 0)
    deferred.mark_stored(2, Task(how=deferred.lacking(2), store=False, perturb=True))
    assert deferred.num_deferred(2) == 1


@pytest.mark.parametrize("queries", [1, 3])
def test_a_block_is_written_before_the_log_forgets_what_it_lacks(queries: int) -> None:
    deferred = made(MezoSettings(queries=queries))
    steps = LOG_CAPACITY // queries
    for step in range(steps):
        assert not deferred.leave_no_room_for_a_step(0)
        assert not deferred.fill_the_log([0])
        take_step(deferred, step, queries)
    assert deferred.leave_no_room_for_a_step(0)
    assert deferred.fill_the_log([0, 1]) == (steps * queries == LOG_CAPACITY)
    assert len(deferred.log.between(deferred.lacking(0).first, deferred.log.length)) == steps * queries
    store(deferred, 0)
    assert not deferred.leave_no_room_for_a_step(0)
    assert deferred.leave_no_room_for_a_step(1)


def roundings(block: int, steps: list[int], last_step: int, every: int, queries: int) -> list[int]:
    """Positions before which the block is rounded, by the rule: before step t, after all updates of steps
    before t, wherever something is there to round."""
    found = [0]
    for turn in range(last_step + 1):
        before = queries * sum(step < turn for step in steps)
        if folds(block, turn, every) and before > found[-1]:
            found.append(before)
    return found[1:]


@given(
    st.sets(st.integers(0, 12), min_size=1, max_size=8),
    st.integers(0, 4),
    st.integers(1, 4),
    st.integers(1, 2),
    st.integers(0, BLOCKS - 1),
)
def test_a_low_bit_block_is_rounded_at_its_turns_alone(
    taken: set[int], later: int, every: int, queries: int, block: int
) -> None:
    """Steps without an update in between, too: of those only the turns count."""
    deferred = made(MezoSettings(base="int8", fold_every=every, queries=queries))
    steps = sorted(taken)
    for step in steps:
        take_step(deferred, step, queries)
    last_step = steps[-1] + later
    expected = roundings(block, steps, last_step, every, queries)
    visits, rest = deferred.split(block, last_step)
    assert [visit.last for visit in visits] == expected
    assert [visit.first for visit in visits] == [0, *expected][: len(expected)]
    assert (rest.first, rest.last) == ([0, *expected][-1], deferred.log.length)

    updates, behind = deferred.to_save(last_step)
    rest_of_each = [
        deferred.log.length - [0, *roundings(each, steps, last_step, every, queries)][-1]
        for each in range(BLOCKS)
    ]
    assert (behind or [0] * BLOCKS) == rest_of_each
    assert len(updates) == max(rest_of_each)
    resumed = made(MezoSettings(base="int8", fold_every=every, queries=queries))
    resumed.restore(last_step, 9, (updates, behind))
    assert (resumed.step, resumed.seed) == (last_step, 9)
    assert [resumed.num_deferred(each) for each in range(BLOCKS)] == rest_of_each

    task = deferred.task_of_roundings(block, last_step)
    assert task.store == bool(expected)
    deferred.mark_stored(block, task)
    assert deferred.num_deferred(block) == rest_of_each[block]
    assert deferred.task_of_roundings(block, last_step).store is False
    assert deferred.is_due(block) == folds(block, deferred.step, every)
