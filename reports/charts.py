"""Small SVG charts as text: horizontal bars and lines. Pure; nothing is loaded, drawn text stays text.

Widths of text are estimated from the length, generously, because an SVG cannot ask the font. Values
stand in a column of their own to the right, where they cannot collide with bars or whiskers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from engines import public_engines

WIDTH = 720
"""Units across; the page scales it."""
FONT = 13
_SMALL = 11.5
_CHARACTER = 0.6 * FONT
"""Estimated width of a character; wider than that of common sans-serif fonts."""
_LABELS = 132
_VALUES = 100
_PLOT = WIDTH - _LABELS - _VALUES
_LEGEND = 176
_ROW = 34
_BAR = 15
_HEADING = 32
_LANE = 19
_LANE_BAR = 11

# Okabe & Ito's palette, told apart by the colour-blind, and darkened where thin lines on white need it.
COLOURS = ("#000000", "#B36B00", "#0072B2", "#9A4C7F", "#007A5A")
_OTHER_COLOUR = "#5A5A5A"
_DASHES = ("", "7 3", "2 3", "10 3 2 3", "12 4")
"""Of lines; as the colours, in the order of the table of engines."""
_OTHER_DASHES = "4 4"
_INK, _FAINT, _PREDICTED = "#1a1a1a", "#d9d9d9", "#D55E00"


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    name: str
    unit: str = ""
    size: float = 1.0
    """Of the unit: ticks are round multiples of it."""

    @property
    def label(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def tick(self, value: float) -> str:
        return f"{value / self.size:.6g}"


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    label: str
    engine: str
    points: tuple[tuple[float, float], ...]


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


def bars(
    title: str,
    description: str,
    rows: Sequence[BarRow],
    axis: Callable[[float], Axis],
    limit: tuple[float, str] | None = None,
) -> str:
    """Horizontal bars from zero on the axis that `axis` gives for the largest value.

    `limit` is a dashed line with its label; left out where it would squeeze the bars into a third.
    """
    ends = [
        value
        for row in rows
        for value in (*(part.value for part in row.parts), row.high, row.predicted)
        if value is not None
    ]
    top = max(ends, default=0.0)
    if limit is not None and (top <= 0 or limit[0] > 3 * top):
        limit = None
    top = max(top, limit[0] if limit else 0.0) or 1.0
    unit = axis(top)
    ticks = [tick * unit.size for tick in nice_ticks(top / unit.size)]
    scale = _PLOT / ticks[-1]
    head = 24 if limit else 4
    bottom = head + _ROW * len(rows)
    body = _x_axis(ticks, scale, _LABELS, head, bottom, unit, _PLOT)
    for index, row in enumerate(rows):
        body += _bar_row(row, head + _ROW * index + _ROW / 2, scale)
    if limit is not None:
        x = _LABELS + limit[0] * scale
        body.append(_line(x, head - 4, x, bottom, _INK, dash="5 3"))
        anchor = "end" if x > _LABELS + _PLOT / 2 else "start"
        body.append(_text(x, head - 9, limit[1], anchor=anchor, size=_SMALL))
    return _svg(title, description, bottom + 44, body)


def grouped_bars(
    title: str, description: str, groups: Sequence[BarGroup], axis: Callable[[float], Axis]
) -> str:
    """Groups of thin horizontal bars on a common axis from zero, that `axis` gives for the largest value."""
    found = [part.value for group in groups for row in group.rows for part in row.parts]
    found += [
        value for group in groups for value in (group.whole, group.floor, group.alone) if value is not None
    ]
    top = max(found, default=0.0) or 1.0
    unit = axis(top)
    ticks = [tick * unit.size for tick in nice_ticks(top / unit.size)]
    scale = _PLOT / ticks[-1]
    heights = [_HEADING + _LANE * len(group.rows) for group in groups]
    bottom = 4 + sum(heights)
    body = _x_axis(ticks, scale, _LABELS, 4, bottom, unit, _PLOT)
    y = 4.0
    for group, height in zip(groups, heights, strict=True):
        first, last = y + _HEADING - 2, y + height - 2
        written = min(len(group.text) * _CHARACTER * _SMALL / FONT + 6, WIDTH - _LABELS - 2.0)
        body.append(_plate(_LABELS + 2, first - 18, written, 16))
        body.append(
            _text(_LABELS - 10, first - 6, group.label, anchor="end", room=_LABELS - 12, weight="bold")
        )
        body.append(_text(_LABELS + 6, first - 6, group.text, size=_SMALL, room=WIDTH - _LABELS - 8))
        for index, row in enumerate(group.rows):
            body += _bar_row(row, first + _LANE * (index + 0.5), scale, thickness=_LANE_BAR)
        for value, ink, dash in (
            (group.whole, _INK, ""),
            (group.floor, _PREDICTED, "5 3"),
            (group.alone, _INK, "1.5 2.5"),
        ):
            if value is not None:
                x = _LABELS + value * scale
                body.append(_line(x, first, x, last, "#ffffff", width=4))  # to be seen on a bar
                body.append(_line(x, first, x, last, ink, width=1.5, dash=dash))
        y += height
    return _svg(title, description, bottom + 44, body)


def lines(
    title: str, description: str, series: Sequence[Line], x_axis: Callable[[float], Axis], y: Axis
) -> str:
    """Lines over a common x from zero, thin where several have one label, with a legend of the labels to the
    right. Every series has a point."""
    left, head, height = 66, 28, 220
    plot = WIDTH - left - _LEGEND
    bottom = head + height
    last_x = max(x for one in series for x, _ in one.points) or 1.0
    ys = [y for one in series for _, y in one.points]
    x = x_axis(last_x)
    x_ticks = [tick * x.size for tick in nice_ticks(last_x / x.size)]
    y_ticks = nice_range(min(ys), max(ys))
    x_scale, y_scale = plot / x_ticks[-1], height / (y_ticks[-1] - y_ticks[0])

    def place(point: tuple[float, float]) -> tuple[str, str]:
        return _n(left + point[0] * x_scale), _n(bottom - (point[1] - y_ticks[0]) * y_scale)

    body = _x_axis(x_ticks, x_scale, left, head, bottom, x, plot)
    body.append(_text(left, head - 14, y.label, size=_SMALL))
    for value in y_ticks:
        height_of = bottom - (value - y_ticks[0]) * y_scale
        body.append(_line(left, height_of, left + plot, height_of, _FAINT))
        body.append(_text(left - 6, height_of + 4, y.tick(value), anchor="end", size=_SMALL))
    labels = [one.label for one in series]
    for one in series:
        colour, dash = _stroke(one.engine)
        width = 2 if labels.count(one.label) == 1 else 1
        path = " ".join(",".join(place(point)) for point in thinned(one.points))
        body.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" '
            f'stroke-linejoin="round" stroke-dasharray="{dash}"/>'
        )
        end_x, end_y = place(one.points[-1])
        body.append(f'<circle cx="{end_x}" cy="{end_y}" r="3.5" fill="{colour}"/>')
    keys = {one.label: _stroke(one.engine) for one in series}
    for index, (label, (colour, dash)) in enumerate(keys.items()):
        key = head + 12 + 22 * index
        body.append(_line(left + plot + 16, key - 4, left + plot + 46, key - 4, colour, width=2, dash=dash))
        body.append(_text(left + plot + 52, key, label, room=_LEGEND - 52))
    return _svg(title, description, max(bottom, head + 22 * len(keys)) + 44, body)


def standalone(svg: str) -> str:
    """A chart as a file of its own, on white: a dark page would swallow its ink."""
    start, _, rest = svg.partition(">")
    return (
        start.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" ', 1)
        + f'><rect width="100%" height="100%" fill="#ffffff"/>{rest}\n'
    )


def nice_ticks(top: float, count: int = 5) -> list[float]:
    """0 and about `count` round steps, the last at or above `top`."""
    step = _nice_step(top, count)
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def nice_range(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        margin = abs(high) * 0.1 if abs(high) > 1e-6 else 1.0
        low, high = low - margin, high + margin
    step = _nice_step(high - low, count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


def thinned(points: Sequence[tuple[float, float]], most: int = 240) -> list[tuple[float, float]]:
    """At most about `most` of the points, evenly, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    stride = math.ceil(len(points) / most)
    kept = list(points[::stride])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def fitted(text: str, room: float, size: float = FONT) -> str:
    """`text`, cut with an ellipsis where it would be wider than `room`."""
    most = int(room / (_CHARACTER * size / FONT))
    return text if len(text) <= most else text[: max(1, most - 1)] + "\u2026"


def _stroke(engine: str) -> tuple[str, str]:
    """Colour and dashes of its lines, by the engine's row; those behind the palette share one of each."""
    known = public_engines()[: len(COLOURS)]
    if engine not in known:
        return _OTHER_COLOUR, _OTHER_DASHES
    return COLOURS[known.index(engine)], _DASHES[known.index(engine)]


def _nice_step(extent: float, count: int) -> float:
    raw = extent / count
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))


def _bar_row(row: BarRow, middle: float, scale: float, thickness: float = _BAR) -> list[str]:
    colour, _ = _stroke(row.engine)
    body = [_text(_LABELS - 10, middle + 4, row.label, anchor="end", room=_LABELS - 12)]
    for part in row.parts:
        width = max(part.value * scale, 1.0)
        fill = f'fill="{colour}" fill-opacity="0.18" stroke="{colour}"' if part.pale else f'fill="{colour}"'
        body.append(
            f'<rect x="{_LABELS}" y="{_n(middle - thickness / 2)}" width="{_n(width)}" '
            f'height="{_n(thickness)}" {fill}/>'
        )
    if row.low is not None and row.high is not None:
        low, high = _LABELS + row.low * scale, _LABELS + row.high * scale
        # White under the black whisker, so that it can be seen on the bar and beside it.
        for ink, width in (("#ffffff", 4), (_INK, 1.5)):
            body.append(_line(low, middle, high, middle, ink, width=width))
            body += [_line(x, middle - 4, x, middle + 4, ink, width=width) for x in (low, high)]
    if row.predicted is not None:
        x = _LABELS + row.predicted * scale
        body.append(
            f'<path d="M{_n(x)} {_n(middle - 8)} l6 8 l-6 8 l-6 -8 z" fill="#ffffff" stroke="{_PREDICTED}" '
            'stroke-width="2"/>'
        )
    if row.missing and not row.parts:
        # To the right of a marker that stands in the left half, else at the left edge.
        x = _LABELS + 6.0
        room = float(_PLOT - 12)
        if row.predicted is not None:
            marker = row.predicted * scale
            if marker < _PLOT / 2:
                x, room = _LABELS + marker + 14, _PLOT - marker - 20
            else:
                room = marker - 20
        body.append(_text(x, middle + 4, row.missing, room=room, style="italic"))
    body.append(_text(_LABELS + _PLOT + 14, middle + 4, row.text, room=_VALUES - 16))
    return body


def _x_axis(
    ticks: Sequence[float],
    scale: float,
    left: float,
    head: float,
    bottom: float,
    axis: Axis,
    plot: float,
) -> list[str]:
    """Grid lines with their numbers (every second one where they would touch), and the axis' name."""
    body = []
    widest = max(len(axis.tick(value)) for value in ticks) * _CHARACTER * _SMALL / FONT + 8
    every = 1 if len(ticks) < 2 or (ticks[1] - ticks[0]) * scale >= widest else 2
    for index, value in enumerate(ticks):
        x = left + value * scale
        body.append(_line(x, head, x, bottom, _FAINT))
        if index % every == 0:
            body.append(_text(x, bottom + 16, axis.tick(value), anchor="middle", size=_SMALL))
    body.append(_line(left, head, left, bottom, _INK))
    body.append(_text(left + plot / 2, bottom + 34, axis.label, anchor="middle", size=_SMALL))
    return body


def _svg(title: str, description: str, height: float, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {_n(height)}" role="img" '
        f'font-size="{FONT}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>" + "".join(body) + "</svg>"
    )


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: float = FONT, room: float | None = None,
    style: str = "normal", weight: str = "normal",
) -> str:  # fmt: skip
    shown = text if room is None else fitted(text, room, size)
    bold = f' font-weight="{weight}"' if weight != "normal" else ""
    tip = f"<title>{escape(text)}</title>" if shown != text else ""
    return (
        f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}" font-size="{_n(size)}" font-style="{style}" '
        f'fill="{_INK}"{bold}>{escape(shown)}{tip}</text>'
    )


def _plate(x: float, y: float, width: float, height: float) -> str:
    """White behind a text that stands on grid lines."""
    return f'<path d="M{_n(x)} {_n(y)} h{_n(width)} v{_n(height)} h-{_n(width)} z" fill="#ffffff"/>'


def _line(
    x1: float, y1: float, x2: float, y2: float, colour: str, *, width: float = 1, dash: str = ""
) -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}" stroke="{colour}" '
        f'stroke-width="{_n(width)}"{dashes}/>'
    )


def _n(value: float) -> str:
    """A coordinate without a tail of digits, the same on every machine."""
    return f"{value:.1f}".rstrip("0").rstrip(".")
