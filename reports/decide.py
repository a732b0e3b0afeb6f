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

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from engines import ENGINES, YARDSTICK, engines_of_role, entry
from engines.errors import UserError
from engines.settings.zeroth_order import approximation
from harness.records.run import Run
from harness.runs.emulate import what_is_short
from profiles.machine import Machine
from profiles.units import format_bytes, format_seconds
from reports import exactness
from reports.criteria import (
    ANY_OFFLOAD,
    Comparison,
    Criteria,
    Criterion,
    Level,
    Metric,
    default_criteria,
)
from reports.format import metric_value, span, times
from reports.messages import say
from reports.metrics import (
    DISTURBED_FACTOR,
    Measurements,
    disturbed,
    ends,
    faster_or_slower,
    find,
    gpu_taken_bytes,
    group,
    held_card_bytes,
    is_emulated,
    predicted,
)

State = Literal["GO", "CONDITIONAL GO", "NO-GO", "INCONCLUSIVE"]
Outcome = Literal["pass", "fail", "unknown", "not applicable"]

EXIT_CODES: dict[State, int] = {"GO": 0, "NO-GO": 3, "CONDITIONAL GO": 4, "INCONCLUSIVE": 5}
GATES: dict[str, State] = {"no-go": "NO-GO", "conditional": "CONDITIONAL GO", "inconclusive": "INCONCLUSIVE"}

FEW_RUNS = 5
"""Below this many runs per method, ranges are shown and called indicative."""
_BEST_FIRST: tuple[State, ...] = ("GO", "CONDITIONAL GO", "INCONCLUSIVE", "NO-GO")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One criterion, judged."""

    id: str
    metric: Metric
    engine: str
    """The method it was judged on."""
    asked_of: str
    """As the criterion names it."""
    comparison: Comparison
    threshold: float
    level: Level
    why: str
    outcome: Outcome
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
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    criteria_sha256: str | None
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
        warnings=_warnings(runs, criteria, measurements),
        criteria_sha256=criteria.sha256 if criteria is not None else None,
    )


def state_of(rows: Sequence[Row]) -> State:
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


def _judge(criterion: Criterion, method: str, measurements: Measurements) -> Row:
    engine = method if criterion.engine == ANY_OFFLOAD else criterion.engine
    finding = find(criterion.metric, engine, measurements)
    note = finding.note
    outcome: Outcome
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
    return Row(
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


def _rank(engine: str, rows: Sequence[Row], all_: Measurements) -> tuple[int, int, float, float, str]:
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


def _asked(row: Row) -> str:
    return f"{row.comparison} {metric_value(row.metric, row.threshold)}"


def _sentence(state: State, rows: Sequence[Row], method: str | None, all_: Measurements) -> str:
    def first(level: Level, *outcomes: Outcome) -> Row | None:
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
            measured=metric_value(row.metric, row.measured),
            asked=_asked(row),
            note=row.note or "",
            because=f" ({row.note})" if row.note else "",
        )
    if state == "INCONCLUSIVE":
        return say("verdict.nothing_to_judge_by")
    return _go_sentence(rows, method, all_)


def _go_sentence(rows: Sequence[Row], method: str | None, all_: Measurements) -> str:
    """What offloading gives and what it costs: GPU memory and step time, beside native's."""
    engine = method or next(row.engine for row in rows if row.level == "must" and row.outcome == "pass")
    step_s = find("step_s", engine, all_).value
    if step_s is None:
        count = sum(row.outcome == "pass" for row in rows)
        return say("verdict.go_plain", engine=engine, count=count)
    gpu = _largest(all_, engine)
    native_gpu = _largest(all_, YARDSTICK)
    native = find("step_time_ratio", engine, all_)
    values = {
        "engine": engine,
        "step": format_seconds(step_s),
        "memory": say("verdict.memory", memory=format_bytes(gpu)) if gpu is not None else "",
    }
    if native.value is None and not native.applies:
        return say("verdict.go_native_does_not_fit", **values)
    than = ""
    if engine != YARDSTICK and native_gpu is not None:
        than = say("verdict.memory_of_native", memory=format_bytes(native_gpu))
    if engine == YARDSTICK or native.value is None or not native.applies:
        return say("verdict.go_alone", **values, than=than)
    return say("verdict.go_beside_native", **values, ratio=times(native.value), than=than)


def _largest(all_: Measurements, engine: str) -> int | None:
    taken = [gpu_taken_bytes(run) for run in all_.of(engine).ok]
    return max((bytes_ for bytes_ in taken if bytes_ is not None), default=None)


def _warnings(runs: Sequence[Run], criteria: Criteria | None, all_: Measurements) -> tuple[str, ...]:
    """What a reader has to know before trusting the verdict, the weightiest first."""
    checks: tuple[Callable[[], str | None], ...] = (
        lambda: _about_criteria(runs, criteria),
        lambda: _about_failures(all_),
        lambda: _if_any(
            runs, lambda run: run.environment.gpu_name is None and run.end_state == "ok", "no_gpu"
        ),
        lambda: _if_any(
            runs,
            lambda run: (
                run.engine == YARDSTICK and run.end_state == "ok" and run.environment.gpu_name is not None
            ),
            "native_fits",
        ),
        lambda: _about_references(all_),
        lambda: _about_memory_saved(all_),
        lambda: _about_the_card(runs),
        lambda: _about_disturbed(all_),
        lambda: _about_predictions(all_),
        lambda: _about_traces(runs),
        lambda: _about_machine(runs, all_.machine),
        lambda: exactness.inexact(all_),
        lambda: _about_approximations(runs),
        lambda: _about_emulation(runs),
        lambda: _about_commit(runs),
        lambda: _if_any(runs, lambda run: "wsl" in run.environment.platform.lower(), "wsl"),
        lambda: _if_any(runs, lambda run: run.model.random_weights, "random_weights"),
        lambda: _about_replication(all_),
    )
    return tuple(text for check in checks if (text := check()) is not None)


def _if_any(runs: Sequence[Run], holds: Callable[[Run], bool], key: str) -> str | None:
    return say(f"warning.{key}") if any(holds(run) for run in runs) else None


def _about_criteria(runs: Sequence[Run], criteria: Criteria | None) -> str | None:
    if criteria is None:
        return say("warning.no_criteria")
    if not criteria.written_down:
        return say("warning.default_criteria")
    stamps = [run.criteria.sha256 if run.criteria is not None else None for run in runs]
    other = sum(stamp is not None and stamp != criteria.sha256 for stamp in stamps)
    missing = stamps.count(None)
    if other:
        return say("warning.criteria_after_measurement", count=other, total=len(stamps))
    if missing:
        return say("warning.no_criteria_stamped", count=missing, total=len(stamps))
    if criteria.sha256 == default_criteria().sha256:
        return say("warning.chosen_by_nobody")
    return None


def _about_failures(all_: Measurements) -> str | None:
    mixed = [
        say("warning.item", engine=engine, value=ends(rounds.runs))
        for engine, rounds in sorted(all_.rounds.items())
        if rounds.ok and len(rounds.ok) < len(rounds.runs)
    ]
    return say("warning.some_failed", items="; ".join(mixed)) if mixed else None


def _about_references(all_: Measurements) -> str | None:
    """A method's reference engine was there and faster, on a GPU whose speed is its own."""
    found = [
        say(
            "warning.reference_fits",
            engine=engine,
            reference=row.reference,
            reference_step=format_seconds(reference.step_s.median),
            step=format_seconds(offloaded.step_s.median),
        )
        for engine, row in ENGINES.items()
        if row.reference is not None
        for reference, offloaded in ((all_.of(row.reference), all_.of(engine)),)
        if reference.step_s is not None and offloaded.step_s is not None
        if not is_emulated(reference) and not is_emulated(offloaded)
        if reference.ok[0].environment.gpu_name is not None
        if faster_or_slower(reference, offloaded) == "FAST"
    ]
    return " ".join(found) or None


def _about_memory_saved(all_: Measurements) -> str | None:
    native = _largest(all_, YARDSTICK)
    items = [
        say("warning.item", engine=engine, value=format_bytes(taken))
        for engine in (*engines_of_role("offload"), *engines_of_role("baseline"))
        if entry(engine).copies != "none"
        if native is not None and (taken := _largest(all_, engine)) is not None and taken >= native
    ]
    return (
        say("warning.no_memory_saved", native=format_bytes(native), items=", ".join(items)) if items else None
    )


def _about_the_card(runs: Sequence[Run]) -> str | None:
    """The whole GPU's memory in use beside the size of the card that the runs were to do with."""
    beyond: dict[str, int] = {}
    cards: set[int] = set()
    for run in runs:
        card, used = held_card_bytes(run), run.summary.peak_gpu_nvml_bytes
        if run.end_state == "ok" and card is not None and used is not None and used > card:
            beyond[run.engine] = max(used, beyond.get(run.engine, 0))
            cards.add(card)
    if not beyond:
        return None
    items = [
        say("warning.item", engine=engine, value=format_bytes(used))
        for engine, used in sorted(beyond.items())
    ]
    return say("warning.beyond_card", card=format_bytes(min(cards)), items=", ".join(items))


def _about_disturbed(all_: Measurements) -> str | None:
    items = [
        say(
            "warning.item",
            engine=engine,
            value=span(format_seconds(rounds.step_s.low), format_seconds(rounds.step_s.high)),
        )
        for engine, rounds in sorted(all_.rounds.items())
        if rounds.step_s is not None and disturbed(rounds)
    ]
    if not items:
        return None
    return say("warning.disturbed", factor=DISTURBED_FACTOR, items=", ".join(items))


def _about_predictions(all_: Measurements) -> str | None:
    """Median steps outside the range predicted, which on an emulated machine is for the emulated GPU."""
    items = []
    for engine, rounds in sorted(all_.rounds.items()):
        expected, step_s = predicted(rounds), rounds.step_s
        if expected is None or step_s is None or is_emulated(rounds):
            continue
        low, high = expected.step_s_low, expected.step_s_high
        if low is not None and high is not None and not low <= step_s.median <= high:
            range_ = span(format_seconds(low), format_seconds(high))
            measured = format_seconds(step_s.median)
            items.append(say("warning.mispredicted_item", engine=engine, measured=measured, range=range_))
    return say("warning.mispredicted", items="; ".join(items)) if items else None


def _about_machine(runs: Sequence[Run], machine: Machine | None) -> str | None:
    """A profile from elsewhere: what it says and what was predicted from it is not of where the runs ran."""
    if machine is None:
        return None
    gpu = machine.gpu.name if machine.gpu is not None else ""
    for run in runs:
        # NVML and torch name one GPU alike, but torch may add its slice.
        here = run.environment.gpu_name or ""
        same_gpu = bool(gpu) == bool(here) and (gpu.startswith(here) or here.startswith(gpu))
        if run.environment.emulated == machine.name:
            continue
        if run.end_state == "ok" and not (same_gpu and machine.cpu.name == run.environment.cpu):
            return say("warning.other_machine", machine=machine.name)
    return None


def _about_traces(runs: Sequence[Run]) -> str | None:
    traced = sum(run.traced for run in runs)
    return say("warning.traced", count=traced, total=len(runs)) if traced else None


def _about_approximations(runs: Sequence[Run]) -> str | None:
    told = {f"{run.engine}: {what}" for run in runs if (what := approximation(run.plan.settings)) is not None}
    return say("warning.approximate", items="; ".join(sorted(told))) if told else None


def _about_emulation(runs: Sequence[Run]) -> str | None:
    names = sorted({run.environment.emulated for run in runs if run.environment.emulated is not None})
    if not names:
        return None
    told = say("warning.emulated", names=", ".join(names))
    short = dict.fromkeys(
        f"{run.engine}: {line}"
        for run in runs
        if run.emulation is not None
        for line in what_is_short(run.emulation)
    )
    return f"{told} {say('warning.not_held', items='; '.join(short))}" if short else told


def _about_commit(runs: Sequence[Run]) -> str | None:
    commits = {run.environment.commit for run in runs}
    if len(commits) > 1:
        return say("warning.several_commits", count=len(commits))
    if any(run.environment.dirty for run in runs):
        return say("warning.dirty")
    if runs and commits == {None}:
        return say("warning.commit_unknown")
    return None


def _about_replication(all_: Measurements) -> str | None:
    counts = [len(rounds.ok) for rounds in all_.rounds.values() if rounds.ok]
    if not counts or min(counts) >= FEW_RUNS:
        return None
    return say("warning.few_runs", count=min(counts), enough=FEW_RUNS)
