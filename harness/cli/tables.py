"""Tables and lines of the terminal: runs, plans of a sweep, engines, models. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from engines import entry, public_engines, why_not_installed
from engines.settings.parse import settings_class
from engines.settings.zeroth_order import approximation
from harness.models.configs import NAMED_SHAPES, named_shape
from harness.records.columns import BYTES, SECONDS, Column, Unit, table_cells, where_known
from harness.records.comparison import Comparison, OtherHost, WhyUndecided, comparisons
from harness.records.run import Run
from harness.records.settings import published_presets
from harness.records.stats import ENOUGH_RUNS, SAME_FACTOR, rare_share_s, rare_step_s
from harness.runs.emulate import what_is_short
from profiles.language import translated, word
from profiles.system.nvml import open_device
from profiles.units import NOT_MEASURED, format_seconds

if TYPE_CHECKING:
    from harness.training.find_lr import LrSearchResult


def format_parameters(count: int) -> str:
    """As people say it: 125.2 M, 13.02 B."""
    return f"{count / 1e9:,.2f} B" if count >= 1e9 else f"{count / 1e6:,.2f} M"


def notes_grid(notes: Mapping[str, Sequence[str]]) -> Table:
    """Sentences by method, each on lines of its own."""
    grid = Table.grid(padding=(0, 2), pad_edge=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for engine, lines in notes.items():
        for number, line in enumerate(lines):
            grid.add_row(engine if number == 0 else "", Text(translated(line)))
    return grid


def plain_table(headings: Sequence[str], whole: Collection[str] = ("method",)) -> Table:
    """Columns of `whole` are never wrapped."""
    table = Table(box=box.SIMPLE_HEAVY)
    for heading in headings:
        table.add_column(heading, overflow="fold", no_wrap=heading in whole)
    return table


def grid_table(cells: Sequence[Any]) -> RenderableType:
    """What a sweep would run, in order."""
    table = plain_table(("id", "round", "settings"), whole=("id",))
    for cell in cells:
        settings = ", ".join(f"{key}={value}" for key, value in cell.plan.settings.items())
        table.add_row(
            cell.id,
            str(cell.round),
            settings if cell.plan.fits else f"will not run: {cell.plan.why_not}",
        )
    return Group(Text("Would run, in this order", style="bold"), table)


def _no_number(run: Run) -> str:
    """Nothing was measured, or was to be: a run that made no step has no numbers to miss."""
    return NOT_MEASURED if run.summary.step_s_median else "-"


def _losses(run: Run) -> str | None:
    """Of the first and the last step."""
    first, last = run.summary.loss_first, run.summary.loss_last
    return None if first is None or last is None else f"{first:.4g} to {last:.4g}"


def _predicted_s(run: Run) -> float | None:
    """The step, where the method was there to take it."""
    return None if run.predicted is None or run.end_state == "not_available" else run.predicted.step_s


RUNS: tuple[Column[Run], ...] = (
    Column("method", lambda run: run.engine),
    Column("round", lambda run: run.round),
    Column("end", lambda run: run.end_state),
    Column("step", lambda run: run.summary.step_s_median, SECONDS, missing=_no_number),
    Column("predicted", _predicted_s, SECONDS, missing="-"),
    Column("tokens/s", lambda run: run.summary.tokens_per_s, Unit(show="{:,.0f}".format), missing=_no_number),
    Column(
        "MFU",
        lambda run: run.summary.mfu,
        Unit(show="{:.1%}".format),
        missing=_no_number,
        shown=where_known(lambda run: run.summary.mfu),
    ),
    Column(
        "GPU memory",
        lambda run: run.summary.peak_gpu_allocated_bytes,
        BYTES,
        missing=_no_number,
        shown=where_known(lambda run: run.summary.peak_gpu_allocated_bytes),
    ),
    Column("host memory", lambda run: run.summary.peak_host_bytes, BYTES, missing=_no_number),
    Column("loss", _losses, missing=_no_number),
)


def _measured_table(columns: Sequence[Column[Run]], runs: Sequence[Run]) -> Table:
    """A row for each run; its method and its end are never wrapped."""
    here, rows = table_cells(columns, runs)
    table = plain_table([word(column.key) for column in here], whole=(word("method"), word("end")))
    for row in rows:
        table.add_row(*(word(cell) for cell in row))
    return table


def runs_table(runs: Sequence[Run], explained: Collection[str] = ()) -> RenderableType:
    """What was measured, one row per run; below it why runs failed, and each method beside native. Steps of
    runs whose ids are `explained` missed their range for the processor's speed."""
    reasons = {
        engine: list(bands_missed([run for run in runs if run.engine == engine], explained))
        for engine in dict.fromkeys(run.engine for run in runs)
    }
    for run in runs:
        lines = reasons[run.engine]
        lines += [line for line in dict.fromkeys(_run_notes(run)) if line not in lines]
    likes = sorted({run.environment.emulated for run in runs if run.environment.emulated is not None})
    title = f"Measured, emulating {', '.join(likes)}" if likes else "Measured"
    answers = {one.engine: [_answer(one), *_with_rare_work(one, runs)] for one in comparisons(runs)}
    return Group(
        Text(translated(title), style="bold"), _measured_table(RUNS, runs), notes_grid(reasons),
        *((Text(word("Step time beside native"), style="bold"), notes_grid(answers)) if answers else ()),
    )  # fmt: skip


_WHY_UNDECIDED: dict[WhyUndecided, str] = {
    "few_runs": f"fewer than {ENOUGH_RUNS} runs",
    "disturbed": "the runs were disturbed",
    "overlap": "the interval reaches both sides",
    "emulated": "on an emulated machine",
    "not_at_best": "native was not at its best",
}


def _with_rare_work(one: Comparison, runs: Sequence[Run]) -> Iterator[str]:
    """That the ratio counts what one step in so many does beside, and what it is without, where that changes
    it."""
    for run in runs:
        usual_s, predicted = run.summary.step_s_median, run.predicted
        if run.engine != one.engine or predicted is None or not predicted.rare_every or not usual_s:
            continue
        factor = 1 + rare_share_s(run) / usual_s
        if factor >= SAME_FACTOR:
            yield (
                f"with what one step in {predicted.rare_every} does beside; of medians alone: "
                f"{one.ratio / factor:.2f}x"
            )
        return


def _answer(one: Comparison) -> str:
    """`slower: 1.80x (95 %: 1.78x to 1.82x)`."""
    range_ = f"{one.low:.2f}x to {one.high:.2f}x"
    if one.confidence is None:
        return f"undecided, {_WHY_UNDECIDED['few_runs']} on a side: {range_}"
    comparison = f"{one.ratio:.2f}x ({one.confidence:.0%}: {range_})"
    if one.why_undecided is None:
        return f"{one.answer}: {comparison}"
    of_native = f" ({one.native_not_at_best})" if one.why_undecided == "not_at_best" else ""
    return f"undecided, {_WHY_UNDECIDED[one.why_undecided]}{of_native}: {comparison}"


COMPILING_MATTERS_S = 1.0
"""From where on it is told how long compiling took."""


RARE_MATTERS_S = 1.0
"""From where on what one step in so many takes beside is told."""


def _run_notes(run: Run) -> Iterator[str]:
    """What to know of a run beside its numbers."""
    if run.traced:
        yield f"traced, which costs time: {run.trace_file or 'the trace could not be kept'}"
    if (approximate := approximation(run.plan.settings)) is not None:
        yield approximate
    yield from run.notes or ()
    if run.disturbance is not None:
        yield f"disturbed: {run.disturbance}"
    if run.summary.compile_s is not None and run.summary.compile_s >= COMPILING_MATTERS_S:
        yield f"compiled for {format_seconds(run.summary.compile_s)}, in its first steps"
    rare_s, predicted = rare_step_s(run), run.predicted
    if rare_s is not None and predicted is not None and rare_s >= RARE_MATTERS_S:
        yield (
            f"one step in {predicted.rare_every} takes {format_seconds(rare_s)} more, "
            "which the median does not show"
        )
    if run.emulation is not None:
        yield from what_is_short(run.emulation)
    if run.end_reason is not None:
        yield f"{run.end_state}: {run.end_reason}"


def bands_missed(runs: Sequence[Run], explained: Collection[str] = ()) -> Iterator[str]:
    """That steps of a method's `runs` took less or more than the range that was predicted: a line for those
    below it and one for those above, of each range, and apart for those that are `explained`, which says so.
    Not of an emulated machine: its GPU is predicted for, and the GPU that computed has a speed of its own."""
    missed: dict[tuple[str, str, bool], list[Run]] = {}
    for run in runs:
        predicted, taken_s = run.predicted, run.summary.step_s_median
        if predicted is None or taken_s is None or run.environment.emulated is not None:
            continue
        low_s, high_s = predicted.step_s_low, predicted.step_s_high
        if low_s is None or high_s is None or low_s <= taken_s <= high_s:
            continue
        side = "faster" if taken_s < low_s else "slower"
        missed.setdefault((side, _span(low_s, high_s), run.id in explained), []).append(run)
    for (side, span, is_explained), those in missed.items():
        taken = _span_of(run.summary.step_s_median for run in those)
        started = _span_of(run.summary.forward_launch_s for run in those)
        why = f"the processor explains it, which took {started} to start an operation"
        why = why if is_explained else "'recommend --calibrate FOLDER' learns from it"
        yield f"{side} than the range predicted: {taken}, not {span}; {why}"


def _span_of(times_s: Iterable[float | None]) -> str:
    known = [time_s for time_s in times_s if time_s is not None]
    return _span(min(known), max(known)) if known else NOT_MEASURED


def host_line(found: OtherHost) -> str:
    """That the machine's profile does not describe the processor that runs had."""
    taken, profile = format_seconds(found.taken_s), format_seconds(found.profile_s)
    how = "longer" if found.is_slower else "less"
    return (
        f"starting an operation took this processor {taken}, not {profile} as the machine's profile says: "
        f"steps that wait for it take {how} than predicted ('lspzo-bench probe' measures it anew)"
    )


def _span(low_s: float, high_s: float) -> str:
    low, high = format_seconds(low_s), format_seconds(high_s)
    return low if low == high else f"{low} to {high}"


def _token_rate(run: Run, step_s: float | None) -> str:
    """Tokens per second of all sequences together, in steps of `step_s`."""
    return NOT_MEASURED if step_s is None else f"{run.tokens_per_step / step_s:,.4g}"


def _token_rates(run: Run) -> str | None:
    seen = run.summary
    if seen.step_s_median is None:
        return None
    return f"{_token_rate(run, seen.step_s_p90)} to {_token_rate(run, seen.step_s_p10)}"


def _floor_s(run: Run) -> float | None:
    return None if run.predicted is None else run.predicted.floor_s


GENERATIONS: tuple[Column[Run], ...] = (
    Column("method", lambda run: run.engine),
    Column("prompts", lambda run: f"{run.job['batch_size']} x {run.job['seq_len']}"),
    Column("end", lambda run: run.end_state),
    Column("tokens/s", lambda run: _token_rate(run, run.summary.step_s_median)),
    Column("10 % to 90 %", _token_rates, missing="-"),
    Column("step", lambda run: run.summary.step_s_median, SECONDS),
    Column("floor", _floor_s, SECONDS, missing="not predicted"),
    Column("floor / step", lambda run: run.summary.floor_share, Unit(show="{:.1%}".format)),
    Column("first token", lambda run: run.first_token_s, SECONDS),
    Column("GPU memory", lambda run: run.summary.peak_gpu_allocated_bytes, BYTES),
)


def generations_table(runs: Sequence[Run]) -> RenderableType:
    """What was measured of decoding, one row per run, and below it why runs failed."""
    reasons = {run.id: [f"{run.end_state}: {run.end_reason}"] for run in runs if run.end_reason is not None}
    counts = sorted({run.tokens for run in runs if run.tokens})
    over = f" over {', '.join(f'{count:,}' for count in counts)} tokens" if counts else ""
    title = Text(f"Measured{over}; the floor is predicted", style="bold")
    return Group(title, _measured_table(GENERATIONS, runs), notes_grid(reasons))


def rates_table(finding: LrSearchResult) -> RenderableType:
    """What `run --find-lr` found, the recommended rate marked."""
    steps = max(trial.steps for trial in finding.trials)
    title = f"Learning rates of {finding.engine}: {finding.measured_on} loss before and after {steps} steps"
    table = plain_table(
        ("learning rate", "before", "after", "change", "end", ""), whole=("learning rate", "end")
    )
    for trial in finding.trials:
        after, change = "-", "-"
        if trial.loss_after is not None:
            after, change = f"{trial.loss_after:.6g}", f"{trial.loss_after - trial.loss_before:+.3g}"
        table.add_row(
            f"{trial.learning_rate:g}", f"{trial.loss_before:.6g}", after, change, trial.end_state,
            "recommended" if trial.learning_rate == finding.recommended else "",
        )  # fmt: skip
    return Group(Text(title, style="bold"), table)


_OF_ROWS = ("target", "summary", "source", "copies", "trains", "masters", "on_gpu", "on_host")


def _why_not_here(engine: str) -> str | None:
    """As its engine would say it, without importing it or torch: a library or a GPU that is missing."""
    missing = why_not_installed(engine)
    if missing is None and entry(engine).needs_gpu and open_device() is None:
        return "needs a GPU, and there is none"
    return missing


def engines_rows() -> list[dict[str, Any]]:
    """What there is, and what is not available here and why."""
    rows = []
    for name in public_engines():
        row, reason = entry(name), _why_not_here(name)
        shown: dict[str, Any] = {
            "name": name,
            **{key: getattr(row, key) for key in _OF_ROWS},
            "available": reason is None,
            "reason": reason,
            "settings": {field.name: field.default for field in fields(settings_class(name))},
        }
        presets = published_presets(name)
        rows.append(shown | {"presets": presets} if presets else shown)
    return rows


def engines_json() -> str:
    return json.dumps(engines_rows(), indent=1) + "\n"


def engines_table() -> RenderableType:
    rows = engines_rows()
    table = plain_table(("method", "here", "what it does", "source"))
    for row in rows:
        table.add_row(row["name"], "yes" if row["available"] else "no", row["summary"], row["source"])
    notes = {
        row["name"]: [
            *([] if row["available"] else [f"not available here: {row['reason']}"]),
            f"trains {row['trains']}; master copies {row['masters']}; "
            f"on the GPU {row['on_gpu']}; on the host {row['on_host']}",
            ", ".join(f"{key}={value}" for key, value in row["settings"].items()),
            *(
                f"preset={name}, as published: "
                + ", ".join(f"{key}={value}" for key, value in values.items())
                for name, values in row.get("presets", {}).items()
            ),
        ]
        for row in rows
    }
    return Group(table, Text("Knobs for --set, with their defaults", style="bold"), notes_grid(notes))


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
        title="Named shapes for --model NAME --random-weights: real sizes, no download",
        box=box.SIMPLE_HEAVY,
        title_justify="left",
        title_style="bold",
    )
    for heading in ("name", "family", "parameters", "blocks", "hidden", "longest sequence", "head tied"):
        table.add_column(heading, justify="left" if heading in ("name", "family") else "right")
    for row in models_rows():
        table.add_row(
            row["name"],
            row["family"],
            format_parameters(row["parameters"]),
            str(row["blocks"]),
            str(row["hidden"]),
            str(row["max_seq_len"]),
            "yes" if row["tied"] else "no",
        )
    return table
