"""The intervals of accuracy and loss over examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.records.stats import Rounds, aggregate
from reports.judging.quality import learned, learned_text
from reports.measured.examples import (
    ENOUGH_SEQUENCES,
    change_over_sequences,
    difference_over_sequences,
    loss_over_sequences,
    ratio_over_sequences,
    share_interval,
)
from reports.measured.measurements import group
from reports.tables.methods import speed_table
from run_records import make_run, make_test_job

REAL = make_test_job(model={"name": "opt-1.3b"}, data={"train": "text.txt"}, eval_batches=8)


@pytest.mark.parametrize(("hits", "count"), [(22, 32), (0, 10), (10, 10), (1, 1), (793, 872)])
def test_the_interval_of_a_share_is_wilsons(hits: int, count: int) -> None:
    found = scipy.stats.binomtest(hits, count).proportion_ci(method="wilson")
    assert share_interval(hits / count, count) == pytest.approx((found.low, found.high), abs=1e-12)


def of_losses(
    labels: tuple[int, ...], *last: tuple[float, ...], engine: str = "native", first: tuple[float, ...] = ()
) -> Rounds:
    """A run for each of `last`."""
    runs = [
        make_run(
            engine, round=i, job=REAL, eval_loss_first=4.0, eval_loss_last=sum(each) / sum(labels),
            eval_sequence_labels=labels, eval_sequence_losses_first=first or each,
            eval_sequence_losses_last=each,
        )
        for i, each in enumerate(last, 1)
    ]  # fmt: skip
    return aggregate(engine, runs)


sequences = st.lists(
    st.tuples(st.integers(1, 500), st.floats(0.01, 12.0)), min_size=ENOUGH_SEQUENCES, max_size=80
)


@given(sequences)
@settings(max_examples=100, deadline=None)
def test_the_interval_of_a_loss_is_that_of_a_ratio(drawn: list[tuple[int, float]]) -> None:
    """Written from Cochran (1977), equation 2.46 without what is left of a finite population, with numpy."""
    labels = np.array([each for each, _ in drawn])
    losses = labels * np.array([each for _, each in drawn])
    found = loss_over_sequences(of_losses(tuple(labels.tolist()), tuple(losses.tolist())))
    assert found is not None
    count = len(drawn)
    value = losses.mean() / labels.mean()
    error = np.std(losses - value * labels, ddof=1) / np.sqrt(count) / labels.mean()
    half = scipy.stats.t.ppf(0.975, count - 1) * error
    assert found.count == count
    assert found.value == pytest.approx(value)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=5e-4, abs=1e-9)
    assert (found.high + found.low) / 2 == pytest.approx(value)


@given(st.lists(st.floats(0.01, 12.0), min_size=ENOUGH_SEQUENCES, max_size=80))
@settings(max_examples=50, deadline=None)
def test_of_sequences_of_one_length_it_is_that_of_their_mean(losses: list[float]) -> None:
    found = loss_over_sequences(of_losses((1,) * len(losses), tuple(losses)))
    assert found is not None
    half = scipy.stats.t.ppf(0.975, len(losses) - 1) * scipy.stats.sem(losses)
    assert found.high - found.value == pytest.approx(half, rel=5e-4, abs=1e-9)


@given(sequences, st.integers(2, 5), st.randoms())
@settings(max_examples=50, deadline=None)
def test_more_sequences_say_more_in_any_order(
    drawn: list[tuple[int, float]], times: int, random: Any
) -> None:
    labels = tuple(each for each, _ in drawn)
    losses = tuple(count * each for count, each in drawn)
    few, many = (loss_over_sequences(of_losses(labels * k, losses * k)) for k in (1, times))
    assert few is not None
    assert many is not None
    assert many.high - many.low <= (few.high - few.low) * times**-0.5 + 1e-9
    shuffled = list(zip(labels, losses, strict=True))
    random.shuffle(shuffled)
    other = loss_over_sequences(of_losses(*map(tuple, zip(*shuffled, strict=True))))
    assert other is not None
    assert (other.low, other.high) == pytest.approx((few.low, few.high))


@given(sequences, st.data())
@settings(max_examples=100, deadline=None)
def test_methods_are_compared_sequence_by_sequence(
    drawn: list[tuple[int, float]], data: st.DataObject
) -> None:
    """Oracles as above, of differences and multiples; a method beside itself is undecided, and the sign of a
    difference turns with its sides."""
    labels = np.array([each for each, _ in drawn])
    one = labels * np.array([each for _, each in drawn])
    count = len(drawn)
    other = one + data.draw(st.lists(st.floats(-0.009, 3.0), min_size=count, max_size=count))
    mine, its = (of_losses(tuple(labels.tolist()), tuple(each.tolist())) for each in (one, other))
    t = scipy.stats.t.ppf(0.975, count - 1)
    for found, above, below in (
        (difference_over_sequences(its, mine), other - one, labels),
        (ratio_over_sequences(its, mine), other, one),
        (change_over_sequences(of_losses(tuple(labels.tolist()), tuple(other.tolist()),
                                         first=tuple(one.tolist()))), other - one, labels),
    ):  # fmt: skip
        assert found is not None
        value = above.sum() / below.sum()
        error = np.std(above - value * below, ddof=1) * np.sqrt(count) / below.sum()
        assert found.value == pytest.approx(value, abs=1e-9)
        assert found.high - found.value == pytest.approx(t * error, rel=5e-4, abs=1e-7)
        assert found.value - found.low == pytest.approx(found.high - found.value)
    turned = difference_over_sequences(mine, its)
    same = difference_over_sequences(mine, mine)
    assert turned is not None
    assert same is not None
    assert (same.low, same.high) == (0.0, 0.0)
    straight = difference_over_sequences(its, mine)
    assert straight is not None
    assert (turned.low, turned.high) == pytest.approx((-straight.high, -straight.low))


def test_other_sequences_are_compared_with_nothing() -> None:
    one, other = of_losses((9,) * 5, (1.0, 2.0, 3.0, 4.0, 5.0)), of_losses((9,) * 6, (1.0,) * 6)
    assert difference_over_sequences(one, other) is ratio_over_sequences(one, other) is None
    nothing = of_losses((9,) * 5, (0.0,) * 5)
    assert difference_over_sequences(one, nothing) is not None
    assert ratio_over_sequences(one, nothing) is None


def test_what_was_not_kept_has_no_interval() -> None:
    """Records of before, few sequences, runs of other ones, and lists that do not belong together."""
    labels, losses = (9,) * 5, (1.0, 2.0, 3.0, 4.0, 5.0)
    assert loss_over_sequences(of_losses(labels, losses, losses)) is not None
    assert loss_over_sequences(of_losses(labels[:4], losses[:4])) is None
    assert loss_over_sequences(of_losses(labels, losses[:4])) is None
    before = make_run("native", round=2, job=REAL, eval_loss_first=4.0, eval_loss_last=0.3)
    both = aggregate("native", (*of_losses(labels, losses).runs, before))
    assert loss_over_sequences(both) is None
    other = of_losses((8, 10, 9, 9, 9), losses)
    assert loss_over_sequences(aggregate("native", (*of_losses(labels, losses).runs, *other.runs))) is None


def test_of_a_text_the_loss_is_told_with_its_sequences() -> None:
    rounds = of_losses((4, 4, 4, 4, 4), (4.0, 8.0, 6.0, 4.0, 8.0))
    all_ = group(rounds.runs, None)
    found = learned("native", all_)
    assert found is not None
    told = "of 5 sequences (95 %: 0.8794 to 2.1206)"
    assert learned_text(found) == f"loss 1.5000 {told} on held-out data; before training 4.0000"
    (row,) = speed_table(all_).rows
    assert any(f"loss 4.0000 to 1.5000 {told}" in str(cell) for cell in row)
