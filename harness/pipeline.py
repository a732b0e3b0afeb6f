"""The line itself: Machine + Job -> Plans -> Runs. It prints nothing. Imports no torch."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engines import ENGINES, is_external
from engines.errors import UserError
from engines.files.locks import locked_folder
from engines.files.reading import exists
from engines.settings.given import GivenSettings
from engines.settings.zeroth_order import MezoSettings
from engines.shapes import ModelShape
from harness.data.padding import padded_length
from harness.job_arguments import job_arguments
from harness.progress import console, told
from harness.records.job import Job
from harness.records.manifest import CRITERIA_FILE
from harness.records.run import Run
from harness.records.shape import MODEL, save_shape
from harness.records.shared import shared_machine
from harness.records.upgrades import UPGRADES, save_upgrades
from harness.resolve import resolve_shape
from harness.runs.attempt import MatrixRate
from harness.runs.emulate import Emulated, emulated
from harness.runs.external.description import external_plans
from harness.runs.launch import WORK, launch_probe
from harness.runs.ranks import check_gpus
from harness.runs.sweep import Cell, SweepEvent, SweepOptions, missing, run_sweep
from harness.runs.sweep_folder import check_folder
from profiles.advice.amount import Amount, DataLengths
from profiles.advice.outlook import JobToPlan
from profiles.advice.what_if import StepsOn, steps_with_upgrades
from profiles.catalog import find_profile
from profiles.machine import MACHINE_FILE, Machine, load_machine, save_machine
from profiles.planning.fold_every import fold_for_loss
from profiles.planning.plan import Plan
from profiles.planning.recommend import recommend
from profiles.rates import measured_matrix_rate

ROUNDS = 3
"""Processes of each method, by default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """How methods are compared on a job: which, where, on which machine, and how often."""

    engines: Sequence[str]
    out: Path
    profile: Path | None = None
    """The machine to predict for, by name or file; `None`: the one saved in `out`, or this one, measured."""
    emulate: Path | None = None
    """The smaller machine that runs are held to and predicted for."""
    external: Sequence[Path] = ()
    """Files that describe trainers of others, each a method beside `engines`."""
    rounds: int = ROUNDS
    criteria: Path | None = None
    check_criteria: Callable[[Path], object]
    """Raises `UserError` for a file of criteria that are none: before the runs, not after their hours."""
    resume: bool = False
    trace: bool = False
    quiet: bool = False


SaveData = Callable[[Path], None]
"""Writes a job's data, in tokens, to a file for its runs; `None` in its place: they draw it at random."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedJob:
    """A job with its shape, its machine and a plan for each method, the recommended first."""

    job: Job
    shape: ModelShape
    machine: Machine
    """The emulated one where there is one, since that is what plans and predictions are for."""
    plans: tuple[Plan, ...]
    emulated: Emulated | None
    """What runs are to be held to."""
    in_use: bool
    """The folder holds runs already."""
    save_data: SaveData | None


def find_machine(profile: Path | None, *, quiet: bool, known: Path | None = None) -> Machine:
    """The machine of `profile`, else the one saved at `known`, else this one, measured now.

    A GPU that torch cannot use here (its driver is too old, say) is hidden from this process and its
    children from then on: NVML would name it, and runs on the CPU would be recorded as runs on it.
    """
    if profile is not None:
        return find_profile(profile)
    machine = load_machine(known) if known is not None and exists(known) else launch_probe(quiet=quiet)
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
        gpus=job.limits.gpus,
        nodes=job.limits.nodes,
        job_arguments={
            engine: job_arguments(
                replace(job, settings={k: v for k, v in job.settings.items() if k == engine}),
                has_gpu=machine.gpu is not None,
            )
            + _emulate_argument(emulate)
            for engine in engines
        },
    )


def data_lengths(job: Job, shape: ModelShape, *, quiet: bool = False) -> DataLengths | None:
    """What a run would train on in an epoch of the job's file, read and tokenized as it is for one; `None`
    where the data is no file. Imports torch. Raises `UserError` as a run would."""
    if job.data.train in ("random", "builtin"):
        return None
    with told(f"reading {Path(job.data.train).name}", quiet=quiet):
        from harness.data.tokenized import sequence_lengths
        from harness.data.tokenizing import tokenize

        tokenized = tokenize(job, shape)
        assert tokenized is not None
        lengths = sequence_lengths(tokenized)
    if tokenized.train.packed or job.padding == "seq_len":
        counts = {job.seq_len: len(lengths)}
    else:
        counts = Counter(padded_length(max(length, 1), job.seq_len) for length in lengths)
    return DataLengths(
        sequences=len(lengths),
        tokens=sum(lengths),
        shares=tuple((length, count / len(lengths)) for length, count in sorted(counts.items())),
        description=tokenized.description,
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


def prepare(job: Job, sweep: Sweep, without_gpu: Job | None = None) -> PreparedJob:
    """Everything up to the first run. Writes nothing.

    `without_gpu` takes the place of `job` where the probe finds no GPU that torch can use. Raises `UserError`
    for what is wrong with the arguments before it measures the machine.
    """
    in_use = check_folder(sweep.out, resume=sweep.resume)
    for path in (sweep.criteria, sweep.out / CRITERIA_FILE):
        if path is not None and (path == sweep.criteria or exists(path)):
            sweep.check_criteria(path)
    if sweep.external and sweep.emulate is not None:
        raise UserError(
            "--external",
            "what another trainer takes of the machine cannot be held to that of another",
            "leave out --emulate",
        )
    external_plans(sweep.external, job)  # what is wrong with them is said before the machine is measured
    like = _like(sweep.emulate, sweep.profile)
    check_gpus(job.limits)
    shape, save_data = _check_job(job, quiet=sweep.quiet)
    named = sweep.emulate or sweep.profile
    machine = find_machine(named, quiet=sweep.quiet, known=sweep.out / MACHINE_FILE)
    if machine.gpu is None and sweep.profile is None and without_gpu is not None and job != without_gpu:
        job = without_gpu
        shape, save_data = _check_job(job, quiet=sweep.quiet)
    plans = plan_job(job, shape, machine, sweep.engines, sweep.emulate)
    plans += external_plans(sweep.external, job)
    return PreparedJob(
        job=job, shape=shape, machine=machine, plans=tuple(plans), emulated=like, in_use=in_use,
        save_data=save_data,
    )  # fmt: skip


def planned_cells(ready: PreparedJob, sweep: Sweep) -> list[Cell]:
    """What `measure_plans` would run, in order. Writes nothing; raises as it does."""
    return missing(ready.job, ready.plans, sweep.out, _options(ready, sweep))


def measure_plans(ready: PreparedJob, sweep: Sweep, observe: Callable[[SweepEvent], None]) -> list[Run]:
    """Run the plans, each in its own process. Keeps beside the runs the machine, the model's sizes, and
    what upgrades would bring."""
    data_file = None if ready.save_data is None else (sweep.out / WORK / "data.safetensors").resolve()
    at_end = contextlib.ExitStack()

    def before_first() -> None:
        save_machine(shared_machine(ready.machine), sweep.out / MACHINE_FILE)
        save_shape(ready.shape, sweep.out / MODEL)
        save_upgrades(_upgrades(ready), sweep.out / UPGRADES)
        if ready.save_data is not None and data_file is not None:
            at_end.callback(_clear, data_file)
            ready.save_data(data_file)

    with at_end, locked_folder(sweep.out):
        return run_sweep(
            ready.job, ready.shape, ready.plans, sweep.out, _options(ready, sweep), on_event=observe,
            before_first=before_first, data_file=data_file,
        )  # fmt: skip


def job_to_plan(job: Job, shape: ModelShape, engines: Sequence[str], amount: Amount | None) -> JobToPlan:
    return JobToPlan(
        shape=shape,
        workload=job.workload,
        engines=engines,
        settings=job.settings,
        amount=amount,
        vram_bytes=job.limits.vram_bytes,
        host_bytes=job.limits.host_bytes,
        gpus=job.limits.gpus,
        nodes=job.limits.nodes,
    )


def _upgrades(ready: PreparedJob) -> tuple[StepsOn, ...]:
    """Of the methods that are planned, and of those that most people would use."""
    planned = [plan.engine for plan in ready.plans if not is_external(plan.engine)]
    usual = [name for name, row in ENGINES.items() if row.asked_first and name not in planned]
    return steps_with_upgrades(
        ready.machine, job_to_plan(ready.job, ready.shape, [*dict.fromkeys(planned), *usual], None)
    )


def _clear(data_file: Path) -> None:
    """Not with its folder: what an ended run left there may still have to become a record."""
    with contextlib.suppress(OSError):
        data_file.unlink(missing_ok=True)
        data_file.parent.rmdir()


def _options(ready: PreparedJob, sweep: Sweep) -> SweepOptions:
    return SweepOptions(
        rounds=sweep.rounds, resume=sweep.resume, criteria=sweep.criteria, trace=sweep.trace,
        emulated=ready.emulated, matrix_rate=_matrix_rate(ready.machine, ready.job),
    )  # fmt: skip


def _matrix_rate(machine: Machine, job: Job) -> MatrixRate | None:
    flops_per_s = measured_matrix_rate(machine, job.workload)
    device = machine.cpu.name if machine.gpu is None else machine.gpu.name
    return None if flops_per_s is None else MatrixRate(flops_per_s=flops_per_s, device=device)


def _check_job(job: Job, *, quiet: bool) -> tuple[ModelShape, SaveData | None]:
    """The shape of the job's model; its data is read, once for all runs. Raises `UserError` for data that a
    run would refuse: each would end as a crash, and the verdict would be on the methods."""
    shape = resolve_shape(job)
    if job.data.train == "random":
        return shape, None
    with told(f"reading {Path(job.data.train).name}", quiet=quiet):
        from harness.data.tokenized import save_tokenized
        from harness.data.tokenizing import tokenize

        tokenized = tokenize(job, shape)
    if tokenized is not None:
        for line in tokenized.readings:
            console(stderr=True, quiet=quiet).print(line, markup=False, soft_wrap=True)
    return shape, None if tokenized is None else functools.partial(save_tokenized, tokenized)


def _like(emulate: Path | None, profile: Path | None) -> Emulated | None:
    """What runs are to be held to. Raises `UserError`."""
    if emulate is None:
        return None
    if profile is not None:
        raise UserError("--profile", "--emulate names the machine already", "leave out one of them")
    return emulated(find_profile(emulate))


def _emulate_argument(emulate: Path | None) -> str:
    return "" if emulate is None else f" --emulate {shlex.quote(str(emulate))}"
