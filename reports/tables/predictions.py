"""What was predicted beside what was measured, and what plans have chosen. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from harness.records.columns import BYTES, SECONDS, CellValue, Column, Unit
from harness.records.run import Run
from harness.records.stats import Rounds
from profiles.language import enumerated, translated
from profiles.planning.plan import Plan, Prediction
from profiles.units import format_seconds
from reports.format import (
    TIMES,
    Table,
    both,
    span,
    times,
)
from reports.load import Loaded, engine_order
from reports.measured.measurements import (
    Measurements,
    largest,
    predicted,
)
from reports.messages import say, several_items


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantity:
    """One thing of one method that was predicted and measured."""

    engine: str
    name: str
    unit: Unit
    predicted: float | None
    measured: float | None
    range: str = ""
    """That was predicted; empty: none."""
    both: tuple[float, float] | None = None
    """What was measured in two runs, which have no median."""


def _predicted(one: Quantity) -> str:
    if not one.predicted:
        return say("table.not_predicted")
    shown = one.unit.show(one.predicted)
    return say("table.with_range", value=shown, range=one.range) if one.range else shown


def _measured(one: Quantity) -> str | None:
    if one.both is not None:
        return both(*map(one.unit.show, one.both))
    return None if one.measured is None else one.unit.show(one.measured)


def _over_predicted(one: Quantity) -> CellValue:
    if not one.predicted or one.measured is None:
        return None
    if one.both is not None:
        return span(*(times(each / one.predicted) for each in one.both))
    return one.measured / one.predicted


PREDICTION: tuple[Column[Quantity], ...] = (
    Column("method", lambda one: one.engine),
    Column("quantity", lambda one: say(f"table.{one.name}")),
    Column("predicted", _predicted),
    Column("measured", _measured),
    Column("ratio", _over_predicted, TIMES),
)


def prediction_table(loaded: Loaded, all_: Measurements) -> Table:
    """Predicted beside measured, and their ratio: step time, GPU memory, host memory."""
    plans = {plan.engine: plan.prediction for plan in reversed(loaded.plans)}  # the first of an engine's
    engines = sorted({*all_.rounds, *plans}, key=engine_order)
    rows = [row for engine in engines for row in _quantities(all_.of(engine), plans.get(engine))]
    return Table.of(PREDICTION, rows, say("tablenote.prediction"))


def _quantities(rounds: Rounds, planned: Prediction | None) -> Iterator[Quantity]:
    """Memory only where it is predicted or measured."""
    expected = predicted(rounds) or planned
    if expected is None:
        return
    yield Quantity(
        engine=rounds.engine,
        name="step_time",
        unit=SECONDS,
        predicted=expected.step_s,
        measured=rounds.step_s.median if rounds.step_s else None,
        both=(rounds.step_s.low, rounds.step_s.high) if rounds.step_s and rounds.step_s.count == 2 else None,
        range=span(format_seconds(expected.step_s_low), format_seconds(expected.step_s_high)),
    )
    memory: tuple[tuple[str, int | None, Callable[[Run], float | None]], ...] = (
        ("gpu_memory", expected.peak_gpu_bytes, lambda run: run.summary.peak_gpu_allocated_bytes),
        ("host_memory", expected.peak_host_bytes, lambda run: run.summary.peak_host_bytes),
    )
    for name, bytes_, value in memory:
        peak = largest(rounds, value)
        if peak is not None or bytes_:
            yield Quantity(engine=rounds.engine, name=name, unit=BYTES, predicted=bytes_, measured=peak)


def plan_notes(loaded: Loaded) -> tuple[str, ...]:
    """Per method: the settings chosen, what is predicted to limit it, and on what that rests."""
    return tuple(
        say(
            "plan.note",
            engine=plan.engine,
            settings=enumerated(f"{key}={value}" for key, value in sorted(plan.settings.items()))
            or say("plan.defaults"),
            bottleneck=translated(plan.prediction.bottleneck or "") or say("plan.no_bottleneck"),
            basis=translated(plan.prediction.basis.rstrip(".")),
            reasons=say("plan.reasons", reasons=_reasons(plan)) if plan.reasons else "",
        )
        for plan in loaded.plans
    )


def _reasons(plan: Plan) -> str:
    return several_items(translated(reason) for reason in plan.reasons)
