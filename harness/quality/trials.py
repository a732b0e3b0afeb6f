"""The trials of a study, one after the other, each with a record of its own.

The search for a method's learning rate is one process, method by method, as only its own rates are compared
in it. Final trials, whose times are reported, are a process each, and methods take turns; where they are so
short that most of the time would go into starting processes, they stay in the method's.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from engines.files.reading import exists
from engines.shapes import ModelShape
from harness.quality.documents import (
    MethodTrials,
    StudyPlan,
    StudyTrial,
    TrialRecord,
    load_trial,
    next_rates,
    trial_path,
)
from harness.records.environment import read_environment
from harness.records.job import Job
from harness.records.learning import Learning, LearningOutcome
from harness.records.shared import paths_of, without_paths
from harness.runs.emulate import Emulated
from harness.runs.events import OnRunEvent
from harness.runs.launch import Outcome, clear_work, launch_child, work_folder
from harness.runs.processes import KeptChild
from harness.runs.worker import LEARNED, Request
from profiles.documents import adapter, to_json, write_whole
from profiles.machine import Machine
from profiles.planning.plan import Plan
from profiles.system.nvml import open_device

SETUP_S = 1800.0
"""Room for set-up and evaluations in a trial's time limit, beside four times its steps."""
SHORT_S = 60.0
"""Final trials that are predicted to take less stay in the process of their method's search."""
LONGEST_S = 7 * 24 * 3600.0

Launch = Callable[[Request, Path, OnRunEvent], tuple[Outcome, LearningOutcome]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedStudy:
    plan: StudyPlan
    shape: ModelShape
    machine: Machine
    plans: dict[str, Plan]
    """By name of the method."""
    emulated: Emulated | None
    out: Path


class StudyTrials:
    """All that the plan of `ready` has; those that are recorded are taken as they are."""

    def __init__(
        self,
        ready: PreparedStudy,
        job: Job,
        learnings: Sequence[Learning] | None,
        data_file: Path,
        launch: Launch,
        together: Callable[[], AbstractContextManager[Launch]],
        report: Callable[[str], None],
        on_event: OnRunEvent,
    ) -> None:
        """`together` is for trials that may share a process."""
        self._ready, self._plan, self._job = ready, ready.plan, job
        self._learnings = learnings
        self._data_file = data_file
        self._launch, self._together = launch, together
        self._report, self._on_event = report, on_event
        self._said_zero_shot = False

    def run(self) -> Iterator[TrialRecord]:
        methods = [method for method in self._plan.methods if method.fits]
        together = all(self._is_short(method) for method in methods)
        rates: dict[str, list[float]] = {}
        for method in methods:
            with self._together() as launch:
                rates[method.name] = yield from self._search(method, launch)
                for seed in self._plan.seeds if together else ():
                    yield from self._final(method, rates[method.name], seed, launch)
        for turn, seed in enumerate(() if together else self._plan.seeds):
            # Each turn in the other order: a machine that slows down then favours no method.
            for method in methods if turn % 2 == 0 else methods[::-1]:
                yield from self._final(method, rates[method.name], seed, self._launch)

    def _is_short(self, method: MethodTrials) -> bool:
        length = self._plan.rungs[-1].length
        if length.seconds is not None:
            return length.seconds < SHORT_S
        return method.step_s is not None and (length.steps or 0) * method.step_s < SHORT_S

    def _final(
        self, method: MethodTrials, rates: Sequence[float], seed: int, launch: Launch
    ) -> Iterator[TrialRecord]:
        """With the rate that the search chose, if it chose one."""
        for rate in rates:
            trial = StudyTrial(
                engine=method.engine, variant=method.variant, rung=len(self._plan.rungs) - 1,
                learning_rate=rate, seed=seed,
            )  # fmt: skip
            yield self._one(trial, method, launch)

    def _search(self, method: MethodTrials, launch: Launch) -> Generator[TrialRecord, None, list[float]]:
        """All rungs but the last; the learning rates that are left."""
        rates = list(method.rates)
        for number, rung in enumerate(self._plan.rungs[:-1]):
            records = []
            for rate in rates[: rung.rates]:
                trial = StudyTrial(
                    engine=method.engine, variant=method.variant, rung=number, learning_rate=rate,
                    seed=self._plan.seeds[0],
                )  # fmt: skip
                records.append(self._one(trial, method, launch))
                yield records[-1]
            rates = next_rates(records, self._plan.target.metric, self._plan.rungs[number + 1].rates)
        return rates

    def _one(self, trial: StudyTrial, method: MethodTrials, launch: Launch) -> TrialRecord:
        out = self._ready.out
        if exists(trial_path(out, trial.id)):
            record = load_trial(out, trial.id)
            if record.end_state != "interrupted":
                return record
        plan = self._ready.plans[method.name]
        given = method.settings.replaced(learning_rate=trial.learning_rate)
        length = self._plan.rungs[trial.rung].length
        limits = self._job.limits
        seconds = LONGEST_S if length.seconds is None else 4 * length.seconds + SETUP_S
        job = replace(
            self._job,
            seed=trial.seed,
            warmup_steps=0,
            limits=replace(limits, timeout_s=max(limits.timeout_s, seconds)),
        )
        request = Request(
            id=trial.id, job=job, shape=self._ready.shape, plan=replace(plan, settings=given),
            emulated=self._ready.emulated, data_file=self._data_file,
            learning=None if self._learnings is None else self._learnings[trial.rung],
        )  # fmt: skip
        began = datetime.now(UTC).isoformat(timespec="seconds")
        outcome, learned = launch(request, out, self._on_event)
        reason = outcome.end_reason
        record = TrialRecord(
            id=trial.id, engine=trial.engine, variant=trial.variant, rung=trial.rung,
            learning_rate=trial.learning_rate, seed=trial.seed, end_state=outcome.end_state,
            end_reason=None if reason is None else without_paths(reason, *paths_of(job)),
            time=began, learned=learned, setup_s=outcome.summary.setup_s,
            step_s_median=outcome.summary.step_s_median,
            peak_gpu_reserved_bytes=outcome.summary.peak_gpu_reserved_bytes,
            peak_host_bytes=outcome.summary.peak_host_bytes,
            environment=replace(read_environment(), emulated=self._plan.emulated),
            shared_process=launch is not self._launch,
        )  # fmt: skip
        write_whole(trial_path(out, trial.id), to_json(record))
        clear_work(out, trial.id)
        self._report_trial(record)
        if outcome.by_user:
            raise KeyboardInterrupt
        return record

    def _report_trial(self, record: TrialRecord) -> None:
        target, learned = self._plan.target, record.learned
        best = learned.best(target.metric)
        value = "" if best is None else f", {target.metric} {best.metrics[target.metric]:.4g}"
        steps = f"{learned.steps} steps in {learned.train_s:.3g} s"
        why = "" if record.end_reason is None else f": {record.end_reason}"
        self._report(f"{record.id}: {record.end_state}{why}, {steps}{value}")
        first = learned.evaluations[0].metrics if learned.evaluations else {}
        if not self._said_zero_shot and target.metric in first and target.is_met(first[target.metric]):
            self._said_zero_shot = True
            self._report(
                f"note: {target} is met before any training ({first[target.metric]:.4g}); set a higher one"
            )


@contextmanager
def one_process() -> Iterator[Launch]:
    """`launched` in one process for all, which ends with the context."""
    kept = KeptChild()
    try:
        yield partial(launched, kept=kept)
    finally:
        kept.close()


def launched(
    request: Request, out: Path, on_event: OnRunEvent, *, kept: KeptChild | None = None
) -> tuple[Outcome, LearningOutcome]:
    """Run a trial in a child process; what it learned until its end, however it ended."""
    outcome = launch_child(request, out, device=open_device(), on_event=on_event, kept=kept)
    try:
        learned: LearningOutcome = adapter(LearningOutcome).validate_json(
            (work_folder(out, request.id) / LEARNED).read_bytes()
        )
    except (OSError, ValidationError):
        learned = LearningOutcome()
    return outcome, learned


def curves(records: Sequence[TrialRecord]) -> str:
    """A line for each evaluation on development data, as CSV."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    names = sorted(
        {name for record in records for each in record.learned.evaluations for name in each.metrics}
    )
    writer.writerow(["engine", "rung", "learning_rate", "seed", "step", "train_s", *names])
    for record in records:
        for each in record.learned.evaluations:
            values = [each.metrics.get(name, "") for name in names]
            writer.writerow(
                [
                    record.method,
                    record.rung,
                    record.learning_rate,
                    record.seed,
                    each.step,
                    each.train_s,
                    *values,
                ]
            )
    return lines.getvalue()
