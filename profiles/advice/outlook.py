"""What a machine would make of a job: its best method of each kind. Pure; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from engines import entry
from engines.settings.given import GivenSettings
from engines.settings.parse import defaults
from engines.shapes import ModelShape, Workload
from profiles.advice.amount import ONE_STEP, Amount
from profiles.advice.job_time import Band, JobForecast, Rates, job_forecast, ranked
from profiles.machine import Machine
from profiles.planning.context import PlanningContext
from profiles.planning.plan import Plan
from profiles.planning.precisions import why_no_dtype
from profiles.planning.ranks import context_of_a_rank
from profiles.planning.recommend import plan_engine


@dataclass(frozen=True, kw_only=True, slots=True)
class JobToPlan:
    """What is to be planned, apart from the machine."""

    shape: ModelShape
    workload: Workload
    engines: Sequence[str]
    settings: Mapping[str, GivenSettings]
    """By engine, what the user set."""
    amount: Amount | None = None
    """`None`: not known, so that times are those of one step."""
    vram_bytes: int | None = None
    host_bytes: int | None = None
    gpus: int = 1
    nodes: int = 1
    """Processes on each machine, and machines, that share out every step."""
    network_bytes_per_s: float | None = None
    """Between the machines; `None`: nobody has named it."""

    @property
    def ranks(self) -> int:
        """Processes on all machines together."""
        return self.gpus * self.nodes

    def settings_of(self, engine: str) -> GivenSettings:
        return self.settings[engine] if engine in self.settings else defaults(engine)

    def context(self, engine: str, machine: Machine) -> PlanningContext:
        """With several processes, of the slowest of them."""
        return context_of_a_rank(
            engine,
            machine,
            self.shape,
            self.workload,
            vram_bytes=self.vram_bytes,
            host_bytes=self.host_bytes,
            gpus=self.gpus,
            nodes=self.nodes,
            network_bytes_per_s=self.network_bytes_per_s,
        )

    @property
    def amount_or_step(self) -> Amount:
        if self.amount is not None:
            return self.amount
        workload = self.workload
        return Amount(
            steps=1,
            sequences=workload.batch_size * workload.accumulation,
            tokens=workload.tokens_per_step,
            shares=((workload.seq_len, 1.0),),
            basis=ONE_STEP,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BestMethod:
    """The method of one kind that ends first."""

    engine: str
    seconds: Band | None
    """Of the job; `None`: it fits, and no time is predicted."""
    on_disk: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    """A part of the model or of its states is read from disk in every step."""
    disk_bytes: Annotated[int, Field(exclude_if=lambda value: not value)] = 0
    """So much of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """Of one machine."""

    name: str
    first: BestMethod | None
    """With gradients; `None`: nothing fits."""
    zeroth: BestMethod | None
    fits: tuple[str, ...]
    """Methods that fit."""
    has_dtype: bool = True
    """The job's precision is one of the machine's."""


def outlook(name: str, machine: Machine, job: JobToPlan) -> Outlook:
    plans: list[Plan] = []
    forecasts: dict[str, JobForecast] = {}
    for engine in job.engines:
        context = job.context(engine, machine)
        plan = plan_engine(context, job.settings_of(engine))
        if plan.fits:
            plans.append(plan)
            forecasts[engine] = job_forecast(plan, context, job.amount_or_step, Rates())
    return Outlook(
        name=name,
        first=_best("first", plans, forecasts),
        zeroth=_best("zeroth", plans, forecasts),
        fits=tuple(plan.engine for plan in plans),
        has_dtype=why_no_dtype(machine, job.workload.dtype) is None,
    )


def _best(order: str, plans: Sequence[Plan], forecasts: Mapping[str, JobForecast]) -> BestMethod | None:
    found = ranked([each for engine, each in forecasts.items() if entry(engine).order == order])
    if not found:
        return None
    best = found[0]
    (plan,) = (each for each in plans if each.engine == best.engine)
    on_disk = plan.prediction.disk_read_bytes
    return BestMethod(engine=best.engine, seconds=best.band, on_disk=on_disk > 0, disk_bytes=on_disk)
