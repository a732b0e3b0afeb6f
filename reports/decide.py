"""The verdict: a pure function of the runs and of the criteria. Never depends on the order of either's runs.

- A must that failed is NO-GO, whatever else is still unknown: no further measurement can mend it.
- Else a must that could not be judged is INCONCLUSIVE; it never counts as passed.
- Else a want that failed or could not be judged is a CONDITIONAL GO.
- Else GO, if at least one must was passed; with nothing to judge by it is INCONCLUSIVE.
- A criterion that is not applicable counts neither way.

Where criteria speak of any offload method, one method has to meet them all: two methods that each meet
half of what is needed are of no use. Every method that was run is judged, and the best one stands for all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from engines import YARDSTICK, engines_of_role
from engines.errors import UserError
from harness.records.comparison import Comparison, beside_native
from harness.records.run import Run
from profiles.machine import Machine
from profiles.units import format_bytes, format_seconds
from reports.criteria import (
    ANY_OFFLOAD,
    Comparator,
    Criteria,
    Criterion,
    Level,
    Metric,
)
from reports.format import metric_value, middle, span, times
from reports.governance import GovernanceLine
from reports.messages import say
from reports.metrics import Measurements, find, gpu_taken_bytes, group, largest
from reports.warnings import warnings

State = Literal["GO", "CONDITIONAL GO", "NO-GO", "INCONCLUSIVE"]
Judgement = Literal["pass", "fail", "unknown", "not applicable"]

EXIT_CODES: dict[State, int] = {"GO": 0, "NO-GO": 3, "CONDITIONAL GO": 4, "INCONCLUSIVE": 5}
GATES: dict[str, State] = {"no-go": "NO-GO", "conditional": "CONDITIONAL GO", "inconclusive": "INCONCLUSIVE"}

_BEST_FIRST: tuple[State, ...] = ("GO", "CONDITIONAL GO", "INCONCLUSIVE", "NO-GO")


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedCriterion:
    """One criterion, judged."""

    id: str
    metric: Metric
    engine: str
    """The method it was judged on."""
    asked_of: str
    """As the criterion names it."""
    comparison: Comparator
    threshold: float
    level: Level
    why: str
    outcome: Judgement
    measured: float | None
    measured_low: float | None
    measured_high: float | None
    over_steps: bool
    """The range is over the steps of one run."""
    runs: int
    predicted: float | None
    note: str | None
    """Why it could not be judged, or what to know beside the number."""
    evidence: tuple[str, ...]
    """Ids of the runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodState:
    engine: str
    state: State


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    state: State
    sentence: str
    """One sentence with the numbers that decide it."""
    method: str | None
    """The offload method that the rows are about; `None` where no criterion asks for any."""
    methods: tuple[MethodState, ...]
    """Every offload method that was run, judged by the same criteria, the best first."""
    rows: tuple[JudgedCriterion, ...]
    warnings: tuple[str, ...]
    comparisons: Annotated[tuple[Comparison, ...], Field(exclude_if=lambda found: not found)] = ()
    """Each method that was measured beside native, in the order of reports."""
    criteria_sha256: str | None
    governance: Annotated[tuple[GovernanceLine, ...], Field(exclude_if=lambda lines: not lines)] = ()
    """The checklist; empty, and then not written, where the records are of before it."""
    schema_version: int = 1


def decide(runs: Sequence[Run], criteria: Criteria | None, machine: Machine | None = None) -> Verdict:
    """Judge `runs` by `criteria`. `machine` only fills in the size of a GPU that the runs do not name."""
    measurements = group(runs, machine)
    asked = criteria.criteria if criteria is not None else ()
    judged = {
        engine: tuple(_judge(criterion, engine, measurements) for criterion in asked)
        for engine in engines_of_role("offload")
        if engine in measurements.rounds
    }
    ranked = sorted(judged, key=lambda engine: _rank(engine, judged[engine], measurements))
    method = ranked[0] if ranked and any(one.engine == ANY_OFFLOAD for one in asked) else None
    rows = (
        judged[ranked[0]]
        if ranked
        else tuple(_judge(criterion, ANY_OFFLOAD, measurements) for criterion in asked)
    )
    state = state_of(rows)
    return Verdict(
        state=state,
        sentence=_sentence(state, rows, method, measurements),
        method=method,
        methods=tuple(MethodState(engine=engine, state=state_of(judged[engine])) for engine in ranked)
        if method is not None
        else (),
        rows=rows,
        warnings=warnings(runs, criteria, measurements),
        comparisons=tuple(
            found
            for engine in measurements.engines
            if (found := beside_native(measurements.of(engine), measurements.of(YARDSTICK))) is not None
        ),
        criteria_sha256=criteria.sha256 if criteria is not None else None,
    )


def state_of(rows: Sequence[JudgedCriterion]) -> State:
    """The verdict that judged criteria amount to; see the rule at the top."""
    musts = {row.outcome for row in rows if row.level == "must"}
    wants = {row.outcome for row in rows if row.level == "want"}
    if "fail" in musts:
        return "NO-GO"
    if "unknown" in musts or "pass" not in musts:
        return "INCONCLUSIVE"
    if "fail" in wants or "unknown" in wants:
        return "CONDITIONAL GO"
    return "GO"


def parse_fail_on(text: str | None) -> frozenset[State]:
    """The verdicts named in `--fail-on no-go,conditional`. Raises `UserError` for another word."""
    words = [word.strip().lower() for word in (text or "").split(",") if word.strip()]
    for word in words:
        if word not in GATES:
            raise UserError(
                f"--fail-on '{word}'", "is not a verdict to fail on", f"choose from: {', '.join(GATES)}"
            )
    return frozenset(GATES[word] for word in words)


def exit_code(verdict: Verdict, gates: Collection[State]) -> int:
    """0, or the code of the verdict where `gates` asks to fail on it."""
    return EXIT_CODES[verdict.state] if verdict.state in gates else 0


def _judge(criterion: Criterion, method: str, measurements: Measurements) -> JudgedCriterion:
    engine = method if criterion.engine == ANY_OFFLOAD else criterion.engine
    finding = find(criterion.metric, engine, measurements)
    note = finding.note
    outcome: Judgement
    if not finding.applies:
        outcome = "not applicable"
    elif finding.value is None:
        outcome = "unknown"
    else:
        low = finding.value if finding.low is None else finding.low
        high = finding.value if finding.high is None else finding.high
        holds = {criterion.holds(low), criterion.holds(high)}
        outcome = "unknown" if len(holds) == 2 else "pass" if holds == {True} else "fail"
        if outcome == "unknown":
            note = say("note.too_noisy")
    return JudgedCriterion(
        id=criterion.id,
        metric=criterion.metric,
        engine=engine,
        asked_of=criterion.engine,
        comparison=criterion.comparison,
        threshold=criterion.threshold,
        level=criterion.level,
        why=criterion.why,
        outcome=outcome,
        measured=finding.value,
        measured_low=finding.low,
        measured_high=finding.high,
        over_steps=finding.over_steps,
        runs=finding.runs,
        predicted=finding.predicted,
        note=note,
        evidence=finding.evidence,
    )


def _rank(
    engine: str, rows: Sequence[JudgedCriterion], all_: Measurements
) -> tuple[int, int, float, float, str]:
    """Best first: verdict, then fewest wants missed, then what was learned, and only then speed.

    Quality before speed, as a quick step that learns nothing is no gain (MLPerf's order).
    """
    learned = find("loss_change", engine, all_).value
    step_s = find("step_s", engine, all_).value
    return (
        _BEST_FIRST.index(state_of(rows)),
        sum(row.outcome in ("fail", "unknown") for row in rows),
        float("inf") if learned is None else learned,
        float("inf") if step_s is None else step_s,
        engine,
    )


def _asked(row: JudgedCriterion) -> str:
    return f"{row.comparison} {metric_value(row.metric, row.threshold)}"


def measured_value(row: JudgedCriterion) -> str:
    """What was measured; of two runs both ends, as they have no median."""
    if row.runs == 2 and row.measured_low is not None and row.measured_high is not None:
        return span(*(metric_value(row.metric, end) for end in (row.measured_low, row.measured_high)))
    return metric_value(row.metric, row.measured)


def _sentence(state: State, rows: Sequence[JudgedCriterion], method: str | None, all_: Measurements) -> str:
    def first(level: Level, *outcomes: Judgement) -> JudgedCriterion | None:
        return next((row for row in rows if row.level == level and row.outcome in outcomes), None)

    match state:
        case "NO-GO":
            row = first("must", "fail")
        case "INCONCLUSIVE":
            row = first("must", "unknown")
        case "CONDITIONAL GO":
            row = first("want", "fail") or first("want", "unknown")
        case "GO":
            row = None
    if row is not None:
        known = "measured" if row.measured is not None else "unknown"
        key = {"NO-GO": "no_go", "CONDITIONAL GO": f"conditional_{known}"}.get(state, f"inconclusive_{known}")
        return say(
            f"verdict.{key}",
            id=row.id,
            engine=row.engine,
            metric=say(f"metric.{row.metric}"),
            measured=measured_value(row),
            asked=_asked(row),
            note=row.note or "",
            because=f" ({row.note})" if row.note else "",
        )
    if state == "INCONCLUSIVE":
        return say("verdict.nothing_to_judge_by")
    return _go_sentence(rows, method, all_)


def _go_sentence(rows: Sequence[JudgedCriterion], method: str | None, all_: Measurements) -> str:
    """What offloading gives and what it costs: GPU memory and step time, beside native's."""
    engine = method or next(row.engine for row in rows if row.level == "must" and row.outcome == "pass")
    step_s = find("step_s", engine, all_).value
    if step_s is None:
        count = sum(row.outcome == "pass" for row in rows)
        return say("verdict.go_plain", engine=engine, count=count)
    gpu = largest(all_.of(engine), gpu_taken_bytes)
    native_gpu = largest(all_.of(YARDSTICK), gpu_taken_bytes)
    native = find("step_time_ratio", engine, all_)
    values = {
        "engine": engine,
        "step": middle(all_.of(engine).step_s, format_seconds),
        "memory": say("verdict.memory", memory=format_bytes(gpu)) if gpu is not None else "",
    }
    if native.value is None and not native.applies:
        return say("verdict.go_native_does_not_fit", **values)
    than = ""
    if engine != YARDSTICK and native_gpu is not None:
        than = say("verdict.memory_of_native", memory=format_bytes(native_gpu))
    if engine == YARDSTICK or native.value is None or not native.applies:
        return say("verdict.go_alone", **values, than=than)
    told = times(native.value)
    if native.runs == 2 and native.low is not None and native.high is not None:
        told = span(times(native.low), times(native.high))
    return say("verdict.go_beside_native", **values, ratio=told, than=than)
