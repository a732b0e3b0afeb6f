"""The tables of a report by themselves; how they are printed is tested with the whole of it."""

from __future__ import annotations

from typing import Any

import pytest

from harness.records.columns import SECONDS, Column, optional
from reports import index, provenance
from reports.findings import breakdown
from reports.findings.breakdown import busy_table, overlap_table
from reports.format import Table
from reports.measured.measurements import Measurements, group
from reports.messages import messages
from reports.tables import machine
from reports.tables.methods import MEMORY, SPEED, memory_table, speed_table
from reports.tables.predictions import PREDICTION
from run_records import cpu_runs, make_breakdown, make_run, make_sweep


def measured(runs: list[Any]) -> Measurements:
    return group(runs, None)


def row_of(table: Table | None, method: str) -> dict[str, str]:
    """Cells of a method by their headings."""
    assert table is not None
    (row,) = (row for row in table.rows if row[0] == method)
    return dict(zip(table.columns, row, strict=True))


@pytest.mark.parametrize(
    ("section", "columns"),
    [
        ("column", SPEED),
        ("column", MEMORY),
        ("column", PREDICTION),
        ("column", breakdown.BUSY),
        ("column", breakdown.OVERLAP),
        ("column", machine.MACHINE),
        ("column", provenance.FAILURES),
        ("index", index.METHODS),
        ("index", index.GENERATIONS),
    ],
)
def test_every_column_has_a_heading(section: str, columns: tuple[Column[Any], ...]) -> None:
    keys = [column.key for column in columns]
    assert len(set(keys)) == len(keys)
    assert [key for key in keys if f"{section}.{key}" not in messages()] == []
    notes = [column.note for column in columns if column.note]
    assert [note for note in notes if f"tablenote.{note}" not in messages()] == []


def test_notes_of_columns_come_after_those_of_the_table() -> None:
    columns: tuple[Column[float], ...] = (
        Column("method", lambda row: "zo2"),
        optional("floor", lambda row: row, SECONDS, note="floor"),
    )
    table = Table.of(columns, [2.0], "First.")
    assert table.numeric == (1,)
    assert table.rows == (("zo2", "2.00 s"),)
    assert table.note == f"First. {messages()['tablenote.floor']}"


def test_a_method_without_a_step_has_no_numbers() -> None:
    failed = row_of(speed_table(measured(make_sweep())), "mezo")
    cells = list(failed.values())
    assert cells[:2] == ["mezo", "1 out of GPU memory, 1 not run, predicted not to fit"]
    assert set(cells[2:]) == {"-"}


def test_accuracy_is_a_column_where_any_method_was_evaluated() -> None:
    evaluated = speed_table(measured(cpu_runs()))
    assert "Held-out accuracy; loss" in evaluated.columns
    assert "Held-out accuracy; loss" not in speed_table(measured(make_sweep())).columns


def test_peaks_are_those_of_the_largest_run_and_copies_are_typical() -> None:
    runs = [
        make_run(round=i, peak_host_bytes=i * 2**30, h2d_bytes=i * 2**20, d2h_bytes=None) for i in (1, 2, 3)
    ]
    table = memory_table(measured([*runs, make_run("lsp")]))
    cells = row_of(table, "zo2")
    assert (cells["Host"], cells["To GPU per step"]) == ("3.00 GiB", "2.00 MiB")
    assert cells["To host per step"] == "-"
    assert "A dash: not measured." in table.note
    alone = memory_table(measured(runs))
    assert "To host per step" not in alone.columns
    assert alone.note.endswith("Measured in no run, so not shown: To host per step.")


def test_compute_with_noise_in_it_says_so_and_first_order_methods_make_none() -> None:
    all_ = measured([*make_breakdown()])
    assert "noise" in row_of(busy_table(all_), "mezo")["GPU compute"]
    assert row_of(busy_table(all_), "zo2")["GPU compute"] == "375 ms"
    assert row_of(busy_table(all_), "native")["GPU noise"] == messages()["busy.no_noise"]


def test_what_hid_behind_others_is_the_rest_of_what_was_exposed() -> None:
    """Never less than none: medians, and work that was not counted as busy, may exceed it."""
    runs = [make_run(h2d_s=0.5, h2d_exposed_s=0.125, d2h_s=0.25, d2h_exposed_s=0.5)]
    table = overlap_table(measured(runs))
    assert table is not None
    by_resource = {row[1]: row[2:] for row in table.rows}
    assert by_resource[messages()["resource.h2d"]] == ("500 ms", "375 ms", "125 ms")
    assert by_resource[messages()["resource.d2h"]] == ("250 ms", "0.00 s", "250 ms")
    assert overlap_table(measured([make_run()])) is None
