"""What accuracy on some examples says of others. Pure."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from harness.records.stats import CONFIDENCE, Rounds, over_runs


@dataclass(frozen=True, kw_only=True, slots=True)
class OverExamples:
    """What accuracy says of examples that were not evaluated: every run has the same ones, so runs tell
    nothing of that."""

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
