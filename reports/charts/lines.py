"""Lines over a common axis, told apart in grey by dashes and by the symbols at their points. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reports.charts.axes import Axis, Scale, nice_range, nice_ticks
from reports.charts.marks import (
    FAINT,
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
    points: tuple[tuple[float, float], ...]
    is_marked: bool = False
    """Each point has its symbol, else the last one alone."""


def lines(
    title: str,
    description: str,
    series: Sequence[Line],
    x: Callable[[float], Axis],
    y: Axis,
    level: tuple[float, str] | None = None,
) -> str:
    """Lines over a common x from zero, thin where several have one label, with a legend of the labels to the
    right. `level` is a dashed line across with its name. Every series has a point."""
    left, head, height = 66, 28, 220
    plot = WIDTH - left - _LEGEND
    bottom = head + height
    last_x = max(point[0] for one in series for point in one.points) or 1.0
    ys = [point[1] for one in series for point in one.points]
    unit = x(last_x)
    scale = Scale(
        axis=unit,
        ticks=tuple(tick * unit.size for tick in nice_ticks(last_x / unit.size)),
        length=plot,
    )
    if level is not None:
        ys.append(level[0])
    y_ticks = nice_range(min(ys), max(ys))
    y_scale = height / (y_ticks[-1] - y_ticks[0])

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return left + scale.place(point[0]), bottom - (point[1] - y_ticks[0]) * y_scale

    body = x_axis(scale, left, head, bottom)
    body.append(text(left, head - 14, y.label, size=SMALL))
    for value in y_ticks:
        height_of = bottom - (value - y_ticks[0]) * y_scale
        body.append(line(left, height_of, left + plot, height_of, FAINT))
        body.append(text(left - 6, height_of + 4, y.tick(value), anchor="end", size=SMALL))
    if level is not None:
        across = place((0.0, level[0]))[1]
        body.append(line(left, across, left + plot, across, "#1a1a1a", dash="5 3"))
    labels = [one.label for one in series]
    names = list(dict.fromkeys(labels))
    for one in series:
        stroke = stroke_of(one.engine)
        width = 2 if labels.count(one.label) == 1 else 1
        path = " ".join(",".join(map(short, place(point))) for point in thinned(one.points))
        body.append(
            f'<polyline points="{path}" fill="none" stroke="{stroke.colour}" stroke-width="{width}" '
            f'stroke-linejoin="round" stroke-dasharray="{stroke.dashes}"/>'
        )
        for point in one.points if one.is_marked else one.points[-1:]:
            body.append(symbol(*place(point), names.index(one.label), stroke.colour))
    keys = {one.label: stroke_of(one.engine) for one in series}
    for index, (label, stroke) in enumerate(keys.items()):
        key = head + 12 + 22 * index
        start = left + plot + 16
        body.append(line(start, key - 4, start + 30, key - 4, stroke.colour, width=2, dash=stroke.dashes))
        body.append(symbol(start + 15, key - 4, index, stroke.colour))
        body.append(text(start + 36, key, label, room=_LEGEND - 52))
    if level is not None:
        key = head + 12 + 22 * len(keys)
        start = left + plot + 16
        body.append(line(start, key - 4, start + 30, key - 4, "#1a1a1a", dash="5 3"))
        body.append(text(start + 36, key, level[1], room=_LEGEND - 52))
    rows = len(keys) + (level is not None)
    return svg(title, description, max(bottom, head + 22 * rows) + 44, body)


def thinned(points: Sequence[tuple[float, float]], most: int = 240) -> list[tuple[float, float]]:
    """At most about `most` of the points, evenly, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    stride = math.ceil(len(points) / most)
    kept = list(points[::stride])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]
