"""What others measured of the same job and method on machines with the same card, beside a prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from harness import PROJECT
from harness.records.job import Job
from harness.sharing.shared_result import SharedMethod, Submission, batches_in_short
from profiles.machine import Machine
from profiles.planning.plan import Plan
from profiles.units import format_seconds

SHARED = PROJECT / "reports" / "community"
"""Where shared results lie in a clone of the repository; an installed program has none."""

OTHER_WORK = ("base", "train", "estimator", "queries", "noise", "moments")
"""Settings of which another value makes a step another piece of work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LikeMachines:
    """Of one method that is planned."""

    engine: str
    predicted_step_s: float
    step_s: tuple[float, ...]
    """Medians that others measured, ascending; never empty."""
    machine: Annotated[str | None, Field(exclude_if=lambda name: name is None)] = None
    """Of the catalogue, for which was planned; `None`: for the machine asked about."""

    @property
    def slower(self) -> int:
        """Of them, how many took longer than is predicted."""
        return sum(each > self.predicted_step_s for each in self.step_s)

    @property
    def told(self) -> str:
        first, last = self.step_s[0], self.step_s[-1]
        took = format_seconds(first) + ("" if first == last else f" to {format_seconds(last)}")
        if self.machine is not None:
            return (
                f"on {self.machine}, {self.engine}: predicted {format_seconds(self.predicted_step_s)} a step "
                f"is better than {self.slower} of {len(self.step_s)} shared results with that card, "
                f"which took {took} for this job, with settings of their own"
            )
        return (
            f"{self.engine}: predicted {format_seconds(self.predicted_step_s)} a step is better than "
            f"{self.slower} of {len(self.step_s)} like machines, which took {took} for this job, with "
            "settings of their own"
        )


def beside_like_machines(
    job: Job, machine: Machine, plans: Sequence[Plan], shared: Sequence[Submission]
) -> tuple[LikeMachines, ...]:
    """For each plan with a time of which somebody shared a result: the same named model and batches, and the
    same card, or without one the same CPU."""
    return tuple(_compared(job, machine, plans, shared))


def beside_catalogue(
    job: Job,
    machines: Mapping[str, Machine],
    plans_on: Callable[[Machine], Sequence[Plan]],
    shared: Sequence[Submission],
) -> tuple[LikeMachines, ...]:
    """The same for every machine of a catalogue of which somebody shared a result of this job; only for those
    is `plans_on` asked."""
    return tuple(
        replace(found, machine=name)
        for name, machine in machines.items()
        if _same_job(job, machine, shared)
        for found in _compared(job, machine, plans_on(machine), shared)
    )


def _same_job(job: Job, machine: Machine, shared: Sequence[Submission]) -> list[Submission]:
    card = None if machine.gpu is None else machine.gpu.name
    alike = [each for each in shared if card is not None or each.machine.cpu == machine.cpu.name]
    wanted = (card, job.limits.gpus, job.model.name, job.model.layers, batches_in_short(job))
    return [
        each for each in alike if (each.machine.gpu, each.gpus, each.model, each.layers, each.job) == wanted
    ]


def _compared(
    job: Job, machine: Machine, plans: Sequence[Plan], shared: Sequence[Submission]
) -> Iterator[LikeMachines]:
    same = _same_job(job, machine, shared)
    for plan in plans:
        step_s = plan.prediction.step_s
        found = sorted(
            other.median_s
            for each in same
            for other in each.methods
            if _does_the_same(plan, other) and other.median_s is not None
        )
        if plan.fits and step_s is not None and found:
            yield LikeMachines(engine=plan.engine, predicted_step_s=step_s, step_s=tuple(found))


def _does_the_same(plan: Plan, other: SharedMethod) -> bool:
    return plan.engine == other.engine and _work(plan.settings) == _work(other.settings)


def _work(settings: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(settings[key]) for key in OTHER_WORK if key in settings}
