"""A sweep: every plan, `rounds` times, interleaved, one record per run, and its resumption. No torch.

`<out>/job.toml` and `<out>/plans.json` say what is compared, `<out>/criteria.toml` by what it will be
judged, `<out>/runs/<id>.json` what happened, `<out>/traces/<id>.json` when, where that was asked for. All
are written whole or not at all, so that a sweep that was killed at any moment can be resumed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engines import entry
from engines.errors import UserError
from engines.shapes import ModelShape
from harness.records.environment import read_environment
from harness.records.job import Job, load_job, save_job
from harness.records.run import (
    CriteriaStamp,
    Emulation,
    Environment,
    Predicted,
    Run,
    RunModel,
    Summary,
    load_run,
    save_run,
)
from harness.records.settings import typed_settings
from harness.runs.emulate import Emulated
from harness.runs.launch import WORK, Outcome, Progress, Stepped, launch
from harness.runs.worker import Request
from profiles.documents import NewerDocument, adapter, write_whole
from profiles.planning.plan import Plan, load_plans, save_plans
from profiles.system.nvml import open_device

WRITTEN_BEFORE = frozenset({"machine.json", "criteria.toml"})
"""Files that may lie in a new folder for results."""


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
    """What a sweep is about to do. Told once, first."""

    kept: tuple[str, ...]
    """Ids of runs whose records are there."""
    to_run: tuple[str, ...]
    """Ids in order of running."""
    again: Mapping[str, str]
    """Those of `to_run` that have a record which does not count, and why."""
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


Event = Planned | Started | Progress | Stepped | Ended


def grid(job: Job, plans: Sequence[Plan], rounds: int, emulated: Emulated | None = None) -> list[Cell]:
    """Every plan once per round, each round in the reverse order of the one before (A B B A).

    A machine that warms up or slows down then favours no method. Ids say engine, what is run, and
    round; they do not depend on predictions. Raises `UserError` if two plans would run the same.
    """
    names = [f"{plan.engine}-{_hash(job, plan, emulated)}" for plan in plans]
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


def compare(
    job: Job,
    shape: ModelShape,
    plans: Sequence[Plan],
    out: Path,
    *,
    rounds: int = 1,
    resume: bool = False,
    criteria: Path | None = None,
    trace: bool = False,
    emulated: Emulated | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    before_first: Callable[[], None] = lambda: None,
    data_file: Path | None = None,
) -> list[Run]:
    """Run what is missing of the grid and return all its records, in the order of the grid.

    A plan that does not fit or cannot run here becomes a record without a run. With `resume`, an engine
    that has a plan in `out` keeps it, for its runs to be alike. `trace` has engines keep what each stream
    did, where they can; it changes no id, and runs whose records are kept get none. With `emulated`, runs are
    held to what that machine has. `before_first` is called once `out` is known to be usable. `data_file`
    holds from then on what all runs train on, in tokens; without it each reads the job's data by itself.

    Raises `UserError` if `out` is in use, was made for another job, other criteria or on another machine, or
    cannot be written; `KeyboardInterrupt` after the record of a run that was stopped from the keyboard.
    """
    if check_folder(out, resume=resume):
        job, plans = _check_resumed(job, plans, out)
    _check_emulation(emulated, out)
    cells = grid(job, plans, rounds, emulated)
    kept, again = _find_records(cells, out)
    environment = replace(read_environment(), emulated=None if emulated is None else emulated.machine)
    if len(kept) < len(cells):
        _check_same_machine(kept.values(), environment, out)
    criteria_sha256 = _settle_criteria(criteria, out)
    _write_intent(job, plans, out)
    shutil.rmtree(out / WORK, ignore_errors=True)  # of a sweep that was killed
    before_first()

    to_run = tuple(cell.id for cell in cells if cell.id not in kept)
    found = tuple(cell.id for cell in cells if cell.id in kept)
    on_event(Planned(kept=found, to_run=to_run, again=again, notes=environment.notes))
    device = open_device()
    runs: list[Run] = []
    for index, cell in enumerate(cells):
        if cell.id in kept:
            runs.append(kept[cell.id])
            continue
        on_event(Started(cell=cell, index=index, total=len(cells)))
        began = datetime.now(UTC).isoformat(timespec="seconds")
        if cell.plan.fits:
            request = Request(
                id=cell.id, job=job, shape=shape, plan=cell.plan, trace=trace, emulated=emulated,
                data_file=data_file,
            )  # fmt: skip
            outcome = launch(request, out, device=device, on_event=on_event)
        else:
            outcome = Outcome(
                end_state="skipped_infeasible" if cell.plan.available else "not_available",
                end_reason=cell.plan.why_not or "the plan does not fit",
                samples=(),
                summary=Summary(),
                by_user=False,
            )
        stamp = None if criteria_sha256 is None else CriteriaStamp(sha256=criteria_sha256, time=began)
        run = replace(
            _record(cell, job, shape, outcome, began, environment, stamp),
            emulation=None if emulated is None else _emulation(cell.engine, emulated, outcome),
        )
        save_run(run, _record_path(out, cell.id))
        runs.append(run)
        on_event(Ended(run=run, index=index, total=len(cells)))
        if outcome.by_user:
            raise KeyboardInterrupt
    return runs


def missing(
    job: Job,
    plans: Sequence[Plan],
    out: Path,
    *,
    rounds: int,
    resume: bool,
    emulated: Emulated | None = None,
) -> list[Cell]:
    """The cells that `compare` would run with the same arguments. Writes nothing; raises as it does."""
    if check_folder(out, resume=resume):
        job, plans = _check_resumed(job, plans, out)
    _check_emulation(emulated, out)
    cells = grid(job, plans, rounds, emulated)
    kept, _ = _find_records(cells, out)
    return [cell for cell in cells if cell.id not in kept]


def check_folder(out: Path, *, resume: bool) -> bool:
    """Whether `out` holds results. Raises `UserError` if it does and `resume` is not asked for."""
    in_use = bool(_entries(out))
    if in_use and not resume:
        raise UserError(
            str(out), "is not empty", "add --resume to do what is missing there, or name another --out"
        )
    return in_use


def _hash(job: Job, plan: Plan, emulated: Emulated | None) -> str:
    """Of what decides a run: the job, the engine and its settings, the emulated machine if there is one."""
    what = [_dump(job), plan.engine, dict(plan.settings)]
    if emulated is not None:
        what.append(adapter(Emulated).dump_python(emulated, mode="json"))
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode("utf-8")).hexdigest()[:8]


def _dump(job: Job) -> dict[str, Any]:
    dumped: dict[str, Any] = adapter(Job).dump_python(job, mode="json")
    return dumped


def _record_path(out: Path, run_id: str) -> Path:
    return out / "runs" / f"{run_id}.json"


def _record(
    cell: Cell,
    job: Job,
    shape: ModelShape,
    outcome: Outcome,
    began: str,
    environment: Environment,
    stamp: CriteriaStamp | None,
) -> Run:
    told = cell.plan.prediction
    return Run(
        id=cell.id,
        end_state=outcome.end_state,
        end_reason=outcome.end_reason,
        engine=cell.engine,
        round=cell.round,
        time=began,
        model=RunModel(
            name=job.model.name, random_weights=job.model.random_weights, parameters=shape.parameters
        ),
        job=_dump(job),
        plan=cell.plan,
        samples=outcome.samples,
        summary=replace(
            outcome.summary, floor_share=floor_share(told.floor_s, outcome.summary.step_s_median)
        ),
        predicted=Predicted(
            step_s_low=told.step_s_low,
            step_s=told.step_s,
            step_s_high=told.step_s_high,
            peak_gpu_bytes=told.peak_gpu_bytes,
            peak_host_bytes=told.peak_host_bytes,
            bottleneck=told.bottleneck,
            basis=told.basis,
            floor_s=told.floor_s,
        ),
        environment=environment,
        criteria=stamp,
        traced=outcome.traced,
        trace_file=outcome.trace_file,
    )


def _emulation(engine: str, asked: Emulated, outcome: Outcome) -> Emulation:
    held = outcome.held
    copies = entry(engine).copies
    return Emulation(
        vram_bytes=asked.vram_bytes,
        threads=asked.threads,
        rates=asked.rates,
        link="emulated" if copies == "own" else "not emulated" if copies == "library" else "unused",
        threads_held=None if held is None else held.threads,
        vram_bytes_held=None if held is None else held.vram_bytes,
        rates_held=None if held is None else held.rates,
    )


def floor_share(floor_s: float | None, step_s: float | None) -> float | None:
    """Predicted floor over measured step; `None` where either is not there."""
    return floor_s / step_s if floor_s is not None and step_s else None


def _entries(out: Path) -> set[str]:
    """Names in `out` that say it is in use."""
    try:
        return {path.name for path in out.iterdir()} - WRITTEN_BEFORE
    except FileNotFoundError:
        return set()
    except NotADirectoryError:
        raise UserError(str(out), "is a file, not a folder for results", "name another --out") from None
    except PermissionError:
        raise UserError(
            str(out), "this folder may not be read", "change its permissions or name another --out"
        ) from None


def _check_resumed(job: Job, plans: Sequence[Plan], out: Path) -> tuple[Job, list[Plan]]:
    """What to run: the job in `out`, which may have settings as text, as earlier versions wrote them; and the
    plans there for the engines that have one, the given ones for others."""
    if not (out / "job.toml").exists():
        raise UserError(str(out), "holds no comparison to resume (no job.toml)", "name another --out")
    begun = load_job(out / "job.toml")
    before, now = (_dump(replace(each, settings=typed_settings(each.settings))) for each in (begun, job))
    changed = _first_difference(before, now)
    if changed is not None:
        field, was, is_now = changed
        raise UserError(
            f"--resume {out}",
            f"the job differs in '{field}' (was {was}, is now {is_now})",
            "give the earlier value, or name another --out",
        )
    earlier = _earlier_plans(out)
    chosen: list[Plan] = []
    for plan in plans:
        kept = [one for one in earlier if one.engine == plan.engine]
        chosen += [one for one in kept or [plan] if one not in chosen]
    return begun, chosen


def _earlier_plans(out: Path) -> tuple[Plan, ...]:
    path = out / "plans.json"
    if not path.exists():  # killed before it was written, so before the first run
        return ()
    return load_plans(path)


def _write_intent(job: Job, plans: Sequence[Plan], out: Path) -> None:
    """job.toml first: its presence says that the folder holds a comparison."""
    if not (out / "job.toml").exists():
        save_job(job, out / "job.toml")
    engines = {plan.engine for plan in plans}
    others = [plan for plan in _earlier_plans(out) if plan.engine not in engines]
    save_plans([*others, *plans], out / "plans.json")


def _settle_criteria(criteria: Path | None, out: Path) -> str | None:
    """Keep a copy of the criteria in `out`; its hash. Once runs began, criteria do not change."""
    kept = out / "criteria.toml"
    if criteria is not None:
        text = _read_criteria(criteria)
        if kept.exists():
            earlier = _read_criteria(kept)
            changed = _first_difference(tomllib.loads(earlier), tomllib.loads(text))
            if changed is not None:
                field, before, now = changed
                raise UserError(
                    str(criteria),
                    f"differs from {kept} in '{field}' (was {before}, is now {now})",
                    "criteria are written down before measuring: name another --out to start anew",
                )
        elif (out / "job.toml").exists():
            raise UserError(
                str(criteria),
                "the earlier runs were made without criteria",
                "criteria are written down before measuring: name another --out to start anew",
            )
        else:
            write_whole(kept, text)
    if not kept.exists():
        return None
    return hashlib.sha256(kept.read_bytes()).hexdigest()


def _read_criteria(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        tomllib.loads(text)
    except OSError as error:
        raise UserError(str(path), f"cannot be read ({error.strerror})", "check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"is not valid TOML ({error})", "mend the file") from None
    return text


def _find_records(cells: Sequence[Cell], out: Path) -> tuple[dict[str, Run], dict[str, str]]:
    """Records that count, by id, and for those that do not, why.

    Raises `UserError` for one that a newer version wrote: it is a result, and to repeat it would lose it.
    """
    kept: dict[str, Run] = {}
    again: dict[str, str] = {}
    for cell in cells:
        path = _record_path(out, cell.id)
        if not path.exists():
            continue
        try:
            run = load_run(path)
        except NewerDocument:
            raise
        except UserError as error:
            again[cell.id] = error.why
            continue
        if run.end_state == "interrupted":
            again[cell.id] = "was interrupted"
        else:
            kept[cell.id] = run
    return kept, again


def _check_same_machine(kept: Iterable[Run], now: Environment, out: Path) -> None:
    """Runs on another machine or torch could not be reported beside the kept ones: refused before their time
    is spent."""
    for run in kept:
        for field in ("gpu_name", "gpu_driver", "cpu", "cores_usable", "torch"):
            before, here = getattr(run.environment, field), getattr(now, field)
            if run.end_state == "ok" and before != here:
                raise UserError(
                    f"--resume {out}",
                    f"its runs differ from here in '{field}' (was {before}, is now {here})",
                    "go on where it was begun, or name another --out",
                )


def _check_emulation(emulated: Emulated | None, out: Path) -> None:
    """Runs of a real machine and of an emulated one, or of two, do not lie in one folder."""
    wanted = None if emulated is None else [emulated.vram_bytes, emulated.threads, emulated.rates]
    for path in sorted((out / "runs").glob("*.json")):
        try:
            run = load_run(path)
        except UserError:
            continue  # spoken of where the records are read
        was = run.emulation
        if wanted != (None if was is None else [was.vram_bytes, was.threads, was.rates]):
            before = run.environment.emulated or "the machine as it is"
            now = "the machine as it is" if emulated is None else emulated.machine
            raise UserError(
                f"--resume {out}",
                f"its runs are of another machine (was {before}, is now {now})",
                "go on with the same --emulate, or name another --out",
            )


def _first_difference(before: Any, now: Any, field: str = "") -> tuple[str, Any, Any] | None:
    """Dotted name, old and new value of the first field in which two documents differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            found = _first_difference(before.get(key), now.get(key), f"{field}.{key}" if field else key)
            if found is not None:
                return found
        return None
    return None if before == now else (field, before, now)
