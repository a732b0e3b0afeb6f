from __future__ import annotations

from harness.records.columns import BYTES, SECONDS, TEXT, Column, optional, table_cells

Row = tuple[str, float | None]

COLUMNS: tuple[Column[Row], ...] = (
    Column("name", lambda row: row[0]),
    Column("time", lambda row: row[1], SECONDS),
    Column("why", lambda row: row[1], SECONDS, missing=lambda row: f"{row[0]} has none"),
    Column("memory", lambda row: "shared" if row[1] is None else 2**30 * row[1], BYTES),
    optional("half", lambda row: None if row[1] is None else row[1] / 2, SECONDS, note="halved"),
)


def test_numbers_have_their_unit_text_is_as_it_is_and_nothing_is_said() -> None:
    columns, cells = table_cells(COLUMNS, [("a", 2.0), ("b", None)])
    assert cells == (
        ("a", "2.00 s", "2.00 s", "2.00 GiB", "1.00 s"),
        ("b", "not measured", "b has none", "shared", "not measured"),
    )
    assert [column.unit.is_numeric for column in columns] == [False, True, True, True, True]
    assert [column.note for column in columns if column.note] == ["halved"]


def test_an_optional_column_is_left_out_where_no_row_has_anything() -> None:
    columns, cells = table_cells(COLUMNS, [("b", None)])
    assert [column.key for column in columns] == ["name", "time", "why", "memory"]
    assert len(cells[0]) == 4


def test_a_number_without_a_unit_is_written_plainly() -> None:
    assert Column[int]("round", lambda row: row, TEXT).cell(3) == "3"
