"""Commands that plan every method and run the plans: `recommend`, `compare`.

Nothing here plans, measures or lays out a table.
"""

from __future__ import annotations

import typer

from harness.cli.by_name import by_name
from harness.cli.options import (
    OF_TRAINING,
    CriteriaFlag,
    DryRun,
    Emulate,
    Engines,
    External,
    JobFlags,
    Json,
    Out,
    Profile,
    Quiet,
    Resume,
    RoundsFlag,
    Trace,
    engine_names,
    exit_for,
    results_folder,
    takes_job,
)
from harness.cli.sweep_progress import measure_seen
from harness.cli.tables import grid_table, runs_table
from harness.pipeline import Sweep, planned_cells, prepare
from harness.progress import console
from profiles.documents import to_json


@takes_job(without=OF_TRAINING)
def compare(
    flags: JobFlags,
    engines: Engines = None,
    profile: Profile = None,
    emulate: Emulate = None,
    external: External = None,
    rounds: RoundsFlag = 3,
    criteria: CriteriaFlag = None,
    out: Out = None,
    resume: Resume = False,
    trace: Trace = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run every plan, each in its own process, interleaved; one record per run, kept whatever happens.

    A job without flags or --job is batch 1 x 512 tokens in bf16, with checkpointing, 10 steps after 3 of
    warm-up, on the built-in data.
    """
    names = engine_names(engines)
    job = flags.job(names)
    folder = results_folder(out, "compare", job.model.name, resume)
    sweep = Sweep(
        engines=names, out=folder, profile=profile, emulate=emulate, rounds=rounds, criteria=criteria,
        check_criteria=by_name("reports.criteria:load_criteria"), resume=resume, trace=trace, quiet=quiet,
        external=external or (),
    )  # fmt: skip
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
        console().print(runs_table(runs))
        typer.echo(str(folder))
    exit_for(run.end_state for run in runs)
