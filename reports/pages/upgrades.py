"""What a better machine would bring for this job: single upgrades, as predicted today. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from engines import ENGINES
from engines.errors import UserError
from harness.recommendation import job_to_plan
from harness.records.columns import SECONDS, CellValue, Column, where_known
from profiles.advice.amount import Asked, amount_of
from profiles.advice.outlook import JobToPlan, outlook
from profiles.advice.what_if import what_if
from profiles.language import translated
from profiles.machine import Machine
from reports.format import TIMES, Table
from reports.judging.untried import shape_of
from reports.load import Loaded
from reports.messages import say
from reports.metrics import Measurements

SAME = 0.02
"""Of a time: a change below it is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnThatMachine:
    """One method on the machine as it is, or with one thing changed."""

    name: str
    seconds: float | None
    """`None`: it does not fit, or no time is predicted."""
    share: float | None = None
    """Of the time as the machine is; `None` for that machine itself, and where either is not known."""
    now_fits: tuple[str, ...] = ()
    """Methods that fit then and do not now."""
    is_new: bool = False
    """A time is known then, and none as the machine is."""

    @property
    def changes(self) -> bool:
        return bool(self.now_fits) or self.is_new or (self.share is not None and abs(self.share - 1) > SAME)


def _newly(one: OnThatMachine) -> CellValue:
    return ", ".join(one.now_fits) or None


COLUMNS: tuple[Column[OnThatMachine], ...] = (
    Column("change", lambda one: one.name),
    Column("predicted_time", lambda one: one.seconds, SECONDS),
    Column("beside_now", lambda one: one.share, TIMES),
    Column("fits_then", _newly, shown=where_known(_newly)),
)


def what_upgrades_bring(loaded: Loaded, engine: str, all_: Measurements) -> Table | str | None:
    """Of `engine`: the machine as it is, and every upgrade that makes it faster or slower or lets another
    method fit; those that change nothing are named below. A sentence where none does; `None` where nothing
    can be predicted: no profile of the machine, no sizes of the model, or a method that is not ours."""
    shape, machine = shape_of(loaded), loaded.machine
    if shape is None or machine is None or engine not in ENGINES:
        return None
    amount = None
    if all_.steps is not None:
        amount = amount_of(loaded.job.workload, Asked(steps=max(1, round(all_.steps))), None)
    others = [name for name, row in ENGINES.items() if row.asked_first or name in all_.rounds]
    planned = job_to_plan(loaded.job, shape, list(dict.fromkeys([engine, *others])), amount)
    try:
        now, *tried = _rows(planned, engine, machine)
    except UserError:  # settings in the records that today's planner refuses
        return None
    changing = [one for one in tried if one.changes]
    idle = say("show.list").join(one.name for one in tried if not one.changes)
    if not changing:
        return say("upgrade.none", engine=engine, items=idle)
    what = say("upgrade.per_step" if amount is None else "upgrade.whole_job")
    notes = [say("upgrade.note", engine=engine, what=what)]
    if idle:
        notes.append(say("upgrade.no_change", items=idle))
    return Table.of(COLUMNS, [now, *changing], *notes)


def _rows(planned: JobToPlan, engine: str, machine: Machine) -> Iterator[OnThatMachine]:
    alone = replace(planned, engines=[engine])
    before = outlook("", machine, alone)
    order = ENGINES[engine].order
    now = before.first if order == "first" else before.zeroth
    now_s = None if now is None or now.seconds is None else now.seconds[1]
    yield OnThatMachine(name=say("upgrade.now"), seconds=now_s)
    every = what_if(outlook("", machine, planned), machine, planned, {})
    for mine, others in zip(what_if(before, machine, alone, {}), every, strict=True):
        best = mine.outlook.first if order == "first" else mine.outlook.zeroth
        then_s = None if best is None or best.seconds is None else best.seconds[1]
        yield OnThatMachine(
            name=translated(mine.outlook.name),
            seconds=then_s,
            share=None if then_s is None or not now_s else then_s / now_s,
            now_fits=others.now_fits,
            is_new=now_s is None and then_s is not None,
        )
