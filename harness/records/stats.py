"""Pure functions over samples. Imports no torch.

The unit of replication is the process: steps of one process share its heat, clocks and memory layout
and are not independent, so a run gives one median and spreads are taken over the runs (Hoefler &
Belli, SC'15). Smallest and largest single steps are kept beside them for the eye, not for judging.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from harness.records.run import Run, Sample, Summary

SAME_FACTOR = 1.05
"""Two methods whose ratio stays within this factor of 1 are called the same, because two launches of
one and the same process differ by about as much."""

StepTimeComparison = Literal["FAST", "SLOW", "SAME", "AMBIGUOUS"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    median: float
    low: float
    high: float
    """Smallest and largest value."""
    count: int
    deviation: float | None
    """Sample standard deviation (n - 1); `None` for a single value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """a / b with the range that the ranges of a and b allow."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounds:
    """All runs of one engine taken together: one value per run that ended `ok`, then their spread."""

    engine: str
    runs: tuple[Run, ...]
    """Every run, whatever its end, by round."""
    ok: tuple[Run, ...]
    step_s: Spread | None
    """Over the medians of the runs."""
    step_s_low: float | None
    step_s_high: float | None
    """Smallest and largest counted step of all runs."""
    counted_steps: int
    tokens_per_s: Spread | None
    """Its median is that of `step_s` turned over, so that the two agree also for an even number of runs."""
    loss_first: float | None
    loss_last: float | None
    """Medians over the runs."""

    @property
    def step_times(self) -> tuple[tuple[float, ...], ...]:
        """Counted steps of each run that ended `ok`, in seconds."""
        return tuple(counted_step_s(run.samples) for run in self.ok)


def spread(values: Iterable[float]) -> Spread | None:
    """`None` for no values at all."""
    kept = sorted(values)
    if not kept:
        return None
    return Spread(
        median=statistics.median(kept),
        low=kept[0],
        high=kept[-1],
        count=len(kept),
        deviation=statistics.stdev(kept) if len(kept) > 1 else None,
    )


def outer_deciles(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """10 % and 90 % quantile, interpolated between the values; `None` without any."""
    if not values:
        return None, None
    if len(values) == 1:
        return values[0], values[0]
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[0], deciles[-1]


def counted_step_s(samples: Sequence[Sample]) -> tuple[float, ...]:
    """Step times without the warm-ups, in seconds."""
    return tuple(sample.step_s for sample in samples if not sample.warmup)


def step_statistics(samples: Sequence[Sample], tokens_per_step: int) -> Summary:
    """Times, rate and losses of the steps; all else of the summary is left `None`.

    `tokens_per_step` counts padding, as the GPU does. The samples are the source: a record keeps what this
    said of them when it was made, for readers without this program, and nothing here reads that back.
    """
    counted = counted_step_s(samples)
    steps = spread(counted)
    p10, p90 = outer_deciles(counted)
    return Summary(
        step_s_median=steps.median if steps else None,
        step_s_low=steps.low if steps else None,
        step_s_high=steps.high if steps else None,
        step_s_p10=p10,
        step_s_p90=p90,
        tokens_per_s=tokens_per_step / steps.median if steps and steps.median > 0 else None,
        loss_first=samples[0].loss if samples else None,
        loss_last=samples[-1].loss if samples else None,
    )


_FROM_SAMPLES = (
    "step_s_median", "step_s_low", "step_s_high", "step_s_p10", "step_s_p90", "tokens_per_s", "loss_first",
    "loss_last",
)  # fmt: skip
_TOLERANCE = 1e-6
"""Relative: earlier versions may have added in another order."""


def differing_field(told: Summary, samples: Sequence[Sample], tokens_per_step: int) -> str | None:
    """The first field of a summary that does not follow from its samples; `None` where all that can do."""
    expected = step_statistics(samples, tokens_per_step)
    for name in _FROM_SAMPLES:
        value, computed = getattr(told, name), getattr(expected, name)
        if value is None or computed is None:
            if value is not None:
                return name
        elif not math.isclose(value, computed, rel_tol=_TOLERANCE, abs_tol=1e-12):
            return name
    return None


def loss_change(samples: Sequence[Sample]) -> float | None:
    """Mean loss of the last quarter of the steps minus that of the first quarter; negative is better.

    Quarters, because every step sees other data and single losses differ more by that than by what was
    learned. Warm-up steps count: they train as the others do. `None` with fewer than two steps or
    where a loss in either quarter was not finite.
    """
    if len(samples) < 2:
        return None
    quarter = max(1, len(samples) // 4)
    first = [sample.loss for sample in samples[:quarter]]
    last = [sample.loss for sample in samples[-quarter:]]
    finite_first = [loss for loss in first if loss is not None]
    finite_last = [loss for loss in last if loss is not None]
    if len(finite_first) < len(first) or len(finite_last) < len(last):
        return None
    return statistics.fmean(finite_last) - statistics.fmean(finite_first)


def aggregate(engine: str, runs: Iterable[Run]) -> Rounds:
    """Take the runs of `engine` among `runs` together. Does not depend on their order."""
    mine = tuple(sorted((run for run in runs if run.engine == engine), key=lambda r: (r.round, r.time, r.id)))
    ok = tuple(run for run in mine if run.end_state == "ok")
    each = [step_statistics(run.samples, run.tokens_per_step) for run in ok]
    steps = spread(step_s for run in ok for step_s in counted_step_s(run.samples))
    loss_first = spread(one.loss_first for one in each if one.loss_first is not None)
    loss_last = spread(one.loss_last for one in each if one.loss_last is not None)
    step_s = spread(one.step_s_median for one in each if one.step_s_median is not None)
    tokens = spread(one.tokens_per_s for one in each if one.tokens_per_s is not None)
    if tokens is not None and step_s is not None:
        tokens = replace(tokens, median=ok[0].tokens_per_step / step_s.median)
    return Rounds(
        engine=engine,
        runs=mine,
        ok=ok,
        step_s=step_s,
        step_s_low=steps.low if steps else None,
        step_s_high=steps.high if steps else None,
        counted_steps=steps.count if steps else 0,
        tokens_per_s=tokens,
        loss_first=loss_first.median if loss_first else None,
        loss_last=loss_last.median if loss_last else None,
    )


def over_runs(runs: Iterable[Run], value: Callable[[Run], float | None]) -> Spread | None:
    """Spread of one number per run, runs without it left out."""
    return spread(found for run in runs if (found := value(run)) is not None)


def _range(rounds: Sequence[Sequence[float]]) -> Spread | None:
    """Where the next launch's median is expected, as far as these rounds can say.

    From two runs on, the range of their medians. A single run says nothing of other launches; the
    range of its steps stands in, which is wider than its median could be wrong by itself.
    """
    measured = [round_ for round_ in rounds if len(round_) > 0]
    if len(measured) == 1:
        return spread(measured[0])
    return spread(statistics.median(round_) for round_ in measured)


def ratio(a_rounds: Sequence[Sequence[float]], b_rounds: Sequence[Sequence[float]]) -> Ratio | None:
    """Step time of a over that of b. Each argument holds the step times (s) of each run.

    `value` is the ratio of the medians over runs, `low` and `high` what the two ranges allow.
    `None` where either side has no step, or a step of zero time to divide by.
    """
    a, b = _range(a_rounds), _range(b_rounds)
    if a is None or b is None or b.low <= 0:
        return None
    return Ratio(value=a.median / b.median, low=a.low / b.high, high=a.high / b.low)


def same_or_different(
    a_rounds: Sequence[Sequence[float]], b_rounds: Sequence[Sequence[float]]
) -> StepTimeComparison:
    """Is a faster or slower than b? Each argument holds the step times (s) of each run.

    The rule, on the range of the ratio a / b (see `ratio`), with the word chosen by the first line
    that holds:

    - SAME: all of the range lies within a factor `SAME_FACTOR` of 1, whether or not it contains 1
    - FAST: all of it lies below 1; the ranges of the per-run medians do not touch
    - SLOW: all of it lies above 1
    - AMBIGUOUS: the ranges overlap by more than SAME allows, or a side was not measured

    With the handful of runs that a comparison has, this is a statement about the ranges seen, not a
    test at some level of significance.
    """
    found = ratio(a_rounds, b_rounds)
    if found is None:
        return "AMBIGUOUS"
    if found.low >= 1 / SAME_FACTOR and found.high <= SAME_FACTOR:
        return "SAME"
    if found.high < 1:
        return "FAST"
    if found.low > 1:
        return "SLOW"
    return "AMBIGUOUS"
