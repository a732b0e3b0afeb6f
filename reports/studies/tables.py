"""The tables of a study: methods, trials, and what gave no result. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from engines import what_trains
from harness.quality.documents import TrialRecord
from harness.quality.judge import MethodResult, SeedSpread
from harness.records.columns import BYTES, SECONDS, CellValue, Column, Unit
from profiles.language import translated
from reports.decide import state_word
from reports.format import digits, span
from reports.messages import say
from reports.pages.data import DataTable
from reports.studies.answer import metric_text, reached_text, state_of_method
from reports.studies.curves import curve
from reports.studies.read import LoadedStudy


@dataclass(frozen=True, kw_only=True, slots=True)
class StudiedMethod:
    result: MethodResult
    study: LoadedStudy

    def largest(self, field: str) -> float | None:
        """Over the final trials."""
        found = [getattr(each, field) for each in self.study.finals(self.result.name)]
        return max((value for value in found if value is not None), default=None)


def _trains(one: StudiedMethod) -> str:
    settings = next(each.settings for each in one.study.plan.methods if each.name == one.result.name)
    return translated(what_trains(one.result.engine, settings))


def _metric_unit(metric: str) -> Unit:
    return Unit(show=lambda value: metric_text(metric, value))


def method_columns(study: LoadedStudy) -> tuple[Column[StudiedMethod], ...]:
    metric = _metric_unit(study.result.metric)

    def reached(one: StudiedMethod) -> CellValue:
        return reached_text(one.result) if one.result.test is not None else None

    return (
        Column("method", lambda one: one.result.name),
        Column("verdict", lambda one: state_word(state_of_method(study, one.result))),
        Column("trains", _trains),
        Column("study_rate", lambda one: one.result.learning_rate, Unit(show=digits)),
        Column("study_target", reached),
        Column("study_test", lambda one: median_of(one.result.test), metric),
        Column("study_range", lambda one: _range(one.result.test, study.result.metric)),
        Column("study_development", lambda one: median_of(one.result.development), metric),
        Column("study_beside", _beside),
        Column("study_step", lambda one: one.largest("step_s_median"), SECONDS),
        Column("gpu_peak", lambda one: one.largest("peak_gpu_reserved_bytes"), BYTES),
        Column("host", lambda one: one.largest("peak_host_bytes"), BYTES),
        Column("study_search", lambda one: one.result.search_s or None, SECONDS),
        Column("study_train", lambda one: one.result.train_s or None, SECONDS),
        Column("study_eval", lambda one: one.result.eval_s or None, SECONDS),
    )


def median_of(spread: SeedSpread | None) -> float | None:
    return None if spread is None else spread.median


def _range(spread: SeedSpread | None, metric: str) -> str | None:
    if spread is None:
        return None
    return span(metric_text(metric, spread.low), metric_text(metric, spread.high))


def _beside(one: StudiedMethod) -> CellValue:
    if one.result.test is None:
        return None
    return say(f"study.beside_{one.result.beside_best or 'best'}")


def trial_columns(metric: str) -> tuple[Column[TrialRecord], ...]:
    unit = _metric_unit(metric)
    return (
        Column("method", lambda one: one.method),
        Column("study_rate", lambda one: one.learning_rate, Unit(show=digits)),
        Column("study_seed", lambda one: one.seed, Unit(show=lambda seed: f"{seed:.0f}")),
        Column("end", lambda one: say(f"end.{one.end_state}")),
        Column("study_steps", lambda one: one.learned.steps, Unit(show=lambda steps: f"{steps:,.0f}")),
        Column("study_train", lambda one: one.learned.train_s, SECONDS),
        Column("study_first", lambda one: _value(one, metric, first=True), unit),
        Column("study_development", lambda one: _value(one, metric, first=False), unit),
        Column(
            "study_best_step", lambda one: _best_step(one, metric), Unit(show=lambda step: f"{step:,.0f}")
        ),
        Column("study_tested", lambda one: (one.learned.test or {}).get(metric), unit),
    )


def _value(one: TrialRecord, metric: str, *, first: bool) -> float | None:
    if first:
        return curve(one, metric)[0][1] if curve(one, metric) else None
    best = one.learned.best(metric)
    return None if best is None else best.metrics[metric]


def _best_step(one: TrialRecord, metric: str) -> int | None:
    best = one.learned.best(metric)
    return None if best is None else best.step


@dataclass(frozen=True, kw_only=True, slots=True)
class Without:
    """A trial, a file or a method that gave no result."""

    what: str
    meaning: str
    reason: str


WITHOUT: tuple[Column[Without], ...] = (
    Column("run", lambda one: one.what),
    Column("meaning", lambda one: one.meaning),
    Column("reason", lambda one: translated(one.reason)),
)


def without_result(study: LoadedStudy) -> list[Without]:
    rows = [
        Without(what=each.id, meaning=say(f"end.{each.end_state}"), reason=each.end_reason or "")
        for each in study.trials
        if each.end_state != "ok"
    ]
    rows += [
        Without(what=each.file, meaning=say("end.unreadable"), reason=each.reason) for each in study.broken
    ]
    rows += [
        Without(what=each.name, meaning=say("end.not_run"), reason=each.why_not or "")
        for each in study.plan.methods
        if not each.fits
    ]
    return rows


def evaluations_table(study: LoadedStudy) -> DataTable:
    """Every evaluation of every trial, for programs."""
    names = sorted(
        {name for each in study.trials for one in each.learned.evaluations for name in one.metrics}
    )
    return DataTable(
        key="evaluations",
        title="Evaluations",
        columns=("method", "rung", "learning_rate", "seed", "step", "train_s", *names),
        rows=tuple(
            (
                each.method, float(each.rung), each.learning_rate, float(each.seed), float(one.step),
                one.train_s, *(one.metrics.get(name) for name in names),
            )
            for each in study.trials
            for one in each.learned.evaluations
        ),
    )  # fmt: skip
