"""Criteria as tables: what is asked, measured and predicted, how it was judged, and why it is asked. Pure."""

from __future__ import annotations

from harness.records.columns import Column
from harness.records.memory_limits import reserves_known
from profiles.language import enumerated, quantity, translated
from reports.decide import JudgedCriterion, Verdict, asked, measured_value
from reports.format import (
    Table,
    metric_value,
    range_told,
)
from reports.measured.measurements import (
    Measurements,
)
from reports.messages import say


def criteria_cells(
    verdict: Verdict, all_: Measurements
) -> tuple[tuple[JudgedCriterion, tuple[str, ...]], ...]:
    """Each criterion with its cells: name, asked, measured, predicted, outcome, runs."""
    return tuple((row, tuple(quantity(cell) for cell in _criterion_cells(row, all_))) for row in verdict.rows)


def _criterion_cells(row: JudgedCriterion, all_: Measurements) -> tuple[str, ...]:
    measured = measured_value(row)
    if (
        row.runs != 2
        and row.measured_low is not None
        and row.measured_high is not None
        and row.measured_low < row.measured_high
    ):
        low, high = metric_value(row.metric, row.measured_low), metric_value(row.metric, row.measured_high)
        if low != high:
            measured = say(
                "table.with_range", value=measured, range=range_told(low, high, over_steps=row.over_steps)
            )
    expected = say("table.not_predicted")
    if row.predicted is not None:
        expected = metric_value(row.metric, row.predicted)
    if row.metric in ("gpu_memory_share", "gpu_memory_gib"):
        if row.measured is not None:
            taken = "reserved" if reserves_known(all_.of(row.engine).ok) else "tensors"
            measured = say(f"table.{taken}", value=measured)
        if row.predicted is not None:
            expected = say("table.tensors", value=expected)
    what = say(
        "table.criterion", metric=say(f"metric.{row.metric}"), engine=row.engine, id=row.id, level=row.level
    )
    return (
        what,
        asked(row),
        measured,
        expected,
        say(f"outcome.{row.outcome.replace(' ', '_')}"),
        enumerated(row.evidence) or say("tile.none"),
    )


WHY: tuple[Column[JudgedCriterion], ...] = (
    Column("criterion", lambda row: row.id),
    Column("why", lambda row: translated(row.why)),
    Column("evidence", lambda row: enumerated(row.evidence) or say("tile.none")),
)


def why_table(verdict: Verdict) -> Table | None:
    """Why each criterion is asked, and the runs that it was judged on."""
    return Table.of(WHY, verdict.rows) if verdict.rows else None
