"""Markdown tables of what `lsp_quality.py` measured."""

from __future__ import annotations

import math
from statistics import fmean, median
from typing import Any

from projector_tables import table

Row = dict[str, Any]
"""A run: source, method, learning_rate, seed, timed, end, and its curve over steps."""

ACCURACY_POINTS = 0.5
PERPLEXITY_SHARE = 0.03
"""What a method may lose against native and still count as equally good."""


def best_rate(rows: list[Row], source: str, method: str) -> float | None:
    """The learning rate whose run with the first seed ends best; `None` if all diverged."""
    same = [row for row in runs(rows, source, method) if row["seed"] == 0 and final(row) is not None]
    best = max(same, key=lambda row: _goodness(row, judges_accuracy(source)), default=None)
    return None if best is None else float(best["learning_rate"])


def judges_accuracy(source: str) -> bool:
    """Classes are judged by accuracy, texts by perplexity."""
    return "SST-2" in source


def runs(rows: list[Row], source: str, method: str, *, timed: bool = False) -> list[Row]:
    return [
        row for row in rows
        if row["source"] == source and row["method"] == method and bool(row["timed"]) == timed
    ]  # fmt: skip


def final(row: Row) -> dict[str, Any] | None:
    """The last point of a run that went to its end with a finite loss."""
    last: dict[str, Any] = row["curve"][-1]
    return last if row["end"] == "ok" and last["loss"] is not None else None


def _goodness(row: Row, by_accuracy: bool) -> tuple[float, float]:
    last = final(row)
    assert last is not None
    return (last["accuracy"], -last["loss"]) if by_accuracy else (-last["loss"], 0.0)


def tables(found: dict[str, Any]) -> str:
    """Per source: how each method ends, its loss against steps, and against the clock."""
    rows: list[Row] = found["rows"]
    parts = []
    for source in dict.fromkeys(row["source"] for row in rows):
        methods = list(dict.fromkeys(row["method"] for row in rows if row["source"] == source))
        chosen = {method: _chosen(rows, source, method) for method in methods}
        chosen = {method: same for method, same in chosen.items() if same}
        parts += [f"### {source}", _ends(source, chosen), "Held-out loss against steps, means over seeds:"]
        parts += [_curves(chosen, lambda row, index: float(row["curve"][index]["loss"]), fmean, ".3f", "")]
        alone = {method: runs(rows, source, method, timed=True) for method in methods}
        alone = {method: same for method, same in alone.items() if same and final(same[0]) is not None}
        if alone:
            parts += [
                "Seconds of training up to those steps, one run at a time, and the held-out loss then:",
                _curves(
                    alone, lambda row, index: float(row["curve"][index]["trained_s"]), median, ".1f", " s"
                ),
            ]
    return "\n\n".join(parts) + "\n"


def _chosen(rows: list[Row], source: str, method: str) -> list[Row]:
    rate = best_rate(rows, source, method)
    same = [row for row in runs(rows, source, method) if row["learning_rate"] == rate]
    return [row for row in same if final(row) is not None]


def quality(source: str, same: list[Row]) -> float:
    """Mean over seeds: accuracy in percent, or perplexity."""
    lasts = [last for row in same if (last := final(row)) is not None]
    if judges_accuracy(source):
        return 100 * fmean(last["accuracy"] for last in lasts)
    return fmean(math.exp(last["loss"]) for last in lasts)


def is_as_good(source: str, mine: float, native: float) -> bool:
    if judges_accuracy(source):
        return mine >= native - ACCURACY_POINTS
    return mine <= native * (1 + PERPLEXITY_SHARE)


def _ends(source: str, chosen: dict[str, list[Row]]) -> str:
    by_accuracy = judges_accuracy(source)
    native = quality(source, chosen["native"]) if "native" in chosen else None
    lines = []
    for method, same in chosen.items():
        mine = quality(source, same)
        singles = [quality(source, [row]) for row in same]
        digits = 1 if by_accuracy else 3
        against = "not measured"
        if native is not None:
            change = f"{mine - native:+.1f} points" if by_accuracy else f"{100 * (mine / native - 1):+.1f} %"
            against = f"{change}, {'as good' if is_as_good(source, mine, native) else 'worse'}"
        lines.append(
            (
                method,
                f"{same[0]['learning_rate']:g}",
                f"{mine:.{digits}f} ({min(singles):.{digits}f} to {max(singles):.{digits}f})",
                f"{fmean(row['curve'][-1]['loss'] for row in same):.4f}",
                against if method != "native" else "the baseline",
                str(len(same)),
            )
        )
    judged = "accuracy, %" if by_accuracy else "perplexity of bytes"
    return table(("method", "learning rate", judged, "loss", "against native", "seeds"), lines)


def _curves(chosen: dict[str, list[Row]], value: Any, over: Any, form: str, unit: str) -> str:
    """A column for each judged step. With a unit, the mean loss stands behind the value."""
    steps = [point["step"] for point in next(iter(chosen.values()))[0]["curve"]]
    lines = []
    for method, same in chosen.items():
        cells = []
        for index in range(len(steps)):
            cell = f"{over([value(row, index) for row in same]):{form}}{unit}"
            if unit:
                cell += f", {fmean(row['curve'][index]['loss'] for row in same):.3f}"
            cells.append(cell)
        lines.append((method, *cells))
    return table(("method", *(f"step {step}" for step in steps)), lines)
