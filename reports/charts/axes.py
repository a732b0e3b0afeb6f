"""Axes: units, round ticks, and where a value lies, in equal steps or logarithmic. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from profiles.language import unit_word

HIDES = 25.0
"""A bar so many times as long as another hides it: from here on an axis is logarithmic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    name: str
    unit: str = ""
    size: float = 1.0
    """Of the unit: ticks are round multiples of it."""

    @property
    def label(self) -> str:
        return f"{self.name} ({unit_word(self.unit)})" if self.unit else self.name

    def tick(self, value: float) -> str:
        return f"{value / self.size:.6g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Where values lie on an axis of `length` units of the drawing, from its first tick to its last."""

    axis: Axis
    ticks: tuple[float, ...]
    length: float
    is_logarithmic: bool = False

    def place(self, value: float) -> float:
        """Distance from the axis' start; what lies before it is at the start."""
        first, last = self.ticks[0], self.ticks[-1]
        if not self.is_logarithmic:
            return max(0.0, value - first) * (self.length / (last - first))
        if value <= first:
            return 0.0
        return self.length * math.log(value / first) / math.log(last / first)


def bar_scale(
    values: Sequence[float], rows: Sequence[float], axis: Callable[[float], Axis], length: float
) -> Scale:
    """From zero over all `values`; logarithmic where the largest of `rows`, one number of each row, is more
    than `HIDES` times the smallest."""
    top = max(values, default=0.0) or 1.0
    unit = axis(top)
    shown = [value for value in rows if value > 0]
    if len(shown) > 1 and max(shown) > HIDES * min(shown):
        ticks = log_ticks(min(shown) / unit.size, top / unit.size)
        return Scale(
            axis=unit, ticks=tuple(tick * unit.size for tick in ticks), length=length, is_logarithmic=True
        )
    return Scale(
        axis=unit, ticks=tuple(tick * unit.size for tick in nice_ticks(top / unit.size)), length=length
    )


def seconds_axis(name: str, top: float) -> Axis:
    """In the unit that suits times up to `top` seconds."""
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if top >= (2 * size if size > 1 else size):
            return Axis(name=name, unit=unit, size=size)
    return Axis(name=name, unit="us", size=1e-6)


def bytes_axis(name: str, top: float) -> Axis:
    """In the power of 1024 that suits sizes up to `top` bytes."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if top >= 1024**power:
            return Axis(name=name, unit=unit, size=1024.0**power)
    return Axis(name=name, unit="B")


def nice_ticks(top: float, count: int = 5) -> list[float]:
    """0 and about `count` round steps, the last at or above `top`."""
    step = _nice_step(top, count)
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Powers of ten from below `low`, so that its bar is seen, to at or above `high`; at most about `most` of
    them, then every second, third, ... power."""
    first = math.floor(math.log10(low * 0.7))
    last = math.ceil(math.log10(high) - 1e-9)
    stride = math.ceil((last - first) / most) or 1
    last = first + stride * math.ceil((last - first) / stride)
    return [10.0**power for power in range(first, last + 1, stride)]


def nice_range(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        margin = abs(high) * 0.1 if abs(high) > 1e-6 else 1.0
        low, high = low - margin, high + margin
    step = _nice_step(high - low, count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


def _nice_step(extent: float, count: int) -> float:
    raw = extent / count
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
