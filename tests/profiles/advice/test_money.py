"""Prices that were typed, with their date."""

from __future__ import annotations

from datetime import date

import pytest

from engines.errors import UserError
from profiles.advice import words
from profiles.advice.money import Cost, costs_of, dated_ahead, parse_power, parse_price

HOURS = (1.0, 2.0, 4.0)


def test_prices_of_hours_and_of_energy_add_up_by_currency() -> None:
    prices = [
        parse_price("2.5 USD/h@2026-11-29"),
        parse_price("30JPY/kWh@2026-11-01"),
        parse_price("100JPY/h@2026-11-02"),
    ]
    usd, jpy = costs_of(prices, HOURS, (0.5, 1.0, 2.0))
    assert (usd.currency, usd.low, usd.expected, usd.high) == ("USD", 2.5, 5.0, 10.0)
    assert (jpy.low, jpy.expected, jpy.high) == (115.0, 230.0, 460.0)
    assert jpy.basis == "30 JPY/kWh as of 2026-11-01 + 100 JPY/h as of 2026-11-02"


def test_a_price_of_a_day_to_come_is_called_a_guess() -> None:
    today = date(2026, 11, 30)
    prices = [parse_price(f"2.5USD/h@{day}") for day in ("2026-11-29", "2026-12-01", "2027-01-01")]
    assert dated_ahead(prices[:2], today) is None
    assert dated_ahead(prices, today) == "--price: 2027-01-01 is still to come, so that price is a guess"


def test_without_power_a_price_of_energy_says_nothing() -> None:
    assert costs_of([parse_price("30JPY/kWh@2026-11-01")], HOURS, None) == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2.5", "no amount, currency and unit"),
        ("2.5USD/day@2026-11-29", "no amount, currency and unit"),
        ("2.5USD/h", "has no date"),
        ("2.5USD/h@tomorrow", "is no date"),
        ("2.5USD/h@20261129", "is no date"),
        ("2.5USD/h@2026-W48-7", "is no date"),
        ("-1USD/h@2026-11-29", "no amount"),
    ],
)
def test_what_is_no_price_is_one_line(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        parse_price(text)
    assert len(str(raised.value)) < 200


def test_power_has_a_unit() -> None:
    assert parse_power("450W") == 450
    assert parse_power("1.2 kW") == 1200
    for text in ("450", "0W", "450mW", "-3W"):
        with pytest.raises(UserError, match="--power"):
            parse_power(text)


def test_money_of_a_short_job_is_not_nothing() -> None:
    def said(amount: float) -> str:
        return words.money(Cost(currency="USD", low=0, expected=amount, high=1234.5, basis=""))

    assert said(0.0042) == "0.0042 USD (0.00 to 1,234.50)"
    assert said(12.344) == "12.34 USD (0.00 to 1,234.50)"
