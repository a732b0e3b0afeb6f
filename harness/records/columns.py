"""A table as data: each column says what it takes of a row, in which unit, and what stands for nothing.

The same columns serve every printer: Markdown, HTML and the terminal. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from profiles.units import NOT_MEASURED, format_bytes, format_seconds

RowT = TypeVar("RowT")


class Told(float):
    """A number with the words that a person reads in its place, such as both values of two runs."""

    def __new__(cls, value: float, text: str) -> Self:
        made = super().__new__(cls, value)
        made.text = text
        return made

    text: str


CellValue = str | float | None
"""A number, shown in the column's unit; text, shown as it is; or nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """How the numbers of a column are written."""

    show: Callable[[float], str]
    is_numeric: bool = True
    """Set to the right, where a printer can."""
    suffix: str = ""
    """Of the column's name in files of data, with the underscore: `_s`, `_bytes`. Empty: numbers alone."""


TEXT = Unit(show=str, is_numeric=False)
SECONDS = Unit(show=format_seconds, suffix="_s")
BYTES = Unit(show=format_bytes, suffix="_bytes")


@dataclass(frozen=True)
class Column(Generic[RowT]):
    """One column of a table whose rows are of type `RowT`."""

    key: str
    """Names its heading: a key of the printer's texts, or the heading itself."""
    of: Callable[[RowT], CellValue]
    unit: Unit = TEXT
    missing: str | Callable[[RowT], str] = NOT_MEASURED
    """What is shown for nothing."""
    shown: Callable[[Sequence[RowT]], bool] = lambda rows: True
    """Whether a table of these rows has the column."""
    note: str = ""
    """Key of a sentence that belongs below a table with this column; empty: none."""

    def cell(self, row: RowT) -> str:
        """What is shown of `row`."""
        value = self.of(row)
        if isinstance(value, Told):
            return value.text
        if value is None:
            return self.missing if isinstance(self.missing, str) else self.missing(row)
        return value if isinstance(value, str) else self.unit.show(value)


def where_known(of: Callable[[RowT], CellValue]) -> Callable[[Sequence[RowT]], bool]:
    """For `Column.shown`: only where some row has something."""
    return lambda rows: any(of(row) is not None for row in rows)


def optional(key: str, of: Callable[[RowT], CellValue], unit: Unit, note: str = "") -> Column[RowT]:
    """A column that a table has only where some row has something to show in it."""
    return Column(key, of, unit, shown=where_known(of), note=note)


def table_cells(
    columns: Sequence[Column[RowT]], rows: Sequence[RowT]
) -> tuple[tuple[Column[RowT], ...], tuple[tuple[str, ...], ...]]:
    """The columns that a table of `rows` has, and its cells, row by row."""
    here = tuple(column for column in columns if column.shown(rows))
    return here, tuple(tuple(column.cell(row) for column in here) for row in rows)
