"""Numbers and tables as a reader sees them. What is None is shown as 'not measured'."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from engines import EXTERNAL_PREFIX, is_external
from harness.records.columns import CellValue, Column, RowT, Told, Unit, table_cells
from harness.records.job import Job, ModelSource
from harness.records.stats import Spread
from profiles.language import enumerated, quantity
from profiles.units import NOT_MEASURED, format_bytes, format_seconds
from reports.criteria import Metric
from reports.messages import say

GIB = 2**30


def model_name(name: str) -> str:
    """A named shape or a hub id as it is; of a folder the last part, as its place means nothing elsewhere."""
    parts = name.rstrip("/").split("/")
    is_folder = len(parts) > 2 or parts[0] in ("", ".", "..", "~")
    return parts[-1] if is_folder else name


def job_in_short(job: Job) -> str:
    """Batch, length and precision, with the GPUs and the limit of memory where they were given."""
    micro_batches = f" x {job.accumulation}" if job.accumulation > 1 else ""
    text = say(
        "index.job_told",
        batch=job.batch_size,
        seq_len=job.seq_len,
        micro_batches=micro_batches,
        dtype=job.dtype,
    )
    if job.limits.gpus > 1:
        text = say("index.job_on_gpus", job=text, count=job.limits.gpus)
    if job.limits.vram_bytes is None:
        return text
    return say("index.job_capped", job=text, vram=format_bytes(job.limits.vram_bytes))


def model_title(source: ModelSource) -> str:
    """Its name, and how many of its blocks, if not all."""
    name = model_name(source.name)
    return name if source.layers is None else say("model.layers", model=name, count=source.layers)


def counted(what: str, count: int) -> str:
    """So many runs or steps: `what` is a key of the text's section `count`."""
    return say(f"count.{what}" if count == 1 else f"count.{what}s", count=count)


def digits(value: float, significant: int = 3) -> str:
    """`value` in that many significant digits, without an exponent where it can be read without."""
    if value != 0 and not 1e-4 <= abs(value) < 1e9:
        return f"{value:.{significant - 1}e}"
    text = f"{value:.{significant}g}"
    return f"{float(text):,.0f}" if "e" in text or abs(value) >= 10**significant else text


def number(value: float | None, significant: int = 3) -> str:
    return NOT_MEASURED if value is None else digits(value, significant)


def times(value: float | None) -> str:
    """A ratio, such as `2.10x`."""
    return NOT_MEASURED if value is None else f"{value:.2f}x" if value < 100 else f"{value:,.0f}x"


def percent(value: float | None) -> str:
    """A share of 1. More digits close to 0, so that little is not shown as none."""
    if value is None:
        return NOT_MEASURED
    return f"{100 * value:.0f} %" if value == 0 or abs(value) >= 0.1 else f"{100 * value:.2g} %"


def loss(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"


def joules(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{digits(value)} J"


def metric_value(metric: Metric, value: float | None) -> str:
    """`value` of `metric` with its unit."""
    if value is None:
        return NOT_MEASURED
    match metric:
        case "runs_ok" | "accuracy" | "gpu_memory_share" | "host_memory_share":
            return percent(value)
        case "step_s":
            return format_seconds(value)
        case "step_time_ratio" | "prediction_factor":
            return times(value)
        case "job_hours":
            return format_seconds(value * 3600)
        case "job_cost":
            return digits(value)
        case "heldout_ratio":
            return f"{value:.3f}x"
        case "tokens_per_s":
            return f"{digits(value)} /s"
        case "gpu_memory_gib" | "host_memory_gib":
            return format_bytes(value * GIB)
        case "loss_change" | "heldout_change":
            return f"{value:+.4f}" if value else "0"


def span(low: str, high: str) -> str:
    """A range of two shown numbers; a shared unit is written once."""
    return _two("show.range", low, high)


def minute(time: str) -> str:
    """`2026-11-21 10:11 UTC` of an ISO 8601 time in UTC; anything else as it is."""
    return f"{time[:10]} {time[11:16]} UTC" if len(time) >= 16 and time[10] == "T" else time


def range_told(low: str, high: str, *, over_steps: bool) -> str:
    """`1.20x to 1.90x over steps: one run`, or without what follows the numbers."""
    return say("compared.over_steps", range=span(low, high)) if over_steps else span(low, high)


def both(low: str, high: str) -> str:
    """Two shown numbers, between which nothing is known; a shared unit is written once."""
    return _two("show.both", low, high)


def _two(key: str, low: str, high: str) -> str:
    if low == high:
        return low
    low, high = quantity(low), quantity(high)
    low_number, _, low_unit = low.partition(" ")
    _, _, high_unit = high.partition(" ")
    return say(key, low=low_number if low_unit and low_unit == high_unit else low, high=high)


def middle(found: Spread | None, show: Callable[[float | None], str]) -> str:
    """The median of one value per run; of two runs both, as they have none."""
    if found is None:
        return show(None)
    return both(show(found.low), show(found.high)) if found.count == 2 else show(found.median)


def middle_cell(found: Spread | None, show: Callable[[float | None], str]) -> CellValue:
    """For a table: the median; of two runs, which have none, what lies between both, shown as both."""
    if found is None or found.count != 2:
        return None if found is None else found.median
    return Told(found.median, middle(found, show))


NUMBER = Unit(show=digits)
TIMES = Unit(show=times, suffix="_ratio")
PERCENT = Unit(show=percent, suffix="_share")
JOULES = Unit(show=joules, suffix="_j")
LOSS = Unit(show=loss)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table as Markdown and HTML print it."""

    columns: tuple[str, ...]
    """Headings."""
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[int, ...] = ()
    """Columns that are set to the right."""
    note: str = ""
    keys: tuple[str, ...] = ()
    """Of the columns, with the unit of their numbers, for programs: `step_s`, `host_bytes`."""
    values: tuple[tuple[CellValue, ...], ...] = ()
    """As measured, in those units; text as it is shown."""

    @classmethod
    def of(cls, columns: Sequence[Column[RowT]], rows: Sequence[RowT], *notes: str) -> Self:
        """`columns` over `rows`; below them `notes`, which are sentences, and those of the columns. A column
        that is empty for all rows is not there, and named below; what else is missing is a dash."""
        there, _ = table_cells(columns, rows)
        found = [[column.of(row) for column in there] for row in rows]
        empty = {
            place
            for place, column in enumerate(there)
            if place and rows and column.missing == NOT_MEASURED and all(row[place] is None for row in found)
        }
        kept = [place for place in range(len(there)) if place not in empty]
        here = [there[place] for place in kept]
        values = tuple(tuple(row[place] for place in kept) for row in found)
        cells = tuple(
            tuple(_cell(column, row, value) for column, value in zip(here, each, strict=True))
            for row, each in zip(rows, values, strict=True)
        )
        said = [*notes, *(say(f"tablenote.{column.note}") for column in here if column.note)]
        if any(say("show.nothing") in row for row in cells):
            said.append(say("tablenote.nothing"))
        if empty:
            names = enumerated(say(f"column.{there[place].key}") for place in sorted(empty))
            said.append(say("tablenote.empty", columns=names))
        return cls(
            columns=tuple(say(f"column.{column.key}") for column in here),
            rows=cells,
            numeric=tuple(index for index, column in enumerate(here) if column.unit.is_numeric),
            note=say("show.sentences").join(said),
            keys=tuple(f"{column.key}{column.unit.suffix}" for column in here),
            values=values,
        )


def _cell(column: Column[RowT], row: RowT, value: CellValue) -> str:
    if value is None and column.missing == NOT_MEASURED:
        return say("show.nothing")
    return quantity(column.cell(row))


def method_flags(engines: Sequence[str]) -> str:
    """The flags of `compare` that name these methods: another trainer's is its file, by the name it has."""
    ours = [engine for engine in engines if not is_external(engine)]
    named = [f"--engines {','.join(ours)}"] if ours else []
    files = (f"{engine.removeprefix(EXTERNAL_PREFIX)}.toml" for engine in engines if is_external(engine))
    return " ".join([*named, *(f"--external {shlex.quote(file)}" for file in files)])
