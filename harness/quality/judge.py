"""What trials say: time to the target, and whether one method's models are better than another's."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from harness.quality.documents import MethodTrials, QualityTarget, StudyPlan, TrialRecord, method_name
from harness.records.job import NotWhereEmpty
from harness.records.learning import Evaluated
from harness.records.metrics import HIGHER_IS_BETTER

SeedAnswer = Literal["better", "worse", "same", "undecided"]

LEAST_SEEDS = 3
"""Fewer say nothing of a spread."""
MARGIN = 0.01
"""Within this two values count as the same: one point of a share or a correlation; of a loss or a perplexity
one part in a hundred."""


def time_to(target: QualityTarget, evaluations: Sequence[Evaluated]) -> float | None:
    """Seconds of steps until the first evaluation that meets the target and whose next one does too; `None`:
    not reached, or not confirmed."""
    met = [target.is_met(each.metrics[target.metric]) for each in evaluations]
    for number, each in enumerate(evaluations[:-1]):
        if met[number] and met[number + 1]:
            return each.train_s
    return None


def over_seeds(values: Sequence[float], others: Sequence[float], metric: str) -> SeedAnswer:
    """Of one method's `values` over its seeds beside those of another.

    Better or worse: every seed beats, or is beaten by, every one of the other's. The same: all of both lie
    within `MARGIN`. Anything else, and fewer than `LEAST_SEEDS` on a side: undecided.
    """
    if min(len(values), len(others)) < LEAST_SEEDS:
        return "undecided"
    sign = 1.0 if HIGHER_IS_BETTER[metric] else -1.0
    own, other = [sign * each for each in values], [sign * each for each in others]
    both = [*own, *other]
    is_relative = metric == "loss" or metric.startswith("perplexity")
    margin = MARGIN * (abs(statistics.median(both)) if is_relative else 1.0)
    # 0.907 and 0.897 are a point apart, if not in binary.
    if max(both) - min(both) <= margin * (1 + 1e-9):
        return "same"
    if min(own) > max(other):
        return "better"
    return "worse" if max(own) < min(other) else "undecided"


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedSpread:
    """Median and range over seeds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodResult:
    """What one method came to."""

    engine: str
    variant: Annotated[str, NotWhereEmpty] = ""
    """What the user calls these settings of the engine, beside others of it."""
    learning_rate: float | None
    """That the search chose; `None`: no trial of it came to its end."""
    why_not: str | None
    """Why there is no result."""
    development: SeedSpread | None
    """The metric of the best evaluations on development data."""
    test: SeedSpread | None
    """The metric on test data with the weights of those."""
    test_values: tuple[float, ...]
    """Of each seed."""
    time_to_target_s: tuple[float | None, ...]
    """Of each final trial, without set-up and evaluations; `None`: not reached."""
    search_s: float
    """Steps of all trials of the search."""
    train_s: float
    """Steps of all final trials."""
    eval_s: float
    """Evaluations of all trials."""
    setup_s: float | None
    """Median set-up of a final trial."""
    beside_best: SeedAnswer | None
    """Its test values beside those of the method with the best median; `None` for that one itself."""

    rate_at_edge: Annotated[bool, NotWhereEmpty] = False
    """The learning rate is the smallest or the largest that was tried: a better one may lie beyond."""

    @property
    def name(self) -> str:
        """As it is told: `lsp`, or `lsp:half`."""
        return method_name(self.engine, self.variant)

    @property
    def reached(self) -> SeedSpread | None:
        """Over the final trials; `None` unless all reached the target."""
        found = [each for each in self.time_to_target_s if each is not None]
        return _spread(found) if found and len(found) == len(self.time_to_target_s) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyResult:
    """What `quality.json` holds."""

    metric: str
    target: str
    zero_shot: float | None
    """The metric on test data before any training: the first final trial's."""
    majority_class: float | None
    """Accuracy on test data of always naming its most frequent class."""
    methods: tuple[MethodResult, ...]
    """Those that reached the target first, by their time; then by the metric on test data."""
    shared_process: Annotated[bool, NotWhereEmpty] = False
    """Final trials were in the process of their method's search, and not in one each."""
    schema_version: int = 1


def judge_study(plan: StudyPlan, records: Iterable[TrialRecord]) -> StudyResult:
    """`records` are all that there are."""
    by_name: dict[str, list[TrialRecord]] = {method.name: [] for method in plan.methods}
    for record in records:
        by_name[record.method].append(record)
    metric, last = plan.target.metric, len(plan.rungs) - 1
    found = [_result(method, by_name[method.name], plan.target, last) for method in plan.methods]
    sign = -1.0 if HIGHER_IS_BETTER[metric] else 1.0
    ranked = [each for each in found if each.test is not None]
    best = min(ranked, key=lambda each: sign * each.test.median, default=None)  # type: ignore[union-attr]
    found = [_placed(each, best, metric) for each in found]
    finals = [record for each in by_name.values() for record in each if record.rung == last]
    finals = [record for record in finals if record.learned.test_before is not None]
    before: Mapping[str, float] = (finals[0].learned.test_before or {}) if finals else {}

    def order(each: MethodResult) -> tuple[float, float]:
        reached = each.reached
        value = float("inf") if each.test is None else sign * each.test.median
        return (float("inf") if reached is None else reached.median, value)

    return StudyResult(
        metric=metric, target=str(plan.target), zero_shot=before.get(metric),
        majority_class=before.get("majority_class"), methods=tuple(sorted(found, key=order)),
        shared_process=any(record.shared_process for record in finals),
    )  # fmt: skip


def _result(
    method: MethodTrials, records: Sequence[TrialRecord], target: QualityTarget, last: int
) -> MethodResult:
    why_not = method.why_not
    final = [record for record in records if record.rung == last]
    ok = [record for record in final if record.end_state == "ok"]
    best = [each for record in ok if (each := record.learned.best(target.metric)) is not None]
    tests = tuple(record.learned.test[target.metric] for record in ok if record.learned.test is not None)
    failed = [record for record in records if record.end_state != "ok"]
    if why_not is None and not ok:
        why_not = f"{failed[0].end_state}: {failed[0].end_reason}" if failed else "not run yet"
    setups = [record.setup_s for record in ok if record.setup_s is not None]
    return MethodResult(
        engine=method.engine,
        variant=method.variant,
        learning_rate=final[0].learning_rate if final else None,
        why_not=None if ok else why_not,
        development=_spread([each.metrics[target.metric] for each in best]),
        test=_spread(tests),
        test_values=tests,
        time_to_target_s=tuple(
            time_to(target, record.learned.evaluations) if record.end_state == "ok" else None
            for record in final
        ),
        search_s=sum(record.learned.train_s for record in records if record.rung < last),
        train_s=sum(record.learned.train_s for record in final),
        eval_s=sum(record.learned.eval_s for record in records),
        setup_s=statistics.median(setups) if setups else None,
        beside_best=None,
        rate_at_edge=bool(final) and final[0].learning_rate in (min(method.rates), max(method.rates)),
    )


def _placed(result: MethodResult, best: MethodResult | None, metric: str) -> MethodResult:
    if best is None or result.name == best.name or result.test is None:
        return result
    return replace(result, beside_best=over_seeds(result.test_values, best.test_values, metric))


def _spread(values: Sequence[float]) -> SeedSpread | None:
    return SeedSpread(median=statistics.median(values), low=min(values), high=max(values)) if values else None
