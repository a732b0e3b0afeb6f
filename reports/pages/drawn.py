"""The charts of a report. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

from harness.records.memory_limits import gpu_limit_bytes, host_limit_bytes
from harness.records.run import Run
from harness.records.stats import outer_deciles, over_runs
from profiles.units import format_bytes, format_seconds
from reports import charts
from reports.findings.breakdown import breakdown
from reports.format import loss, middle, percent
from reports.messages import say
from reports.metrics import Measurements, ends, predicted
from reports.pages.document import Drawing


def figures(all_: Measurements) -> dict[str, Drawing]:
    """Name -> each chart that has something to show."""
    engines = all_.engines
    drawn = {
        "step": _step_chart(engines, all_),
        "busy": _busy_chart(engines, all_),
        "gpu": _memory_chart("gpu", engines, all_),
        "host": _memory_chart("host", engines, all_),
        "loss": _loss_chart(engines, all_),
    }
    return {
        name: Drawing(title=say(f"chart.{name}"), svg=svg, caption=say(f"chart.key_{name}"))
        for name, svg in drawn.items()
        if svg is not None
    }


def _step_chart(engines: Sequence[str], all_: Measurements) -> str | None:
    """Whiskers leave the outer deciles out: a few slow steps would make the bars short."""
    rows = []
    for engine in engines:
        rounds, expected = all_.of(engine), predicted(all_.of(engine))
        measured = rounds.step_s.median if rounds.step_s else None
        low, high = outer_deciles([step_s for steps in rounds.step_times for step_s in steps])
        rows.append(
            charts.BarRow(
                label=engine,
                engine=engine,
                parts=(charts.BarPart(value=measured),) if measured is not None else (),
                low=low,
                high=high,
                predicted=expected.step_s if expected else None,
                text=middle(rounds.step_s, format_seconds) if measured is not None else "",
                missing=ends(rounds.runs),
            )
        )
    return _bars("step", rows, charts.seconds_axis, None)


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
            charts.BarRow(
                label=say(f"lane.{key}"),
                engine=engine,
                parts=(charts.BarPart(value=seconds, pale=key == "idle"),),
                text=format_seconds(seconds),
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
                charts.BarGroup(
                    label=engine,
                    text="; ".join(text),
                    rows=tuple(rows),
                    whole=step_s.median if step_s else None,
                    floor=floor_s,
                    alone=one.disk_floor_s,
                )
            )
    if not groups:
        return None
    return charts.grouped_bars(
        say("chart.busy"),
        "; ".join(
            f"{group.label}: {', '.join(f'{row.label} {row.text}' for row in group.rows)}" for group in groups
        ),
        groups,
        lambda top: charts.seconds_axis(say("chart.busy_axis"), top),
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
        parts = [charts.BarPart(value=pale.high, pale=True)] if pale else []
        parts += [charts.BarPart(value=full.high)] if full else []
        rows.append(
            charts.BarRow(
                label=engine,
                engine=engine,
                parts=tuple(parts),
                predicted=expected_bytes or None,
                text=format_bytes(max(part.value for part in parts)) if parts else "",
                missing=say("chart.not_recorded") if rounds.ok else ends(rounds.runs),
            )
        )
    return _bars(kind, rows, charts.bytes_axis, limit)


def _bars(
    key: str, rows: Sequence[charts.BarRow], axis: Callable[[str, float], charts.Axis], limit: int | None
) -> str | None:
    """`None` where no row has a bar: a chart of predictions alone would look like a measurement."""
    if not any(row.parts for row in rows):
        return None
    return charts.bars(
        say(f"chart.{key}"),
        "; ".join(f"{row.label}: {row.text or row.missing}" for row in rows),
        rows,
        lambda top: axis(say(f"chart.{key}_axis"), top),
        limit=(limit, say("chart.limit", limit=format_bytes(limit))) if limit else None,
    )


def _loss_chart(engines: Sequence[str], all_: Measurements) -> str | None:
    """A line for each run, from where its warm-up ended."""
    series = [
        charts.Line(label=engine, engine=engine, points=points)
        for engine in engines
        for run in all_.of(engine).ok
        if (points := _loss_over_time(run))
    ]
    if not series:
        return None
    ends_at = [(one.label, *one.points[-1]) for one in series]
    return charts.lines(
        say("chart.loss"),
        "; ".join(
            say("chart.after", engine=engine, loss=loss(value), time=format_seconds(time))
            for engine, time, value in ends_at
        ),
        series,
        lambda top: charts.seconds_axis(say("chart.loss_axis"), top),
        charts.Axis(name=say("chart.loss_value")),
    )


def _loss_over_time(run: Run) -> tuple[tuple[float, float], ...]:
    """(seconds since the warm-up ended, loss) of every counted step with a finite loss."""
    counted = [sample for sample in run.samples if not sample.warmup]
    clocks = itertools.accumulate(sample.step_s for sample in counted)
    return tuple(
        (clock, sample.loss) for clock, sample in zip(clocks, counted, strict=True) if sample.loss is not None
    )
