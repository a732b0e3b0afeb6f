"""Markdown tables of what `projector_quality.py` measured."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean, median

SHARES = (0.25, 0.5, 0.75)
"""d by the smaller side of a matrix."""
BATCHES = 8
"""Calibration batches where there are several."""

Row = dict[str, float | str | int | None]
Found = dict[str, list[Row]]

BIASES = ("own", "bias_other", "bias_after_200")
COSINES = ("cosine_other", "cosine_other_mean", "cosine_after_200")


def tables(found: Found) -> str:
    """Means over the stages: bias and cosine by d, cost at d = n/2, other ways to make blocks, and Adam."""
    on = "other batches / mean of 8 others / after 200 steps"
    parts = [
        f"### {found['stages'][0]['source']}",
        "Bias on its own calibration / other batches / after 200 steps:",
        *_by_size(found["rows"], BIASES),
        f"Cosine on {on}:",
        *_by_size(found["rows"], COSINES),
        "Cost at d = n/2, all matrices: projecting 1024 rows on both sides, making, storing in bf16:",
        *_costs(found["rows"]),
        f"Blocks at d = n/2 made otherwise, cosine on {on}:",
        *_variants(found["variants"]),
        "Adam on cores, cosine with full Adam's direction / with its first moment:",
        *_adam(found["adam"]),
    ]
    return "\n\n".join(parts) + "\n"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _kinds(rows: list[Row], d_share: float | None) -> Iterator[tuple[tuple[str, str, str], list[Row]]]:
    """Kind, batches and r as shown, with the rows of that d, or of all."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if d_share is None or row["d_share"] == d_share:
            key = str(row["kind"]), str(row["calibration"]), str(row["r"] or "d")
            groups.setdefault(key, []).append(row)
    yield from groups.items()


def _by_size(rows: list[Row], cells: tuple[str, ...]) -> Iterator[str]:
    lines = []
    for key, same in _kinds(rows, None):
        shown = [_cells([row for row in same if row["d_share"] == d], cells) for d in SHARES]
        lines.append((*key, *shown))
    yield table(("kind", "batches", "r", *(f"d = {d:g} n" for d in SHARES)), lines)


def _costs(rows: list[Row]) -> Iterator[str]:
    lines = []
    for key, same in _kinds([row for row in rows if "make_s" in row], 0.5):
        project, made, held = (
            median(_number(row[name]) for row in same) for name in ("project_s", "make_s", "storage_bytes")
        )
        lines.append((*key, f"{1e3 * project:.0f} ms", f"{made:.2f} s", f"{held / 1e3:.0f} kB"))
    yield table(("kind", "batches", "r", "project", "make", "store"), lines)


def _variants(rows: list[Row]) -> Iterator[str]:
    widths = dict.fromkeys(row["r"] for row in rows)
    groups: dict[tuple[str, str | float | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((str(row["name"]), row["r"]), []).append(row)
    lines = [
        (name, *(_cells(groups[name, r], COSINES) for r in widths))
        for name in dict.fromkeys(name for name, _ in groups)
    ]
    yield table(("made", *(f"r = {r}" for r in widths)), lines)


def _adam(rows: list[Row]) -> Iterator[str]:
    lines = []
    for name in dict.fromkeys(str(row["name"]) for row in rows):
        same = [row for row in rows if row["name"] == name]
        ats = [_cells(same, (f"{at}_with_adam", f"{at}_with_moment")) for at in ("first", "tenth", "last")]
        lines.append((name, *ats))
    yield table(("projectors", "step 1", "step 10", "step 50"), lines)


def _cells(rows: list[Row], cells: tuple[str, ...]) -> str:
    if not rows:
        return "not measured"
    return " / ".join(f"{fmean(_number(row[_field(row, cell)]) for row in rows):.2f}" for cell in cells)


def _field(row: Row, cell: str) -> str:
    """`own` is the bias on what the projector was made from."""
    if cell != "own":
        return cell
    return "bias_sum" if row["calibration"] == str(BATCHES) else "bias_calibration"


def _number(value: float | str | int | None) -> float:
    assert isinstance(value, float | int)
    return value
