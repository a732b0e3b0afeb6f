"""Sizes and rates to and from text."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import UserError
from profiles.units import (
    NOT_MEASURED,
    format_bytes,
    format_elements,
    format_flops,
    format_rate,
    format_seconds,
    parse_bytes,
    typed_bytes,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GB", 24 * 10**9),
        ("24GiB", 24 * 2**30),
        ("512MB", 512 * 10**6),
        ("1.5 GiB", 3 * 2**29),
        (" 80gb ", 80 * 10**9),
        ("1024KiB", 2**20),
        ("7B", 7),
        ("2PiB", 2**51),
        ("0.3KB", 300),
    ],
)
def test_parse_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@given(st.integers(1, 2**62) | st.integers(1, 400).map(lambda n: n * 2**30) | st.just(24 * 10**9))
def test_bytes_as_they_are_typed_are_read_to_the_byte(count: int) -> None:
    assert parse_bytes(typed_bytes(count)) == count
    assert [typed_bytes(each) for each in (8 * 2**30, 24 * 10**9, 1234567)] == ["8GiB", "24GB", "1234567B"]
    asked = ("7.7GiB", "11.76GiB", "7.5GB", "8267812045B")
    assert tuple(typed_bytes(parse_bytes(each)) for each in asked) == asked


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("24", "has no unit"),
        ("", "is not a number with a unit"),
        ("GB", "is not a number with a unit"),
        ("24Gb", "would be bits"),
        ("24G", "is not known"),
        ("24 parsecs", "is not known"),
        ("1,024MB", "is not a number with a unit"),
        ("1e3MB", "is not a number with a unit"),
        ("nanGB", "is not a number with a unit"),
        ("0GB", "is not positive"),
        ("0.5B", "is not positive"),
        ("-3GB", "is not positive"),
        ("99999999999999GB", "is larger than any machine"),
        ("9" * 500 + "GB", "is not a number with a unit"),
        ("\u0663GB", "is not a number with a unit"),
    ],
)
def test_parse_bytes_refuses(text: str, why: str) -> None:
    with pytest.raises(UserError) as error:
        parse_bytes(text, "--vram")
    assert why in str(error.value)
    assert str(error.value).startswith("--vram '")
    assert "24GB (1e9) or 24GiB (2**30)" in error.value.remedy


@settings(deadline=None)
@given(st.integers(min_value=1, max_value=2**62))
def test_whole_bytes_survive(count: int) -> None:
    assert parse_bytes(f"{count}B") == count


@settings(deadline=None)
@given(st.integers(min_value=1, max_value=2**60))
def test_shown_bytes_are_read_back(count: int) -> None:
    """To three digits, and whole bytes."""
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, abs=5.1e-3 * count + 1)


@settings(deadline=None)
@given(st.text(max_size=20))
def test_any_text_is_a_size_or_a_users_mistake(text: str) -> None:
    with suppress(UserError):
        assert parse_bytes(text) > 0


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (format_bytes(0), "0 B"),
        (format_bytes(1023), "1023 B"),
        (format_bytes(2**30), "1.00 GiB"),
        (format_bytes(2**30 - 1), "1.00 GiB"),
        (format_bytes(22.4 * 2**30), "22.4 GiB"),
        (format_rate(26.13e9), "26.1 GB/s"),
        (format_rate(999.7e6), "1.00 GB/s"),
        (format_flops(790e12), "790 TFLOP/s"),
        (format_elements(1.25e9), "1.25 G/s"),
        (format_seconds(0), "0.00 s"),
        (format_seconds(12.5e-6), "12.5 us"),
        (format_seconds(0.0125), "12.5 ms"),
        (format_seconds(3.1), "3.10 s"),
        (format_seconds(119), "119 s"),
        (format_seconds(252), "4.20 min"),
        (format_seconds(7200), "2.00 h"),
        (format_seconds(47.9 * 3600), "47.9 h"),
        (format_seconds(48 * 3600), "2.00 days"),
        (format_seconds(7624 * 3600), "318 days"),
        (format_seconds(-730 * 86400), "-2.00 years"),
    ],
)
def test_formats(shown: str, text: str) -> None:
    assert shown == text


@pytest.mark.parametrize("form", [format_bytes, format_rate, format_flops, format_elements, format_seconds])
def test_absent_is_not_measured(form: object) -> None:
    assert callable(form)
    assert form(None) == NOT_MEASURED
