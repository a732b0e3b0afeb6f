"""What people say of a decision, in the file of its criteria: the question, how much is to be trained, and
prices. Nothing here is measured, and no price is built in. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

from pydantic import ConfigDict

from harness.records.job import Job

_DATE = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
HOURS_A_MONTH = 730.0


def _check_date(name: str, text: str) -> None:
    if text and not _DATE.fullmatch(text):
        raise ValueError(f"{name} must be a date such as 2026-12-15")


def _check_numbers(owner: object) -> None:
    for each in fields(owner):  # type: ignore[arg-type]
        value = getattr(owner, each.name)
        if isinstance(value, int | float) and (not math.isfinite(value) or value < 0):
            raise ValueError(f"{each.name} must be a number, 0 or more")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is decided, by whom, until when. Empty: not said."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    purpose: str = ""
    """What the model is to be fine-tuned for."""
    owner: str = ""
    """Who decides."""
    decide_by: str = ""
    next_gate: str = ""

    def __post_init__(self) -> None:
        _check_date("decide_by", self.decide_by)
        _check_date("next_gate", self.next_gate)


@dataclass(frozen=True, kw_only=True)
class JobSize:
    """How much is trained once it is decided: examples and epochs, or tokens, or optimizer steps."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    examples: int | None = None
    epochs: float = 1.0
    tokens: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        _check_numbers(self)
        given = [name for name in ("examples", "tokens", "steps") if getattr(self, name) is not None]
        if len(given) != 1 or not getattr(self, given[0]):
            raise ValueError("give one of examples, tokens and steps, more than 0")

    def steps_of(self, job: Job) -> float:
        """Optimizer steps that this is in batches of `job`."""
        sequences = job.batch_size * job.accumulation
        if self.steps is not None:
            return float(self.steps)
        if self.tokens is not None:
            return math.ceil(self.tokens * self.epochs / (sequences * job.seq_len))
        return math.ceil((self.examples or 0) * self.epochs / sequences)


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Typed by the user, with the day that they are of."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    currency: str
    """Such as JPY."""
    as_of: str
    """Day of the prices."""
    source: str = ""
    per_kwh: float | None = None
    power_w: float | None = None
    """Of the whole machine while it trains."""
    pue: float = 1.0
    """What is drawn for each unit that the machine uses, cooling included."""
    machine: float | None = None
    """What buying the machine costs; leave it out if it is there anyway."""
    years: float = 3.0
    """That it is written off over."""
    hours_per_month: float = 160.0
    """That it is in use."""
    rent_name: str = ""
    rent_per_hour: float | None = None
    rent_speed: float = 1.0
    """How many times as fast as here the rented machine is; 1: as fast."""
    card_name: str = ""
    card: float | None = None
    """Of another graphics card."""
    card_speed: float = 1.0
    """How many times as fast as here it is."""

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_date("as_of", self.as_of)
        if not self.currency.strip() or not self.as_of:
            raise ValueError("prices need a currency and a date (as_of)")
        for name in ("years", "hours_per_month", "rent_speed", "card_speed", "pue"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0")

    @property
    def energy_per_hour(self) -> float | None:
        """Of the whole machine; `None`: its power or the tariff was not typed."""
        if self.per_kwh is None or self.power_w is None:
            return None
        return self.power_w / 1000 * self.pue * self.per_kwh

    @property
    def written_off_per_hour(self) -> float | None:
        """The machine's price by the hours that it is in use; `None`: not typed."""
        if self.machine is None:
            return None
        return self.machine / (12 * self.years * self.hours_per_month)

    @property
    def own_per_hour(self) -> float | None:
        """An hour on the own machine: energy, and what it is written off by. `None`: neither is known."""
        parts = [one for one in (self.energy_per_hour, self.written_off_per_hour) if one is not None]
        return sum(parts) if parts else None

    def rent(self, hours: float) -> float | None:
        """What renting costs for work of `hours` here; `None`: no rent was typed."""
        return None if self.rent_per_hour is None else hours / self.rent_speed * self.rent_per_hour

    def months_to_break_even(self, use: float = 1.0, rent: float = 1.0) -> float | None:
        """Months of `hours_per_month * use` after which buying has cost less than renting at `rent` times its
        price. Infinite: never. `None`: a price is missing."""
        if self.machine is None or self.rent_per_hour is None:
            return None
        hours = min(HOURS_A_MONTH, self.hours_per_month * use)
        # The running cost alone: the purchase is what is to be paid back.
        saved = (self.rent(hours) or 0.0) * rent - hours * (self.energy_per_hour or 0.0)
        return self.machine / saved if saved > 0 else math.inf
