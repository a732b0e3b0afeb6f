"""A folder of `compare --target --budget` read back: its plan, its trials, and what is wrong with them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from engines import ENGINES
from engines.errors import UserError
from engines.files.reading import exists, read_text
from harness.quality.documents import (
    PLAN,
    SCHEMA_VERSION,
    TRIALS,
    StudyPlan,
    TrialRecord,
    load_plan,
)
from harness.quality.judge import StudyResult, judge_study
from harness.records.metrics import HIGHER_IS_BETTER
from harness.records.shared import shared_job, shared_name
from profiles.documents import read_document
from profiles.machine import MACHINE_FILE, Machine, load_machine
from reports.load import Broken, engine_order

ABOUT = "about.txt"
"""In a published folder: a sentence on what it is for."""
MOST_ABOUT = 600
"""Characters of it on page one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedStudy:
    name: str
    """Of the folder, without its path."""
    plan: StudyPlan
    """With names for its paths."""
    trials: tuple[TrialRecord, ...]
    """By method, rung, rate and seed; never empty."""
    result: StudyResult
    """Judged anew from the trials."""
    machine: Machine | None
    broken: tuple[Broken, ...]
    about: str = ""
    """What was written down about it by hand, in about.txt; empty: nothing."""

    @property
    def last_rung(self) -> int:
        return len(self.plan.rungs) - 1

    def finals(self, method: str) -> tuple[TrialRecord, ...]:
        """Trials of the rate that the method's search chose, one for each seed."""
        return tuple(each for each in self.trials if each.method == method and each.rung == self.last_rung)


def is_study(folder: Path) -> bool:
    return exists(folder / PLAN)


def load_study(folder: Path) -> LoadedStudy:
    """Raises `UserError` where the plan or all trials cannot be read, or where trials ran on unlike
    machines."""
    plan = load_plan(folder)
    unknown = [each.engine for each in plan.methods if each.engine not in ENGINES]
    if unknown or plan.target.metric not in HIGHER_IS_BETTER or not plan.rungs or not plan.seeds:
        what = f"method '{unknown[0]}'" if unknown else "target, rungs or seeds"
        raise UserError(
            str(folder / PLAN), f"has a {what} that this version does not know", "run the study again"
        )
    broken: list[Broken] = []
    trials = _load_trials(folder, plan, broken)
    machine: Machine | None = None
    if exists(folder / MACHINE_FILE):
        try:
            machine = load_machine(folder / MACHINE_FILE)
        except UserError as error:
            broken.append(Broken(file=MACHINE_FILE, reason=error.why))
    about = ""
    if exists(folder / ABOUT):
        try:
            about = read_text(folder / ABOUT, "note on a study").strip()[:MOST_ABOUT]
        except UserError as error:
            broken.append(Broken(file=ABOUT, reason=error.why))
    shown = replace(
        plan, job=shared_job(plan.job), test=None if plan.test is None else shared_name(plan.test)
    )
    return LoadedStudy(
        name=folder.resolve().name, plan=shown, trials=trials, result=judge_study(plan, trials),
        machine=machine, broken=tuple(broken), about=about,
    )  # fmt: skip


def _load_trials(folder: Path, plan: StudyPlan, broken: list[Broken]) -> tuple[TrialRecord, ...]:
    try:
        names = sorted(name for name in os.listdir(folder / TRIALS) if name.endswith(".json"))
    except OSError:
        names = []
    if not names:
        raise UserError(
            str(folder), f"is a study without trials ({TRIALS}/*.json)", "go on with it: compare --resume"
        )
    found: dict[str, TrialRecord] = {}
    for name in names:
        if name.startswith("."):
            continue
        path = folder / TRIALS / name
        try:
            record = read_document(path, TrialRecord, SCHEMA_VERSION, "record of a trial")
            wrong = _impossible(record, plan)
        except UserError as error:
            record, wrong = None, error.why
        if record is not None and wrong is None and record.id in found:
            wrong = f"has the id '{record.id}' of another file"
        if record is None or wrong is not None:
            broken.append(Broken(file=f"{TRIALS}/{name}", reason=wrong or ""))
        else:
            found[record.id] = record
    if not found:
        first = broken[0]
        raise UserError(
            str(folder), f"none of its {len(names)} trials can be read ({first.file} {first.reason})",
            "restore them, or run the study again",
        )  # fmt: skip
    trials = sorted(
        found.values(),
        key=lambda one: (engine_order(one.engine), one.variant, one.rung, one.learning_rate, one.seed),
    )
    _refuse_unlike(trials, plan)
    return tuple(trials)


def _impossible(record: TrialRecord, plan: StudyPlan) -> str | None:
    """Why what passed the schema cannot be reported."""
    if record.method not in {each.name for each in plan.methods}:
        return f"its method '{record.method}' is none of the study's"
    if not 0 <= record.rung < len(plan.rungs) or record.seed not in plan.seeds:
        return "its rung or its seed is none of the study's"
    learned = record.learned
    times = [each.train_s for each in learned.evaluations]
    if any(not math.isfinite(each) or each < 0 for each in (*times, learned.train_s, learned.eval_s)):
        return "its times are no times"
    if times != sorted(times):
        return "its evaluations are not in order"
    metrics: list[Mapping[str, float]] = [each.metrics for each in learned.evaluations]
    metrics += [each for each in (learned.test, learned.test_before) if each is not None]
    if any(name not in each for each in metrics for name in (plan.target.metric, "loss")):
        return f"an evaluation lacks {plan.target.metric}, or the loss"
    return None


def _refuse_unlike(trials: list[TrialRecord], plan: StudyPlan) -> None:
    first = trials[0]
    names = ["gpu_name", "gpu_driver", "torch", "cpu", "emulated"]
    # A budget of tokens gives each trial as many steps with any number of cores, and they learn the same.
    names += ["cores_usable"] if plan.budget.seconds is not None else []
    for other in trials[1:]:
        for name in names:
            mine, its = getattr(first.environment, name), getattr(other.environment, name)
            # What a trial that never started could not read is not held against it.
            if mine != its and None not in (mine, its):
                raise UserError(
                    f"trials '{first.id}' and '{other.id}'",
                    f"are unlike: {name} is {mine!r} in one and {its!r} in the other",
                    "report them from separate folders",
                )
