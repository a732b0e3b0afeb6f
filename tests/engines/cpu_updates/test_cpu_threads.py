"""How many threads Adam takes, by how long steps take with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.cpu_updates.cpu_threads import FIRST_STEPS, SEEN_STEPS, AdamThreads

STEPS = 1 + FIRST_STEPS + SEEN_STEPS
"""After which all threads have been seen, the one included that nothing comes before."""


@pytest.fixture(autouse=True)
def _threads_of_a_large_host() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(32)
    yield
    torch.set_num_threads(before)


def counts(step_s: Callable[[int, int], float], steps: int = 3 * STEPS) -> list[int]:
    """Of each step, where step n takes so long with a number of threads."""
    now = 0.0
    threads, found = AdamThreads(lambda: now), []
    for step in range(steps):
        found.append(threads.count)
        now += step_s(step, threads.count)
        threads.step_ended()
    return found


def test_half_the_threads_where_steps_are_no_slower_with_them() -> None:
    for with_half_s in (0.07, 0.08):
        found = counts(lambda _, count, half=with_half_s: 0.08 if count == 30 else half)  # type: ignore[misc]
        assert found[:STEPS] == [30] * STEPS
        assert set(found[STEPS:]) == {15}


def test_all_threads_where_the_cpu_decides() -> None:
    found = counts(lambda _, count: 8.0 / count)
    assert found.count(15) == 1 + SEEN_STEPS
    assert found[-STEPS:] == [30] * STEPS


def test_one_slow_step_decides_nothing() -> None:
    """Nor do the first ones, in which kernels are compiled."""
    slow: Sequence[int] = (0, 1, 2, 4, STEPS + 2)
    found = counts(lambda step, count: 9.0 if step in slow else 0.08 if count == 30 else 0.07)
    assert found[-1] == 15


@given(st.lists(st.floats(0.01, 10.0), min_size=3 * STEPS, max_size=3 * STEPS))
def test_it_settles_for_good(times_s: list[float]) -> None:
    found = counts(lambda step, _: times_s[step])
    assert set(found) <= {15, 30}
    assert len(set(found[STEPS + 1 + SEEN_STEPS :])) == 1


def test_few_threads_are_all_taken() -> None:
    for has in (1, 2, 3):
        torch.set_num_threads(has)
        assert set(counts(lambda *_: 1.0)) == {1}
