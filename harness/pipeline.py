"""The line itself: Machine + Job -> Plans -> Runs -> Verdict. Imports no torch."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import typer

from engines.errors import UserError
from engines.settings.given import GivenSettings
from engines.settings.zeroth_order import MezoSettings
from engines.shapes import ModelShape
from harness.cli.sweep_progress import CompareProgress
from harness.cli.tables import plans_table
from harness.progress import console
from harness.records.job import Job
from harness.records.run import Run
from harness.resolve import resolve_shape
from harness.runs.emulate import Emulated, emulated
from harness.runs.launch import launch_probe
from harness.runs.sweep import Cell, check_folder, compare, missing
from profiles.catalog import find_profile
from profiles.display.tables import machine_table
from profiles.documents import write_whole
from profiles.machine import Machine, load_machine, save_machine
from profiles.planning.fold_every import fold_for_loss
from profiles.planning.plan import Plan
from profiles.planning.recommend import recommend, why_first
from reports.criteria import init_text, load_criteria
from reports.decide import Verdict
from reports.load import Broken
from reports.render import write_report


def find_machine(profile: Path | None, *, quiet: bool, known: Path | None = None) -> Machine:
    """The machine of `profile`, else the one saved at `known`, else this one, measured now.

    A GPU that torch cannot use here (its driver is too old, say) is hidden from this process and its
    children from then on: NVML would name it, and runs on the CPU would be recorded as runs on it.
    """
    if profile is not None:
        return find_profile(profile)
    machine = load_machine(known) if known is not None and known.exists() else launch_probe(quiet=quiet)
    if machine.gpu is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return machine


def plan_job(
    job: Job,
    shape: ModelShape,
    machine: Machine,
    engines: Sequence[str],
    emulate: Path | None = None,
) -> list[Plan]:
    """One plan per engine, the recommended first.

    The shape is resolved by the caller, before the probe: a mistake in the job must not cost its time.
    """
    return recommend(
        machine,
        shape,
        job.workload,
        engines,
        job.settings,
        vram_bytes=job.limits.vram_bytes,
        host_bytes=job.limits.host_bytes,
        job_arguments={
            engine: job_arguments(
                replace(job, settings={k: v for k, v in job.settings.items() if k == engine})
            )
            + _emulate_argument(emulate)
            for engine in engines
        },
    )


def training_settings(job: Job, engine: str, profile: Path | None) -> GivenSettings:
    """The settings to train with: those set, over the ones recommended for the machine of `profile`, if any.
    How often a low-bit base is rounded is the loss's matter on every machine.

    Raises `UserError` if the plan does not fit that machine.
    """
    if profile is None:
        given = job.settings_of(engine)
        if isinstance(given.typed, MezoSettings) and "fold_every" not in given:
            best = fold_for_loss(given.typed)
            return given if best is None else given.replaced(fold_every=best[0])
        return given
    (plan,) = plan_job(job, resolve_shape(job), find_profile(profile), [engine])
    if not plan.fits:
        raise UserError(
            engine,
            f"does not fit the machine of {profile}: it {plan.why_not}",
            "see 'lspzo-bench recommend' for what fits, or leave out --profile",
        )
    return plan.settings


def compare_job(
    job: Job,
    engines: Sequence[str],
    out: Path,
    *,
    profile: Path | None,
    rounds: int,
    criteria: Path | None,
    resume: bool,
    quiet: bool,
    trace: bool = False,
    emulate: Path | None = None,
) -> list[Run]:
    """Plan and run. Keeps the machine beside the runs: the emulated one where there is one, since that is
    what plans and predictions are for."""
    shape, machine, plans, like = _planned(
        job, engines, out, profile=profile, criteria=criteria, resume=resume, quiet=quiet, emulate=emulate
    )
    return _measure(
        job, shape, plans, machine, out, rounds=rounds, criteria=criteria, resume=resume, quiet=quiet,
        trace=trace, like=like,
    )  # fmt: skip


def planned_cells(
    job: Job,
    engines: Sequence[str],
    out: Path,
    *,
    profile: Path | None,
    rounds: int,
    criteria: Path | None,
    resume: bool,
    quiet: bool,
    emulate: Path | None = None,
) -> list[Cell]:
    """What `compare_job` would run with the same arguments, in order. Writes nothing; raises as it does."""
    _, _, plans, like = _planned(
        job, engines, out, profile=profile, criteria=criteria, resume=resume, quiet=quiet, emulate=emulate
    )
    return missing(job, plans, out, rounds=rounds, resume=resume, emulated=like)


def _planned(
    job: Job,
    engines: Sequence[str],
    out: Path,
    *,
    profile: Path | None,
    criteria: Path | None,
    resume: bool,
    quiet: bool,
    emulate: Path | None,
) -> tuple[ModelShape, Machine, list[Plan], Emulated | None]:
    """The job's shape, the machine, a plan per engine, and what runs are to be held to. Raises `UserError`
    for what is wrong with the arguments before it measures the machine."""
    check_folder(out, resume=resume)
    _check_criteria(criteria, out)
    like = _like(emulate, profile)
    shape = _checked_shape(job)
    machine = find_machine(emulate or profile, quiet=quiet, known=out / "machine.json")
    return shape, machine, plan_job(job, shape, machine, engines, emulate), like


def _checked_shape(job: Job) -> ModelShape:
    """The shape of the job's model. Raises `UserError` for data that the runs would refuse: each would end as
    a crash, and the verdict would be on the methods."""
    shape = resolve_shape(job)
    if job.data.train != "random":
        from harness.data.batches import make_data

        make_data(job, shape)
    return shape


def _like(emulate: Path | None, profile: Path | None) -> Emulated | None:
    """What runs are to be held to. Raises `UserError`."""
    if emulate is None:
        return None
    if profile is not None:
        raise UserError("--profile", "--emulate names the machine already", "leave out one of them")
    return emulated(find_profile(emulate))


def proof_of_concept(
    job: Job,
    engines: Sequence[str],
    out: Path,
    *,
    profile: Path | None,
    rounds: int,
    criteria: Path | None,
    resume: bool,
    quiet: bool,
    require_gpu: bool,
    without_gpu: Job,
    trace: bool = False,
    emulate: Path | None = None,
) -> tuple[Verdict, list[Run]]:
    """Probe, recommend, compare, report; by the default criteria if none are given.

    `without_gpu` takes the place of `job` where the probe finds no GPU that torch can use. Exits 7 without a
    GPU if one is required.
    """
    notes = console(stderr=True, quiet=quiet)
    in_use = check_folder(out, resume=resume)
    _check_criteria(criteria, out)
    like = _like(emulate, profile)
    shape = _checked_shape(job)
    machine = find_machine(emulate or profile, quiet=quiet, known=out / "machine.json")
    if require_gpu and machine.gpu is None:
        exit_without_gpu(machine.gpu_absent_reason)
    if machine.gpu is None and profile is None and job != without_gpu:
        notes.print(f"the GPU cannot be used ({machine.gpu_absent_reason}): on the CPU", markup=False)
        job = without_gpu
        shape = _checked_shape(job)
    notes.print(machine_table(machine))
    plans = plan_job(job, shape, machine, engines, emulate)
    notes.print(plans_table(shape, job, machine, plans))
    notes.print(why_first(plans), markup=False)
    if criteria is None and not in_use and not (out / "criteria.toml").exists():
        write_whole(out / "criteria.toml", init_text())
    runs = _measure(
        job, shape, plans, machine, out, rounds=rounds, criteria=criteria, resume=resume, quiet=quiet,
        trace=trace,
        like=like,
    )  # fmt: skip
    return write_report(out, on_broken=note_left_out), runs


def _check_criteria(given: Path | None, out: Path) -> None:
    """Raises `UserError` if the criteria to judge by are none: before the runs, not after their hours."""
    for path in (given, out / "criteria.toml"):
        if path is not None and (path == given or path.exists()):
            load_criteria(path)


def _measure(
    job: Job,
    shape: ModelShape,
    plans: Sequence[Plan],
    machine: Machine,
    out: Path,
    *,
    rounds: int,
    criteria: Path | None,
    resume: bool,
    quiet: bool,
    trace: bool = False,
    like: Emulated | None = None,
) -> list[Run]:
    try:
        with CompareProgress(quiet) as progress:
            return compare(
                job, shape, plans, out, rounds=rounds, resume=resume, criteria=criteria, trace=trace,
                emulated=like, on_event=progress.update,
                before_first=lambda: save_machine(machine, out / "machine.json"),
            )  # fmt: skip
    except KeyboardInterrupt:
        sys.stderr.write(
            f"stopped: finished runs are kept; go on with the same flags, --resume and --out {out}\n"
        )
        raise


def exit_without_gpu(reason: str | None) -> NoReturn:
    """One line on stderr, exit code 7."""
    error = UserError(
        "no GPU", reason or "the profile has none", "see 'nvidia-smi', or leave out --require-gpu"
    )
    sys.stderr.write(f"error: {error}\n")
    raise typer.Exit(7)


def note_left_out(broken: Broken) -> None:
    """A line on stderr for a file that a report leaves out."""
    typer.echo(f"note: {broken.file} left out: {broken.reason}", err=True)


def job_arguments(job: Job) -> str:
    """The flags that give this job, for commands that a person can paste."""
    default = Job(model=job.model)
    parts = ["--model", job.model.name]
    if job.model.random_weights:
        parts.append("--random-weights")
    if job.model.untied:
        parts.append("--untied")
    if job.model.layers is not None:
        parts += ["--layers", str(job.model.layers)]
    if job.model.head != "auto":
        parts += ["--head", job.model.head]
    parts += ["--data", job.data.train]
    if job.data.evaluate is not None:
        parts += ["--eval-data", job.data.evaluate]
    for name in ("batch_size", "seq_len", "dtype", "accumulation", "steps", "warmup_steps", "eval_batches"):
        if name in _ALWAYS or getattr(job, name) != getattr(default, name):
            parts += [f"--{name.replace('_', '-')}", str(getattr(job, name))]
    parts += ["--checkpointing" if job.checkpointing else "--no-checkpointing", "--seed", str(job.seed)]
    if job.limits.vram_bytes is not None:
        parts += ["--vram", f"{job.limits.vram_bytes}B"]
    if job.limits.host_bytes is not None:
        parts += ["--host-memory", f"{job.limits.host_bytes}B"]
    if job.limits.timeout_s != default.limits.timeout_s:
        parts += ["--timeout", f"{job.limits.timeout_s:g}"]
    for engine, settings in job.settings.items():
        for key, value in settings.items():
            parts += ["--set", f"{engine}.{key}={value}"]
    return shlex.join(parts)


def _emulate_argument(emulate: Path | None) -> str:
    return "" if emulate is None else f" --emulate {shlex.quote(str(emulate))}"


_ALWAYS = frozenset({"batch_size", "seq_len", "dtype", "steps", "warmup_steps"})
"""Told even where they are the defaults: what a reader wants to see."""
