"""What a job costs: prices that the user typed, with the date they are of. None is built in. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Literal

from engines.errors import UserError

REMEDY = "write it as 2.49USD/h@2026-11-29 or 31JPY/kWh@2026-11-29"
_PRICE = re.compile(r"(\d{1,12}(?:\.\d{1,9})?)\s*([A-Z]{3})/(h|kWh)(?:@(\S+))?")
_POWER = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(W|kW)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    amount: float
    currency: str
    """Three letters, such as JPY."""
    per: Literal["h", "kWh"]
    day: str
    """The date that the price is of, as YYYY-MM-DD."""

    @property
    def text(self) -> str:
        return f"{self.amount:g} {self.currency}/{self.per} as of {self.day}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of the whole job, in one currency."""

    currency: str
    low: float
    expected: float
    high: float
    basis: str


def parse_price(text: str) -> Price:
    """Raises `UserError` for what is no price of an hour or a kWh with its date."""
    what = f"--price '{text}'"
    match = _PRICE.fullmatch(text.strip())
    if match is None:
        raise UserError(what, "is no amount, currency and unit", REMEDY)
    amount, currency, per, day = match.groups()
    if day is None:
        raise UserError(what, "has no date, and prices change", REMEDY)
    try:
        if date.fromisoformat(day).isoformat() != day:  # 20261129 and 2026-W48 are dates, too
            raise ValueError
    except ValueError:
        raise UserError(what, f"'{day}' is no date", REMEDY) from None
    return Price(amount=float(amount), currency=currency, per="kWh" if per == "kWh" else "h", day=day)


def dated_ahead(prices: Sequence[Price], today: date) -> str | None:
    """That the date of a price is still to come, a day later than `today`, as it may be there already."""
    ahead = [price.day for price in prices if date.fromisoformat(price.day) > today + timedelta(days=1)]
    return f"--price: {ahead[0]} is still to come, so that price is a guess" if ahead else None


def parse_power(text: str) -> float:
    """Watts of `350W` or `1.2kW`. Raises `UserError`."""
    match = _POWER.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise UserError(f"--power '{text}'", "is no power", "write it as 450W")
    return float(match[1]) * (1000 if match[2] == "kW" else 1)


def costs_of(
    prices: Sequence[Price],
    hours: tuple[float, float, float],
    kwh: tuple[float, float, float] | None,
    *,
    machines: int = 1,
) -> tuple[Cost, ...]:
    """By currency, low, expected and high. A price of an hour is that of one of the `machines`, `kwh` are
    those of all. A price per kWh says nothing where the power is not known."""
    found: dict[str, Cost] = {}
    for price in prices:
        amounts = hours if price.per == "h" else kwh
        if amounts is None:
            continue
        times = machines if price.per == "h" else 1
        low, expected, high = (times * price.amount * each for each in amounts)
        text = price.text if times == 1 else f"{times} x {price.text}"
        before = found.get(price.currency)
        if before is not None:
            low, expected, high = low + before.low, expected + before.expected, high + before.high
        found[price.currency] = Cost(
            currency=price.currency,
            low=low,
            expected=expected,
            high=high,
            basis=text if before is None else f"{before.basis} + {text}",
        )
    return tuple(found.values())
