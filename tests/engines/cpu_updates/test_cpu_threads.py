"""How many threads Adam takes, by how long steps take with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.cpu_updates.cpu_threads import FIRST_STEPS, SEEN_STEPS, AdamThreads

STEPS = 1 + FIRST_STEPS + SEEN_STEPS
"""After which half the threads have been seen, the step included that nothing comes before."""


@pytest.fixture(autouse=True)
def _threads_of_a_large_host() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(32)
    yield
    torch.set_num_threads(before)


StepS = Callable[[int, int], float]


def counts(
    step_s: StepS, steps: int = 3 * STEPS, *, cpu_s: StepS = lambda *_: 1.0, hiding_s: StepS | None = None
) -> list[int]:
    """Of each step, where step n takes so long with a number of threads, as do updates and what of the GPU's
    time hides them."""
    now = 0.0
    threads, found = AdamThreads(lambda: now), []
    for step in range(steps):
        count = threads.count
        found.append(count)
        now += step_s(step, count)
        threads.step_ended(cpu_s(step, count), None if hiding_s is None else hiding_s(step, count))
    return found


def in_turn(slow_s: float, fast_s: float) -> StepS:
    return lambda step, _: slow_s if step % 2 == 0 else fast_s


@pytest.mark.parametrize("taken", [in_turn(0.06, 0.12), in_turn(0.12, 0.06)])
def test_half_the_threads_where_updates_hide_behind_the_gpu(taken: StepS) -> None:
    """However long steps take: none is tried with all."""
    found = counts(taken, cpu_s=in_turn(0.07, 0.04), hiding_s=in_turn(0.06, 0.075))
    assert set(found) == {15}
    found = counts(taken, cpu_s=in_turn(0.07, 0.06), hiding_s=in_turn(0.06, 0.07))
    assert found[STEPS : 2 * STEPS - FIRST_STEPS] == [30] * (1 + SEEN_STEPS)


def test_half_the_threads_where_steps_are_no_faster_with_all() -> None:
    for with_all_s in (0.079, 0.08, 0.09):
        found = counts(lambda _, count, most=with_all_s: 0.08 if count == 15 else most)  # type: ignore[misc]
        assert found[:STEPS] == [15] * STEPS
        assert found.count(30) == 1 + SEEN_STEPS
        assert found[-STEPS:] == [15] * STEPS


def test_all_threads_where_the_cpu_decides() -> None:
    """After some steps; or from the third on where it plainly does."""
    for gpu_s, after in ((0.45, STEPS), (0.1, 1 + FIRST_STEPS)):
        found = counts(
            lambda _, count: 8.0 / count,
            cpu_s=lambda _, count: 7.0 / count,
            hiding_s=lambda *_, busy_s=gpu_s: busy_s,  # type: ignore[misc]
        )
        assert found[:after] == [15] * after
        assert set(found[after:]) == {30}


def test_half_the_threads_where_updates_are_no_faster_with_all() -> None:
    """As beside other programs, though the CPU plainly decides. Kernels are compiled in the first steps."""
    for with_all_s, chosen in ((0.69, 15), (0.8, 15), (0.6, 30)):
        found = counts(
            lambda step, _: 9.0 if step < 3 else 0.8,
            cpu_s=lambda _, count, most_s=with_all_s: 0.7 if count == 15 else most_s,  # type: ignore[misc]
            hiding_s=lambda *_: 0.1,
        )
        assert found[1 + FIRST_STEPS : 1 + FIRST_STEPS + 1 + SEEN_STEPS] == [30] * (1 + SEEN_STEPS)
        assert set(found[-STEPS:]) == {chosen}


def test_one_step_whose_updates_are_slow_is_not_plain() -> None:
    for slow in range(1, 1 + FIRST_STEPS):
        busy: StepS = lambda step, _, slow=slow: 9.0 if step == slow else 0.05  # type: ignore[misc]  # noqa: E731
        assert set(counts(lambda *_: 0.08, cpu_s=busy, hiding_s=lambda *_: 0.07)) == {15}


@pytest.mark.parametrize("first", [0, 1])
def test_steps_that_are_slow_and_fast_in_turn_are_taken_by_their_mean(first: int) -> None:
    """As where one step begins before the updates of the one before have ended."""
    swing_s = {15: 0.045, 30: 0.005}
    for with_all_s, chosen in ((0.09, 15), (0.08, 30)):
        mean_s = {15: 0.085, 30: with_all_s}
        found = counts(
            lambda step, count, mean_s=mean_s: (  # type: ignore[misc]
                mean_s[count] + swing_s[count] * (1 if (step + first) % 2 else -1)
            )
        )
        assert set(found[-STEPS:]) == {chosen}


def test_one_slow_step_decides_nothing() -> None:
    """Nor do the first ones, in which kernels are compiled."""
    slow: Sequence[int] = (0, 1, 2, 4, STEPS + 2)
    found = counts(lambda step, count: 9.0 if step in slow else 0.08 if count == 15 else 0.07)
    assert found[-1] == 30
    busy: StepS = lambda step, _: 9.0 if step in slow else 0.05  # noqa: E731
    found = counts(busy, cpu_s=busy, hiding_s=lambda *_: 0.07)
    assert found.count(30) == 1 + SEEN_STEPS  # as the CPU decided in the first ones; tried, and not kept
    assert set(found[1 + FIRST_STEPS + 1 + SEEN_STEPS :]) == {15}


@given(
    st.lists(st.floats(0.01, 10.0), min_size=3 * STEPS, max_size=3 * STEPS),
    st.lists(st.floats(0.01, 10.0), min_size=3 * STEPS, max_size=3 * STEPS),
    st.booleans(),
)
def test_it_settles_for_good(times_s: list[float], gpu_s: list[float], is_known: bool) -> None:
    busy_s: StepS | None = (lambda step, _: gpu_s[step]) if is_known else None
    found = counts(lambda step, _: times_s[step], cpu_s=lambda step, _: times_s[step], hiding_s=busy_s)
    assert set(found) <= {15, 30}
    assert len(set(found[1 + FIRST_STEPS + 3 * (1 + SEEN_STEPS) :])) == 1


def test_few_threads_are_all_taken() -> None:
    for has in (1, 2, 3):
        torch.set_num_threads(has)
        assert set(counts(lambda *_: 1.0)) == {1}
