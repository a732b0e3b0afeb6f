"""Every sentence of this room, in one place."""

from __future__ import annotations

from collections.abc import Sequence

from profiles.advice.money import Cost
from profiles.planning.context import NO_PRICE
from profiles.units import DAY_S, YEAR_S, format_bytes, format_seconds

UPGRADE_VRAM = "GPU memory"
UPGRADE_RAM = "host memory"
UPGRADE_GPU = "a second GPU like it, host memory shared"
UPGRADE_SLOT = "a link twice as fast (the next PCIe generation, or twice the lanes)"
UPGRADE_CHANNELS = "memory channels, twice as many"
UPGRADE_CORES = "CPU cores, twice as many"
SUPPOSED = "supposed"
WITH_GRADIENTS = "With gradients"
WITHOUT_GRADIENTS = "Without gradients (zeroth order)"
NO_PLAN = "There is no plan."
NOTHING_FITS = "Nothing fits."
NOTHING_RUNS = "Nothing can run as it was asked."
MEASURE = "ranges overlap, so which is faster is for a measurement to say"

_DTYPES = {
    "bf16": "weights and passes in bf16",
    "fp16": "weights and passes in fp16",
    "fp32": "none, but weights take twice the memory of 16 bits",
}


def of_dtype(dtype: str) -> str:
    return _DTYPES[dtype]


def of_prices(prices: Sequence[str]) -> str:
    """What several changes cost together: one that costs nothing says so only where none of them does."""
    told = list(dict.fromkeys(prices))
    costly = [each for each in told if not each.startswith("none: ")]
    return "; ".join(costly or told[:1]) or NO_PRICE


def of_shorter(tokens: int) -> str:
    return f"sequences beyond {tokens} tokens are cut"


def upgrade_machine(gbit_per_s: int) -> str:
    return f"a second machine like it, over {gbit_per_s} Gbit/s"


def upgrade_vram(before: int, after: int) -> str:
    return f"{UPGRADE_VRAM} {format_bytes(before)} to {format_bytes(after)}"


def upgrade_ram(before: int, after: int) -> str:
    return f"{UPGRADE_RAM} {format_bytes(before)} to {format_bytes(after)}"


def duration(seconds: float | None) -> str:
    return "not known" if seconds is None else format_seconds(seconds)


UNIT_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "days": DAY_S, "years": YEAR_S}


def band(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "-"
    first, last = duration(low), duration(high)
    unit = last.partition(" ")[2]
    if first.endswith(f" {unit}"):
        return f"{first.partition(' ')[0]} to {last}"
    return f"{three_digits(low / UNIT_S[unit])} to {last}" if low >= high / 100 else f"{first} to {last}"


def three_digits(value: float) -> str:
    """`0.500`, `1.40`, `105` or `1,230`."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:#.3g}".rstrip(".")


def money(cost: Cost) -> str:
    return f"{_amount(cost.expected)} {cost.currency} ({_amount(cost.low)} to {_amount(cost.high)})"


def _amount(money: float) -> str:
    """Two places; of a short job's cents two digits, so that they are not nothing."""
    return f"{money:,.2f}" if money >= 0.1 or money == 0 else f"{money:.2g}"


def names(engines: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    if len(engines) < 2:
        return "".join(engines)
    return f"{', '.join(engines[:-1])} and {engines[-1]}"


def least_machine(kind: str, machine: str, engine: str, *, disk_bytes: int, timed: bool) -> str:
    disk = f", with {format_bytes(disk_bytes)} of it on disk" if disk_bytes else ""
    disk += ", in a time that is not predicted" if disk and not timed else ""
    return f"{kind} the least machine that does it is {machine}, by {engine}{disk}."


def perhaps_machine(kind: str, machine: str, engine: str) -> str:
    return f"{kind} {machine} may do it, by {engine}: its range goes beyond the target."


def no_machine(kind: str) -> str:
    return f"{kind} no machine of the catalogue does it."


def even_so(tokens: int, why_not: str) -> str:
    return f"even one sequence of {tokens} tokens at a time {why_not}"
