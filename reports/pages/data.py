"""A report for programs: its verdict and tables as JSON with a schema, and each table as a file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engines.errors import UserError
from engines.files.writing import write_whole
from harness.records.columns import CellValue
from harness.records.run import Run
from profiles.documents import adapter
from reports.decide import Verdict
from reports.pages.document import Document

TableFormat = Literal["csv", "parquet"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataTable:
    """A table of a report for programs: numbers in the units that the names of their columns end in, of two
    runs what lies between both."""

    key: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[CellValue, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportData:
    """A report for programs: the verdict and every table."""

    verdict: Verdict
    tables: tuple[DataTable, ...]
    schema_version: int = 1


RUN_FIELDS: tuple[tuple[str, Callable[[Run], CellValue]], ...] = (
    ("id", lambda run: run.id),
    ("method", lambda run: run.engine),
    ("round", lambda run: run.round),
    ("end_state", lambda run: run.end_state),
    ("time", lambda run: run.time),
    ("emulated", lambda run: run.environment.emulated),
    *(
        (name, lambda run, name=name: getattr(run.summary, name))
        for name in (
            "step_s_median", "step_s_p10", "step_s_p90", "tokens_per_s", "peak_gpu_allocated_bytes",
            "peak_gpu_reserved_bytes", "peak_gpu_nvml_bytes", "peak_host_bytes", "pinned_bytes", "h2d_bytes",
            "d2h_bytes", "energy_j", "loss_first", "loss_last", "eval_loss_first", "eval_loss_last",
            "eval_accuracy_first", "eval_accuracy_last", "eval_examples", "eval_majority_class", "setup_s",
            "floor_share",
        )
    ),
)  # fmt: skip
"""Of each run, as its record has it."""


def table_of_runs(runs: Sequence[Run]) -> DataTable:
    """A row of each run. A cell of `None` was not measured."""
    return DataTable(
        key="runs",
        title="Runs",
        columns=tuple(name for name, _ in RUN_FIELDS),
        rows=tuple(tuple(_plain(of(run)) for _, of in RUN_FIELDS) for run in runs),
    )


def data_of(verdict: Verdict, document: Document, more: Sequence[DataTable]) -> ReportData:
    """The verdict, the tables of `document`, and `more`. A cell of `None` was not measured."""
    return ReportData(
        verdict=verdict,
        tables=(
            *(
                DataTable(
                    key=one.key,
                    title=one.title,
                    columns=one.table.keys,
                    rows=tuple(tuple(_plain(value) for value in row) for row in one.table.values),
                )
                for one in document.sheets
            ),
            *more,
        ),
    )


def report_schema() -> dict[str, Any]:
    """JSON Schema of report.json."""
    found: dict[str, Any] = adapter(ReportData).json_schema(mode="serialization")
    return found


def write_tables(data: ReportData, folder: Path, kind: TableFormat) -> tuple[Path, ...]:
    """Every table as a file of its own in `folder`, by its key. Returns the paths.

    Raises `UserError` where Parquet is asked for and what writes it is not installed, or where `folder`
    cannot be written.
    """
    if kind == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            "--format parquet", "needs pyarrow, which is not installed", "pip install pyarrow, or take csv"
        )
    import pandas as pd

    paths = []
    for table in data.tables:
        rows = [[_safe(value) for value in row] for row in table.rows]
        frame = pd.DataFrame(rows, columns=list(table.columns))
        path = folder / f"{table.key}.{kind}"
        if kind == "csv":
            content = frame.to_csv(index=False).encode("utf-8")
        else:
            text = [
                name
                for name, values in zip(table.columns, zip(*rows, strict=True), strict=False)
                if any(isinstance(value, str) for value in values)
            ]
            content = frame.astype(dict.fromkeys(text, "string")).to_parquet(index=False)
        write_whole(path, content)
        paths.append(path)
    return tuple(paths)


def _plain(value: CellValue) -> CellValue:
    """A whole number is a number like others, and so is one that is shown in words."""
    return value if value is None or isinstance(value, str) else float(value)


def _safe(value: CellValue) -> CellValue:
    """Text that a spreadsheet would take for a formula is marked as text."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
