"""The one number that a report states of each thing that decides, with where it comes from. Headline, tiles
and tables take it from here, so that they cannot contradict each other. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.records.memory_limits import gpu_taken_bytes, reserves_known
from harness.records.run import Run
from harness.records.stats import over_runs, rare_job_s
from profiles.language import quantity
from profiles.units import NOT_MEASURED, format_bytes, format_seconds
from reports.format import both, span, times
from reports.measured.finding import MetricFinding
from reports.measured.measurements import Measurements, is_emulated, largest, predicted
from reports.messages import say

NumberOrigin = Literal["measured", "predicted", "unknown"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stated:
    """A number of the machine that the page is about."""

    value: float | None
    low: float | None = None
    high: float | None = None
    origin: NumberOrigin = "unknown"
    runs: int = 0
    """That it rests on."""

    @property
    def is_pair(self) -> bool:
        """Of two runs, which have no median: both are told."""
        return self.runs == 2 and self.low != self.high


def step_s(engine: str, all_: Measurements) -> Stated:
    """Seconds per step. On an emulated machine the measured ones are those of another GPU: there it is what
    was predicted for the machine emulated."""
    rounds = all_.of(engine)
    if not is_emulated(rounds):
        if rounds.step_s is None:
            return Stated(value=None)
        step = rounds.step_s
        low, high = step.interval or (step.low, step.high)
        return Stated(value=step.median, low=low, high=high, origin="measured", runs=step.count)
    expected = predicted(rounds)
    if expected is None or expected.step_s is None:
        return Stated(value=None)
    return Stated(
        value=expected.step_s, low=expected.step_s_low, high=expected.step_s_high, origin="predicted"
    )


def job_s(engine: str, all_: Measurements, steps: float) -> Stated:
    """Seconds of `steps` steps, with what one step in so many takes beside."""
    step, rounds = step_s(engine, all_), all_.of(engine)
    rare = over_runs(rounds.ok, lambda run: rare_job_s(run, steps)) if step.origin == "measured" else None
    more = (0.0, 0.0, 0.0) if rare is None else (rare.low, rare.median, rare.high)
    if step.origin == "predicted" and (expected := predicted(rounds)) is not None:
        more = (expected.rare_job_s(steps),) * 3

    def whole(value: float | None, more_s: float) -> float | None:
        return None if value is None else value * steps + more_s

    low, middle, high = more
    return Stated(
        value=whole(step.value, middle), low=whole(step.low, low), high=whole(step.high, high),
        origin=step.origin, runs=step.runs,
    )  # fmt: skip


def gpu_peak(engine: str, all_: Measurements) -> Stated:
    """Peak GPU memory that the method held; without a GPU unknown."""
    return _peak(largest(all_.of(engine), gpu_taken_bytes))


def gpu_kind(engine: str, all_: Measurements) -> Literal["gpu", "gpu_tensors"]:
    """What that is: what torch reserved, or of runs that do not tell it what their tensors took."""
    return "gpu" if reserves_known(all_.of(engine).ok) else "gpu_tensors"


def host_peak(engine: str, all_: Measurements) -> Stated:
    """Peak host memory of the process."""

    def peak(run: Run) -> float | None:
        return run.summary.peak_host_bytes

    return _peak(largest(all_.of(engine), peak))


def _peak(value: float | None) -> Stated:
    return Stated(value=value, origin="unknown" if value is None else "measured")


def plain_time(time: Stated) -> str:
    """`1.20 s`, of two runs `1.10 s and 1.30 s`."""
    if time.is_pair:
        return both(format_seconds(time.low), format_seconds(time.high))
    return quantity(format_seconds(time.value))


def time_text(time: Stated) -> str:
    """`1.20 s`; a prediction says so: `1.20 s (predicted)`."""
    text = plain_time(time)
    return say("stated.predicted", value=text) if time.origin == "predicted" else text


def ratio_text(found: MetricFinding) -> str:
    """A ratio of medians, `2.10x`; of two runs, which have none, what they allow."""
    if found.runs == 2 and found.low is not None and found.high is not None:
        return span(times(found.low), times(found.high))
    return quantity(times(found.value))


def range_text(time: Stated) -> str:
    """`0.90 to 1.30 s`; empty where there is no range."""
    if time.low is None or time.high is None or time.low == time.high:
        return ""
    return span(format_seconds(time.low), format_seconds(time.high))


def memory_text(peak: Stated) -> str:
    """`12.5 GiB`, or that it was not measured."""
    return NOT_MEASURED if peak.value is None else format_bytes(peak.value)
