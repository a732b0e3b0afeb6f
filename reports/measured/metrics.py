"""Each metric of `reports.criteria`, computed from the runs of one engine. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from engines import YARDSTICK
from harness.records.memory_limits import gpu_limit_bytes, gpu_taken_bytes, host_limit_bytes
from harness.records.run import Predicted, Run
from harness.records.stats import Rounds, loss_change, over_runs, rare_job_s, ratio
from reports.criteria import Metric
from reports.format import GIB
from reports.measured.examples import change_over_sequences, over_examples, ratio_over_sequences
from reports.measured.finding import (
    MetricFinding,
    from_spread,
    of_largest,
    scaled,
    with_examples,
    with_sequences,
    with_steps_of_one,
)
from reports.measured.measurements import (
    DOES_NOT_FIT,
    NOTHING_LEARNED,
    Measurements,
    ends,
    heldout_loss,
    is_emulated,
    is_random,
    over_steps,
    predicted,
)
from reports.measured.padding import padded_to
from reports.messages import say

_OF_QUALITY: tuple[Metric, ...] = ("accuracy", "heldout_change", "heldout_ratio")


def find(metric: Metric, engine: str, all_: Measurements) -> MetricFinding:
    """`metric` of `engine`."""
    rounds = all_.of(engine)
    evidence = tuple(run.id for run in rounds.runs)
    if not rounds.runs:
        return MetricFinding(note=say("note.no_runs", engine=engine))
    finding = _METRICS[metric](rounds, all_)
    if metric in _OF_QUALITY and finding.applies and any(run.model.random_weights for run in rounds.ok):
        finding = MetricFinding(note=say("note.random_weights"))  # it is not the real model's
    if finding.value is None and finding.note is None:
        note = say("note.not_recorded") if rounds.ok else say("note.none_ok", ends=ends(rounds.runs))
        finding = replace(finding, note=note)
    return replace(finding, evidence=finding.evidence or evidence)


def _expected(rounds: Rounds, of: Callable[[Predicted], float | None]) -> float | None:
    found = predicted(rounds)
    return None if found is None else of(found)


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _runs_ok(rounds: Rounds, all_: Measurements) -> MetricFinding:
    concluded = [run for run in rounds.runs if run.end_state not in NOTHING_LEARNED]
    expected = 1.0 if rounds.runs[0].plan.fits else 0.0
    if not concluded:
        return MetricFinding(predicted=expected, note=say("note.none_ok", ends=ends(rounds.runs)))
    value = len(rounds.ok) / len(concluded)
    note = None if value == 1 else ends(rounds.runs)
    return MetricFinding(
        value=value, low=value, high=value, runs=len(concluded), predicted=expected, note=note
    )


def _step_s(rounds: Rounds, all_: Measurements) -> MetricFinding:
    step_s = _expected(rounds, lambda one: one.step_s)
    if is_emulated(rounds):
        return MetricFinding(predicted=step_s, note=say("note.emulated_time"))
    return with_steps_of_one(from_spread(rounds.step_s, step_s), rounds)


def _tokens_per_s(rounds: Rounds, all_: Measurements) -> MetricFinding:
    step_s = _expected(rounds, lambda one: one.step_s)
    rate = rounds.runs[0].tokens_per_step / step_s if step_s else None
    if is_emulated(rounds):
        return MetricFinding(predicted=rate, note=say("note.emulated_time"))
    return with_steps_of_one(from_spread(rounds.tokens_per_s, rate), rounds, is_rate=True)


def _job_hours(rounds: Rounds, all_: Measurements) -> MetricFinding:
    """The whole job at the median step, and what one step in so many takes beside. What the same examples are
    worth is another question, which a zeroth-order step answers with less.

    Where steps were padded and `run` pads less, it may take as little as the square of what is no padding: no
    part of a step grows faster with the length of its sequences.
    """
    if all_.steps is None:
        return MetricFinding(note=say("note.no_size"))
    found = scaled(_step_s(rounds, all_), all_.steps / 3600)
    expected, rare = predicted(rounds), over_runs(rounds.ok, lambda run: rare_job_s(run, all_.steps or 0))
    if found.low is not None and (padded := padded_to(rounds)) is not None:
        tokens, share = padded
        found = replace(found, low=found.low * (1 - share) ** 2, undecided=say("note.padded", tokens=tokens))
    if expected is None or rare is None or found.value is None:
        return found
    return replace(
        found,
        value=found.value + rare.median / 3600,
        low=None if found.low is None else found.low + rare.low / 3600,
        high=None if found.high is None else found.high + rare.high / 3600,
        predicted=found.predicted and found.predicted + expected.rare_job_s(all_.steps) / 3600,
    )


def _job_cost(rounds: Rounds, all_: Measurements) -> MetricFinding:
    per_hour = all_.prices.own_per_hour if all_.prices is not None else None
    if per_hour is None:
        return MetricFinding(note=say("note.no_prices"))
    return scaled(_job_hours(rounds, all_), per_hour)


def _heldout_change(rounds: Rounds, all_: Measurements) -> MetricFinding:
    if is_random(rounds.runs[0]):
        return MetricFinding(applies=False, note=say("note.random_data"))

    def change(run: Run) -> float | None:
        first, last = run.summary.eval_loss_first, run.summary.eval_loss_last
        return None if first is None or last is None else last - first

    found = over_runs(rounds.ok, change)
    if found is None and rounds.ok:
        return MetricFinding(note=say("note.no_evaluation"))
    return with_sequences(from_spread(found), change_over_sequences(rounds))


def _heldout_ratio(rounds: Rounds, all_: Measurements) -> MetricFinding:
    if is_random(rounds.runs[0]):
        return MetricFinding(applies=False, note=say("note.random_data"))
    native = all_.of(YARDSTICK)
    mine, other = over_runs(rounds.ok, heldout_loss), over_runs(native.ok, heldout_loss)
    if mine is not None and other is not None and other.low > 0:
        found = MetricFinding(
            value=mine.median / other.median, low=mine.low / other.high, high=mine.high / other.low,
            runs=mine.count,
        )  # fmt: skip
        return (
            found
            if rounds.engine == YARDSTICK
            else with_sequences(found, ratio_over_sequences(rounds, native))
        )
    if (why := _native_is_out(native, all_)) is not None:
        return MetricFinding(applies=False, note=why)
    if not rounds.ok:
        return MetricFinding()
    return MetricFinding(note=say("note.no_evaluation" if native.ok else "note.native_missing"))


def _native_is_out(native: Rounds, all_: Measurements) -> str | None:
    """Why nothing can be told beside native, which does not fit; `None`: it fits, or is not known."""
    concluded = {run.end_state for run in native.runs} - NOTHING_LEARNED
    if concluded and concluded <= DOES_NOT_FIT:
        key = "note.native_skipped" if concluded == {"skipped_infeasible"} else "note.native_does_not_fit"
        return say(key)
    return None if native.runs or all_.forecast is None else say("note.native_forecast")


def _step_time_ratio(rounds: Rounds, all_: Measurements) -> MetricFinding:
    native = all_.of(YARDSTICK)
    mine, other = (_expected(each, lambda one: one.lasting_step_s) for each in (rounds, native))
    expected = _share(mine, other)
    evidence = tuple(dict.fromkeys(run.id for run in (*rounds.runs, *native.runs)))
    if rounds.engine == YARDSTICK and rounds.step_s is not None:
        return MetricFinding(value=1.0, low=1.0, high=1.0, runs=len(rounds.ok), evidence=evidence)
    found = ratio(rounds.lasting_step_times, native.lasting_step_times)
    if found is not None:
        emulated = is_emulated(rounds)
        return MetricFinding(
            value=found.value,
            low=found.low,
            high=found.high,
            over_steps=over_steps(rounds, native),
            runs=min(len(rounds.ok), len(native.ok)),
            predicted=expected,
            applies=not emulated,
            note=say("note.emulated") if emulated else None,
            evidence=evidence,
        )
    if (why := _native_is_out(native, all_)) is not None:
        return MetricFinding(applies=False, note=why, evidence=evidence)
    note = say("note.native_missing") if rounds.ok else None
    return MetricFinding(predicted=expected, note=note, evidence=evidence)


def _gpu_memory(
    rounds: Rounds, all_: Measurements, unit: Callable[[Run, float], float | None]
) -> MetricFinding:
    bytes_ = _expected(rounds, lambda one: one.peak_gpu_bytes)
    found = over_runs(rounds.ok, lambda one: _apply(unit, one, gpu_taken_bytes(one)))
    if all(one.environment.gpu_name is None for one in rounds.ok or rounds.runs) and found is None:
        return MetricFinding(applies=not rounds.ok, note=say("note.no_gpu") if rounds.ok else None)
    return of_largest(found, _apply(unit, rounds.runs[0], bytes_ or None))


def _apply(unit: Callable[[Run, float], float | None], run: Run, value: float | None) -> float | None:
    return None if value is None else unit(run, value)


def _gpu_memory_share(rounds: Rounds, all_: Measurements) -> MetricFinding:
    return _gpu_memory(rounds, all_, lambda run, value: _share(value, gpu_limit_bytes(run, all_.machine)))


def _gpu_memory_gib(rounds: Rounds, all_: Measurements) -> MetricFinding:
    return _gpu_memory(rounds, all_, lambda run, value: value / GIB)


def _host_memory_share(rounds: Rounds, all_: Measurements) -> MetricFinding:
    bytes_ = _expected(rounds, lambda one: one.peak_host_bytes)
    found = over_runs(rounds.ok, lambda run: _share(run.summary.peak_host_bytes, host_limit_bytes(run)))
    return of_largest(found, _share(bytes_, host_limit_bytes(rounds.runs[0])))


def _host_memory_gib(rounds: Rounds, all_: Measurements) -> MetricFinding:
    bytes_ = _expected(rounds, lambda one: one.peak_host_bytes)
    found = over_runs(rounds.ok, lambda run: _share(run.summary.peak_host_bytes, GIB))
    return of_largest(found, _share(bytes_, GIB))


def _loss_change(rounds: Rounds, all_: Measurements) -> MetricFinding:
    """Nothing can be learned from random data: their loss changes by chance."""
    if is_random(rounds.runs[0]):
        return MetricFinding(applies=False, note=say("note.random_data"))
    return from_spread(over_runs(rounds.ok, lambda run: loss_change(run.samples)))


def _accuracy(rounds: Rounds, all_: Measurements) -> MetricFinding:
    """With the wider of the two ranges, over runs and over examples."""
    found = over_runs(rounds.ok, lambda run: run.summary.eval_accuracy_last)
    if found is None:
        return MetricFinding(note=say("note.no_evaluation") if rounds.ok else None)
    return with_examples(from_spread(found), over_examples(rounds))


def _prediction_factor(rounds: Rounds, all_: Measurements) -> MetricFinding:
    step_s, predicted_s = rounds.step_s, _expected(rounds, lambda one: one.step_s)
    if step_s is None:
        return MetricFinding()
    if is_emulated(rounds):
        return MetricFinding(applies=False, note=say("note.emulated"))
    if not predicted_s:
        return MetricFinding(note=say("note.no_prediction"))
    ends_s = step_s.interval or (step_s.low, step_s.high)
    factors = sorted(
        max(value / predicted_s, predicted_s / value) for value in (ends_s[0], step_s.median, ends_s[1])
    )
    value = max(step_s.median / predicted_s, predicted_s / step_s.median)
    return MetricFinding(value=value, low=factors[0], high=factors[-1], runs=step_s.count)


_METRICS: dict[Metric, Callable[[Rounds, Measurements], MetricFinding]] = {
    "runs_ok": _runs_ok,
    "step_s": _step_s,
    "step_time_ratio": _step_time_ratio,
    "tokens_per_s": _tokens_per_s,
    "gpu_memory_share": _gpu_memory_share,
    "gpu_memory_gib": _gpu_memory_gib,
    "host_memory_share": _host_memory_share,
    "host_memory_gib": _host_memory_gib,
    "loss_change": _loss_change,
    "accuracy": _accuracy,
    "heldout_change": _heldout_change,
    "heldout_ratio": _heldout_ratio,
    "job_hours": _job_hours,
    "job_cost": _job_cost,
    "prediction_factor": _prediction_factor,
}
