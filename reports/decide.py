"""The verdict: a pure function of the runs and of the criteria. Never depends on the order of either's runs.

- A must that failed is NO-GO, whatever else is still unknown: no further measurement can change that.
- Else a must that could not be judged is INCONCLUSIVE; it never counts as passed.
- Else a want that failed or could not be judged is a CONDITIONAL GO.
- Else GO, if at least one must was passed; with nothing to judge by it is INCONCLUSIVE.
- A criterion that is not applicable counts neither way.

Where criteria speak of any method, one method has to meet them all: two methods that each meet half of what
is needed are of no use. Every method that was run is judged, native and the methods of libraries too, and the
best one stands for all; never one that another beats in time, memory and quality.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from engines import YARDSTICK, entry, public_engines
from engines.errors import UserError
from harness.records.comparison import Comparison, beside_native
from harness.records.run import Run
from profiles.language import translated
from profiles.machine import Machine
from reports.criteria import (
    ANY_METHOD,
    Comparator,
    Criteria,
    Criterion,
    Level,
    Metric,
)
from reports.findings.governance import GovernanceLine
from reports.format import metric_value, span
from reports.judging.quality import learned
from reports.judging.ranking import Standing, State, beaten_by, ordered, trains_less
from reports.judging.stated import (
    gpu_kind,
    gpu_peak,
    host_peak,
    job_s,
    memory_text,
    ratio_text,
    step_s,
    time_text,
)
from reports.judging.untried import Untried, what_to_run
from reports.measured.measurements import Measurements, group
from reports.measured.metrics import find
from reports.messages import say
from reports.warnings import warnings

Judgement = Literal["pass", "fail", "unknown", "not applicable"]

EXIT_CODES: dict[State, int] = {"GO": 0, "NO-GO": 3, "CONDITIONAL GO": 4, "INCONCLUSIVE": 5}
GATES: dict[str, State] = {"no-go": "NO-GO", "conditional": "CONDITIONAL GO", "inconclusive": "INCONCLUSIVE"}


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
    beaten_by: Annotated[str | None, Field(exclude_if=lambda engine: engine is None)] = None
    """A method that is faster, takes less memory and gets no worse; `None`: there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    state: State
    sentence: str
    """One sentence with the numbers that decide it."""
    method: str | None
    """The method to use, or that came nearest; `None` where no criterion asks for any."""
    methods: tuple[MethodState, ...]
    """Every method that was run, judged by the same criteria, the best first."""
    rows: tuple[JudgedCriterion, ...]
    warnings: tuple[str, ...]
    comparisons: Annotated[tuple[Comparison, ...], Field(exclude_if=lambda found: not found)] = ()
    """Each method that was measured beside native, in the order of reports."""
    criteria_sha256: str | None
    settings: Annotated[str, Field(exclude_if=lambda text: not text)] = ""
    """Those that `method` ran with, as `--set` takes them."""
    next_command: Annotated[str, Field(exclude_if=lambda text: not text)] = ""
    """The one command that would tell what is not known and counts; empty: nothing is missing."""
    governance: Annotated[tuple[GovernanceLine, ...], Field(exclude_if=lambda lines: not lines)] = ()
    """The checklist; empty, and then not written, where the records are of before it."""
    schema_version: int = 1

    @property
    def about(self) -> str:
        """The method to use; where there is none, the one that was judged; empty: nothing was."""
        return self.method or (self.rows[0].engine if self.rows else "")


def decide(
    runs: Sequence[Run],
    criteria: Criteria | None,
    machine: Machine | None = None,
    untried: Untried | None = None,
) -> Verdict:
    """Judge `runs` by `criteria`. `machine` only fills in the size of a GPU that the runs do not name;
    `untried` says what is predicted of methods that were not run."""
    untried = untried or Untried()
    measurements = group(runs, machine, criteria, untried.yardstick_is_out)
    asked_for = criteria.criteria if criteria is not None else ()
    judged = {
        engine: tuple(_judge(criterion, engine, measurements) for criterion in asked_for)
        for engine in public_engines()
        if engine in measurements.rounds
    }
    standings = [_standing(engine, rows) for engine, rows in judged.items()]
    # What needs a GPU is no answer where there is none; what is only not installed may be.
    ranked = sorted(ordered(standings, measurements), key=lambda one: _is_ruled_out(one.engine, measurements))
    beaten = beaten_by(standings, measurements)
    method = ranked[0].engine if ranked and any(one.is_of_any for one in asked_for) else None
    rows = (
        judged[ranked[0].engine]
        if ranked
        else tuple(_judge(criterion, ANY_METHOD, measurements) for criterion in asked_for)
    )
    state = state_of(rows)
    return Verdict(
        state=state,
        sentence=_sentence(state, rows, method, measurements),
        method=method,
        methods=tuple(
            MethodState(engine=one.engine, state=one.state, beaten_by=beaten.get(one.engine))
            for one in ranked
        )
        if method is not None
        else (),
        rows=rows,
        settings=_settings(method, measurements),
        next_command=what_to_run(
            [(row.metric, row.engine) for row in rows if row.outcome == "unknown"], measurements, untried
        ),
        warnings=warnings(runs, criteria, measurements, method),
        comparisons=tuple(
            found
            for engine in measurements.engines
            if (found := beside_native(measurements.of(engine), measurements.of(YARDSTICK))) is not None
        ),
        criteria_sha256=criteria.sha256 if criteria is not None else None,
    )


def _is_ruled_out(engine: str, all_: Measurements) -> bool:
    runs = all_.of(engine).runs
    return entry(engine).needs_gpu and all(run.environment.gpu_name is None for run in runs)


def _standing(engine: str, rows: Sequence[JudgedCriterion]) -> Standing:
    missed = sum(row.outcome in ("fail", "unknown") for row in rows)
    return Standing(engine=engine, state=state_of(rows), missed=missed)


def _settings(method: str | None, all_: Measurements) -> str:
    if method is None:
        return ""
    settings = all_.of(method).runs[0].plan.settings
    return " ".join(f"--set {method}.{key}={value}" for key, value in sorted(settings.items()))


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
    engine = method if criterion.is_of_any else criterion.engine
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
            note = finding.undecided or say("note.too_noisy")
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
        several = "" if method is None or len(all_.rounds) == 1 else "_of_all"
        key = {"NO-GO": f"no_go{several}", "CONDITIONAL GO": f"conditional_{known}"}.get(
            state, f"inconclusive_{known}"
        )
        return say(
            f"verdict.{key}",
            id=row.id,
            engine=row.engine,
            answer=_answer(method or row.engine, all_),
            metric=say(f"metric.{row.metric}"),
            measured=measured_value(row),
            asked=asked(row),
            note=row.note or "",
            because=say("verdict.because", note=row.note) if row.note else "",
            untold=_untold(method or row.engine, all_),
        )
    if state == "INCONCLUSIVE":
        return say("verdict.nothing_to_judge_by")
    engine = method or next(row.engine for row in rows if row.level == "must" and row.outcome == "pass")
    if answer := _answer(engine, all_):
        return say("verdict.go", engine=engine, answer=answer, untold=_untold(engine, all_))
    count = sum(row.outcome == "pass" for row in rows)
    return say("verdict.go_plain", engine=engine, count=count)


def _untold(engine: str, all_: Measurements) -> str:
    """Of a method that does not train every weight along its gradient: that how good it gets is not known.
    Empty where it is known, or trains all."""
    if not all_.of(engine).ok or learned(engine, all_) is not None:
        return ""
    row = entry(engine)
    if row.order == "zeroth":
        return say("verdict.without_gradients")
    return say("verdict.trains_fewer", trains=translated(row.trains)) if trains_less(engine) else ""


def measured_value(row: JudgedCriterion) -> str:
    """What was measured; of two runs both ends, as they have no median."""
    if row.runs == 2 and row.measured_low is not None and row.measured_high is not None:
        return span(*(metric_value(row.metric, end) for end in (row.measured_low, row.measured_high)))
    return metric_value(row.metric, row.measured)


def state_text(state: State) -> str:
    """As a reader sees it in the headline."""
    return say(f"state.{_key(state)}")


def state_word(state: State) -> str:
    """In a table or a list."""
    return say(f"state_short.{_key(state)}")


def _key(state: State) -> str:
    return state.lower().replace(" ", "_").replace("-", "_")


def asked(row: JudgedCriterion) -> str:
    """`at most 5.00x`."""
    return say(f"asked.{row.comparison.replace(' ', '_')}", value=metric_value(row.metric, row.threshold))


def _answer(engine: str, all_: Measurements) -> str:
    """The two numbers that decide, how long it takes and how much memory, and native's; empty where no step
    was timed."""
    time = step_s(engine, all_)
    if time.value is None:
        return ""
    memory = gpu_peak(engine, all_)
    kind = gpu_kind(engine, all_) if memory.value is not None else "host"
    taken = memory if memory.value is not None else host_peak(engine, all_)
    if all_.steps is None:
        takes = say("verdict.per_step", time=time_text(time))
    else:
        takes = say("verdict.whole_job", time=time_text(job_s(engine, all_, all_.steps)))
    return say(
        "verdict.answer",
        takes=takes,
        quality=_quality(engine, all_),
        memory=say(f"verdict.{kind}_memory", memory=memory_text(taken)),
        beside=_beside_native(engine, all_),
    )


def _beside_native(engine: str, all_: Measurements) -> str:
    """`; native takes 0.5 times as long and 20 GiB`, that it does not fit, or nothing."""
    if engine == YARDSTICK:
        return ""
    ratio = find("step_time_ratio", engine, all_)
    if ratio.value is None:
        if ratio.applies:
            return ""
        return say("verdict.native_does_not_fit", why=ratio.note or "")
    native = gpu_peak(YARDSTICK, all_)
    memory = native if native.value is not None else host_peak(YARDSTICK, all_)
    values = {"memory": memory_text(memory), "quality": _quality(YARDSTICK, all_)}
    if not ratio.applies:
        return say("verdict.native_memory", **values)
    return say("verdict.beside_native", ratio=ratio_text(ratio), **values)


def _quality(engine: str, all_: Measurements) -> str:
    found = learned(engine, all_)
    return say(f"verdict.{found.kind}", value=found.told) if found else ""
