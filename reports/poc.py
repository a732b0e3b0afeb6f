"""`poc`: the whole line in one go, from the probe to the verdict."""

from __future__ import annotations

from typing import Annotated

import typer

from engines.files.reading import exists
from harness.cli.advice_tables import recommendation_text
from harness.cli.job_flags import OF_TRAINING, JobFlags, takes_job
from harness.cli.new_folder import results_folder
from harness.cli.options import (
    CriteriaFlag,
    Emulate,
    Engines,
    External,
    FailOn,
    Lang,
    Out,
    Profile,
    Quiet,
    RequireGpu,
    Resume,
    RoundsFlag,
    Trace,
    engine_names,
    exit_for,
    exit_without_gpu,
    speaks,
)
from harness.cli.sweep_progress import measure_seen
from harness.cli.tables import runs_table
from harness.host_speed import explains
from harness.pipeline import Sweep, job_to_plan, prepare
from harness.progress import console
from harness.recommendation import recommended
from harness.records.manifest import CRITERIA_FILE
from harness.records.presets import preset_values
from profiles.advice.job_time import Rates
from profiles.display.tables import machine_table
from profiles.documents import write_whole
from profiles.language import translated
from profiles.system.nvml import open_device
from reports.commands import note_left_out
from reports.criteria import init_text, load_criteria
from reports.decide import exit_code, parse_fail_on
from reports.render import in_short, page, write_report

OF_PRESET = {
    "model": "the preset's: opt-125m, on a CPU tiny-llama, with random weights",
    **dict.fromkeys(
        (
            "batch_size",
            "seq_len",
            "dtype",
            "steps",
            "warmup_steps",
            "eval_batches",
            "timeout",
            "random_weights",
        ),
        "the preset's",
    ),
}

Preset = Annotated[str | None, typer.Option("--preset", help="A ready-made job: quick.")]


@speaks
@takes_job(without=OF_TRAINING, defaults=OF_PRESET)
def poc(
    flags: JobFlags,
    preset: Preset = "quick",
    engines: Engines = None,
    profile: Profile = None,
    emulate: Emulate = None,
    external: External = None,
    rounds: RoundsFlag = 3,
    criteria: CriteriaFlag = None,
    fail_on: FailOn = None,
    out: Out = None,
    resume: Resume = False,
    trace: Trace = False,
    lang: Lang = "en",
    quiet: Quiet = False,
    require_gpu: RequireGpu = False,
) -> None:
    """The whole line in one go: probe, recommend, compare, report. Its last line is the report's path."""
    gates = parse_fail_on(fail_on)
    names = engine_names(engines)
    # The driver's word; whether torch can use the GPU shows when it is probed.
    on_gpu, on_cpu = (
        flags.job(names, preset_values(preset, has_gpu=has_gpu) if preset else {})
        for has_gpu in (True, False)
    )
    job = on_gpu if open_device() is not None else on_cpu
    folder = results_folder(out, "poc", job.model.name, resume)
    sweep = Sweep(
        engines=names, out=folder, profile=profile, emulate=emulate, rounds=rounds, criteria=criteria,
        check_criteria=load_criteria, resume=resume, trace=trace, quiet=quiet,
        external=external or (),
    )  # fmt: skip
    notes = console(stderr=True, quiet=quiet)
    ready = prepare(job, sweep, without_gpu=on_cpu)
    if require_gpu and ready.machine.gpu is None:
        exit_without_gpu(ready.machine.gpu_absent_reason)
    if ready.job != job:
        reason = ready.machine.gpu_absent_reason
        notes.print(translated(f"the GPU cannot be used ({reason}): on the CPU"), markup=False)
    notes.print(machine_table(ready.machine))
    planned = job_to_plan(ready.job, ready.shape, names, None)
    notes.print(recommendation_text(recommended(ready.job, planned, ready.machine, rates=Rates())))
    if criteria is None and not ready.in_use and not exists(folder / CRITERIA_FILE):
        write_whole(folder / CRITERIA_FILE, init_text())
    runs = measure_seen(ready, sweep)
    explained = {run.id for run in runs if explains(run, ready.machine, ready.shape)}
    notes.print(runs_table(runs, explained))
    verdict = write_report(folder, on_broken=note_left_out, language=lang)
    typer.echo(in_short(verdict, lang))
    typer.echo(str(page(folder, lang)))
    if code := exit_code(verdict, gates):
        raise typer.Exit(code)
    exit_for(run.end_state for run in runs)
