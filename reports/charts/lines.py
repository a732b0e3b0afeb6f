"""Lines over a common axis, told apart in grey by dashes and by the symbols at their points. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reports.charts.axes import HIDES, Axis, Scale, log_ticks, nice_range, nice_ticks
from reports.charts.marks import (
    FAINT,
    INK,
    SMALL,
    WIDTH,
    line,
    short,
    stroke_of,
    svg,
    symbol,
    text,
    x_axis,
)

_LEGEND = 176


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    label: str
    engine: str
    nth: int = 0
    """Of the methods that are this engine with other settings."""
    points: tuple[tuple[float, float], ...]
    is_marked: bool = False
    """Each point has its symbol, else the last one alone."""
    is_faint: bool = False
    """One of those that a bold line of the same label sums up: thin and without symbols."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelLine:
    """A line across, with its name in the legend."""

    value: float
    name: str
    dash: str = "5 3"


def lines(
    title: str,
    description: str,
    series: Sequence[Line],
    x: Callable[[float], Axis],
    y: Axis,
    levels: Sequence[LevelLine] = (),
    logarithmic: str = "",
) -> str:
    """Lines over a common x from zero, with a legend of the labels to the right. Every series has a point.

    Where one method's lines would hide another's x is logarithmic, which the axis says in the words of
    `logarithmic`; without them it never is. What is at zero is then at its start.
    """
    left, head, height = 66, 28, 220
    plot = WIDTH - left - _LEGEND
    bottom = head + height
    last_x = max(point[0] for one in series for point in one.points) or 1.0
    ys = [point[1] for one in series for point in one.points]
    unit = x(last_x)
    scale = _x_scale(series, unit, last_x, plot, may_be_logarithmic=bool(logarithmic))
    ys += [each.value for each in levels]
    y_ticks = [tick * y.size for tick in nice_range(min(ys) / y.size, max(ys) / y.size)]
    y_scale = height / (y_ticks[-1] - y_ticks[0])

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return left + scale.place(point[0]), bottom - (point[1] - y_ticks[0]) * y_scale

    body = x_axis(scale, left, head, bottom, logarithmic if scale.is_logarithmic else "")
    body.append(text(left, head - 14, y.label, size=SMALL))
    for value in y_ticks:
        height_of = bottom - (value - y_ticks[0]) * y_scale
        body.append(line(left, height_of, left + plot, height_of, FAINT))
        body.append(text(left - 6, height_of + 4, y.tick(value), anchor="end", size=SMALL))
    for each in levels:
        across = place((0.0, each.value))[1]
        body.append(line(left, across, left + plot, across, INK, dash=each.dash))
    labels = [one.label for one in series if not one.is_faint]
    names = list(dict.fromkeys(labels))
    for one in series:
        stroke = stroke_of(one.engine, one.nth)
        width, opacity = (2 if labels.count(one.label) == 1 else 1), ""
        if one.is_faint:
            width, opacity = 1, ' stroke-opacity="0.45"'
        path = " ".join(",".join(map(short, place(point))) for point in thinned(one.points))
        body.append(
            f'<polyline points="{path}" fill="none" stroke="{stroke.colour}" stroke-width="{width}"{opacity} '
            f'stroke-linejoin="round" stroke-dasharray="{stroke.dashes}"/>'
        )
        if one.is_faint:
            continue
        for point in one.points if one.is_marked else one.points[-1:]:
            body.append(symbol(*place(point), names.index(one.label), stroke.colour))
    keys = {one.label: stroke_of(one.engine, one.nth) for one in series}
    for index, (label, stroke) in enumerate(keys.items()):
        key = head + 12 + 22 * index
        start = left + plot + 16
        body.append(line(start, key - 4, start + 30, key - 4, stroke.colour, width=2, dash=stroke.dashes))
        body.append(symbol(start + 15, key - 4, index, stroke.colour))
        body.append(text(start + 36, key, label, room=_LEGEND - 52))
    for index, each in enumerate(levels, len(keys)):
        key = head + 12 + 22 * index
        start = left + plot + 16
        body.append(line(start, key - 4, start + 30, key - 4, INK, dash=each.dash))
        body.append(text(start + 36, key, each.name, room=_LEGEND - 52))
    rows = len(keys) + len(levels)
    return svg(title, description, max(bottom, head + 22 * rows) + 44, body)


def _x_scale(
    series: Sequence[Line], unit: Axis, last_x: float, length: float, *, may_be_logarithmic: bool
) -> Scale:
    ends = {label: max(x for one in series if one.label == label for x, _ in one.points) for label in
            {one.label for one in series}}  # fmt: skip
    shown = [end for end in ends.values() if end > 0]
    if may_be_logarithmic and len(shown) > 1 and max(shown) > HIDES * min(shown):
        first = min(x for one in series for x, _ in one.points if x > 0)
        ticks = log_ticks(first / unit.size, last_x / unit.size)
        return Scale(
            axis=unit, ticks=tuple(tick * unit.size for tick in ticks), length=length, is_logarithmic=True
        )
    ticks = nice_ticks(last_x / unit.size)
    return Scale(axis=unit, ticks=tuple(tick * unit.size for tick in ticks), length=length)


def thinned(points: Sequence[tuple[float, float]], most: int = 240) -> list[tuple[float, float]]:
    """At most about `most` of the points, evenly, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    stride = math.ceil(len(points) / most)
    kept = list(points[::stride])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]
