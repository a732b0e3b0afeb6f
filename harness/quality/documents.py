"""A comparison by what methods learn: target and budget, the trials that each method gets, and their records.

Every method has the same trials. Successive halving over its own grid of learning rates: all rates for a
short while, the better half for longer, then the best one with several seeds. A quarter of the budget each
goes to the first two, half of it to the last, in time or in tokens. All of it is written down before the
first trial (`study.json`); a folder is gone on with only by the same plan. Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from engines.errors import UserError
from engines.shapes import Workload
from harness.records.job import Job, NotWhereEmpty
from harness.records.learning import LearningLength, LearningOutcome
from harness.records.metrics import HIGHER_IS_BETTER
from harness.records.run import EndState, Environment
from profiles.documents import read_document, to_json, write_whole
from profiles.planning.plan import EngineSettings

SCHEMA_VERSION = 1
"""Of study.json and of the records of trials. 1: first version (0.1.0)."""

PLAN, TRIALS = "study.json", "trials"

FACTORS = (0.1, 1 / 3, 1.0, 3.0)
"""Learning rates of every method's grid over the one in its middle."""
KEPT = (4, 2, 1)
"""Rates that are tried in each rung."""
SHARES = (0.25, 0.25, 0.5)
"""Of the budget that each rung takes."""
EVALUATIONS = (5, 5, 20)
"""On development data, on the way of each trial of a rung."""

UNITS_S = {"s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}
UNITS_TOKENS = {"tokens": 1.0, "ktokens": 1e3, "Mtokens": 1e6, "Gtokens": 1e9}


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityTarget:
    """What is to be reached on development data."""

    metric: str
    value: float

    def is_met(self, value: float) -> bool:
        return value >= self.value if HIGHER_IS_BETTER[self.metric] else value <= self.value

    def __str__(self) -> str:
        return f"{self.metric}{'>=' if HIGHER_IS_BETTER[self.metric] else '<='}{self.value:.12g}"


def parse_quality_target(text: str) -> QualityTarget:
    """`accuracy>=0.9` or `perplexity_per_token<=20`. Raises `UserError`."""
    found = re.fullmatch(r"\s*(\w+)\s*(>=|<=)\s*([-+.\deE]+)\s*", text)
    try:
        value = math.nan if found is None else float(found[3])
    except ValueError:
        value = math.nan
    if found is None or not math.isfinite(value):
        raise UserError(
            f"--target {text}", "is not METRIC>=VALUE or METRIC<=VALUE", "such as 'accuracy>=0.9'"
        )
    metric = found[1]
    if metric not in HIGHER_IS_BETTER:
        raise UserError(
            f"--target {text}",
            f"there is no metric '{metric}'",
            f"choose from: {', '.join(HIGHER_IS_BETTER)}",
        )
    right = ">=" if HIGHER_IS_BETTER[metric] else "<="
    if found[2] != right:
        better = "higher" if HIGHER_IS_BETTER[metric] else "lower"
        raise UserError(
            f"--target {text}", f"{metric} is better when it is {better}", f"write {metric}{right}"
        )
    least, most = _range_of(metric)
    if not least <= value <= most:
        hint = f"write {value / 100:g} for {value:g} %" if most == 1 < value <= 100 else "give one in between"
        raise UserError(
            f"--target {text}", f"{metric} goes from {least:g} to {most:g}: nothing reaches it", hint
        )
    return QualityTarget(metric=metric, value=value)


def _range_of(metric: str) -> tuple[float, float]:
    if metric in ("matthews", "pearson", "spearman"):
        return -1.0, 1.0
    if metric in ("accuracy", "f1", "exact_match", "answer_f1"):
        return 0.0, 1.0
    return (1.0 if metric.startswith("perplexity") else 0.0), math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialBudget:
    """For each method: search for a learning rate and final trials together, without set-ups and
    evaluations."""

    seconds: float | None = None
    tokens: float | None = None
    """Padding included, as tokens per step are counted."""

    def __str__(self) -> str:
        if self.seconds is None:
            return f"{self.tokens:,.0f} tokens"
        if self.seconds < 60:
            return f"{self.seconds:g} s"
        return f"{self.seconds / 3600:g} h" if self.seconds >= 3600 else f"{self.seconds / 60:g} min"


def parse_budget(text: str) -> TrialBudget:
    """`2h`, `30min`, `90s`, or `5Mtokens`. Raises `UserError`."""
    found = re.fullmatch(r"\s*([.\d]+)\s*([A-Za-z]+)\s*", text)
    amount = 0.0
    if found is not None and (found[2] in UNITS_S or found[2] in UNITS_TOKENS) and found[1].count(".") < 2:
        amount = float(found[1]) if found[1] != "." else 0.0
    if found is None or not amount > 0:
        raise UserError(
            f"--budget {text}", "is no time and no number of tokens", "such as 2h, 30min, 5Mtokens"
        )
    if found[2] in UNITS_S:
        return TrialBudget(seconds=amount * UNITS_S[found[2]])
    return TrialBudget(tokens=amount * UNITS_TOKENS[found[2]])


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """Trials of one length: `rates` of them, or as many as there are seeds where one rate is left."""

    rates: int
    length: LearningLength


def rungs_of(budget: TrialBudget, seeds: int, workload: Workload) -> tuple[Rung, ...]:
    """Raises `UserError` for so few tokens that some trial has no step for each of its evaluations."""
    rungs = []
    for kept, share, evaluations in zip(KEPT, SHARES, EVALUATIONS, strict=True):
        trials = kept if kept > 1 else seeds
        if budget.seconds is not None:
            length = LearningLength(evaluations=evaluations, seconds=budget.seconds * share / trials)
        else:
            assert budget.tokens is not None
            steps = int(budget.tokens * share / trials) // workload.tokens_per_step
            if steps < evaluations:
                least = evaluations * workload.tokens_per_step * trials / share
                raise UserError(
                    f"--budget {budget}",
                    f"is too short: a trial has {steps} steps, and {evaluations} evaluations",
                    f"give {math.ceil(least):,} tokens or more, or smaller steps",
                )
            length = LearningLength(evaluations=evaluations, steps=steps)
        rungs.append(Rung(rates=kept, length=length))
    return tuple(rungs)


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodTrials:
    """What one method is to do."""

    engine: str
    variant: Annotated[str, NotWhereEmpty] = ""
    """What the user calls these settings of the engine, beside others of it; empty: there is one of them."""
    settings: EngineSettings
    """But for the learning rate."""
    fits: bool
    why_not: str | None
    step_s: float | None
    """Predicted; `None`: not known."""
    rates: tuple[float, ...]

    @property
    def name(self) -> str:
        """As it is told: `lsp`, or `lsp:half`."""
        return method_name(self.engine, self.variant)


def method_name(engine: str, variant: str) -> str:
    return f"{engine}:{variant}" if variant else engine


def rate_grid(middle: float) -> tuple[float, ...]:
    """The grid, ascending, as short decimals: what is printed is what is tried."""
    return tuple(float(f"{middle * factor:.2g}") for factor in FACTORS)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudySizes:
    """Most examples of each part; `None`: all."""

    train: int | None = None
    development: int | None = 500
    test: int | None = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyPlan:
    """All that is decided before the first trial."""

    job: Job
    test: str | None
    """The test file; `None`: half of what is held out, with as much of each class."""
    sizes: StudySizes
    target: QualityTarget
    budget: TrialBudget
    seeds: tuple[int, ...]
    rungs: tuple[Rung, ...]
    methods: tuple[MethodTrials, ...]
    emulated: str | None = None
    """Name of the emulated machine."""
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyTrial:
    """One run of one method."""

    engine: str
    variant: str = ""
    rung: int
    """From 0."""
    learning_rate: float
    seed: int

    @property
    def id(self) -> str:
        method = f"{self.engine}-{self.variant}" if self.variant else self.engine
        return f"{method}-rung{self.rung}-lr{self.learning_rate:g}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """What a trial came to. `None`: not measured."""

    id: str
    engine: str
    variant: Annotated[str, NotWhereEmpty] = ""
    rung: int
    learning_rate: float
    seed: int
    end_state: EndState
    end_reason: str | None
    time: str
    """When it began, ISO 8601 in UTC."""
    learned: LearningOutcome
    setup_s: float | None = None
    step_s_median: float | None = None
    peak_gpu_reserved_bytes: int | None = None
    peak_host_bytes: int | None = None
    environment: Environment
    shared_process: Annotated[bool, NotWhereEmpty] = False
    """Its process had other trials of the method before it, or was to have some after it."""
    schema_version: int = SCHEMA_VERSION

    @property
    def method(self) -> str:
        """As it is told: `lsp`, or `lsp:half`."""
        return method_name(self.engine, self.variant)


def save_plan(plan: StudyPlan, out: Path) -> None:
    write_whole(out / PLAN, to_json(plan))


def load_plan(out: Path) -> StudyPlan:
    """Raises `UserError`."""
    return read_document(out / PLAN, StudyPlan, SCHEMA_VERSION, "plan of a study")


def trial_path(out: Path, trial_id: str) -> Path:
    return out / TRIALS / f"{trial_id}.json"


def load_trial(out: Path, trial_id: str) -> TrialRecord:
    """Raises `UserError`."""
    return read_document(trial_path(out, trial_id), TrialRecord, SCHEMA_VERSION, "record of a trial")


def next_rates(records: Sequence[TrialRecord], metric: str, kept: int) -> list[float]:
    """The `kept` best learning rates of a rung, by development data, none of a trial that failed. Of equals
    the one with the smaller loss, then the smaller one: it is the safer."""
    ranked = []
    for record in records:
        best = record.learned.best(metric) if record.end_state == "ok" else None
        if best is not None and math.isfinite(value := best.metrics[metric]):
            loss = best.metrics["loss"]
            loss = loss if math.isfinite(loss) else math.inf
            ranked.append((-value if HIGHER_IS_BETTER[metric] else value, loss, record.learning_rate))
    return [rate for _, _, rate in sorted(ranked)[:kept]]
