"""Is a method faster than native, and how sure is that: from run records alone. Imports no torch.

'Faster' and 'slower' are said of native at its best, of three processes on each side, and of times that
nothing else took; else the answer is 'undecided', with why.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engines import YARDSTICK
from harness.records.run import Run
from harness.records.stats import (
    CONFIDENCE,
    Rounds,
    StepTimeComparison,
    aggregate,
    disturbed,
    ratio,
    same_or_different,
)
from profiles.machine import Machine
from profiles.rates import launch_time

BesideNative = Literal["faster", "slower", "same", "undecided"]

_WORDS: dict[StepTimeComparison, BesideNative] = {
    "FAST": "faster",
    "SLOW": "slower",
    "SAME": "same",
    "AMBIGUOUS": "undecided",
}

OTHER_HOST_FACTOR = 1.4
"""Between what starting an operation takes and what the profile says, from which the profile does not
describe the host: the probe's quickest samples on three hosts of H200s were 13.9 to 18.9 us."""

WhyUndecided = Literal["few_runs", "disturbed", "overlap", "emulated", "not_at_best"]

_BEST: tuple[str, ...] = ("compile", "graphs", "checkpointed_blocks")
"""Settings of native that its plan chooses for speed; one who sets them by hand may have slowed it down."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A method's step time beside that of native."""

    engine: str
    answer: BesideNative
    why_undecided: WhyUndecided | None
    """`None` for every other answer."""
    ratio: float
    """Of the medians over runs: 2 is twice as long a step. Of two runs there is no median: see the range."""
    low: float
    high: float
    """The bootstrap's interval at `confidence`; without one, what the ranges seen allow."""
    confidence: float | None
    """`None`: a side has fewer than three runs."""
    runs: int
    native_runs: int
    """That ended ok."""
    native_not_at_best: str | None = None
    """Why native was not, as far as its records say; `None`: it was."""


def beside_native(rounds: Rounds, native: Rounds) -> Comparison | None:
    """`rounds` beside native; `None` where it is native itself, or a side was not measured."""
    if rounds.engine == YARDSTICK:
        return None
    found = ratio(rounds.lasting_step_times, native.lasting_step_times)
    if found is None:
        return None
    reasons = [reason for run in native.ok if (reason := not_at_its_best(run)) is not None]
    not_at_best = reasons[0] if reasons else None
    answer = _WORDS[same_or_different(rounds.lasting_step_times, native.lasting_step_times)]
    why: WhyUndecided | None = None
    if any(run.emulation is not None for run in rounds.ok):
        why = "emulated"
    elif not found.is_interval:
        why = "few_runs"
    elif disturbed(rounds) or disturbed(native):
        why = "disturbed"
    elif answer in ("faster", "same") and not_at_best is not None:
        why = "not_at_best"
    elif answer == "undecided":
        why = "overlap"
    return Comparison(
        engine=rounds.engine,
        answer=answer if why is None else "undecided",
        why_undecided=why,
        ratio=found.value,
        low=found.low,
        high=found.high,
        confidence=CONFIDENCE if found.is_interval else None,
        runs=len(rounds.ok),
        native_runs=len(native.ok),
        native_not_at_best=not_at_best,
    )


def comparisons(runs: Sequence[Run]) -> tuple[Comparison, ...]:
    """Every method of `runs` that was measured, beside native, in the order of `runs`."""
    native = aggregate(YARDSTICK, runs)
    found = (
        beside_native(aggregate(engine, runs), native) for engine in dict.fromkeys(r.engine for r in runs)
    )
    return tuple(one for one in found if one is not None)


def not_at_its_best(run: Run) -> str | None:
    """Why this run of native was slower than it could be, as far as its record says; `None`: it was not.

    On a GPU its blocks are compiled and captured, with as few of them recomputed as fit, unless settings of
    the job say otherwise or it could not be had. Records of before that do not say how native ran.
    """
    if run.environment.gpu_name is None:
        return None
    if run.notes is None:
        return "its record does not say whether it was compiled"
    asked = run.job.get("settings", {}).get(run.engine, {})
    by_hand = [f"{name}={asked[name]}" for name in _BEST if name in asked]
    if by_hand:
        return f"set by hand: {', '.join(by_hand)}"
    return run.notes[0] if run.notes else None


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherHost:
    """What starting an operation took where runs ran, and what the machine's profile says of it."""

    taken_s: float
    """The median over the runs."""
    profile_s: float

    @property
    def is_slower(self) -> bool:
        return self.taken_s > self.profile_s


def other_host(runs: Sequence[Run], machine: Machine | None) -> OtherHost | None:
    """Where the processor that `runs` had is not the one that `machine` describes, by a factor of
    `OTHER_HOST_FACTOR`. `None` too where that was not measured, or a smaller machine was emulated."""
    if machine is None or not machine.cpu.forward_launch_s.value:
        return None
    expected = launch_time(machine, machine.cpu.forward_launch_s)
    taken = [
        run.summary.forward_launch_s
        for run in runs
        if run.summary.forward_launch_s is not None and run.environment.emulated is None
    ]
    if not taken:
        return None
    value = expected.value or 0.0
    found = OtherHost(taken_s=statistics.median(taken), profile_s=value)
    # Where cores have two speeds, the profile has both.
    has_windows = machine.cpu.python_turn_s.value is not None
    low, high = (expected.low or value, expected.high or value) if has_windows else (value, value)
    return None if low / OTHER_HOST_FACTOR < found.taken_s < high * OTHER_HOST_FACTOR else found
