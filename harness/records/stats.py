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
from profiles.planning.plan import rare_work_s

SAME_FACTOR = 1.05
"""Two methods whose ratio stays within this factor of 1 are called the same, because two launches of
one and the same process differ by about as much."""

ENOUGH_RUNS = 3
"""Processes from which on a median is told and a method is called faster or slower: of two there is no
median, and one says nothing of the next."""

CONFIDENCE = 0.95
"""Of the intervals around medians and their ratios."""

DISTURBED_FACTOR = 1.5
"""Medians of one method's runs that differ by more say that something else set their times."""

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
    interval: tuple[float, float] | None = None
    """Of the median, by the bootstrap (`median_interval`); `None` below `ENOUGH_RUNS` values, and for values
    that are not one per run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """a / b and what it may be: the bootstrap's interval of the ratio of medians where both sides have
    `ENOUGH_RUNS` runs, else what the ranges of the two allow."""

    value: float
    low: float
    high: float
    is_interval: bool = False
    """`low` and `high` are the bootstrap's."""


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

    @property
    def lasting_step_times(self) -> tuple[tuple[float, ...], ...]:
        """The same as a long job has them: each with its part of what one step in so many has to do beside,
        which no median shows."""
        return tuple(
            tuple(step_s + rare_share_s(run) for step_s in counted_step_s(run.samples)) for run in self.ok
        )

    @property
    def lasting_step_s(self) -> float | None:
        """Median over the runs of those; `None`: no step was counted."""
        medians = [statistics.median(steps) for steps in self.lasting_step_times if steps]
        return statistics.median(medians) if medians else None


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


def spread_of_runs(values: Iterable[float]) -> Spread | None:
    """The same for one value per run, with the interval of the median."""
    kept = list(values)
    found = spread(kept)
    return None if found is None else replace(found, interval=median_interval(kept))


Atoms = Sequence[tuple[float, float]]
"""A distribution over finitely many values: (value, probability), by value."""


def resampled_medians(values: Sequence[float]) -> Atoms:
    """The bootstrap's distribution of the median: of as many values, drawn with replacement from `values`.

    Exact, so that nothing is drawn and there is no seed. The median of n draws lies at or below the k-th
    smallest value where at least half of them do, of which each does with probability k / n (Efron 1979,
    section 2; for even n the two draws in the middle are taken together).
    """
    kept = sorted(values)
    count = len(kept)
    half = count // 2
    found: dict[float, float] = {}
    if count % 2:
        at_most = [_at_least(half + 1, count, k / count) for k in range(count + 1)]
        for k, value in enumerate(kept):
            found[value] = found.get(value, 0.0) + at_most[k + 1] - at_most[k]
    else:
        # Of the two in the middle, the lower is the i-th smallest value and the upper the j-th.
        at_most = [_at_least(half, count, k / count) for k in range(count + 1)]
        for i, lower in enumerate(kept):
            below = (((i + 1) / count) ** half) - ((i / count) ** half)
            apart = 0.0
            for j in range(i + 1, count):
                above = (((count - j) / count) ** half) - (((count - j - 1) / count) ** half)
                both = math.comb(count, half) * below * above
                apart += both
                middle = (lower + kept[j]) / 2
                found[middle] = found.get(middle, 0.0) + both
            found[lower] = found.get(lower, 0.0) + at_most[i + 1] - at_most[i] - apart
    return sorted(found.items())


def _at_least(hits: int, draws: int, share: float) -> float:
    """Probability of so many hits or more, each draw hitting with probability `share`."""
    return sum(math.comb(draws, k) * share**k * (1 - share) ** (draws - k) for k in range(hits, draws + 1))


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The bootstrap's percentile interval of the median at `CONFIDENCE`; `None` below `ENOUGH_RUNS` values.

    Of three values it reaches from the smallest to the largest; it gets narrower from seven on.
    """
    return _middle(resampled_medians(values)) if len(values) >= ENOUGH_RUNS else None


def _middle(atoms: Atoms) -> tuple[float, float]:
    """What is left of a distribution without what lies outside `CONFIDENCE`, half of it on each side."""
    tail = (1 - CONFIDENCE) / 2
    total = sum(chance for _, chance in atoms)
    low = high = None
    passed = 0.0
    for value, chance in atoms:
        passed += chance / total
        if low is None and passed > tail:
            low = value
        if high is None and passed >= 1 - tail:
            high = value
    return (atoms[0][0] if low is None else low), (atoms[-1][0] if high is None else high)


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


def step_statistics(samples: Sequence[Sample], tokens_per_step: float) -> Summary:
    """Times, rate and losses of the steps; all else of the summary is left `None`.

    The samples are the source: a record keeps what this
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


def rare_step_s(run: Run) -> float | None:
    """Seconds that the first step took beyond the median and beside compiling, where the plan says that one
    step in `rare_every` has more to do; `None`: all steps are alike, or the first was not taken here."""
    usual_s, predicted = run.summary.step_s_median, run.predicted
    if predicted is None or predicted.rare_every is None or usual_s is None:
        return None
    first = next((sample for sample in run.samples if sample.step == 0), None)
    if first is None:
        return None
    return max(0.0, first.step_s - usual_s - (run.summary.compile_s or 0.0))


def rare_share_s(run: Run) -> float:
    """A step's part of that in a long job; 0 where all steps are alike."""
    rare_s, predicted = rare_step_s(run), run.predicted
    if rare_s is None or predicted is None or not predicted.rare_every:
        return 0.0
    return rare_s / predicted.rare_every


def rare_job_s(run: Run, steps: float) -> float | None:
    """Seconds of that in a job of `steps`."""
    rare_s = rare_step_s(run)
    if rare_s is None or run.predicted is None:
        return None
    return rare_work_s(rare_s, run.predicted.rare_every, steps)


def differing_field(stored: Summary, samples: Sequence[Sample], tokens_per_step: float) -> str | None:
    """The first field of a summary that does not follow from its samples; `None` where all that can do."""
    expected = step_statistics(samples, tokens_per_step)
    for name in _FROM_SAMPLES:
        value, computed = getattr(stored, name), getattr(expected, name)
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
    step_s = spread_of_runs(one.step_s_median for one in each if one.step_s_median is not None)
    tokens = spread_of_runs(one.tokens_per_s for one in each if one.tokens_per_s is not None)
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
    return spread_of_runs(found for run in runs if (found := value(run)) is not None)


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

    `value` is the ratio of the medians over runs; `low` and `high` are the bootstrap's interval of it, the
    medians of runs as its units, where both sides have `ENOUGH_RUNS`; else what the two ranges allow.
    `None` where either side has no step, or a step of zero time to divide by.
    """
    a, b = _range(a_rounds), _range(b_rounds)
    if a is None or b is None or b.low <= 0:
        return None
    value = a.median / b.median
    medians = [_medians(rounds) for rounds in (a_rounds, b_rounds)]
    if min(map(len, medians)) < ENOUGH_RUNS:
        return Ratio(value=value, low=a.low / b.high, high=a.high / b.low)
    of_a, of_b = (resampled_medians(each) for each in medians)
    low, high = _middle(sorted((x / y, p * q) for x, p in of_a for y, q in of_b))
    return Ratio(value=value, low=low, high=high, is_interval=True)


def _medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    """Of each run that has steps."""
    return [statistics.median(round_) for round_ in rounds if len(round_) > 0]


def same_or_different(
    a_rounds: Sequence[Sequence[float]], b_rounds: Sequence[Sequence[float]]
) -> StepTimeComparison:
    """Is a faster or slower than b? Each argument holds the step times (s) of each run.

    The rule, on the interval of the ratio a / b (see `ratio`), with the word chosen by the first line
    that holds:

    - AMBIGUOUS: a side has fewer than `ENOUGH_RUNS` runs with steps
    - SAME: all of the interval lies within a factor `SAME_FACTOR` of 1, whether or not it contains 1
    - FAST: all of it lies below 1
    - SLOW: all of it lies above 1
    - AMBIGUOUS: it reaches further to both sides than SAME allows

    With the handful of runs that a comparison has, the interval is about as wide as what was seen.
    """
    found = ratio(a_rounds, b_rounds)
    if found is None or not found.is_interval:
        return "AMBIGUOUS"
    if found.low >= 1 / SAME_FACTOR and found.high <= SAME_FACTOR:
        return "SAME"
    if found.high < 1:
        return "FAST"
    if found.low > 1:
        return "SLOW"
    return "AMBIGUOUS"


def disturbed(rounds: Rounds) -> bool:
    """Whether medians of the runs differ by more than launches of one and the same process do."""
    return rounds.step_s is not None and rounds.step_s.high > DISTURBED_FACTOR * rounds.step_s.low


def faster_or_slower(a: Rounds, b: Rounds) -> StepTimeComparison:
    """Whether a step of a is faster or slower than one of b; with disturbed runs that is not known."""
    if disturbed(a) or disturbed(b):
        return "AMBIGUOUS"
    return same_or_different(a.step_times, b.step_times)
