"""What a study answers: which method reached the target first, as a verdict with its sentence. Pure.

GO: some method reached the target with every seed, of at least three. CONDITIONAL GO: the same with fewer
seeds. NO-GO: every method did all its trials, and none reached it with any seed. INCONCLUSIVE: anything else.
Of methods whose times to the target overlap, the one with the best test value is the answer, so that none
is told whom another beats in time and in quality.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence

from harness.quality.judge import LEAST_SEEDS, MethodResult, SeedSpread
from harness.records.metrics import HIGHER_IS_BETTER
from profiles.language import enumerated, translated
from profiles.units import NOT_MEASURED, format_seconds
from reports.decide import MethodState, Verdict
from reports.format import digits, span
from reports.judging.ranking import State
from reports.messages import say, several_items
from reports.studies.read import LoadedStudy

_SHARES = ("accuracy", "f1", "exact_match", "answer_f1")


def metric_text(metric: str, value: float | None) -> str:
    """`81.2 %` of a share, else four digits."""
    if value is None:
        return NOT_MEASURED
    return f"{100 * value:.1f} %" if metric in _SHARES else digits(value, 4)


def spread_text(metric: str, spread: SeedSpread | None) -> str:
    """`81.2 % (80.0 % to 82.4 %)`."""
    if spread is None:
        return NOT_MEASURED
    shown = metric_text(metric, spread.median)
    range_ = span(metric_text(metric, spread.low), metric_text(metric, spread.high))
    return shown if spread.low == spread.high else say("table.with_range", value=shown, range=range_)


def reached_text(result: MethodResult) -> str:
    """`12.0 s (10.0 s to 14.0 s)`, by how many seeds, or that it was not."""
    found = [each for each in result.time_to_target_s if each is not None]
    if not found:
        return say("study.not_reached")
    spread = result.reached
    if spread is None:
        return say("study.by_some", some=len(found), seeds=len(result.time_to_target_s))
    shown = format_seconds(spread.median)
    range_ = span(format_seconds(spread.low), format_seconds(spread.high))
    return shown if spread.low == spread.high else say("table.with_range", value=shown, range=range_)


def target_text(study: LoadedStudy) -> str:
    """`accuracy at least 80.0 % on development data`."""
    target = study.plan.target
    return say(
        f"study.target_{'least' if HIGHER_IS_BETTER[target.metric] else 'most'}",
        metric=say(f"study_metric.{target.metric}"),
        value=metric_text(target.metric, target.value),
    )


def budget_text(study: LoadedStudy) -> str:
    """`30 min of steps`, or `5,000,000 tokens`."""
    budget = study.plan.budget
    if budget.seconds is None:
        return say("study.tokens", count=f"{budget.tokens:,.0f}")
    return say("study.seconds", time=format_seconds(budget.seconds))


def state_of_method(study: LoadedStudy, result: MethodResult) -> State:
    seeds = len(study.plan.seeds)
    hits = sum(each is not None for each in result.time_to_target_s)
    if hits == seeds:
        return "GO" if seeds >= LEAST_SEEDS else "CONDITIONAL GO"
    is_done = _is_done(study, result)
    fits = next(each.fits for each in study.plan.methods if each.name == result.name)
    return "NO-GO" if hits == 0 and (is_done or not fits) else "INCONCLUSIVE"


def _is_done(study: LoadedStudy, result: MethodResult) -> bool:
    """Every seed came to its end."""
    finals = study.finals(result.name)
    return len(finals) == len(study.plan.seeds) and all(each.end_state == "ok" for each in finals)


def answer_first(study: LoadedStudy) -> tuple[MethodResult, ...]:
    """The answer, then by time to the target, then by the metric on test data."""
    answer = _answer(study)
    others = (each for each in study.result.methods if each is not answer)
    return study.result.methods if answer is None else (answer, *others)


def _answer(study: LoadedStudy) -> MethodResult | None:
    """Of those that reached the target with every seed."""
    hit = [each for each in study.result.methods if each.reached is not None]
    if not hit:
        return None
    first = min((each.reached for each in hit if each.reached), key=lambda each: each.median)
    tied = [each for each in hit if each.reached is not None and each.reached.low <= first.high]
    sign = -1.0 if HIGHER_IS_BETTER[study.result.metric] else 1.0

    def order(each: MethodResult) -> tuple[float, float]:
        assert each.reached is not None
        return (sign * each.test.median if each.test else float("inf"), each.reached.median)

    return min(tied, key=order)


def study_verdict(study: LoadedStudy) -> Verdict:
    """In the language spoken."""
    methods = answer_first(study)
    states = tuple(MethodState(engine=each.name, state=state_of_method(study, each)) for each in methods)
    method = methods[0] if methods and methods[0].reached is not None else None
    state = states[0].state if method is not None else _without_answer(states)
    return Verdict(
        state=state, sentence=_sentence(study, state, method),
        method=None if method is None else method.name, methods=states, rows=(),
        warnings=tuple(_warnings(study)), criteria_sha256=None,
        settings="" if method is None else _settings(study, method),
        next_command=_next(study, state),
    )  # fmt: skip


def _without_answer(states: tuple[MethodState, ...]) -> State:
    return "NO-GO" if all(each.state == "NO-GO" for each in states) else "INCONCLUSIVE"


def _sentence(study: LoadedStudy, state: State, method: MethodResult | None) -> str:
    metric, target = study.result.metric, target_text(study)
    if method is not None:
        others = [each for each in study.result.methods if each.name != method.name]
        key = "go" if state == "GO" else "few_seeds"
        before = metric_text(metric, study.result.zero_shot)
        return say(
            f"study.{key}", engine=method.name, target=target, time=reached_text(method),
            seeds=len(study.plan.seeds), metric=say(f"study_metric.{metric}"),
            test=spread_text(metric, method.test), before=before, others=_beside(others, metric),
        )  # fmt: skip
    some = [each for each in study.result.methods if any(t is not None for t in each.time_to_target_s)]
    if some and all(_is_done(study, each) for each in some):
        return say("study.some_seeds", target=target, engine=some[0].name, reached=reached_text(some[0]))
    if state == "NO-GO":
        sign = -1.0 if HIGHER_IS_BETTER[metric] else 1.0
        ran = [each for each in study.result.methods if each.development is not None]
        if not ran:
            return say("study.nothing_ran", target=target)
        nearest = min(ran, key=lambda each: sign * each.development.median)  # type: ignore[union-attr]
        best = nearest.development
        assert best is not None
        once = study.plan.target.is_met(best.high if HIGHER_IS_BETTER[metric] else best.low)
        return say(
            "study.no_go_once" if once else "study.no_go", target=target, budget=budget_text(study),
            engine=nearest.name, nearest=spread_text(metric, best),
        )  # fmt: skip
    return say("study.not_done", target=target)


def _beside(others: list[MethodResult], metric: str) -> str:
    """What the next method reached, or nothing."""
    tested = [each for each in others if each.test is not None]
    if not tested:
        return ""
    return say(
        "study.next_method", engine=tested[0].name, time=reached_text(tested[0]),
        metric=say(f"study_metric.{metric}"),
        test=spread_text(metric, tested[0].test),
    )  # fmt: skip


def _settings(study: LoadedStudy, method: MethodResult) -> str:
    planned = next(each for each in study.plan.methods if each.name == method.name)
    given = planned.settings
    if method.learning_rate is not None:
        given = given.replaced(learning_rate=method.learning_rate)
    return " ".join(f"--set {method.name}.{key}={value}" for key, value in sorted(given.items()))


def command(study: LoadedStudy, out: str) -> str:
    """What runs the study, or goes on with it."""
    plan = study.plan
    engines = ",".join(each.name for each in plan.methods)
    budget = plan.budget
    length = f"{budget.seconds:.12g}s" if budget.seconds is not None else f"{budget.tokens:.0f}tokens"
    test = "" if plan.test is None else f" --test-data {shlex.quote(str(plan.test))}"
    return (
        f"lspzo-bench compare --job job.toml --engines {engines} --target '{plan.target}' --budget {length} "
        f"--seeds {len(plan.seeds)}{test} --out {shlex.quote(out)}"
    )


def _next(study: LoadedStudy, state: State) -> str:
    """Goes on where trials are missing."""
    missing = any(
        sum(one.end_state != "interrupted" for one in study.finals(each.name)) < len(study.plan.seeds)
        for each in study.plan.methods
        if each.fits
    )
    return f"{command(study, '.')} --resume" if state == "INCONCLUSIVE" and missing else ""


def _overlapping(methods: Sequence[MethodResult]) -> Iterator[str]:
    """Those that are undecided beside the best one since their test values overlap with its, and not for want
    of seeds."""
    tested = [(each, each.test) for each in methods if each.test is not None]
    best = next((test for each, test in tested if each.beside_best is None), None)
    if best is None:
        return
    for each, test in tested:
        meets = test.low <= best.high and best.low <= test.high
        if meets and each.beside_best == "undecided":
            yield each.name


def _warnings(study: LoadedStudy) -> Iterator[str]:
    plan, result = study.plan, study.result
    if plan.job.model.random_weights:
        yield say("study.warn_random")
    if len(plan.seeds) < LEAST_SEEDS:
        yield say("study.warn_seeds", seeds=len(plan.seeds))
    first = [each.learned.evaluations[0] for each in study.trials if each.learned.evaluations]
    if first and plan.target.is_met(first[0].metrics[plan.target.metric]):
        yield say("study.warn_met", value=metric_text(result.metric, first[0].metrics[plan.target.metric]))
    majority = result.majority_class
    tests = [each.test.median for each in result.methods if each.test is not None]
    if majority is not None and result.metric == "accuracy" and tests and max(tests) <= majority:
        yield say("study.warn_majority", value=metric_text(result.metric, majority))
    edges = [each.name for each in result.methods if each.rate_at_edge]
    if edges:
        yield say("study.warn_edge", engines=several_items(edges))
    early = list(_tested_early(study))
    if early:
        yield say("study.warn_early", trials=several_items(early))
    failed = [each for each in study.trials if each.end_state != "ok"]
    if failed:
        key = "study.warn_failed" if len(failed) == 1 else "study.warn_several_failed"
        yield say(key, count=len(failed))
    if study.broken:
        yield say("warning.unreadable", count=len(study.broken))
    if plan.emulated is not None:
        yield say("study.warn_emulated", machine=plan.emulated)
    overlapping = list(_overlapping(result.methods))
    if overlapping:
        yield say("study.warn_undecided", engines=several_items(overlapping))
    cores = sorted({each.environment.cores_usable for each in study.trials})
    if len(cores) > 1:
        yield say("study.warn_cores", cores=enumerated(str(each) for each in cores))
    yield from _surroundings(study)
    dirty = {each.environment.dirty for each in study.trials}
    if dirty != {False}:
        yield say("study.warn_commit")


def _tested_early(study: LoadedStudy) -> Iterator[str]:
    """Final trials whose best evaluation came before half of their steps."""
    for method in study.plan.methods:
        for each in study.finals(method.name):
            best = each.learned.best(study.result.metric)
            if each.end_state == "ok" and best is not None and 2 * best.step < each.learned.steps:
                yield say(
                    "study.early",
                    engine=method.name,
                    seed=each.seed,
                    step=best.step,
                    steps=each.learned.steps,
                )


def _surroundings(study: LoadedStudy) -> Iterator[str]:
    """What trials noted of their machine, notes that differ in numbers alone once."""
    notes: dict[str, list[str]] = {}
    for each in study.trials:
        for note in each.environment.notes or ():
            notes.setdefault(re.sub(r"\d+", "", note), []).append(note)
    for found in notes.values():
        yield say(
            "study.warn_surroundings", count=len(found), total=len(study.trials), note=translated(found[0])
        )
