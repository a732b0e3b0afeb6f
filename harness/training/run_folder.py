"""The folder of a training run: taken for a run, checked against the run that is in it, and read back.

What lies in `<out>`: `job.toml` and `engine.json` (what is trained, and how), `log.jsonl` (a line per
step, `step` being the number of steps done, and a line per evaluation), `updates.log` of a zeroth-order
method (`harness.training.update_log`), `checkpoints/` (the newest full one), `model/` (the export),
`summary.json` (how it ended), `best/` (the model of the best evaluation, where there are some on the way),
`trace.json` and `tensorboard/` where they were asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from engines.errors import UserError
from engines.files.reading import exists, is_folder, names_in
from engines.files.writing import is_leftover
from engines.settings.given import GivenSettings
from engines.settings.zeroth_order import MezoSettings
from harness.models.export import holds_something
from harness.records.job import JOB_FILE, Job, load_job, save_job
from harness.records.settings import typed_settings
from harness.runs.worker import TRACE
from harness.training import restore
from harness.training.run_files import ENGINE_FILE, check_holds_run
from harness.training.update_log import check_belongs, read_update_log, refuse_damaged
from profiles.documents import read_document, to_json, write_whole
from profiles.planning.plan import EngineSettings

SCHEMA_VERSION = 1
"""Of engine.json. 1: first version (0.1.0)."""

MODEL = "model"

LR_FILE = "find_lr.json"
"""What `--find-lr` leaves in a folder, which may then be trained into."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """Which engine trains, with all of its settings."""

    engine: str
    settings: EngineSettings
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRun:
    """What the folder of a run holds, so far."""

    out: Path
    job: Job
    method: Method
    settings: Any
    """Of the engine, typed."""
    has_log: bool
    step: int
    """Steps done."""


def read_run(out: Path) -> TrainingRun:
    """Raises `UserError` if `out` holds no run, or none whose weights can be rebuilt."""
    check_holds_run(out)
    job = load_job(out / JOB_FILE)
    method = _read_method(out)
    typed = method.settings.typed
    has_log = isinstance(typed, MezoSettings) and exists(out / restore.UPDATE_LOG)
    step = restore.step_of(restore.newest_checkpoint(out))
    if has_log:
        contents = read_update_log(out / restore.UPDATE_LOG)
        check_belongs(contents, job, typed, out / restore.UPDATE_LOG)
        refuse_damaged(contents, out / restore.UPDATE_LOG)
        step = max(step, contents.end_step)
    elif restore.newest_checkpoint(out) is None:
        why, remedy = "holds no checkpoint", "train with --save-every"
        if holds_something(out / MODEL):
            remedy = f"its finished model is {out / MODEL}"
        elif holds_something(out / restore.CHECKPOINTS):
            why = "holds no whole checkpoint: the first is being written, or the run was ended while it was"
            remedy = "wait for it, or begin anew with --resume"
        raise UserError(str(out), why, remedy)
    return TrainingRun(out=out, job=job, method=method, settings=typed, has_log=has_log, step=step)


def claim(job: Job, method: Method, out: Path, resume: bool) -> Any:
    """Take `out` for this run, or check that it is its own; the settings to train with. Raises `UserError`
    for the folder of another run: its engine, job or update log."""
    if not exists(out / JOB_FILE):  # which is written last: no step was taken without it
        refuse_folder_in_use(out, resume)
        write_whole(out / ENGINE_FILE, to_json(method))
        save_job(job, out / JOB_FILE)
        return method.settings.typed
    earlier = _read_method(out)
    settings = earlier.settings.typed
    before = load_job(out / JOB_FILE)
    before = replace(before, limits=job.limits, settings=typed_settings(before.settings))
    switched = earlier.engine != method.engine
    if switched:
        settings = carried_over(settings, method.settings.typed)
        if settings is None:
            raise UserError(
                "--resume",
                f"the earlier engine was {earlier.engine}, not {method.engine}",
                "give the same flags",
            )
        before = replace(before, settings=job.settings)
    changed = [field.name for field in fields(Job) if getattr(before, field.name) != getattr(job, field.name)]
    if changed:
        raise UserError(
            "--resume",
            f"the job differs from the earlier one in {', '.join(changed)}",
            "give the same flags, or name another --out",
        )
    path = out / restore.UPDATE_LOG
    if isinstance(settings, MezoSettings) and exists(path):
        check_belongs(read_update_log(path), job, settings, path)
    if switched:
        save_job(job, out / JOB_FILE)
        write_whole(out / ENGINE_FILE, to_json(method_of(method.engine, settings)))
    return settings


def refuse_folder_in_use(out: Path, resume: bool) -> None:
    """Raises `UserError` if a run may not begin or go on in `out`. What a start leaves that was killed before
    it was complete is no run, and is written over by the next."""
    remedy = "leave out --resume, or name its --out" if resume else "name another --out, or add --resume"
    why = "holds no run to resume" if resume else "is not an empty folder"
    if not exists(out):
        if resume:
            raise UserError(str(out), why, remedy)
        return
    names = names_in(out) if is_folder(out) else {JOB_FILE}
    begun = is_folder(out) and JOB_FILE in names
    free = all(name in (LR_FILE, ENGINE_FILE) or is_leftover(name) for name in names)
    if (resume and not begun and not (free and ENGINE_FILE in names)) or (not resume and not free):
        raise UserError(str(out), why, remedy)


@contextmanager
def given_back_if_refused(out: Path, resume: bool) -> Iterator[None]:
    """Takes back what a new run has written if a `UserError` ends it before there is a line in its log: the
    corrected command may then name the same folder."""
    try:
        yield
    except UserError:
        log = out / restore.LOSS_LOG
        if not resume and not (exists(log) and log.stat().st_size):
            for name in (ENGINE_FILE, JOB_FILE, restore.LOSS_LOG, restore.UPDATE_LOG, TRACE):
                with suppress(OSError):  # it is not there, or cannot be taken away
                    (out / name).unlink()
        raise


def method_of(engine: str, settings: Any) -> Method:
    """With the typed `settings` as all that there are."""
    return Method(engine=engine, settings=GivenSettings(asdict(settings), settings))


def carried_over(earlier: Any, new: Any) -> Any:
    """Settings with which the engine of `new` takes the same steps as one with the settings `earlier` did:
    those of MeZO are kept, those that only say where and how things lie are its own. `None` if it is another
    algorithm.
    """
    if not isinstance(earlier, MezoSettings) or not isinstance(new, MezoSettings):
        return None
    kept = earlier.decides_updates
    if not (earlier.is_quantized or new.is_quantized):
        kept["base"] = new.base
    return replace(new, **kept)


def _read_method(out: Path) -> Method:
    return read_document(out / ENGINE_FILE, Method, SCHEMA_VERSION, "record of a training run")
