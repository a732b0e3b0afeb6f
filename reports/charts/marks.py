"""What charts are drawn of: text, lines, symbols, colours. Pure; drawn text stays text.

Widths of text are estimated from the length, generously, because an SVG cannot ask the font.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from engines import public_engines
from reports.charts.axes import Scale

WIDTH = 720
"""Units across; the page scales it."""
FONT = 13
SMALL = 11.5
CHARACTER = 0.6 * FONT
"""Estimated width of a character; wider than that of common sans-serif fonts."""
INK, FAINT, PREDICTED = "#1a1a1a", "#d9d9d9", "#D55E00"

# Okabe & Ito's palette, told apart by the colour-blind, and darkened where thin lines on white need it.
COLOURS = ("#000000", "#B36B00", "#0072B2", "#9A4C7F", "#007A5A", "#7A4A2B", "#4B4FA0", "#6B6B00")
_OTHER_COLOUR = "#5A5A5A"
_DASHES = ("", "7 3", "2 3", "10 3 2 3", "12 4", "4 2", "1 2", "14 3 2 3 2 3")
"""Of lines; as the colours, in the order of the table of engines."""
_OTHER_DASHES = "4 4"
SYMBOLS = ("circle", "square", "triangle", "diamond", "cross", "bar")
"""At the ends of lines, by the order of the lines: what tells them apart in grey."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stroke:
    colour: str
    dashes: str


def stroke_of(engine: str, nth: int = 0) -> Stroke:
    """By the engine's row; those behind the palette share one of each. Several lines of one engine, by `nth`,
    have its colour and dashes of their own."""
    known = public_engines()[: len(COLOURS)]
    if engine not in known:
        return Stroke(colour=_OTHER_COLOUR, dashes=_OTHER_DASHES)
    return Stroke(
        colour=COLOURS[known.index(engine)], dashes=_DASHES[(known.index(engine) + nth) % len(_DASHES)]
    )


def x_axis(scale: Scale, left: float, head: float, bottom: float, note: str = "") -> list[str]:
    """Grid lines with their numbers (every second one where they would touch), and the axis' name."""
    body = []
    axis, places = scale.axis, [scale.place(value) for value in scale.ticks]
    widest = max(len(axis.tick(value)) for value in scale.ticks) * CHARACTER * SMALL / FONT + 8
    every = 1 if len(places) < 2 or places[1] - places[0] >= widest else 2
    for index, (value, place) in enumerate(zip(scale.ticks, places, strict=True)):
        x = left + place
        body.append(line(x, head, x, bottom, FAINT))
        if index % every == 0:
            body.append(text(x, bottom + 16, axis.tick(value), anchor="middle", size=SMALL))
    body.append(line(left, head, left, bottom, INK))
    label = f"{axis.label}{note}"
    body.append(
        text(left + scale.length / 2, bottom + 34, label, anchor="middle", size=SMALL, room=WIDTH - 20)
    )
    return body


def symbol(x: float, y: float, index: int, colour: str) -> str:
    """The mark of the line of that number."""
    match SYMBOLS[index % len(SYMBOLS)]:
        case "circle":
            return f'<circle cx="{short(x)}" cy="{short(y)}" r="3.5" fill="{colour}"/>'
        case "square":
            path = f"M{short(x - 3.2)} {short(y - 3.2)} h6.4 v6.4 h-6.4 z"
        case "triangle":
            path = f"M{short(x)} {short(y - 4.4)} l4.4 7.6 h-8.8 z"
        case "diamond":
            path = f"M{short(x)} {short(y - 4.6)} l4.6 4.6 l-4.6 4.6 l-4.6 -4.6 z"
        case "cross":
            arms = "h2.8 v-2.8 h2.4 v2.8 h2.8 v2.4 h-2.8 v2.8 h-2.4 v-2.8 h-2.8 z"
            path = f"M{short(x - 4)} {short(y - 1.2)} {arms}"
        case _:
            path = f"M{short(x - 1.4)} {short(y - 5)} h2.8 v10 h-2.8 z"
    return f'<path d="{path}" fill="{colour}"/>'


def svg(title: str, description: str, height: float, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {short(height)}" role="img" '
        f'font-size="{FONT}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>" + "".join(body) + "</svg>"
    )


def standalone(drawn: str) -> str:
    """A chart as a file of its own, on white: a dark page would swallow its ink."""
    start, _, rest = drawn.partition(">")
    return (
        start.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" ', 1)
        + f'><rect width="100%" height="100%" fill="#ffffff"/>{rest}\n'
    )


def text(
    x: float, y: float, told: str, *, anchor: str = "start", size: float = FONT, room: float | None = None,
    style: str = "normal", weight: str = "normal",
) -> str:  # fmt: skip
    shown = told if room is None else fitted(told, room, size)
    bold = f' font-weight="{weight}"' if weight != "normal" else ""
    tip = f"<title>{escape(told)}</title>" if shown != told else ""
    return (
        f'<text x="{short(x)}" y="{short(y)}" text-anchor="{anchor}" font-size="{short(size)}" '
        f'font-style="{style}" fill="{INK}"{bold}>{escape(shown)}{tip}</text>'
    )


def fitted(told: str, room: float, size: float = FONT) -> str:
    """`told`, cut with an ellipsis where it would be wider than `room`."""
    most = int(room / (CHARACTER * size / FONT))
    return told if len(told) <= most else told[: max(1, most - 1)] + "\u2026"


def plate(x: float, y: float, width: float, height: float) -> str:
    """White behind a text that stands on grid lines."""
    across, down = short(width), short(height)
    return f'<path d="M{short(x)} {short(y)} h{across} v{down} h-{across} z" fill="#ffffff"/>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str, *, width: float = 1, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{short(x1)}" y1="{short(y1)}" x2="{short(x2)}" y2="{short(y2)}" stroke="{colour}" '
        f'stroke-width="{short(width)}"{dashes}/>'
    )


def short(value: float) -> str:
    """A coordinate without a tail of digits, the same on every machine."""
    return f"{value:.1f}".rstrip("0").rstrip(".")
