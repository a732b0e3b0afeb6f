"""A folder of results and what it says of the sweep that was begun in it: what may go on there, and what is
refused. Imports no torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines.errors import UserError
from engines.files.reading import MOST_SETTINGS_BYTES, exists, parse_toml, read_bytes, read_text
from engines.files.writing import is_leftover
from harness.records.job import JOB_FILE, Job, load_job, make_job, save_job
from harness.records.manifest import CRITERIA_FILE, PLANS_FILE
from harness.records.run import Environment, Run, load_run
from harness.records.settings import typed_settings
from harness.records.shape import MODEL
from harness.records.shared import shared_job, shared_plan
from harness.records.upgrades import UPGRADES
from harness.runs.attempt import dumped_job, record_path
from harness.runs.emulate import Emulated
from harness.runs.external.description import refuse_changed
from harness.runs.launch import WORK
from profiles.documents import NewerDocument, write_whole
from profiles.machine import MACHINE_FILE
from profiles.planning.plan import Plan, load_plans, save_plans

WRITTEN_BEFORE = frozenset({MACHINE_FILE, MODEL, UPGRADES, CRITERIA_FILE, WORK})
"""Files that may lie in a new folder for results."""


def check_folder(out: Path, *, resume: bool) -> bool:
    """Whether `out` holds results. Raises `UserError` if it does and `resume` is not asked for."""
    in_use = bool(_entries(out))
    if in_use and not resume:
        raise UserError(
            str(out), "is not empty", "add --resume to do what is missing there, or name another --out"
        )
    return in_use


def _entries(out: Path) -> set[str]:
    """Names in `out` that say it is in use."""
    try:
        return {name for name in os.listdir(out) if not is_leftover(name)} - WRITTEN_BEFORE
    except FileNotFoundError:
        return set()
    except NotADirectoryError:
        raise UserError(str(out), "is a file, not a folder for results", "name another --out") from None
    except PermissionError:
        raise UserError(
            str(out), "this folder may not be read", "change its permissions or name another --out"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(str(out), f"cannot be read ({reason})", "name another --out") from None


def resumed(job: Job, plans: Sequence[Plan], out: Path) -> tuple[Job, list[Plan]]:
    """What to run: the job in `out`, which may have settings as text, as earlier versions wrote them; and the
    plans there for the engines that have one, the given ones for others.

    Raises `UserError` if `out` holds no comparison, or one of another job.
    """
    if not exists(out / JOB_FILE):
        raise UserError(str(out), "holds no comparison to resume (no job.toml)", "name another --out")
    begun = load_job(out / JOB_FILE)
    before, now = (dumped_job(replace(each, settings=typed_settings(each.settings))) for each in (begun, job))
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
        same_engine = [one for one in earlier if one.engine == plan.engine]
        for one in same_engine:
            refuse_changed(one, plan, out)
        chosen += [one for one in same_engine or [plan] if one not in chosen]
    return begun, chosen


def _earlier_plans(out: Path) -> tuple[Plan, ...]:
    path = out / PLANS_FILE
    if not exists(path):  # killed before it was written, so before the first run
        return ()
    return load_plans(path)


def write_intent(job: Job, plans: Sequence[Plan], out: Path) -> None:
    """Say in `out` what is compared. job.toml first: its presence says that the folder holds a comparison."""
    if not exists(out / JOB_FILE):
        save_job(job, out / JOB_FILE)
    engines = {plan.engine for plan in plans}
    others = [plan for plan in _earlier_plans(out) if plan.engine not in engines]
    shown = [shared_plan(plan, keep_settings=True) for plan in (*others, *plans)]
    save_plans(shown, out / PLANS_FILE)


def settle_criteria(criteria: Path | None, out: Path) -> str | None:
    """Keep a copy of the criteria in `out`; its hash, or `None` where there are none.

    Raises `UserError` for criteria that differ from those of runs that began: they do not change then.
    """
    kept = out / CRITERIA_FILE
    if criteria is not None:
        text = _read_criteria(criteria)
        if exists(kept):
            earlier = _read_criteria(kept)
            changed = _first_difference(parse_toml(earlier, str(kept)), parse_toml(text, str(criteria)))
            if changed is not None:
                field, before, now = changed
                raise UserError(
                    str(criteria),
                    f"differs from {kept} in '{field}' (was {before}, is now {now})",
                    "criteria are written down before measuring: name another --out to start anew",
                )
        elif exists(out / JOB_FILE):
            raise UserError(
                str(criteria),
                "the earlier runs were made without criteria",
                "criteria are written down before measuring: name another --out to start anew",
            )
        else:
            write_whole(kept, text)
    if not exists(kept):
        return None
    return hashlib.sha256(read_bytes(kept, "criteria file", MOST_SETTINGS_BYTES)).hexdigest()


def _read_criteria(path: Path) -> str:
    text = read_text(path, "criteria file", MOST_SETTINGS_BYTES)
    parse_toml(text, str(path))
    return text


def find_records(run_ids: Iterable[str], out: Path) -> tuple[dict[str, Run], dict[str, str]]:
    """Records that count, by id, and for those that do not, why.

    Raises `UserError` for one that a newer version wrote: it is a result, and to repeat it would lose it.
    """
    found: dict[str, Run] = {}
    again: dict[str, str] = {}
    for run_id in run_ids:
        path = record_path(out, run_id)
        if not exists(path):
            continue
        try:
            run = load_run(path)
        except NewerDocument:
            raise
        except UserError as error:
            again[run_id] = error.why
            continue
        if run.end_state == "interrupted":
            again[run_id] = "was interrupted"
        else:
            found[run_id] = run
    return found, again


def check_same_machine(found: Iterable[Run], now: Environment, out: Path) -> None:
    """Raises `UserError` on another machine, torch or setting of its allocator than those of runs `found`:
    new ones could not be reported beside them, or their memory not be compared, and their time would be spent
    for nothing."""
    for run in found:
        for field in ("gpu_name", "gpu_driver", "cpu", "cores_usable", "torch", "gpu_allocator"):
            before, here = getattr(run.environment, field), getattr(now, field)
            if run.end_state == "ok" and before != here:
                was, is_now = ("none" if each is None else each for each in (before, here))
                raise UserError(
                    f"--resume {out}",
                    f"its runs differ from here in '{field}' (was {was}, is now {is_now})",
                    "go on where it was begun, or name another --out",
                )


def check_emulation(emulated: Emulated | None, out: Path) -> None:
    """Raises `UserError` if runs in `out` are of another machine, real or emulated, than is asked for now."""
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


def check_job(job: Job, out: Path) -> None:
    """Raises `UserError` if runs in `out` are of another job than `job`, which its job.toml says: that has
    been edited, and new runs could not be reported beside the old. Settings are told by plans."""
    now = _what_reports_compare(shared_job(job))
    for path in sorted((out / "runs").glob("*.json")):
        try:
            run = load_run(path)
            before = _what_reports_compare(make_job(run.job, str(path)))
        except UserError:
            continue  # spoken of where the records are read
        changed = _first_difference(before, now)
        if changed is not None:
            field, was, is_now = changed
            raise UserError(
                f"--resume {out}",
                f"its job.toml is not the job of its runs: '{field}' was {was}, is now {is_now}",
                "put the earlier value back, or name another --out",
            )


def _what_reports_compare(job: Job) -> dict[str, Any]:
    values = dumped_job(replace(job, settings={}, seed=0))
    values["limits"] = {name: each for name, each in values["limits"].items() if name != "timeout_s"}
    return values


def _first_difference(before: Any, now: Any, field: str = "") -> tuple[str, Any, Any] | None:
    """Dotted name, old and new value of the first field in which two documents differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            found = _first_difference(before.get(key), now.get(key), f"{field}.{key}" if field else key)
            if found is not None:
                return found
        return None
    return None if before == now else (field, before, now)
