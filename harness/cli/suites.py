"""`compare --suite`: the studies of a suite, one after the other. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from engines.errors import UserError
from harness.cli.job_flags import JobFlags
from harness.cli.options import method_names
from harness.cli.quality import study_seen
from harness.progress import console
from harness.quality.documents import parse_budget, parse_quality_target
from harness.quality.study import StudyRequest, check_study, planned_trials, predicted_s, prepare_study
from harness.quality.suites import Suite, SuiteTask, beside_suite, file_of, job_of_task, load_suite
from harness.quality.trials import PreparedStudy
from harness.records.job import Job
from profiles.advice.words import duration
from profiles.documents import merged, to_json
from profiles.machine import Machine


@dataclass(frozen=True, kw_only=True, slots=True)
class SuiteFlags:
    """What is said of a suite beside the job's flags; what is `None` the suite says."""

    name: str
    out: Path
    data_dir: Path | None
    engines: str | None
    budget: str | None
    emulate: Path | None
    profile: Path | None
    seeds: int
    resume: bool
    quiet: bool


def suite_seen(flags: JobFlags, asked: SuiteFlags, *, dry_run: bool, as_json: bool) -> None:
    """All that can be wrong is looked at before the first study. Raises `UserError`."""
    suite = load_suite(asked.name)
    if flags.gives("data") or flags.gives("eval_data"):
        raise UserError("--suite", "its tasks name their data", "name their folder with --data-dir")
    ready, why = _prepared(suite, flags, asked)
    if not ready:
        reason = next(iter(why.values()))
        raise UserError(
            f"--suite {asked.name}",
            f"no task of it can be studied: {reason}",
            "name the folder of its files with --data-dir",
        )
    if dry_run:
        if as_json:
            typer.echo(to_json(tuple(each.plan for each in ready.values())), nl=False)
        else:
            console().print(suite_table(suite, ready, why))
            console().print(_total(ready), markup=False, soft_wrap=True)
        return
    notes = console(stderr=True, quiet=asked.quiet)
    for name, reason in why.items():
        notes.print(f"{name}: left out: {reason}", markup=False, soft_wrap=True)
    for name, each in ready.items():
        notes.print(f"task {name}", markup=False)
        study_seen(each, dry_run=False, as_json=as_json, quiet=asked.quiet, out=asked.out)


def _prepared(
    suite: Suite, flags: JobFlags, asked: SuiteFlags
) -> tuple[dict[str, PreparedStudy], dict[str, str]]:
    """Studies by task, and why others cannot be."""
    names = method_names(asked.engines or (",".join(suite.engines) or None))
    emulate = asked.emulate or (None if suite.emulate is None else Path(suite.emulate))
    if asked.profile is not None and asked.emulate is None:
        emulate = None  # the user says which machine it is
    base = StudyRequest(
        engines=names, out=asked.out, target=parse_quality_target("loss<=0"),
        budget=parse_budget(asked.budget or suite.budget), seeds=asked.seeds, sizes=suite.sizes,
        profile=asked.profile, emulate=emulate, resume=asked.resume, quiet=asked.quiet,
    )  # fmt: skip
    wanted: dict[str, tuple[Job, StudyRequest]] = {}
    why: dict[str, str] = {}
    folder = asked.data_dir or beside_suite(asked.name)
    for task in suite.tasks:
        if task.missing:
            why[task.name] = task.missing
            continue
        try:
            values, test = job_of_task(suite, task, folder), _test(task, folder)
        except UserError as error:
            why[task.name] = f"{error.what} {error.why}" if folder is None else error.why
            continue
        job = replace(flags.job(names, _with_padding(values)), warmup_steps=0)
        study = replace(base, out=asked.out / task.name, target=parse_quality_target(task.target), test=test)
        check_study(job, study)
        wanted[task.name] = (job, study)
    ready: dict[str, PreparedStudy] = {}
    machine: Machine | None = None
    for name, (job, study) in wanted.items():
        ready[name] = prepare_study(job, replace(study, machine=machine))
        if study.profile is None and study.emulate is None:
            machine = ready[name].machine
    return ready, why


def _with_padding(values: Mapping[str, Any]) -> dict[str, Any]:
    return merged({"padding": "longest"}, values)


def _test(task: SuiteTask, folder: Path | None) -> str | None:
    return None if task.test_data is None else file_of(task, task.test_data, folder)


def suite_table(suite: Suite, ready: Mapping[str, PreparedStudy], why: Mapping[str, str]) -> Table:
    table = Table(title=suite.about, title_justify="left")
    for heading in ("task", "target", "methods", "do not fit", "trials", "steps of all"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "task")
    for task in suite.tasks:
        if task.name in why:
            table.add_row(task.name, task.target, f"left out: {why[task.name]}")
            continue
        plan = ready[task.name].plan
        runs = [method.name for method in plan.methods if method.fits]
        others = [method.name for method in plan.methods if not method.fits]
        trials = sum(count for method, _, count in planned_trials(plan) if method.fits)
        cells = (", ".join(runs), ", ".join(others), str(trials), duration(predicted_s(plan)))
        table.add_row(task.name, task.target, *cells)
    return table


def _total(ready: Mapping[str, PreparedStudy]) -> str:
    of_each = [predicted_s(each.plan) for each in ready.values()]
    known = [each for each in of_each if each is not None]
    if len(known) < len(of_each):
        return "total: not known"
    trials = evaluations = 0
    for each in ready.values():
        for method, rung, count in planned_trials(each.plan):
            if method.fits:
                trials += count
                evaluations += count * (each.plan.rungs[rung].length.evaluations + 1)
    return (
        f"total: {duration(sum(known))} of steps; on top of them come {trials} set-ups and {evaluations} "
        "evaluations, whose times are not predicted"
    )
