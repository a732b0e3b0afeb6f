"""The charts of a study: quality over the time of steps, seed by seed, and the time to the target. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from harness.quality.documents import TrialRecord
from harness.quality.judge import MethodResult
from profiles.language import quantity
from profiles.units import format_seconds
from reports.charts.axes import Axis, seconds_axis
from reports.charts.bars import BarPart, BarRow, bars
from reports.charts.lines import LevelLine, Line, lines
from reports.messages import say, several_items
from reports.pages.document import Drawing
from reports.studies.answer import metric_text, reached_text
from reports.studies.read import LoadedStudy

_Point = tuple[float, float]


def quality_chart(study: LoadedStudy, methods: Sequence[MethodResult]) -> Drawing | None:
    """Every final trial as a thin line, with the median over seeds; `None` where nothing was evaluated."""
    metric = study.result.metric
    series: list[Line] = []
    of_engine: list[str] = []
    for each in methods:
        found = [points for trial in study.finals(each.name) if len(points := curve(trial, metric)) > 1]
        if not found:
            continue
        nth = of_engine.count(each.engine)
        of_engine.append(each.engine)
        if len(found) > 1:
            series += [
                Line(label=each.name, engine=each.engine, nth=nth, points=one, is_faint=True) for one in found
            ]
            series.append(Line(label=each.name, engine=each.engine, nth=nth, points=middle_curve(found)))
        else:
            series.append(Line(label=each.name, engine=each.engine, nth=nth, points=found[0]))
    if not series:
        return None
    target = study.plan.target
    is_share = metric_text(metric, 0.5).endswith("%")
    svg = lines(
        say("chart.study"),
        several_items(
            say(
                "study.curve_told", engine=each.name, reached=reached_text(each),
                value=metric_text(metric, each.development.median),
            )
            for each in methods
            if each.development is not None
        ),
        series,
        lambda top: seconds_axis(say("chart.quality_axis"), top),
        Axis(
            name=say(f"study_metric.{metric}"), unit="%" if is_share else "", size=0.01 if is_share else 1.0
        ),
        [
            LevelLine(value=target.value, name=say("study.level", value=metric_text(metric, target.value))),
            *(
                [LevelLine(value=start, name=say("chart.zero_shot"), dash="2 3")]
                if (start := _start(study)) is not None
                else []
            ),
        ],
        logarithmic=say("chart.logarithmic"),
    )  # fmt: skip
    return Drawing(title=say("chart.study"), svg=svg, caption=say("chart.key_study"))


def curve(trial: TrialRecord, metric: str) -> tuple[_Point, ...]:
    """(seconds of steps, value on development data) of every evaluation whose value is finite."""
    return tuple(
        (each.train_s, each.metrics[metric])
        for each in trial.learned.evaluations
        if math.isfinite(each.metrics[metric])
    )


def middle_curve(found: Sequence[Sequence[_Point]]) -> tuple[_Point, ...]:
    """Medians of time and value over the curves, evaluation by evaluation, as far as all of them go."""
    return tuple(
        (statistics.median(x for x, _ in each), statistics.median(y for _, y in each))
        for each in zip(*found, strict=False)
    )


def _start(study: LoadedStudy) -> float | None:
    """On development data before any training."""
    metric = study.result.metric
    found = [
        value
        for each in study.trials
        if each.learned.evaluations and each.learned.evaluations[0].step == 0
        if math.isfinite(value := each.learned.evaluations[0].metrics[metric])
    ]
    return statistics.median(found) if found else None


def target_chart(methods: Sequence[MethodResult]) -> Drawing | None:
    """Time to the target; `None` where no method reached it with every seed."""
    rows = [
        BarRow(
            label=each.name, engine=each.engine,
            parts=(BarPart(value=each.reached.median),) if each.reached else (),
            low=each.reached.low if each.reached else None,
            high=each.reached.high if each.reached else None,
            text=quantity(format_seconds(each.reached.median)) if each.reached else "",
            missing=reached_text(each) if each.test is not None else say("study.no_result"),
        )
        for each in methods
    ]  # fmt: skip
    if not any(row.parts for row in rows):
        return None
    title = say("chart.target")
    svg = bars(
        title,
        several_items(f"{row.label}: {row.text or row.missing}" for row in rows),
        rows,
        lambda top: seconds_axis(say("chart.quality_axis"), top),
        logarithmic=say("chart.logarithmic"),
    )
    return Drawing(title=title, svg=svg, caption=say("chart.key_target"))
