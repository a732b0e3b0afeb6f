"""What a better machine would bring for this job: single upgrades, as predicted beforehand. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from harness.records.columns import SECONDS, CellValue, Column, where_known
from profiles.advice.what_if import StepsOn
from profiles.language import enumerated, translated
from reports.format import TIMES, Table
from reports.load import Loaded
from reports.measured.measurements import Measurements
from reports.messages import say, several_items

SAME = 0.02
"""Of a time: a change below it is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnThatMachine:
    """One method on the machine as it is, or with one thing changed."""

    name: str
    seconds: float | None
    """`None`: it does not fit, or no time is predicted."""
    share: float | None
    """Of the time as the machine is; `None` where either is not known."""
    now_fits: tuple[str, ...]
    """Methods that fit then and do not now."""

    @property
    def changes(self) -> bool:
        if self.now_fits or (self.share is None and self.seconds is not None):
            return True
        return self.share is not None and abs(self.share - 1) > SAME


def _newly(one: OnThatMachine) -> CellValue:
    return enumerated(one.now_fits) or None


COLUMNS: tuple[Column[OnThatMachine], ...] = (
    Column("change", lambda one: one.name),
    Column("predicted_time", lambda one: one.seconds, SECONDS),
    Column("beside_now", lambda one: one.share, TIMES),
    Column("fits_then", _newly, missing=lambda _: say("show.nothing"), shown=where_known(_newly)),
)


def what_upgrades_bring(loaded: Loaded, engine: str, all_: Measurements) -> Table | str | None:
    """Of `engine`: the machine as it is, and every upgrade that makes it faster or slower or lets another
    method fit; those that change nothing are named below. A sentence where none does; `None` where nothing
    was predicted."""
    if not loaded.upgrades:
        return None
    now, *then = loaded.upgrades
    steps = 1.0 if all_.steps is None else all_.steps
    tried = [_beside(now, each, engine, steps) for each in then]
    changing = [one for one in tried if one.changes]
    idle = several_items(one.name for one in tried if not one.changes)
    if not changing:
        return say("upgrade.none", engine=engine, items=idle)
    what = say("upgrade.per_step" if all_.steps is None else "upgrade.whole_job")
    notes = [say("upgrade.note", engine=engine, what=what)]
    if idle:
        notes.append(say("upgrade.no_change", items=idle))
    return Table.of(COLUMNS, [_beside(now, now, engine, steps), *changing], *notes)


def _beside(now: StepsOn, then: StepsOn, engine: str, steps: float) -> OnThatMachine:
    before, after = now.step_s.get(engine), then.step_s.get(engine)
    return OnThatMachine(
        name=translated(then.name) if then.name else say("upgrade.now"),
        seconds=None if after is None else steps * after,
        share=None if before is None or after is None else after / before,
        now_fits=tuple(name for name in then.step_s if name not in now.step_s),
    )
