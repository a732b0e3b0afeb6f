"""The runs of a folder, grouped once, and what they are asked for. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from harness.records.job import make_job
from harness.records.run import EndState, Predicted, Run
from harness.records.stats import Rounds, aggregate, over_runs
from profiles.language import enumerated
from profiles.machine import Machine
from reports.criteria import Criteria
from reports.load import engine_order
from reports.messages import say
from reports.question import Prices

NOTHING_LEARNED: frozenset[EndState] = frozenset({"not_available", "interrupted"})
"""Ends that say nothing about the method: it was not there, or was stopped from outside."""
DOES_NOT_FIT: frozenset[EndState] = frozenset({"oom_gpu", "oom_host", "pinned_limit", "skipped_infeasible"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurements:
    """All runs, grouped once."""

    rounds: Mapping[str, Rounds]
    machine: Machine | None
    steps: float | None = None
    """Of the whole job, once it is decided; `None`: nobody said how much is to be trained."""
    prices: Prices | None = None
    """`None`: nobody typed any."""
    forecast: str | None = None
    """Why the yardstick, which was not run, is predicted not to fit; `None`: it fits, or is not known."""

    @property
    def engines(self) -> list[str]:
        """Methods that were run, in the order of reports."""
        return sorted(self.rounds, key=engine_order)

    def of(self, engine: str) -> Rounds:
        return self.rounds.get(engine) or aggregate(engine, ())


def group(
    runs: Sequence[Run],
    machine: Machine | None,
    criteria: Criteria | None = None,
    forecast: str | None = None,
) -> Measurements:
    """`criteria` say how much is to be trained and at which prices."""
    engines = sorted({run.engine for run in runs})
    size = criteria.size if criteria is not None else None
    return Measurements(
        rounds={engine: aggregate(engine, runs) for engine in engines},
        machine=machine,
        steps=size.steps_of(make_job(runs[0].job, "job")) if size is not None and runs else None,
        prices=criteria.prices if criteria is not None else None,
        forecast=forecast,
    )


def ends(runs: Sequence[Run]) -> str:
    """`1 ok, 2 out of GPU memory`: how many runs ended how."""
    states = [run.end_state for run in runs]
    return enumerated(
        say("count.ended", count=states.count(state), end=say(f"end.{state}"))
        for state in get_args(EndState)
        if state in states
    )


def predicted(rounds: Rounds) -> Predicted | None:
    """The prediction stamped into the runs; the plan's own where a run carries none."""
    stamped = [run.predicted for run in rounds.runs if run.predicted is not None]
    if stamped or not rounds.runs:
        return stamped[0] if stamped else None
    return Predicted.of(rounds.runs[0].plan.prediction)


def floor_share(run: Run) -> float | None:
    """Predicted floor over measured step; `None` also on an emulated machine, whose floor counts with the
    speed of a GPU that was not there."""
    return run.summary.floor_share if run.emulation is None else None


def over_steps(*compared: Rounds) -> bool:
    """Whether the range of step times is, for one of these methods, that of a single run's steps."""
    return any(sum(bool(steps) for steps in rounds.step_times) == 1 for rounds in compared)


def is_emulated(rounds: Rounds) -> bool:
    """Whether the times are those of an emulated machine, whose GPU, cores and host memory were not there."""
    return any(run.emulation is not None for run in rounds.ok)


def typical(rounds: Rounds, value: Callable[[Run], float | None]) -> float | None:
    """Median of `value` over the runs that ended ok and have it; `None`: none has."""
    found = over_runs(rounds.ok, value)
    return found.median if found else None


def largest(rounds: Rounds, value: Callable[[Run], float | None]) -> float | None:
    """Largest `value` of the runs that ended ok and have it; `None`: none has."""
    found = over_runs(rounds.ok, value)
    return found.high if found else None


def is_random(run: Run) -> bool:
    """Trained on random data, of which nothing can be learned."""
    return bool(run.job.get("data", {}).get("train") == "random")


def heldout_loss(run: Run) -> float | None:
    """After the last step, on data that was not trained on; `None` also where that data is random."""
    return None if is_random(run) else run.summary.eval_loss_last
