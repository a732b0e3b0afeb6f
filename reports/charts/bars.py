"""Horizontal bars, in equal steps from zero or, where one would hide the others, logarithmic. Pure.

Values stand in a column of their own to the right, where they cannot collide with bars or whiskers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reports.charts.axes import Axis, Scale, bar_scale
from reports.charts.marks import (
    CHARACTER,
    FONT,
    INK,
    PREDICTED,
    SMALL,
    WIDTH,
    line,
    plate,
    short,
    stroke_of,
    svg,
    text,
    x_axis,
)

_LABELS = 132
_VALUES = 128
_PLOT = WIDTH - _LABELS - _VALUES
_ROW = 34
_BAR = 15
_HEADING = 32
_LANE = 19
_LANE_BAR = 11

FARTHEST_LIMIT = 12.0
"""A limit so many times the largest bar is not drawn: it would leave no room for the bars."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BarPart:
    """One bar of a row, from zero to `value`."""

    value: float
    pale: bool = False
    """Drawn in outline: what was held beyond what was used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BarRow:
    label: str
    engine: str
    parts: tuple[BarPart, ...] = ()
    """Largest first; later ones lie on top."""
    low: float | None = None
    high: float | None = None
    """Ends of the whisker."""
    predicted: float | None = None
    text: str = ""
    """To the right of the plot."""
    missing: str = ""
    """Inside the plot where there is no bar, such as why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BarGroup:
    """Bars that belong together, under a heading."""

    label: str
    text: str
    """Beside the label."""
    rows: tuple[BarRow, ...]
    whole: float | None = None
    """A line through the group's bars: what they are parts of."""
    floor: float | None = None
    """A dashed line in the colour of predictions."""
    alone: float | None = None
    """A dotted line: what one of the rows takes with all others at rest."""


def bars(
    title: str,
    description: str,
    rows: Sequence[BarRow],
    axis: Callable[[float], Axis],
    limit: tuple[float, str] | None = None,
    logarithmic: str = " (logarithmic)",
) -> str:
    """Horizontal bars on the axis that `axis` gives for the largest value: from zero, or logarithmic, which
    the axis then says in the words of `logarithmic`.

    `limit` is a dashed line with its label; left out where it would leave the bars no room.
    """
    ends = [
        value
        for row in rows
        for value in (*(part.value for part in row.parts), row.high, row.predicted)
        if value is not None
    ]
    top = max(ends, default=0.0)
    if limit is not None and (top <= 0 or limit[0] > FARTHEST_LIMIT * top):
        limit = None
    wholes = [max(part.value for part in row.parts) for row in rows if row.parts]
    scale = bar_scale([*ends, *([limit[0]] if limit else [])], wholes, axis, _PLOT)
    head = 24 if limit else 4
    bottom = head + _ROW * len(rows)
    body = x_axis(scale, _LABELS, head, bottom, logarithmic if scale.is_logarithmic else "")
    for index, row in enumerate(rows):
        body += _bar_row(row, head + _ROW * index + _ROW / 2, scale)
    if limit is not None:
        x = _LABELS + scale.place(limit[0])
        body.append(line(x, head - 4, x, bottom, INK, dash="5 3"))
        anchor = "end" if x > _LABELS + _PLOT / 2 else "start"
        body.append(text(x, head - 9, limit[1], anchor=anchor, size=SMALL))
    return svg(title, description, bottom + 44, body)


def grouped_bars(
    title: str,
    description: str,
    groups: Sequence[BarGroup],
    axis: Callable[[float], Axis],
    logarithmic: str = " (logarithmic)",
) -> str:
    """Groups of thin horizontal bars on a common axis that `axis` gives for the largest value; logarithmic
    where one group would hide another."""
    found = [part.value for group in groups for row in group.rows for part in row.parts]
    found += [
        value for group in groups for value in (group.whole, group.floor, group.alone) if value is not None
    ]
    wholes = [group.whole for group in groups if group.whole is not None]
    scale = bar_scale(found, wholes, axis, _PLOT)
    heights = [_HEADING + _LANE * len(group.rows) for group in groups]
    bottom = 4 + sum(heights)
    body = x_axis(scale, _LABELS, 4, bottom, logarithmic if scale.is_logarithmic else "")
    y = 4.0
    for group, height in zip(groups, heights, strict=True):
        first, last = y + _HEADING - 2, y + height - 2
        written = min(len(group.text) * CHARACTER * SMALL / FONT + 6, WIDTH - _LABELS - 2.0)
        body.append(plate(_LABELS + 2, first - 18, written, 16))
        body.append(
            text(_LABELS - 10, first - 6, group.label, anchor="end", room=_LABELS - 12, weight="bold")
        )
        body.append(text(_LABELS + 6, first - 6, group.text, size=SMALL, room=WIDTH - _LABELS - 8))
        for index, row in enumerate(group.rows):
            body += _bar_row(row, first + _LANE * (index + 0.5), scale, thickness=_LANE_BAR)
        for value, ink, dash in (
            (group.whole, INK, ""),
            (group.floor, PREDICTED, "5 3"),
            (group.alone, INK, "1.5 2.5"),
        ):
            if value is not None:
                x = _LABELS + scale.place(value)
                body.append(line(x, first, x, last, "#ffffff", width=4))  # to be seen on a bar
                body.append(line(x, first, x, last, ink, width=1.5, dash=dash))
        y += height
    return svg(title, description, bottom + 44, body)


def _bar_row(row: BarRow, middle: float, scale: Scale, thickness: float = _BAR) -> list[str]:
    colour = stroke_of(row.engine).colour
    body = [text(_LABELS - 10, middle + 4, row.label, anchor="end", room=_LABELS - 12)]
    for part in row.parts:
        width = max(scale.place(part.value), 1.0)
        fill = f'fill="{colour}" fill-opacity="0.18" stroke="{colour}"' if part.pale else f'fill="{colour}"'
        body.append(
            f'<rect x="{_LABELS}" y="{short(middle - thickness / 2)}" width="{short(width)}" '
            f'height="{short(thickness)}" {fill}/>'
        )
    if row.low is not None and row.high is not None:
        low, high = _LABELS + scale.place(row.low), _LABELS + scale.place(row.high)
        # White under the black whisker, so that it can be seen on the bar and beside it.
        for ink, width in (("#ffffff", 4), (INK, 1.5)):
            body.append(line(low, middle, high, middle, ink, width=width))
            body += [line(x, middle - 4, x, middle + 4, ink, width=width) for x in (low, high)]
    if row.predicted is not None:
        x = _LABELS + scale.place(row.predicted)
        body.append(
            f'<path d="M{short(x)} {short(middle - 8)} l6 8 l-6 8 l-6 -8 z" fill="#ffffff" '
            f'stroke="{PREDICTED}" stroke-width="2"/>'
        )
    if row.missing and not row.parts:
        # To the right of a marker that stands in the left half, else at the left edge.
        x = _LABELS + 6.0
        room = float(_PLOT - 12)
        if row.predicted is not None:
            marker = scale.place(row.predicted)
            if marker < _PLOT / 2:
                x, room = _LABELS + marker + 14, _PLOT - marker - 20
            else:
                room = marker - 20
        body.append(text(x, middle + 4, row.missing, room=room, style="italic"))
    body.append(text(_LABELS + _PLOT + 14, middle + 4, row.text, room=_VALUES - 16))
    return body
