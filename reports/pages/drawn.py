"""The charts of a report. Pure."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

from harness.records.memory_limits import gpu_limit_bytes, host_limit_bytes
from harness.records.run import Run
from harness.records.stats import outer_deciles, over_runs
from profiles.language import enumerated, quantity
from profiles.units import format_bytes, format_seconds
from reports.charts.axes import Axis, bytes_axis, seconds_axis
from reports.charts.bars import BarGroup, BarPart, BarRow, bars, grouped_bars
from reports.charts.lines import LevelLine, Line, lines
from reports.findings.breakdown import breakdown
from reports.format import loss, middle, percent
from reports.judging import stated
from reports.judging.quality import accuracy, learned
from reports.measured.measurements import Measurements, ends, is_emulated, predicted
from reports.messages import say, several_items
from reports.pages.document import Drawing


def figures(engines: Sequence[str], all_: Measurements) -> dict[str, Drawing]:
    """Name -> each chart that has something to show, with rows in the order of `engines`."""
    drawn = {
        "job": _job_chart(engines, all_),
        "step": _step_chart(engines, all_),
        "busy": _busy_chart(engines, all_),
        "gpu": _memory_chart("gpu", engines, all_),
        "host": _memory_chart("host", engines, all_),
        "quality": _quality_chart(engines, all_),
        "loss": _loss_chart(engines, all_),
    }
    return {
        name: Drawing(title=say(f"chart.{name}"), svg=svg, caption=say(f"chart.key_{name}"))
        for name, svg in drawn.items()
        if svg is not None
    }


def _job_chart(engines: Sequence[str], all_: Measurements) -> str | None:
    """Time to the job's end, as the first page has it; `None` where nobody said how much is trained."""
    steps = all_.steps
    if steps is None:
        return None
    rows = []
    for engine in engines:
        time, expected = stated.job_s(engine, all_, steps), predicted(all_.of(engine))
        forecast = expected.step_s if expected and time.origin != "predicted" else None
        rows.append(
            BarRow(
                label=engine,
                engine=engine,
                parts=_stated_bar(time),
                low=time.low,
                high=time.high,
                predicted=forecast * steps if forecast is not None else None,
                text=stated.plain_time(time) if time.value is not None else "",
                missing=ends(all_.of(engine).runs),
            )
        )
    return _bars("job", rows, seconds_axis, None)


def _stated_bar(time: stated.Stated) -> tuple[BarPart, ...]:
    """In outline where it is a prediction."""
    return () if time.value is None else (BarPart(value=time.value, pale=time.origin == "predicted"),)


def _step_chart(engines: Sequence[str], all_: Measurements) -> str | None:
    """Whiskers leave the outer deciles out: a few slow steps would make the bars short. `None` where there is
    a chart of the whole job, which would show the same."""
    if all_.steps is not None:
        return None
    rows = []
    for engine in engines:
        rounds, expected = all_.of(engine), predicted(all_.of(engine))
        time = stated.step_s(engine, all_)
        is_measured = time.origin == "measured"
        low, high = outer_deciles([step_s for steps in rounds.step_times for step_s in steps])
        rows.append(
            BarRow(
                label=engine,
                engine=engine,
                parts=_stated_bar(time),
                low=low if is_measured else time.low,
                high=high if is_measured else time.high,
                predicted=expected.step_s if expected and is_measured else None,
                text=stated.plain_time(time) if time.value is not None else "",
                missing=ends(rounds.runs),
            )
        )
    return _bars("step", rows, seconds_axis, None)


def _busy_chart(engines: Sequence[str], all_: Measurements) -> str | None:
    """For each method a group of bars: what each resource did in a step. Only what was measured has a bar."""
    groups = []
    for engine in engines:
        rounds, expected = all_.of(engine), predicted(all_.of(engine))
        one = breakdown(rounds)
        lanes = {
            "h2d": one.h2d_s,
            "d2h": one.d2h_s,
            "mixed" if one.mixed else "compute": one.gpu_s if one.mixed else one.compute_s,
            "noise": one.noise_s,
            "idle": one.idle_s,
            "cpu": one.cpu_s,
            "disk": one.disk_s,
        }
        rows = [
            BarRow(
                label=say(f"lane.{key}"),
                engine=engine,
                parts=(BarPart(value=seconds, pale=key == "idle"),),
                text=quantity(format_seconds(seconds)),
            )
            for key, seconds in lanes.items()
            if seconds is not None
        ]
        if rows:
            step_s = rounds.step_s
            floor_s = expected.floor_s if expected and one.floor_share is not None else None
            text = [say("lane.step", value=middle(step_s, format_seconds))]
            if floor_s is not None:
                share = percent(one.floor_share)
                text.append(say("lane.floor", value=format_seconds(floor_s), share=share))
            if one.disk_floor_s is not None:
                share = percent(one.disk_floor_share)
                text.append(say("lane.disk_floor", value=format_seconds(one.disk_floor_s), share=share))
            if one.landed_share is not None:
                text.append(say("lane.landed", share=percent(one.landed_share)))
            groups.append(
                BarGroup(
                    label=engine,
                    text=several_items(text),
                    rows=tuple(rows),
                    whole=step_s.median if step_s else None,
                    floor=floor_s,
                    alone=one.disk_floor_s,
                )
            )
    if not groups:
        return None
    return grouped_bars(
        say("chart.busy"),
        several_items(
            f"{group.label}: {enumerated(f'{row.label} {row.text}' for row in group.rows)}"
            for group in groups
        ),
        groups,
        lambda top: seconds_axis(say("chart.busy_axis"), top),
        say("chart.logarithmic"),
    )


def _memory_chart(kind: Literal["gpu", "host"], engines: Sequence[str], all_: Measurements) -> str | None:
    """On the GPU what torch reserved is drawn pale behind what its tensors took."""
    rows = []
    limit: int | None = None
    for engine in engines:
        rounds, expected = all_.of(engine), predicted(all_.of(engine))
        if kind == "gpu":
            pale = over_runs(rounds.ok, lambda run: run.summary.peak_gpu_reserved_bytes)
            full = over_runs(rounds.ok, lambda run: run.summary.peak_gpu_allocated_bytes)
            expected_bytes = expected.peak_gpu_bytes if expected else None
            limits = [gpu_limit_bytes(run, all_.machine) for run in rounds.ok]
        else:
            pale, full = None, over_runs(rounds.ok, lambda run: run.summary.peak_host_bytes)
            expected_bytes = expected.peak_host_bytes if expected else None
            limits = [host_limit_bytes(run) for run in rounds.ok]
        limit = limit or (limits[0] if limits else None)
        parts = [BarPart(value=pale.high, pale=True)] if pale else []
        parts += [BarPart(value=full.high)] if full else []
        rows.append(
            BarRow(
                label=engine,
                engine=engine,
                parts=tuple(parts),
                predicted=expected_bytes or None,
                text=format_bytes(max(part.value for part in parts)) if parts else "",
                missing=say("chart.not_recorded") if rounds.ok else ends(rounds.runs),
            )
        )
    return _bars(kind, rows, bytes_axis, limit)


def _bars(
    key: str, rows: Sequence[BarRow], axis: Callable[[str, float], Axis], limit: int | None
) -> str | None:
    """`None` where no row has a bar: a chart of predictions alone would look like a measurement."""
    if not any(row.parts for row in rows):
        return None
    return bars(
        say(f"chart.{key}"),
        several_items(f"{row.label}: {row.text or row.missing}" for row in rows),
        rows,
        lambda top: axis(say(f"chart.{key}_axis"), top),
        limit=(limit, say("chart.limit", limit=format_bytes(limit))) if limit else None,
        logarithmic=say("chart.logarithmic"),
    )


def _quality_chart(engines: Sequence[str], all_: Measurements) -> str | None:
    """What was measured on held-out data before the first step and after the last, over the time of all steps
    between. `None` where that says nothing: without evaluations, of random weights or data, where a step's
    time is not that of the machine told of."""
    kinds = {engine: found.kind for engine in engines if (found := learned(engine, all_)) is not None}
    if not kinds:
        return None
    kind = next(iter(kinds.values()))
    series = [
        Line(label=engine, engine=engine, points=points, is_marked=True)
        for engine in engines
        if kinds.get(engine) == kind and not is_emulated(all_.of(engine))
        for run in all_.of(engine).ok
        if (points := _evaluated(run, kind))
    ]
    if not series:
        return None
    starts = [one.points[0][1] for one in series]
    show = accuracy if kind == "accuracy" else loss
    return lines(
        say("chart.quality"),
        several_items(
            say(
                "chart.after",
                engine=one.label,
                loss=show(one.points[-1][1]),
                time=format_seconds(one.points[-1][0]),
            )
            for one in series
        ),
        series,
        lambda top: seconds_axis(say("chart.quality_axis"), top),
        Axis(name=say(f"chart.{kind}")),
        [LevelLine(value=statistics.median(starts), name=say("chart.zero_shot"))],
    )


def _evaluated(run: Run, kind: str) -> tuple[tuple[float, float], ...]:
    """(seconds of steps, held-out value) before and after training; empty where either is missing."""
    summary = run.summary
    before, after = (
        (summary.eval_accuracy_first, summary.eval_accuracy_last)
        if kind == "accuracy"
        else (summary.eval_loss_first, summary.eval_loss_last)
    )
    if before is None or after is None:
        return ()
    return ((0.0, before), (sum(sample.step_s for sample in run.samples), after))


def _loss_chart(engines: Sequence[str], all_: Measurements) -> str | None:
    """A line for each run, from where its warm-up ended."""
    series = [
        Line(label=engine, engine=engine, points=points)
        for engine in engines
        for run in all_.of(engine).ok
        if (points := _loss_over_time(run))
    ]
    if not series:
        return None
    ends_at = [(one.label, *one.points[-1]) for one in series]
    return lines(
        say("chart.loss"),
        several_items(
            say("chart.after", engine=engine, loss=loss(value), time=format_seconds(time))
            for engine, time, value in ends_at
        ),
        series,
        lambda top: seconds_axis(say("chart.loss_axis"), top),
        Axis(name=say("chart.loss_value")),
    )


def _loss_over_time(run: Run) -> tuple[tuple[float, float], ...]:
    """(seconds since the warm-up ended, loss) of every counted step with a finite loss."""
    counted = [sample for sample in run.samples if not sample.warmup]
    clocks = itertools.accumulate(sample.step_s for sample in counted)
    return tuple(
        (clock, sample.loss) for clock, sample in zip(clocks, counted, strict=True) if sample.loss is not None
    )
