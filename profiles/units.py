"""Numbers with units, to and from people. GB is 1e9 bytes, GiB is 2**30; what is shown says which."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

from engines.errors import UserError

NOT_MEASURED = "not measured"

_MULTIPLES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "PB": 10**15,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "PIB": 2**50,
}
_QUANTITY = re.compile(r"\s*(-?)(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]*)\s*", re.ASCII)
_LARGEST_BYTES = 2**63 - 1

DAY_S = 86400.0
YEAR_S = 365 * DAY_S


def format_bytes(count: float | None) -> str:
    """An amount of memory in powers of two, such as `22.4 GiB`. `None` is 'not measured'."""
    if count is None:
        return NOT_MEASURED
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def format_rate(bytes_per_s: float | None) -> str:
    """A bandwidth in powers of ten, such as `26.1 GB/s`. `None` is 'not measured'."""
    if bytes_per_s is None:
        return NOT_MEASURED
    return _scaled(bytes_per_s, 1000, ("B/s", "KB/s", "MB/s", "GB/s", "TB/s", "PB/s"))


def format_flops(flops: float | None) -> str:
    """A rate in FLOP/s, such as `790 TFLOP/s`. `None` is 'not measured'."""
    if flops is None:
        return NOT_MEASURED
    return _scaled(flops, 1000, ("FLOP/s", "KFLOP/s", "MFLOP/s", "GFLOP/s", "TFLOP/s", "PFLOP/s"))


def format_elements(elements_per_s: float | None) -> str:
    """A rate in elements per second, such as `1.25 G/s`. `None` is 'not measured'."""
    if elements_per_s is None:
        return NOT_MEASURED
    return _scaled(elements_per_s, 1000, ("/s", "K/s", "M/s", "G/s", "T/s"))


def format_seconds(seconds: float | None) -> str:
    """A duration, such as `12.5 ms`, `3.10 s`, `4.20 min` or, beyond two days, `3.50 days`. `None` is
    'not measured'."""
    if seconds is None:
        return NOT_MEASURED
    size = abs(seconds)
    if size >= 2 * YEAR_S:
        return f"{_digits(seconds / YEAR_S)} years"
    if size >= 2 * DAY_S:
        return f"{_digits(seconds / DAY_S)} days"
    if size >= 7200:
        return f"{_digits(seconds / 3600)} h"
    if size >= 120:
        return f"{_digits(seconds / 60)} min"
    if size >= 1 or size == 0:
        return f"{_digits(seconds)} s"
    if size >= 1e-3:
        return f"{_digits(seconds * 1e3)} ms"
    return f"{_digits(seconds * 1e6)} us"


def format_nanoseconds(seconds: float | None) -> str:
    """What takes less than a microsecond, such as `34.9 ns`; `None` is 'not measured'."""
    return NOT_MEASURED if seconds is None else f"{_digits(seconds * 1e9)} ns"


def format_span(low: float, high: float, form: Callable[[float | None], str]) -> str:
    """Such as `24.2 to 30.7 GB/s`: the unit once where both have it."""
    first, last = form(low), form(high)
    number, _, unit = first.partition(" ")
    return f"{number if last.endswith(f' {unit}') else first} to {last}"


def parse_bytes(text: str, option: str = "size") -> int:
    """The bytes in `24GB`, `24GiB` or `512MB`; a fraction of a byte is dropped.

    `option` names for the user what is being read, such as `--vram`. Raises `UserError` for a missing or
    unknown unit, bits, and anything that is not a positive number of bytes that fits in 63 bits.
    """
    remedy = "write bytes with a unit, such as 24GB (1e9) or 24GiB (2**30)"
    what = f"{option} '{text}'"
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise UserError(what, "is not a number with a unit", remedy)
    sign, number, unit = match.groups()
    if not unit:
        raise UserError(what, "has no unit", remedy)
    if len(unit) > 1 and unit[-1] == "b" and unit[0].isupper():
        raise UserError(what, f"'{unit}' would be bits", remedy)
    multiple = _MULTIPLES.get(unit.upper())
    if multiple is None:
        raise UserError(what, f"the unit '{unit}' is not known", remedy)
    count = Decimal(number) * multiple
    if sign or count < 1:
        raise UserError(what, "is not positive", remedy)
    if count > _LARGEST_BYTES:
        raise UserError(what, "is larger than any machine", remedy)
    return int(count)


def typed_bytes(count: int) -> str:
    """`count` as `parse_bytes` reads it, to the byte: `8GiB`, `24GB`, `7.7GiB` or `512MB` where one of these
    says it, else bytes."""
    for unit, size in (("GiB", 2**30), ("GB", 10**9), ("MiB", 2**20), ("MB", 10**6)):
        text = f"{count / size:.2f}".rstrip("0").rstrip(".") + unit
        if count >= size and parse_bytes(text) == count:
            return text
    return f"{count}B"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    """`value` in the unit that keeps it below `base`; a rounded 1000 or 1024 moves one unit up."""
    scaled, position = float(value), 0
    while position < len(units) - 1 and float(_digits(abs(scaled))) >= base:
        scaled /= base
        position += 1
    number = f"{scaled:.0f}" if position == 0 and scaled.is_integer() else _digits(scaled)
    return f"{number} {units[position]}"


def _digits(value: float) -> str:
    """Three significant digits, never in exponent form."""
    size = abs(value)
    if float(f"{size:.2f}") < 10:
        return f"{value:.2f}"
    if float(f"{size:.1f}") < 100:
        return f"{value:.1f}"
    return f"{value:.0f}"
