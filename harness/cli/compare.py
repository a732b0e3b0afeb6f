"""The command that plans every method and runs the plans: `compare`.

Nothing here plans, measures or lays out a table.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import typer

from engines.errors import UserError
from harness.cli.by_name import by_name
from harness.cli.job_flags import OF_TRAINING, JobFlags, takes_job
from harness.cli.new_folder import results_folder
from harness.cli.options import (
    BudgetFlag,
    CriteriaFlag,
    DataDir,
    DryRun,
    Emulate,
    Engines,
    External,
    Json,
    Out,
    Profile,
    QualityTargetFlag,
    Quiet,
    Resume,
    RoundsFlag,
    SeedsFlag,
    SuiteFlag,
    TestData,
    Trace,
    engine_names,
    exit_for,
    method_names,
)
from harness.cli.quality import study_seen
from harness.cli.suites import SuiteFlags, suite_seen
from harness.cli.sweep_progress import measure_seen
from harness.cli.tables import grid_table, host_line, runs_table
from harness.host_speed import explains
from harness.pipeline import ROUNDS, Sweep, planned_cells, prepare
from harness.progress import console
from harness.quality.documents import QualityTarget, TrialBudget, parse_budget, parse_quality_target
from harness.quality.study import StudyRequest, prepare_study
from harness.records.comparison import other_host
from harness.records.job import Job
from profiles.documents import to_json


@takes_job(without=OF_TRAINING)
def compare(
    flags: JobFlags,
    engines: Engines = None,
    profile: Profile = None,
    emulate: Emulate = None,
    external: External = None,
    rounds: RoundsFlag = ROUNDS,
    criteria: CriteriaFlag = None,
    out: Out = None,
    resume: Resume = False,
    trace: Trace = False,
    target: QualityTargetFlag = None,
    budget: BudgetFlag = None,
    test_data: TestData = None,
    seeds: SeedsFlag = 3,
    suite: SuiteFlag = None,
    data_dir: DataDir = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run every plan, each in its own process, interleaved; one record per run, kept whatever happens.

    With --target and --budget: what does each method learn in that time, and when does it reach the target?
    All get the same trials: four learning rates by successive halving, then the best one with --seeds seeds.
    Development data chooses, test data is only read. --suite has several such studies in one file. One engine
    with several settings: --engines lsp:half,lsp:quarter --set lsp:half.d=288 --set lsp:quarter.d=144.

    A job without flags or --job is batch 1 x 512 tokens in bf16, with checkpointing, 10 steps after 3 of
    warm-up, on the built-in data.
    """
    if suite is not None:
        _check_suite(target, test_data)
        asked = SuiteFlags(
            name=suite, out=results_folder(out, "suite", Path(suite).stem, resume, dry_run=dry_run),
            data_dir=data_dir, engines=engines, budget=budget, emulate=emulate, profile=profile, seeds=seeds,
            resume=resume, quiet=quiet,
        )  # fmt: skip
        suite_seen(flags, asked, dry_run=dry_run, as_json=as_json)
    elif target is not None or budget is not None:
        quality_target, limit = _target_and_budget(target, budget, external)
        names = method_names(engines)
        job = replace(flags.job(names, {"padding": "longest"}), warmup_steps=0)
        study = StudyRequest(
            engines=names, out=results_folder(out, "study", job.model.name, resume, dry_run=dry_run),
            target=quality_target, budget=limit, seeds=seeds, test=test_data,
            profile=profile, emulate=emulate, resume=resume, quiet=quiet,
        )  # fmt: skip
        study_seen(prepare_study(job, study), dry_run=dry_run, as_json=as_json, quiet=quiet)
    else:
        names = engine_names(engines)
        if test_data is not None:
            raise UserError("--test-data", "is for --target and --budget", "leave it out, or give both")
        job = flags.job(names)
        sweep = Sweep(
            engines=names, out=results_folder(out, "compare", job.model.name, resume, dry_run=dry_run),
            profile=profile, emulate=emulate, rounds=rounds, criteria=criteria,
            check_criteria=by_name("reports.criteria:load_criteria"), resume=resume, trace=trace, quiet=quiet,
            external=external or (),
        )  # fmt: skip
        _sweep_seen(job, sweep, dry_run=dry_run, as_json=as_json)


def _check_suite(target: str | None, test_data: str | None) -> None:
    """Raises `UserError` for what a suite's tasks say by themselves."""
    if target is not None or test_data is not None:
        raise UserError("--suite", "its tasks have targets and test data", "leave out --target, --test-data")


def _target_and_budget(
    target: str | None, budget: str | None, external: list[Path] | None
) -> tuple[QualityTarget, TrialBudget]:
    """Raises `UserError` for one without the other, and for trainers that are not ours."""
    if target is None or budget is None:
        missing = "--budget" if budget is None else "--target"
        raise UserError(missing, "is missing", "give both --target METRIC>=VALUE and --budget 2h")
    if external:
        raise UserError("--external", "has data of its own, of which --target says nothing", "leave it out")
    return parse_quality_target(target), parse_budget(budget)


def _sweep_seen(job: Job, sweep: Sweep, *, dry_run: bool, as_json: bool) -> None:
    """Plan and run, and print what came out; ends the program by how the runs ended."""
    ready = prepare(job, sweep)
    if dry_run:
        cells = planned_cells(ready, sweep)
        if as_json:
            typer.echo(to_json(tuple(cells)), nl=False)
        else:
            console().print(grid_table(cells))
        return
    runs = measure_seen(ready, sweep)
    if as_json:
        typer.echo(to_json(tuple(runs)), nl=False)
    else:
        explained = {run.id for run in runs if explains(run, ready.machine, ready.shape)}
        console().print(runs_table(runs, explained))
        if (unlike := other_host(runs, ready.machine)) is not None:
            console(stderr=True, quiet=sweep.quiet).print(host_line(unlike), markup=False, soft_wrap=True)
        typer.echo(by_name("reports.render:what_to_do")(sweep.out))
        typer.echo(str(sweep.out))
    exit_for(run.end_state for run in runs)
