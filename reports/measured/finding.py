"""What runs say of one metric: a value and its range over runs, over the steps of a single process, or over
held-out examples. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from harness.records.stats import Rounds, Spread
from reports.measured.examples import OverExamples, OverSequences
from reports.messages import say


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricFinding:
    """What the runs say of one metric. `value` is None where they do not say it; `note` is then why."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    """The smallest and largest value that the runs allow; from three runs on the interval of their median."""
    over_steps: bool = False
    """The range rests on the steps of a single run, as there is no other."""
    runs: int = 0
    """Runs that `value` rests on."""
    undecided: str | None = None
    """Why, where the range reaches both sides of a threshold; `None`: the runs disagree."""
    predicted: float | None = None
    applies: bool = True
    """False: there is nothing to judge, or not by `value`; `note` says why."""
    note: str | None = None
    evidence: tuple[str, ...] = ()
    """Ids of the runs that were looked at."""


def from_spread(found: Spread | None, expected: float | None = None) -> MetricFinding:
    if found is None:
        return MetricFinding(predicted=expected)
    low, high = found.interval or (found.low, found.high)
    return MetricFinding(value=found.median, low=low, high=high, runs=found.count, predicted=expected)


def of_largest(found: Spread | None, expected: float | None) -> MetricFinding:
    """A peak is judged by the largest run."""
    if found is None:
        return MetricFinding(predicted=expected)
    return MetricFinding(
        value=found.high, low=found.high, high=found.high, runs=found.count, predicted=expected
    )


def scaled(found: MetricFinding, factor: float) -> MetricFinding:
    def by(value: float | None) -> float | None:
        return None if value is None else value * factor

    return replace(
        found, value=by(found.value), low=by(found.low), high=by(found.high), predicted=by(found.predicted)
    )


def with_steps_of_one(found: MetricFinding, rounds: Rounds, *, is_rate: bool = False) -> MetricFinding:
    """A single run says nothing of the next: the range of its steps stands in, as beside native."""
    low, high = rounds.step_s_low, rounds.step_s_high
    if found.value is None or rounds.step_s is None or not low or not high or found.runs > 1:
        return found
    if is_rate:
        low, high = (found.value * rounds.step_s.median / end for end in (high, low))
    return replace(found, low=low, high=high, over_steps=True, undecided=say("note.one_run"))


def with_examples(finding: MetricFinding, found: OverExamples | None) -> MetricFinding:
    """With the wider of the two ranges, over runs and over examples; `None`: these were not counted."""
    return _wider(finding, found, few="note.few_examples", uncounted="note.examples_not_counted")


def with_sequences(finding: MetricFinding, found: OverSequences | None) -> MetricFinding:
    """Likewise over held-out sequences."""
    return _wider(finding, found, few="note.few_sequences", uncounted="note.sequences_not_counted")


def _wider(
    finding: MetricFinding, found: OverExamples | OverSequences | None, *, few: str, uncounted: str
) -> MetricFinding:
    if finding.low is None or finding.high is None:
        return finding
    if found is None:
        return replace(finding, note=say(uncounted))
    return replace(
        finding,
        low=min(found.low, finding.low),
        high=max(found.high, finding.high),
        undecided=say(few, count=found.count),
    )
