"""What else could be done, in hours and money: other methods here, another card, renting. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from harness.records.columns import CellValue, Column, Told, Unit
from profiles.units import format_seconds
from reports.decide import Verdict
from reports.format import Table, digits
from reports.judging import stated
from reports.judging.untried import Untried, to_try
from reports.measured.measurements import Measurements
from reports.messages import say
from reports.pages.front import money_text, months_text
from reports.question import Prices

HOURS = Unit(show=lambda hours: format_seconds(hours * 3600))
SENSITIVITY = (0.5, 1.0, 2.0)
"""Of use and of the price of renting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternative:
    """One way to have the job done."""

    name: str
    hours: CellValue
    """A number, or both of two runs."""
    cost: str | None
    basis: str


ALTERNATIVES: tuple[Column[Alternative], ...] = (
    Column("alternative", lambda one: one.name),
    Column("job_time", lambda one: one.hours, HOURS),
    Column("job_cost", lambda one: one.cost),
    Column("basis", lambda one: one.basis),
)


def alternatives_table(verdict: Verdict, all_: Measurements, untried: Untried) -> Table | None:
    """`None` where there is nothing beside the method of the verdict."""
    rows = list(_rows(verdict, all_, untried))
    return Table.of(ALTERNATIVES, rows, *_notes(all_)) if len(rows) > 1 else None


def _notes(all_: Measurements) -> tuple[str, ...]:
    if all_.prices is None:
        return (say("alternative.no_prices"),)
    source = all_.prices.source or say("reproduce.not_known")
    return (say("alternative.prices", date=all_.prices.as_of, source=source),)


def _rows(verdict: Verdict, all_: Measurements, untried: Untried) -> Iterator[Alternative]:
    prices = all_.prices
    for one in verdict.methods:
        if not all_.of(one.engine).ok:
            continue
        time = stated.job_s(one.engine, all_, all_.steps) if all_.steps else None
        hours = time.value / 3600 if time is not None and time.value is not None else None
        step = stated.step_s(one.engine, all_)
        basis = say(f"alternative.{step.origin}", step=stated.plain_time(step))
        yield Alternative(
            name=say("alternative.here", engine=one.engine),
            hours=Told(hours, stated.plain_time(time)) if time and hours and time.is_pair else hours,
            cost=_own(hours, prices),
            basis=basis,
        )
    for engine in untried.first:
        yield Alternative(
            name=say("alternative.here", engine=engine), hours=None, cost=None,
            basis=say(
                "alternative.refusing" if engine in untried.refusing else "alternative.untried",
                command=to_try(engine, untried),
            ),
        )  # fmt: skip
    if prices is None or all_.steps is None or verdict.method is None:
        return
    chosen = stated.job_s(verdict.method, all_, all_.steps)
    if chosen.value is None:
        return
    hours = chosen.value / 3600
    if prices.card is not None:
        faster = hours / prices.card_speed
        yield Alternative(
            name=prices.card_name or say("alternative.card"), hours=faster,
            cost=say("alternative.card_cost", price=money_text(prices.card, prices)),
            basis=say("alternative.typed_speed", factor=digits(prices.card_speed)),
        )  # fmt: skip
    rent = prices.rent(hours)
    if rent is not None:
        yield Alternative(
            name=prices.rent_name or say("front.rented"), hours=hours / prices.rent_speed,
            cost=money_text(rent, prices),
            basis=say("alternative.typed_speed", factor=digits(prices.rent_speed)),
        )  # fmt: skip


def _own(hours: float | None, prices: Prices | None) -> str | None:
    per_hour = prices.own_per_hour if prices is not None else None
    return (
        None if hours is None or per_hour is None or prices is None else money_text(hours * per_hour, prices)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakEven:
    """Buying beside renting at one use of the machine."""

    use: float
    prices: Prices

    def after(self, rent: float) -> CellValue:
        months = self.prices.months_to_break_even(self.use, rent)
        return None if months is None else months_text(months)


def break_even_table(prices: Prices | None) -> Table | None:
    """Months to break even by use of the machine and price of renting; `None` without both prices."""
    if prices is None or prices.months_to_break_even() is None:
        return None
    columns = (
        Column[BreakEven](
            "use", lambda one: say("alternative.use", hours=digits(prices.hours_per_month * one.use))
        ),
        Column[BreakEven]("rent_half", lambda one: one.after(SENSITIVITY[0])),
        Column[BreakEven]("rent_as_typed", lambda one: one.after(SENSITIVITY[1])),
        Column[BreakEven]("rent_double", lambda one: one.after(SENSITIVITY[2])),
    )
    rows = [BreakEven(use=use, prices=prices) for use in SENSITIVITY]
    return Table.of(columns, rows, say("alternative.break_even_note", date=prices.as_of))
