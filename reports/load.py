"""Read an output folder back. What cannot be read becomes a line of the report; unlike runs are refused."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from engines import ENGINES, is_external
from engines.errors import UserError
from engines.files.reading import exists
from engines.shapes import ModelShape
from harness.quality.documents import PLAN
from harness.records.job import JOB_FILE, Job, load_job, make_job
from harness.records.manifest import CRITERIA_FILE, MANIFEST, PLANS_FILE, ManifestFinding, check_manifest
from harness.records.run import Run, load_run
from harness.records.shape import MODEL, load_shape
from harness.records.shared import shared_job, shared_plan, shared_values
from harness.records.upgrades import UPGRADES, load_upgrades
from profiles.advice.what_if import StepsOn
from profiles.documents import adapter
from profiles.machine import MACHINE_FILE, Machine, load_machine
from profiles.planning.plan import Plan, load_plans
from reports.criteria import Criteria, load_criteria

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Broken:
    file: str
    """Relative to the folder."""
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    name: str
    """Of the folder, without its path."""
    machine: Machine | None
    job: Job
    """With names for its paths."""
    plans: tuple[Plan, ...]
    """One per engine; from the runs where plans.json is absent."""
    runs: tuple[Run, ...]
    """By engine, round and time; never empty."""
    broken: tuple[Broken, ...]
    criteria: Criteria | None
    """`None`: the folder holds none."""
    shape: ModelShape | None = None
    """Sizes of the model; `None`: the folder does not keep them, as earlier ones did not."""
    upgrades: tuple[StepsOn, ...] = ()
    """The machine as it is, then with single upgrades, as predicted when the sweep began; empty: nothing is
    kept of it."""
    findings: tuple[ManifestFinding, ...] = ()
    """What is not as the folder's manifest says."""


def engine_order(engine: str) -> tuple[int, str]:
    """Engines in the order of `engines.ENGINES`; unknown ones last."""
    known = list(ENGINES)
    return (known.index(engine) if engine in known else len(known), engine)


def load_folder(folder: Path) -> Loaded:
    """What `compare` left in `folder`.

    Raises `UserError` if there is no run to be read, if the folder or the criteria may not be read, or if the
    runs are unlike each other.
    """
    if _names(folder) is None:
        raise UserError(
            str(folder), "there is no such folder", "name the --out folder of 'lspzo-bench compare'"
        )
    if exists(folder / PLAN):
        raise UserError(
            str(folder),
            "is a study: it has trials and no runs",
            "use 'report' or 'export' on it",
        )
    broken: list[Broken] = []
    runs = _load_runs(folder, broken)
    refuse_unlike(runs)
    machine = _optional(folder / MACHINE_FILE, load_machine, broken)
    plans = _optional(folder / PLANS_FILE, _shown_plans, broken)
    ran = make_job(runs[0].job, f"the job of run '{runs[0].id}'")
    job = _optional(folder / JOB_FILE, lambda path: shared_job(load_job(path)), broken)
    if job is not None and (differs := _unlike(job, ran)):
        broken.append(Broken(file=JOB_FILE, reason=f"it is not the job of the runs: {differs}"))
        job = None
    shape = _optional(folder / MODEL, load_shape, broken)
    criteria = folder / CRITERIA_FILE
    return Loaded(
        name=folder.resolve().name,
        machine=machine,
        job=job or ran,
        plans=tuple(
            sorted(
                plans or {run.engine: run.plan for run in runs}.values(), key=lambda p: engine_order(p.engine)
            )
        ),
        runs=runs,
        shape=shape,
        upgrades=_optional(folder / UPGRADES, load_upgrades, broken) or (),
        findings=_findings(folder, broken),
        criteria=load_criteria(criteria) if exists(criteria) else None,
        broken=tuple(broken),
    )


def _shown_plans(path: Path) -> tuple[Plan, ...]:
    return tuple(shared_plan(plan) for plan in load_plans(path))


def _findings(folder: Path, broken: list[Broken]) -> tuple[ManifestFinding, ...]:
    try:
        return check_manifest(folder)
    except UserError as error:
        broken.append(Broken(file=MANIFEST, reason=_short(error, folder / MANIFEST)))
        return (ManifestFinding(kind="no_manifest", file=MANIFEST),)


def refuse_unlike(runs: Sequence[Run]) -> None:
    """Runs of differing GPU, driver, torch, model, data, precision or token count are not compared.

    Raises `UserError` naming the first field that differs and a run on each side. What a run that never
    started could not read (its driver, its torch) is not held against it. The seed and the time limit
    may differ.
    """
    seen: dict[str, tuple[Any, str]] = {}
    for run in runs:
        for field, value in likeness(run):
            other, id_ = seen.setdefault(field, (value, run.id))
            if other != value:
                raise UserError(
                    f"runs '{id_}' and '{run.id}'",
                    f"are unlike: {field} is {other!r} in one and {value!r} in the other",
                    "report them from separate folders",
                )


def _unlike(job: Job, ran: Job) -> str:
    """What a job file says otherwise than the runs do; empty: nothing that `refuse_unlike` looks at."""
    own, theirs = (dict(_flat(adapter(Job).dump_python(each, mode="json"))) for each in (job, ran))
    return "; ".join(
        f"{name.removeprefix('job.')} is {value} and was {theirs.get(name)}"
        for name, value in own.items()
        if value != theirs.get(name) and _must_be_alike(name)
    )


def _must_be_alike(name: str) -> bool:
    """Of a field of the job."""
    return name not in ("job.seed", "job.limits.timeout_s") and not name.startswith("job.settings.")


def likeness(run: Run) -> Iterator[tuple[str, Any]]:
    """What must be the same of runs for their times to be compared, by name."""
    environment = run.environment
    for field, value in (
        ("GPU", environment.gpu_name),
        ("GPU driver", environment.gpu_driver),
        ("torch", environment.torch),
        ("emulated machine", environment.emulated),
    ):
        if run.end_state == "ok" or value is not None:
            yield field, value
    if run.emulation is not None:
        yield "emulated GPU memory", run.emulation.vram_bytes
        yield "emulated threads", run.emulation.threads
        yield "emulated link", run.emulation.rates
    yield "CPU", environment.cpu
    yield "cores usable", environment.cores_usable
    for key, value in _flat(shared_values(run.job)):
        if _must_be_alike(key):
            yield key, value
    for key, setting in sorted(shared_values(run.plan.settings).items()):
        yield f"setting {run.engine}.{key}", setting


def _flat(values: Mapping[str, Any], prefix: str = "job") -> Iterator[tuple[str, Any]]:
    for key, value in sorted(values.items()):
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}", value


def _names(folder: Path) -> list[str] | None:
    """What lies in `folder`; `None` if there is no such folder. Raises `UserError` if it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(
            str(folder), f"this folder cannot be read ({error.strerror})", "make it readable"
        ) from None


def _is_of_compare(folder: Path) -> bool:
    """Whether a comparison or a study, such as one task of a suite, lies there."""
    return any((folder / name).exists() for name in ("runs", PLAN))


def _load_runs(folder: Path, broken: list[Broken]) -> tuple[Run, ...]:
    names = _names(folder / "runs") or []
    files = [folder / "runs" / name for name in names if name.endswith(".json") and not name.startswith(".")]
    if not files:
        below = [name for name in _names(folder) or () if _is_of_compare(folder / name)]
        remedy = "run 'lspzo-bench compare' with this --out"
        if below:
            remedy = f"name one of the folders in it, such as {folder / below[0]}"
        raise UserError(str(folder), "holds no runs (runs/*.json)", remedy)
    runs: dict[str, Run] = {}
    known_jobs: list[dict[str, Any]] = []
    for path in files:
        name = f"runs/{path.name}"
        try:
            run = load_run(path)
            if run.job not in known_jobs:
                make_job(run.job, "job")
                known_jobs.append(run.job)
        except UserError as error:
            broken.append(Broken(file=name, reason=_short(error, path)))
            continue
        wrong = _impossible(run)
        if wrong is None and run.id in runs:
            wrong = f"has the id '{run.id}' of another file"
        if wrong is not None:
            broken.append(Broken(file=name, reason=wrong))
            continue
        runs[run.id] = run
    if not runs:
        raise UserError(
            str(folder),
            f"none of its {len(files)} run files can be read ({broken[0].file} {broken[0].reason})",
            "restore them, or run 'lspzo-bench compare' again",
        )
    return tuple(
        sorted(runs.values(), key=lambda run: (engine_order(run.engine), run.round, run.time, run.id))
    )


def _impossible(run: Run) -> str | None:
    """Why what passed the schema cannot be reported: an unknown engine, or numbers that cannot have been
    measured."""
    if run.engine not in ENGINES and not is_external(run.engine):
        return f"its engine '{run.engine}' is none that this version knows"
    numbers = asdict(run.summary) | {f"samples.{i}": asdict(sample) for i, sample in enumerate(run.samples)}
    for key, value in _flat(numbers, "run"):
        if isinstance(value, float) and not math.isfinite(value):
            return f"{key} is not a finite number"
        # The realized update is a projection of what arrived on what was wanted: rounding can turn its sign.
        signed = "loss" in key or key == "run.landed_share"
        if isinstance(value, int | float) and value < 0 and not signed:
            return f"{key} is negative"
    if any(sample.step_s == 0 for sample in run.samples):
        return "a step took no time at all"
    return None


def _short(error: UserError, path: Path) -> str:
    """Without the path, which the report gives itself and which may differ between machines."""
    what = error.what.removeprefix(str(path)).lstrip(": ")
    return f"{what}: {error.why}" if what else error.why


def _optional(path: Path, load: Callable[[Path], T], broken: list[Broken]) -> T | None:
    try:
        if not exists(path):
            return None
        return load(path)
    except UserError as error:
        broken.append(Broken(file=path.name, reason=_short(error, path)))
        return None
