"""What a person sees in the terminal: tables on stdout, progress on stderr. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, fields
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from engines import ENGINES, load_engine
from engines.base import ModelShape
from engines.settings import SETTINGS
from harness.compare import Ended, Event, Planned, Started
from harness.job import Job
from harness.launch import Progress as SetUp
from harness.launch import Stepped
from harness.result import Run
from harness.shapes import NAMED_SHAPES, named_shape
from profiles.machine import Machine
from profiles.plan import Plan
from profiles.units import format_bytes, format_seconds

NOT_MEASURED = "not measured"


def format_parameters(count: int) -> str:
    """As people say it: 125.2 M, 13.02 B."""
    return f"{count / 1e9:,.2f} B" if count >= 1e9 else f"{count / 1e6:,.2f} M"


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console that is plain without a terminal."""
    out = Console(stderr=stderr, quiet=quiet, highlight=False)
    if not out.is_terminal:
        out.width = 160
    return out


class Progress:
    """A bar per kind of work, on stderr; one plain line per kind of work without a terminal."""

    def __init__(self, quiet: bool, silent: Collection[str] = ()) -> None:
        """`silent` kinds of work get a bar but no line."""
        self._silent = silent
        self._console = console(stderr=True, quiet=quiet)
        self._bars = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def print(self, line: str) -> None:
        """A line that stays, above the bars."""
        (self._bars.console if self._console.is_terminal else self._console).print(line)

    def update(self, what: str, done: int, total: int, note: str = "") -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, note=note)
            if not self._console.is_terminal and what not in self._silent:
                self._console.print(f"{what} ...")
        self._bars.update(self._tasks[what], completed=done, total=total, note=note)


def plans_table(shape: ModelShape, job: Job, machine: Machine, plans: Sequence[Plan]) -> Table:
    """Predictions and reasons per method."""
    title = (
        f"{shape.name} ({format_parameters(shape.parameters)} parameters), batch {job.batch_size} x "
        f"{job.seq_len} x {job.accumulation}, {job.dtype}, on {machine.name}: predicted"
    )
    table = Table(title=title, box=box.SIMPLE_HEAVY, title_justify="left")
    for heading in (
        "method",
        "fits",
        "s/step (low to high)",
        "GPU memory",
        "host memory",
        "limited by",
        "settings and reasons",
    ):
        table.add_column(heading, overflow="fold")
    for plan in plans:
        told = plan.prediction
        span = (told.step_s, told.step_s_low, told.step_s_high)
        middle, low, high = (format_seconds(value) if value is not None else "?" for value in span)
        step = f"{middle} ({low} to {high})" if told.step_s is not None else "not predicted"
        notes = [", ".join(f"{key}={value}" for key, value in plan.settings.items()), *plan.reasons]
        table.add_row(
            plan.engine,
            "yes" if plan.fits else f"no: {plan.why_not}",
            step,
            format_bytes(told.peak_gpu_bytes) if machine.gpu is not None else "no GPU",
            format_bytes(told.peak_host_bytes),
            told.bottleneck or "unknown",
            "\n".join(note for note in notes if note),
        )
    return table


def grid_table(cells: Sequence[Any]) -> Table:
    """What a sweep would run, in order."""
    table = Table(title="would run, in this order", box=box.SIMPLE_HEAVY, title_justify="left")
    for heading in ("id", "engine", "round", "settings"):
        table.add_column(heading, overflow="fold")
    for cell in cells:
        settings = ", ".join(f"{key}={value}" for key, value in cell.plan.settings.items())
        table.add_row(
            cell.id,
            cell.plan.engine,
            str(cell.round),
            settings if cell.plan.fits else f"no: {cell.plan.why_not}",
        )
    return table


def runs_table(runs: Sequence[Run]) -> Table:
    """What was measured, one row per run."""
    table = Table(title="measured", box=box.SIMPLE_HEAVY, title_justify="left")
    for heading in (
        "method",
        "round",
        "end",
        "s/step",
        "predicted",
        "tokens/s",
        "GPU memory",
        "host memory",
        "loss",
    ):
        table.add_column(heading, overflow="fold")
    for run in runs:
        seen = run.summary
        told = run.predicted.step_s if run.predicted is not None else None
        loss = (
            f"{seen.loss_first:.4g} to {seen.loss_last:.4g}"
            if seen.loss_first is not None and seen.loss_last is not None
            else NOT_MEASURED
        )
        table.add_row(
            run.engine,
            str(run.round),
            run.end_state if run.end_reason is None else f"{run.end_state}: {run.end_reason}",
            format_seconds(seen.step_s_median) if seen.step_s_median is not None else NOT_MEASURED,
            format_seconds(told) if told is not None else "not predicted",
            f"{seen.tokens_per_s:,.0f}" if seen.tokens_per_s is not None else NOT_MEASURED,
            format_bytes(seen.peak_gpu_allocated_bytes)
            if seen.peak_gpu_allocated_bytes is not None
            else NOT_MEASURED,
            format_bytes(seen.peak_host_bytes) if seen.peak_host_bytes is not None else NOT_MEASURED,
            loss,
        )
    return table


def engines_rows() -> list[dict[str, Any]]:
    """What there is, and what is not available here and why."""
    rows = []
    for name, entry in ENGINES.items():
        if name == "scripted":
            continue
        reason = load_engine(name).why_not_available()
        knobs = {field.name: field.default for field in fields(SETTINGS[name])}
        rows.append(
            {"name": name, **asdict(entry), "available": reason is None, "reason": reason, "settings": knobs}
        )
    return rows


def engines_json() -> str:
    return json.dumps(engines_rows(), indent=1) + "\n"


def engines_table() -> Table:
    table = Table(box=box.SIMPLE_HEAVY)
    for heading in ("engine", "what it does", "source", "here", "knobs for --set"):
        table.add_column(heading, overflow="fold")
    for row in engines_rows():
        table.add_row(
            row["name"],
            row["summary"],
            row["source"],
            "available" if row["available"] else f"not available: {row['reason']}",
            ", ".join(f"{key}={value}" for key, value in row["settings"].items()),
        )
    return table


def models_rows() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "family": shape.family,
            "parameters": shape.parameters,
            "blocks": shape.num_blocks,
            "hidden": shape.hidden,
            "max_seq_len": shape.max_seq_len,
            "tied": shape.tied,
        }
        for name in NAMED_SHAPES
        for shape in (named_shape(name),)
    ]


def models_json() -> str:
    return json.dumps(models_rows(), indent=1) + "\n"


def models_table() -> Table:
    table = Table(
        title="Named shapes: real sizes with seeded random weights, no download",
        box=box.SIMPLE_HEAVY,
        title_justify="left",
    )
    for heading in ("name", "family", "parameters", "blocks", "hidden", "longest sequence", "head tied"):
        table.add_column(heading, justify="left" if heading in ("name", "family") else "right")
    for row in models_rows():
        table.add_row(
            row["name"],
            row["family"],
            f"{row['parameters'] / 1e6:,.1f} M"
            if row["parameters"] < 1e9
            else f"{row['parameters'] / 1e9:,.2f} B",
            str(row["blocks"]),
            str(row["hidden"]),
            str(row["max_seq_len"]),
            "yes" if row["tied"] else "no",
        )
    return table


class CompareProgress:
    """A sweep as it happens: one bar for its runs, one for the steps of the current run, a line per end."""

    def __init__(self, quiet: bool) -> None:
        self._notes = console(stderr=True, quiet=quiet)
        self._progress = Progress(quiet, silent=("runs", "steps"))

    def __enter__(self) -> CompareProgress:
        self._progress.__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        self._progress.__exit__(*args)

    def update(self, event: Event) -> None:
        match event:
            case Planned():
                self._planned(event)
            case Started():
                self._progress.update("runs", event.index, event.total, note=event.cell.id)
            case SetUp():
                self._progress.update(event.what, event.done, event.total)
            case Stepped():
                loss = "not finite" if event.sample.loss is None else f"{event.sample.loss:.4g}"
                note = f"{format_seconds(event.sample.step_s)} a step, loss {loss}"
                self._progress.update("steps", event.sample.step + 1, event.total, note=note)
            case Ended():
                self._progress.update("runs", event.index + 1, event.total, note=event.run.id)
                self._progress.print(_ended_line(event.run))

    def _planned(self, event: Planned) -> None:
        for run_id in event.kept:
            self._notes.print(f"kept     {run_id}")
        for run_id, why in event.again.items():
            self._notes.print(f"again    {run_id}: {why}")
        if event.kept:
            for run_id in event.to_run:
                self._notes.print(f"missing  {run_id}")


def _ended_line(run: Run) -> str:
    if run.end_reason is not None:
        return f"{run.id}: {run.end_state}: {run.end_reason}"
    seen = run.summary
    step = NOT_MEASURED if seen.step_s_median is None else f"{format_seconds(seen.step_s_median)} a step"
    return f"{run.id}: {run.end_state}, {step}"
