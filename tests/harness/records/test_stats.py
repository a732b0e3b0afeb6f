from __future__ import annotations

import itertools
import random
import statistics

import numpy
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from harness.records.run import Sample
from harness.records.stats import (
    SAME_FACTOR,
    aggregate,
    loss_change,
    median_interval,
    outer_deciles,
    ratio,
    resampled_medians,
    same_or_different,
    spread,
    step_statistics,
)
from run_records import make_run, make_samples

times = st.floats(min_value=1e-4, max_value=1e3)
rounds = st.lists(st.lists(times, min_size=1, max_size=5), min_size=1, max_size=5)


def test_spread_of_nothing_and_of_one() -> None:
    assert spread([]) is None
    one = spread([2.0])
    assert one is not None
    assert (one.median, one.low, one.high, one.count, one.deviation) == (2.0, 2.0, 2.0, 1, None)


@given(st.lists(times, min_size=2))
def test_spread_agrees_with_the_standard_library(values: list[float]) -> None:
    found = spread(values)
    assert found is not None
    assert found.low <= found.median <= found.high
    assert found.median == statistics.median(values)
    assert found.deviation == pytest.approx(statistics.stdev(values))


def test_one_slow_step_is_outside_of_the_outer_deciles() -> None:
    assert outer_deciles([]) == (None, None)
    assert outer_deciles([2.0]) == (2.0, 2.0)
    assert outer_deciles([float(value) for value in range(10, -1, -1)]) == (1.0, 9.0)
    assert outer_deciles([*[1.0] * 20, 50.0]) == (1.0, 1.0)


def test_step_statistics_leave_warmups_out_of_times_but_not_of_the_first_loss() -> None:
    found = step_statistics(make_samples([0.5, 0.25, 1.0], [9.0, 8.0, 7.0, 6.0, 5.0]), tokens_per_step=100)
    assert (found.step_s_median, found.step_s_low, found.step_s_high) == (0.5, 0.25, 1.0)
    assert found.tokens_per_s == 200.0
    assert (found.loss_first, found.loss_last) == (9.0, 5.0)


def test_step_statistics_of_nothing_and_of_warmups_only() -> None:
    nothing = step_statistics((), 100)
    assert all(getattr(nothing, name) in (None, {}, ()) for name in nothing.__slots__)
    only = step_statistics([Sample(step=0, warmup=True, step_s=1.0, loss=2.0)], 100)
    assert only.step_s_median is None
    assert only.tokens_per_s is None
    assert (only.loss_first, only.loss_last) == (2.0, 2.0)


def test_loss_change_compares_quarters() -> None:
    losses = [4.0, 2.0, 9.0, 9.0, 9.0, 9.0, 1.0, 2.0]
    assert loss_change(make_samples([1.0] * 8, losses, warmup=0)) == pytest.approx(1.5 - 3.0)
    assert loss_change(make_samples([1.0], [3.0], warmup=0)) is None
    assert loss_change(make_samples([1.0, 1.0], [3.0, None], warmup=0)) is None


def test_aggregate_takes_one_median_per_process() -> None:
    # Pooled, the five slow steps would outvote the three of the fast run.
    runs = [
        make_run(round=1, step_s=(1.0, 1.0, 1.0)),
        make_run(round=2, step_s=(3.0,) * 5),
        make_run(round=3, end_state="crash"),
        make_run("native", step_s=(50.0,)),
    ]
    found = aggregate("zo2", runs)
    assert found.step_s is not None
    assert (found.step_s.median, found.step_s.count) == (2.0, 2)
    assert (found.step_s_low, found.step_s_high, found.counted_steps) == (1.0, 3.0, 8)
    assert (len(found.runs), len(found.ok)) == (3, 2)
    assert found.tokens_per_s is not None
    assert (found.tokens_per_s.median, found.tokens_per_s.high) == (512.0, 1024.0)
    random.Random(0).shuffle(runs)
    assert aggregate("zo2", runs) == found


def test_aggregate_of_failures_only_measured_nothing() -> None:
    found = aggregate("zo2", [make_run(end_state="timeout")])
    assert found.step_s is None
    assert found.loss_last is None
    assert found.step_times == ()


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        ([[1.0], [1.1], [1.05]], [[2.0], [2.1], [2.0]], "FAST"),
        ([[2.0], [2.1], [2.0]], [[1.0], [1.1], [1.05]], "SLOW"),
        ([[1.0], [1.01], [1.0]], [[1.02], [1.0], [1.01]], "SAME"),
        # Ranges that do not touch, yet differ by less than two launches of one program do.
        ([[1.0], [1.001], [1.0]], [[1.02], [1.021], [1.02]], "SAME"),
        ([[1.0], [2.0], [1.5]], [[1.5], [2.5], [2.0]], "AMBIGUOUS"),
        # One run of nine that was held up does not decide, as it would by the ranges.
        ([[1.0]] * 8 + [[2.5]], [[2.0]] * 9, "FAST"),
        ([[1.0]], [], "AMBIGUOUS"),
        ([], [], "AMBIGUOUS"),
        # Fewer than three runs on a side claim nothing, however far apart they are.
        ([[1.0, 1.2, 1.1]], [[2.0], [2.1], [2.0]], "AMBIGUOUS"),
        ([[1.0], [1.1]], [[2.0], [2.1], [2.0]], "AMBIGUOUS"),
    ],
)
def test_same_or_different(a: list[list[float]], b: list[list[float]], word: str) -> None:
    assert same_or_different(a, b) == word


@given(rounds, rounds)
def test_swapping_the_sides_swaps_the_answer(a: list[list[float]], b: list[list[float]]) -> None:
    swapped = {"FAST": "SLOW", "SLOW": "FAST", "SAME": "SAME", "AMBIGUOUS": "AMBIGUOUS"}
    forth, back = ratio(a, b), ratio(b, a)
    assert forth is not None
    assert back is not None
    assert back.low == pytest.approx(1 / forth.high)
    edges = (1 / SAME_FACTOR, 1.0, SAME_FACTOR)
    on_edge = any(end == pytest.approx(edge) for end in (forth.low, forth.high) for edge in edges)
    assert on_edge or swapped[same_or_different(a, b)] == same_or_different(b, a)


@given(rounds)
def test_a_method_is_never_faster_or_slower_than_itself(a: list[list[float]]) -> None:
    assert same_or_different(a, a) in ("SAME", "AMBIGUOUS")


@given(rounds, rounds)
def test_the_ratio_lies_in_its_range(a: list[list[float]], b: list[list[float]]) -> None:
    found = ratio(a, b)
    assert found is not None
    assert found.low <= found.value * (1 + 1e-12)
    assert found.value <= found.high * (1 + 1e-12)


def by_enumeration(values: list[float]) -> dict[float, float]:
    """Of every sample that can be drawn, its median."""
    chance = 1 / len(values) ** len(values)
    found: dict[float, float] = {}
    for sample in itertools.product(values, repeat=len(values)):
        median = statistics.median(sample)
        found[median] = found.get(median, 0.0) + chance
    return found


@pytest.mark.parametrize(
    "values", [[1.0], [3.0, 1.0], [1.0, 5.0, 2.0], [4.0, 1.0, 2.0, 9.0], [1, 1, 2, 3, 8]]
)
def test_resampled_medians_are_those_of_every_sample(values: list[float]) -> None:
    expected = by_enumeration(values)
    found = dict(resampled_medians(values))
    assert set(found) == set(expected)
    assert found == pytest.approx(expected)


def test_the_interval_agrees_with_scipy() -> None:
    source = random.Random(0)
    values = [source.gauss(1.0, 0.1) for _ in range(21)]
    drawn = scipy.stats.bootstrap(
        (values,), statistics.median, method="percentile", n_resamples=20_000, vectorized=False,
        rng=numpy.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert median_interval(values) == pytest.approx((drawn.low, drawn.high), rel=1e-9)


def test_the_interval_leaves_a_fortieth_out_on_each_side() -> None:
    """Of nine values 0.1 % of the resampled medians are the smallest, and 3.0 % one of the two smallest."""
    assert median_interval([float(value) for value in range(1, 10)]) == (2.0, 8.0)


def test_there_is_no_interval_of_two_and_that_of_three_is_their_range() -> None:
    assert median_interval([1.0, 2.0]) is None
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert median_interval([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 9.0]) == (2.0, 2.0)


@given(st.lists(times, min_size=3, max_size=9))
def test_the_interval_holds_the_median_and_lies_in_the_range(values: list[float]) -> None:
    found = median_interval(values)
    assert found is not None
    assert min(values) <= found[0] <= statistics.median(values) <= found[1] <= max(values)


def test_no_ratio_to_a_step_of_zero_time() -> None:
    assert ratio([[1.0]], [[0.0]]) is None
