"""A sweep: every plan, `rounds` times, interleaved, one record per run, and its resumption. No torch.

`<out>/job.toml` and `<out>/plans.json` say what is compared, `<out>/criteria.toml` by what it will be
judged, `<out>/runs/<id>.json` what happened, `<out>/traces/<id>.json` when, where that was asked for. All
are written whole or not at all, so that a sweep that was killed at any moment can be resumed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engines.errors import UserError
from engines.files.writing import clear_leftovers
from engines.shapes import ModelShape
from harness.records.environment import read_environment
from harness.records.job import Job
from harness.records.manifest import begin_manifest
from harness.records.run import Run
from harness.runs.attempt import MatrixRate, attempt, dumped_job, take_up
from harness.runs.emulate import Emulated
from harness.runs.events import SettingUp, Stepped
from harness.runs.sweep_folder import (
    check_emulation,
    check_folder,
    check_job,
    check_same_machine,
    find_records,
    resumed,
    settle_criteria,
    write_intent,
)
from harness.runs.worker import Request
from profiles.documents import adapter
from profiles.planning.plan import Plan
from profiles.system.nvml import open_device
from profiles.units import format_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One run to do: a plan in a round."""

    id: str
    engine: str
    plan: Plan
    round: int
    """From 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """What a sweep is about to do. Reported once, first."""

    kept: tuple[str, ...]
    """Ids of runs whose records are there."""
    to_run: tuple[str, ...]
    """Ids in order of running."""
    again: Mapping[str, str]
    """Those of `to_run` that have a record which does not count, and why."""
    taken_up: tuple[str, ...] = ()
    """Those of `kept` whose records were made just now of what ended runs had left."""
    notes: tuple[str, ...] = ()
    """Of the machine; see `harness.records.run.Environment`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    cell: Cell
    index: int
    """Position among all cells of the sweep, from 0."""
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    run: Run
    index: int
    total: int


SweepEvent = Planned | Started | SettingUp | Stepped | Ended


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepOptions:
    """How a sweep is run."""

    rounds: int = 1
    """Runs of each plan."""
    resume: bool = False
    """The folder may hold a comparison. Its records are kept, and an engine that has a plan there keeps it,
    for its runs to be alike."""
    criteria: Path | None = None
    """By what it will be judged; `None`: by those in the folder, if there are any."""
    trace: bool = False
    """Have engines keep what each stream did, where they can. It changes no id, and runs whose records are
    kept get none."""
    emulated: Emulated | None = None
    """What of another machine runs are held to; `None`: the machine is used as it is."""
    matrix_rate: MatrixRate | None = None
    """Of the machine's profile, for the share of it that steps reach."""


def grid(job: Job, plans: Sequence[Plan], rounds: int, emulated: Emulated | None = None) -> list[Cell]:
    """Every plan once per round, each round in the reverse order of the one before (A B B A).

    A machine that warms up or slows down then favours no method. Ids say engine, what is run, and
    round; they do not depend on predictions. Raises `UserError` if two plans would run the same.
    """
    # A name of a file on every system: a colon is none.
    names = [f"{plan.engine.replace(':', '-')}-{_hash(job, plan, emulated)}" for plan in plans]
    for name, plan in zip(names, plans, strict=True):
        if names.count(name) > 1:
            raise UserError(
                f"engine '{plan.engine}'", "is planned twice with the same settings", "name it once"
            )
    pairs = list(zip(names, plans, strict=True))
    return [
        Cell(id=f"{name}-r{round_}", engine=plan.engine, plan=plan, round=round_)
        for round_ in range(1, rounds + 1)
        for name, plan in (pairs if round_ % 2 else reversed(pairs))
    ]


def run_sweep(
    job: Job,
    shape: ModelShape,
    plans: Sequence[Plan],
    out: Path,
    options: SweepOptions = SweepOptions(),
    *,
    on_event: Callable[[SweepEvent], None] = lambda event: None,
    before_first: Callable[[], None] = lambda: None,
    data_file: Path | None = None,
) -> list[Run]:
    """Run what is missing of the grid and return all its records, in the order of the grid.

    A plan that does not fit or cannot run here becomes a record without a run. `before_first` is called once
    `out` is known to be usable. `data_file` holds from then on what all runs train on, in tokens; without it
    each reads the job's data by itself.

    Raises `UserError` if `out` is in use, was made for another job, other criteria or on another machine, or
    cannot be written; `KeyboardInterrupt` after the record of a run that a signal stopped.
    """
    emulated = options.emulated
    clear_leftovers(out)
    clear_leftovers(out / "runs")
    job, plans, cells = _cells(job, plans, out, options)
    taken = take_up(out)
    kept, again = find_records((cell.id for cell in cells), out)
    environment = replace(read_environment(), emulated=None if emulated is None else emulated.machine)
    if len(kept) < len(cells):
        check_same_machine(kept.values(), environment, out)
    criteria_sha256 = settle_criteria(options.criteria, out)
    write_intent(job, plans, out)
    before_first()
    begin_manifest(out, (cell.id for cell in cells), environment, criteria_sha256)

    to_run = tuple(cell.id for cell in cells if cell.id not in kept)
    found = tuple(cell.id for cell in cells if cell.id in kept)
    on_event(
        Planned(
            kept=found, to_run=to_run, again=again,
            notes=(*environment.notes, *late_runs(job, plans)),
            taken_up=tuple(run.id for run in taken),
        )
    )  # fmt: skip
    device = open_device()
    runs: list[Run] = []
    for index, cell in enumerate(cells):
        if cell.id in kept:
            runs.append(kept[cell.id])
            continue
        on_event(Started(cell=cell, index=index, total=len(cells)))
        request = Request(
            id=cell.id, job=job, shape=shape, plan=cell.plan, trace=options.trace, emulated=emulated,
            data_file=data_file,
        )  # fmt: skip
        run, by_user = attempt(
            request,
            cell.round,
            out,
            environment=environment,
            device=device,
            on_event=on_event,
            criteria_sha256=criteria_sha256,
            matrix_rate=options.matrix_rate,
        )
        runs.append(run)
        on_event(Ended(run=run, index=index, total=len(cells)))
        if by_user:
            raise KeyboardInterrupt
    return runs


def missing(job: Job, plans: Sequence[Plan], out: Path, options: SweepOptions) -> list[Cell]:
    """The cells that `run_sweep` would run with the same arguments. Writes nothing; raises as it does."""
    _, _, cells = _cells(job, plans, out, options)
    kept, _ = find_records((cell.id for cell in cells), out)
    return [cell for cell in cells if cell.id not in kept]


def _cells(
    job: Job, plans: Sequence[Plan], out: Path, options: SweepOptions
) -> tuple[Job, Sequence[Plan], list[Cell]]:
    """The grid of what is compared in `out`, with its job and plans. Raises `UserError` for a folder that
    cannot hold it."""
    if check_folder(out, resume=options.resume):
        job, plans = resumed(job, plans, out)
        check_job(job, out)
    check_emulation(options.emulated, out)
    return job, plans, grid(job, plans, options.rounds, options.emulated)


def _hash(job: Job, plan: Plan, emulated: Emulated | None) -> str:
    """Of what decides a run: the job, the engine and its settings, the emulated machine if there is one."""
    what = [dumped_job(job), plan.engine, dict(plan.settings)]
    if emulated is not None:
        what.append(adapter(Emulated).dump_python(emulated, mode="json"))
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode("utf-8")).hexdigest()[:8]


def late_runs(job: Job, plans: Sequence[Plan]) -> Iterator[str]:
    """A sentence on each plan whose steps may take longer, by its prediction, than a run is given."""
    steps, limit_s = job.warmup_steps + job.steps, job.limits.timeout_s
    for plan in plans:
        most_s = steps * (plan.prediction.step_s_high or 0.0)
        if plan.fits and most_s > limit_s:
            yield (
                f"{plan.engine}: {steps} steps may take {format_seconds(most_s)}, and --timeout {limit_s:g} "
                "stops a run after so many seconds"
            )
