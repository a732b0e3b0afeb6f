"""What accuracy and loss on some examples say of others. Pure.

Every run of a job has the same held-out examples, so runs tell nothing of other ones. An example is what has
a class or an answer; for losses it is a sequence, whose labels are not independent of each other. Sequences
count as drawn one by one: of blocks of the same text the interval is too narrow.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from harness.records.stats import CONFIDENCE, Rounds, over_runs

ENOUGH_SEQUENCES = 5
"""For an interval of their losses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OverExamples:
    """What accuracy says of examples that were not evaluated."""

    count: int
    low: float
    high: float
    """The interval of the accuracy over the examples."""
    majority_class: float | None
    """Share of the examples that are of the most frequent class; `None`: they have no classes."""


def over_examples(rounds: Rounds) -> OverExamples | None:
    """Of the median accuracy after the last step; `None`: there is none, or examples were not counted."""
    told = [run.summary for run in rounds.ok if run.summary.eval_accuracy_last is not None]
    counts = [summary.eval_examples for summary in told if summary.eval_examples]
    share = over_runs(rounds.ok, lambda run: run.summary.eval_accuracy_last)
    if share is None or len(counts) < len(told):
        return None
    low, high = share_interval(share.median, min(counts))
    majority = over_runs(rounds.ok, lambda run: run.summary.eval_majority_class)
    return OverExamples(
        count=min(counts), low=low, high=high, majority_class=None if majority is None else majority.median
    )


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's score interval at `CONFIDENCE` of a share seen among `count` examples (Wilson 1927)."""
    z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / (1 + z**2 / count)
    return max(0.0, center - half), min(1.0, center + half)


@dataclass(frozen=True, kw_only=True, slots=True)
class OverSequences:
    """A number that is made of the losses of held-out sequences, and its interval over these."""

    count: int
    """Sequences."""
    value: float
    low: float
    high: float


def loss_over_sequences(rounds: Rounds) -> OverSequences | None:
    """Of the mean loss of a label after the last step; `None`: losses of sequences were not kept, or are of
    fewer than `ENOUGH_SEQUENCES`."""
    found = _kept(rounds)
    return None if found is None else _ratio(found.last, found.labels)


def change_over_sequences(rounds: Rounds) -> OverSequences | None:
    """Of what that loss is after the last step more than before the first, sequence by sequence."""
    found = _kept(rounds)
    return None if found is None else _ratio(_less(found.last, found.first), found.labels)


def difference_over_sequences(rounds: Rounds, other: Rounds) -> OverSequences | None:
    """Of what it is more than another method's, sequence by sequence; `None` also where that one was
    evaluated on others."""
    mine, its = _kept(rounds), _kept(other)
    if mine is None or its is None or mine.labels != its.labels:
        return None
    return _ratio(_less(mine.last, its.last), mine.labels)


def ratio_over_sequences(rounds: Rounds, other: Rounds) -> OverSequences | None:
    """Of its multiple of another method's, likewise."""
    mine, its = _kept(rounds), _kept(other)
    if mine is None or its is None or mine.labels != its.labels or not sum(its.last) > 0:
        return None
    return _ratio(mine.last, its.last)


def _less(some: Sequence[float], others: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(some, others, strict=True)]


@dataclass(frozen=True, slots=True)
class _Kept:
    """Of each sequence: its labels, and the sums of their losses, means over the runs."""

    labels: tuple[int, ...]
    first: Sequence[float]
    last: Sequence[float]


def _kept(rounds: Rounds) -> _Kept | None:
    """`None` where a run that was evaluated kept none, or those of other sequences."""
    told = [run.summary for run in rounds.ok if run.summary.eval_loss_last is not None]
    labels = {summary.eval_sequence_labels for summary in told}
    if len(labels) != 1 or len(of_each := labels.pop()) < ENOUGH_SEQUENCES:
        return None
    first = [summary.eval_sequence_losses_first for summary in told]
    last = [summary.eval_sequence_losses_last for summary in told]
    if any(len(each) != len(of_each) for each in (*first, *last)):
        return None
    return _Kept(
        of_each, *([statistics.fmean(each) for each in zip(*runs, strict=True)] for runs in (first, last))
    )


def _ratio(above: Sequence[float], below: Sequence[float]) -> OverSequences:
    """The ratio of two sums over the same sequences and its interval at `CONFIDENCE`: that of Cochran,
    Sampling Techniques (1977), section 2.11, the sequences drawn from very many, and with Student's t."""
    count = len(above)
    value = sum(above) / sum(below)
    squares = math.fsum((one - value * other) ** 2 for one, other in zip(above, below, strict=True))
    half = _student_t(count - 1) * math.sqrt(squares * count / (count - 1)) / abs(sum(below))
    return OverSequences(count=count, value=value, low=value - half, high=value + half)


def _student_t(freedom: int) -> float:
    """Quantile of Student's t at `CONFIDENCE` on both sides, by the expansion of Abramowitz and Stegun
    (26.7.5): from 4 degrees of freedom on it is right to 0.03 %."""
    z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(sum(term / freedom**power for power, term in enumerate(terms)))
