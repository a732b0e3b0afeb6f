from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.charts.axes import (
    Axis,
    bar_scale,
    bytes_axis,
    log_ticks,
    nice_range,
    nice_ticks,
    seconds_axis,
)
from reports.charts.bars import BarGroup, BarPart, BarRow, bars, grouped_bars
from reports.charts.lines import LevelLine, Line, lines, thinned
from reports.charts.marks import FONT, WIDTH, fitted

HOSTILE = "<script>alert(\"1\")</script> & 'more'"
amounts = st.floats(min_value=1e-9, max_value=1e15)
rows = st.lists(
    st.builds(
        lambda label, value, factor, predicted, text: BarRow(
            label=label, engine="lsp", parts=(BarPart(value=value * factor, pale=True), BarPart(value=value)),
            low=value, high=value * factor, predicted=predicted, text=text, missing=label,
        ),
        st.text(min_size=1, max_size=40), amounts, st.floats(1, 3), st.none() | amounts, st.text(max_size=40),
    ),
    min_size=1, max_size=7,
)  # fmt: skip


def boxes(root: ElementTree.Element) -> list[tuple[float, float, float, float, str]]:
    """(left, top, right, bottom, text) of every drawn text, by a width that real fonts do not reach."""
    found = []
    for node in root.iter("text"):
        shown = node.text or ""
        size, x, y = (float(node.attrib[key]) for key in ("font-size", "x", "y"))
        width = 0.6 * size * len(shown)
        left = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[node.attrib["text-anchor"]]
        found.append((left, y - 0.8 * size, left + width, y + 0.2 * size, shown))
    return found


def check_layout(svg: str) -> ElementTree.Element:
    """Nothing is drawn outside, and no two texts overlap."""
    root = ElementTree.fromstring(svg)
    _, _, width, height = (float(part) for part in root.attrib["viewBox"].split())
    assert width == WIDTH
    assert root[0].tag == "title"
    assert root[1].tag == "desc"
    for rect in root.iter("rect"):
        assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= WIDTH
    texts = boxes(root)
    for left, top, right, bottom, text in texts:
        assert left >= -1, text
        assert right <= width + 1, text
        assert top >= -1, text
        assert bottom <= height + 1, text
    for i, a in enumerate(texts):
        for b in texts[i + 1 :]:
            apart = a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 1 or b[3] <= a[1] + 1
            assert apart, (a[4], b[4])
    return root


@given(rows, st.none() | amounts)
def test_bars_stay_inside_and_apart(rows: list[BarRow], limit: float | None) -> None:
    # Control characters cannot stand in XML; the report's own texts come from JSON and are cleaned there.
    rows = [
        BarRow(
            label=re.sub(r"[^ -~]", "?", row.label), engine=row.engine, parts=row.parts, low=row.low,
            high=row.high, predicted=row.predicted, text=re.sub(r"[^ -~]", "?", row.text),
        )
        for row in rows
    ]  # fmt: skip
    svg = bars(
        "Title", "What it shows", rows, lambda top: bytes_axis("Memory", top),
        None if limit is None else (limit, "limit 24.0 GiB"),
    )  # fmt: skip
    root = check_layout(svg)
    assert len(list(root.iter("rect"))) == 2 * len(rows)


groups = st.lists(
    st.builds(
        lambda label, text, values, whole, floor, alone: BarGroup(
            label=label, text=text, whole=whole, floor=floor, alone=alone,
            rows=tuple(
                BarRow(
                    label="copies to GPU", engine="zo2", parts=(BarPart(value=value, pale=i == 1),), text="9"
                )
                for i, value in enumerate(values)
            ),
        ),
        st.text("abc-", min_size=1, max_size=40), st.text("abc ;%", max_size=200),
        st.lists(amounts, min_size=1, max_size=6),
        *[st.none() | amounts] * 3,
    ),
    min_size=1, max_size=5,
)  # fmt: skip


@given(groups)
def test_groups_stay_inside_and_apart(groups: list[BarGroup]) -> None:
    svg = grouped_bars("Title", "What it shows", groups, lambda top: seconds_axis("Time", top))
    root = check_layout(svg)
    assert len(list(root.iter("rect"))) == sum(len(group.rows) for group in groups)
    for line in root.iter("line"):
        assert 0 <= float(line.attrib["x2"]) <= WIDTH


def test_a_floor_is_drawn_in_its_own_group_only() -> None:
    def line_of(floor: float | None) -> list[tuple[float, float]]:
        row = BarRow(label="compute", engine="zo2", parts=(BarPart(value=1.0),))
        groups = [
            BarGroup(label="zo2", text="", rows=(row, row), whole=2.0),
            BarGroup(label="lsp", text="", rows=(row,), floor=floor),
        ]
        root = ElementTree.fromstring(grouped_bars("t", "d", groups, lambda top: seconds_axis("s", top)))
        found = [line for line in root.iter("line") if "stroke-dasharray" in line.attrib]
        return [(float(line.attrib["y1"]), float(line.attrib["y2"])) for line in found]

    assert line_of(None) == []
    ((top, bottom),) = line_of(1.5)
    assert bottom > top > 4 + 2 * 19


@given(
    st.lists(
        st.lists(st.tuples(st.floats(1e-6, 1e5), st.floats(0, 1e4)), min_size=1, max_size=9),
        min_size=1,
        max_size=6,
    )
)
def test_lines_stay_inside_and_apart(series: list[list[tuple[float, float]]]) -> None:
    named = [
        Line(label=f"torchao-offload{i}", engine="zo2", points=tuple(one)) for i, one in enumerate(series)
    ]
    svg = lines("Title", "What it shows", named, lambda top: seconds_axis("Time", top), Axis(name="Loss"))
    root = check_layout(svg)
    _, _, _, height = (float(part) for part in root.attrib["viewBox"].split())
    for line in root.iter("polyline"):
        for point in line.attrib["points"].split():
            x, y = (float(part) for part in point.split(","))
            assert 0 <= x <= WIDTH
            assert 0 <= y <= height


def test_lines_of_one_label_are_thin_and_stand_in_the_legend_once() -> None:
    runs = [Line(label="lsp", engine="lsp", points=((1.0, float(i)),)) for i in (1, 2, 3)]
    once = Line(label="zo2", engine="zo2", points=((1.0, 1.0), (2.0, 2.0)))
    root = ElementTree.fromstring(
        lines("t", "d", [*runs, once], lambda top: seconds_axis("s", top), Axis(name="Loss"))
    )
    assert [line.attrib["stroke-width"] for line in root.iter("polyline")] == ["1", "1", "1", "2"]
    assert [node.text for node in root.iter("text") if node.text in ("lsp", "zo2")] == ["lsp", "zo2"]


def test_text_is_escaped_and_stays_text() -> None:
    row = BarRow(label=HOSTILE, engine="x", parts=(BarPart(value=1.0),), text=HOSTILE)
    svg = bars(HOSTILE, HOSTILE, [row], lambda top: seconds_axis(HOSTILE, top), (1.2, HOSTILE))
    assert "<script" not in svg
    root = ElementTree.fromstring(svg)
    assert root[0].text == HOSTILE
    assert "http" not in svg
    # What had to be cut is whole in the tooltip.
    assert any(node.findtext("title") == HOSTILE for node in root.iter("text"))


def test_a_row_without_a_bar_says_why_beside_its_prediction() -> None:
    def label_x(predicted: float | None) -> float:
        rows = [
            BarRow(label="lsp", engine="lsp", parts=(BarPart(value=10.0),)),
            BarRow(label="mezo", engine="mezo", predicted=predicted, missing="1 crashed"),
        ]
        root = ElementTree.fromstring(bars("t", "d", rows, lambda top: seconds_axis("s", top)))
        return next(float(node.attrib["x"]) for node in root.iter("text") if node.text == "1 crashed")

    assert label_x(None) == label_x(9.0)
    assert label_x(2.0) > label_x(None)


def test_a_far_limit_is_left_out() -> None:
    rows = [BarRow(label="lsp", engine="lsp", parts=(BarPart(value=1.0),))]
    assert "limit" in bars("t", "d", rows, lambda top: bytes_axis("m", top), (11.9, "limit"))
    assert "limit" not in bars("t", "d", rows, lambda top: bytes_axis("m", top), (12.1, "limit"))


def test_a_row_that_would_hide_the_others_makes_the_axis_logarithmic() -> None:
    def drawn(*values: float) -> str:
        rows = [
            BarRow(label=f"m{i}", engine="lsp", parts=(BarPart(value=each),)) for i, each in enumerate(values)
        ]
        return bars("t", "d", rows, lambda top: seconds_axis("s", top))

    assert "(logarithmic)" not in drawn(1.0, 24.0)
    far = drawn(0.3, 1.0, 300.0)
    assert "s (min) (logarithmic)" in far
    root = check_layout(far)
    widths = [float(rect.attrib["width"]) for rect in root.iter("rect")]
    assert widths == sorted(widths)
    assert min(widths) > 0.1 * max(widths)  # each can be seen
    groups = [
        BarGroup(
            label="a",
            text="",
            rows=(BarRow(label="gpu", engine="lsp", parts=(BarPart(value=one),)),),
            whole=one,
        )
        for one in (1.0, 100.0)
    ]
    assert "(logarithmic)" in grouped_bars("t", "d", groups, lambda top: seconds_axis("s", top))


@given(st.lists(amounts, min_size=2, max_size=6))
def test_a_scale_keeps_the_order_and_stays_on_the_axis(values: list[float]) -> None:
    scale = bar_scale(values, values, lambda top: seconds_axis("s", top), 400.0)
    places = [scale.place(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(-1e-6 <= place <= 400.0 + 1e-6 for place in places)


@given(amounts, st.floats(1.0, 1e12))
def test_powers_of_ten_cover(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert ticks[0] < low
    assert ticks[-1] >= low * factor * (1 - 1e-9)
    assert 2 <= len(ticks) <= 10


def test_lines_are_told_apart_by_more_than_their_colour() -> None:
    """By dashes and by the symbols at their ends, of all methods that a default comparison runs."""
    names = ["native", "lora", "lsp", "mezo", "zo2", "exact-offload"]
    series = [
        Line(label=name, engine=name, points=((0.0, 1.0), (1.0, float(i)))) for i, name in enumerate(names)
    ]
    root = ElementTree.fromstring(
        lines(
            "t",
            "d",
            series,
            lambda top: seconds_axis("s", top),
            Axis(name="Loss"),
            [LevelLine(value=2.0, name="before")],
        )
    )
    dashes = [one.attrib["stroke-dasharray"] for one in root.iter("polyline")]
    assert len(set(dashes)) == len(names)
    assert "before" in [node.text for node in root.iter("text")]


@given(amounts)
def test_ticks_are_round_and_cover(top: float) -> None:
    ticks = nice_ticks(top)
    assert ticks[0] == 0
    assert ticks[-1] >= top * (1 - 1e-9)
    assert 2 <= len(ticks) <= 7


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_ranges_cover(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    ticks = nice_range(low, high)
    assert 2 <= len(ticks) <= 8
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack


@pytest.mark.parametrize(
    ("axis", "top", "unit", "tick"),
    [
        (seconds_axis, 0.5, "ms", "250"),
        (seconds_axis, 3.0, "s", "0.25"),
        (seconds_axis, 100.0, "s", "0.25"),
        (seconds_axis, 600.0, "min", None),
        (seconds_axis, 9000.0, "h", None),
        (seconds_axis, 2e-5, "us", None),
        (bytes_axis, 3 * 2**30, "GiB", None),
        (bytes_axis, 100.0, "B", None),
    ],
)
def test_units_of_axes(axis: object, top: float, unit: str, tick: str | None) -> None:
    found = axis("x", top)  # type: ignore[operator]
    assert found.unit == unit
    assert found.label == f"x ({unit})"
    if tick is not None:
        assert found.tick(0.25) == tick


def test_thinning_keeps_the_ends() -> None:
    points = [(float(i), 0.0) for i in range(5001)]
    kept = thinned(points)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert 200 <= len(kept) <= 242
    assert thinned(points[:3]) == points[:3]


def test_fitted_text() -> None:
    assert fitted("short", 200) == "short"
    cut = fitted("x" * 100, 100)
    assert cut.endswith("\u2026")
    assert len(cut) * 0.6 * FONT <= 100
