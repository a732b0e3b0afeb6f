"""What a processor's speed did to steps of runs: they are predicted at what starting an operation took them.

Cores of a shared host run at two speeds (`profiles.probe.core_speed`), so of two runs one may have had a
quicker processor. Steps that the GPU or the link decides take as long either way; of others a part of the
difference is the host's. Imports no torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from engines import is_external
from engines.shapes import ModelShape
from harness.records.job import make_job
from harness.records.run import Run
from profiles.machine import Machine
from profiles.planning.plan import Prediction
from profiles.planning.ranks import context_of_a_rank
from profiles.rates import with_launches_of

UNLIKE_FACTOR = 1.2
"""Between what starting an operation took two methods, from which their processors had unlike speeds: on one
host it took 14 to 15.5 us in some processes and 19 to 25 in the others
(`tests/studies/prediction_grid_h200_second_afternoon`)."""

WAITS_FACTOR = 1.05
"""How much longer a step takes on the slower processor, from which it is said to wait for it."""


def predicted_at(run: Run, machine: Machine, shape: ModelShape, forward_s: float) -> Prediction | None:
    """What is predicted of the steps of `run` on `machine` where starting an operation takes `forward_s`;
    `None`: nothing is."""
    if run.scenario != "train" or is_external(run.engine) or run.environment.emulated is not None:
        return None
    job = make_job(run.job, run.id)
    context = context_of_a_rank(
        run.engine, with_launches_of(machine, forward_s), shape, job.workload,
        gpus=job.limits.gpus, nodes=job.limits.nodes,
    )  # fmt: skip
    return context.predict(run.plan.settings.typed)


def started_s(run: Run, machine: Machine) -> float | None:
    """What starting an operation took `run` in the steps that count: what `machine` says, as many times as
    long as a turn of its Python loop was around them. Where either has not timed the loop, what an operation
    took the run when its steps were over, at the speed that its core had then; `None`: nor has it timed that.
    """
    turn, start = machine.cpu.python_turn_s, machine.cpu.forward_launch_s
    around = (run.summary.python_turn_before_s, run.summary.python_turn_after_s)
    known = [turn_s for turn_s in around if turn_s is not None]
    one_python = run.environment.python == machine.versions.get("python")
    if not (known and one_python and turn.value and start.value):
        return run.summary.forward_launch_s
    return start.value * statistics.mean(known) / turn.value


def explains(run: Run, machine: Machine, shape: ModelShape) -> bool:
    """Whether a step outside its predicted range lies inside where the prediction is made with what starting
    an operation took this run."""
    at_s, taken_s, predicted = started_s(run, machine), run.summary.step_s_median, run.predicted
    if at_s is None or taken_s is None or predicted is None:
        return False
    low_s, high_s = predicted.step_s_low, predicted.step_s_high
    if low_s is None or high_s is None or low_s <= taken_s <= high_s:
        return False
    at_its_speed = predicted_at(run, machine, shape, at_s)
    if at_its_speed is None or at_its_speed.step_s_low is None or at_its_speed.step_s_high is None:
        return False
    return at_its_speed.step_s_low <= taken_s <= at_its_speed.step_s_high


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodAtSpeeds:
    """Steps of a method as measured, and as they would be on the quickest and the slowest processor that a
    method of the same comparison had."""

    engine: str
    started_s: float
    """What starting an operation took (`started_s`), the median over its runs."""
    python_turn_s: float | None
    """Of a Python loop, before and after its steps, likewise; `None`: not in its records."""
    step_s: float
    step_quick_s: float
    step_slow_s: float

    @property
    def waits(self) -> bool:
        """For the processor."""
        return self.step_slow_s >= WAITS_FACTOR * self.step_quick_s


@dataclass(frozen=True, kw_only=True, slots=True)
class UnlikeSpeeds:
    """Methods whose processors had unlike speeds."""

    quick_s: float
    slow_s: float
    """What starting an operation took, where it took least and most."""
    waiting: tuple[MethodAtSpeeds, ...]
    """Those whose steps wait for it; never empty."""
    turned: tuple[str, str] | None
    """Of two methods, the one that was slower and would be faster at one speed, and the other; `None`: the
    order of all is the same at one speed, whichever."""


def unlike_speeds(
    runs: Sequence[Run], machine: Machine | None, shape: ModelShape | None
) -> UnlikeSpeeds | None:
    """`None`: methods had processors of one speed, or wait for none, or nobody knows."""
    if machine is None or shape is None or not machine.cpu.forward_launch_s.value:
        return None
    of_engine: dict[str, list[Run]] = {}
    for run in runs:
        if run.end_state == "ok" and run.summary.step_s_median:
            of_engine.setdefault(run.engine, []).append(run)
    timed = {
        engine: [taken_s for run in own if (taken_s := started_s(run, machine))]
        for engine, own in of_engine.items()
    }
    started = {engine: statistics.median(times_s) for engine, times_s in timed.items() if times_s}
    if not started or max(started.values()) < UNLIKE_FACTOR * min(started.values()):
        return None
    quick_s, slow_s = min(started.values()), max(started.values())
    methods = [
        found
        for engine, its_s in started.items()
        if (found := _at_speeds(of_engine[engine], its_s, (quick_s, slow_s), machine, shape)) is not None
    ]
    waiting = tuple(method for method in methods if method.waits)
    if not waiting:
        return None
    return UnlikeSpeeds(quick_s=quick_s, slow_s=slow_s, waiting=waiting, turned=_turned(methods))


def _at_speeds(
    runs: Sequence[Run], its_s: float, speeds: tuple[float, float], machine: Machine, shape: ModelShape
) -> MethodAtSpeeds | None:
    predicted = [predicted_at(runs[0], machine, shape, each_s) for each_s in (its_s, *speeds)]
    steps = [each.step_s for each in predicted if each is not None and each.step_s]
    if len(steps) < len(predicted):
        return None
    step_s = statistics.median(run.summary.step_s_median or 0.0 for run in runs)
    turns = [
        turn_s
        for run in runs
        for turn_s in (run.summary.python_turn_before_s, run.summary.python_turn_after_s)
        if turn_s is not None
    ]
    return MethodAtSpeeds(
        engine=runs[0].engine,
        started_s=its_s,
        python_turn_s=statistics.median(turns) if turns else None,
        step_s=step_s,
        step_quick_s=step_s * steps[1] / steps[0],
        step_slow_s=step_s * steps[2] / steps[0],
    )


def _turned(methods: Sequence[MethodAtSpeeds]) -> tuple[str, str] | None:
    for slower in methods:
        for faster in methods:
            if slower.step_s > faster.step_s and (
                slower.step_quick_s < faster.step_quick_s or slower.step_slow_s < faster.step_slow_s
            ):
                return slower.engine, faster.engine
    return None
