"""One attempt at a run: launched where its plan fits, and one record of how it ended. Imports no torch.

`<out>/runs/<id>.json` is the record of a run that trained, `<out>/generations/<id>.json` of one that decoded,
whose steps are other steps.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from engines import entry, why_not_installed
from engines.costs.transformer import model_flops
from engines.errors import UserError
from engines.files.reading import exists, read_bytes
from engines.files.writing import ELSEWHERE, whole_file, write_whole
from harness.records.job import Job
from harness.records.manifest import record_noted
from harness.records.run import (
    CriteriaStamp,
    Emulation,
    Environment,
    Predicted,
    Run,
    RunModel,
    ScenarioName,
    Summary,
    encode_run,
    most_record_bytes,
)
from harness.records.shared import paths_of, shared_name, shared_plan, shared_values, without_paths
from harness.records.stats import counted_step_s
from harness.runs.events import OnRunEvent
from harness.runs.governance_facts import governance_facts
from harness.runs.launch import WORK, Outcome, clear_work, launch_child, read_result, work_folder
from harness.runs.worker import REQUEST, RESULT, Request
from profiles.documents import adapter, to_json
from profiles.planning.plan import Plan
from profiles.system.nvml import NvmlDevice

FOLDERS: dict[ScenarioName, str] = {"train": "runs", "decode": "generations"}
"""Of records, below a folder of results."""


def record_path(out: Path, run_id: str, scenario: ScenarioName = "train") -> Path:
    """Where the record of a run lies in the folder of results `out`."""
    return out / FOLDERS[scenario] / f"{run_id}.json"


def dumped_job(job: Job) -> dict[str, Any]:
    """`job` as documents keep it; a record has names for its paths (`harness.records.shared`)."""
    dumped: dict[str, Any] = adapter(Job).dump_python(job, mode="json")
    return dumped


def attempt(
    request: Request,
    round_: int,
    out: Path,
    *,
    environment: Environment,
    device: NvmlDevice | None,
    on_event: OnRunEvent,
    criteria_sha256: str | None = None,
    matrix_rate: MatrixRate | None = None,
) -> tuple[Run, bool]:
    """Launch `request`, keep its record in `out`, and say whether the sweep is to stop with it.

    A plan that does not fit or cannot run here, or whose library is missing, becomes a record without a run.
    Room for the record is taken before the run. Raises `UserError` if there is none, if the child cannot be
    started, or if the record cannot be written; then what the run left stays, and `take_up` makes a record of
    it.
    """
    began = datetime.now(UTC).isoformat(timespec="seconds")
    about = Attempt(
        round=round_, began=began, environment=environment, criteria_sha256=criteria_sha256,
        matrix_rate=matrix_rate,
    )  # fmt: skip
    scenario: ScenarioName = "train" if request.generation is None else "decode"
    path = record_path(out, request.id, scenario)
    reserved_bytes = most_record_bytes(request.job.warmup_steps + request.job.steps)
    remedy = f"{ELSEWHERE}; a run that has ended is kept for --resume"
    with whole_file(path, remedy, reserve_bytes=reserved_bytes) as file, record_noted(out, path) as note:
        missing = why_not_installed(request.plan.engine)
        if request.plan.fits and missing is None:
            write_whole(work_folder(out, request.id) / ATTEMPT, to_json(about))
            outcome = launch_child(request, out, device=device, on_event=on_event)
        else:
            outcome = _not_run(request.plan, missing)
        run = _record(request, about, outcome)
        run = _with_governance(run, request, out, scenario, outcome.contacted)
        content = encode_run(run)
        note(content)
        file.write(content)
    clear_work(out, request.id)
    return run, outcome.by_user


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixRate:
    """Matrix products of a machine, as its profile has measured them."""

    flops_per_s: float
    device: str
    """The GPU's name, or the CPU's where there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """What a record says beside the request and the outcome."""

    round: int
    began: str
    environment: Environment
    criteria_sha256: str | None
    matrix_rate: MatrixRate | None = None
    """Of the machine that is planned for, which need not be the one that runs; `None`: not measured."""


ATTEMPT = "attempt.json"


def take_up(out: Path) -> list[Run]:
    """Records of runs that ended ok and whose record was never written: the disk was full, or the sweep was
    killed in between. Clears what else there is of killed runs.

    Only for one that holds the folder's lock. Raises `UserError` if a record cannot be written.
    """
    taken = []
    for work in sorted((out / WORK).glob("*")):
        try:
            request = adapter(Request).validate_json(read_bytes(work / REQUEST, "request"))
            about = adapter(Attempt).validate_json(read_bytes(work / ATTEMPT, "attempt"))
            result = read_result(work / RESULT)
        except (UserError, ValidationError):
            continue
        path = record_path(out, request.id)
        # What a trace cost and what of another machine held, the parent knew and did not say.
        whole = request.generation is None and not request.trace and request.emulated is None
        whole = whole and request.job.limits.ranks == 1  # else it is the story of one rank
        if result is None or result.end_state != "ok" or not whole or exists(path):
            continue
        outcome = Outcome(
            end_state=result.end_state, end_reason=result.end_reason, samples=result.samples,
            summary=result.summary, by_user=False, notes=result.notes,
        )  # fmt: skip
        run = _record(request, about, outcome)
        run = _with_governance(run, request, out, "train", outcome.contacted)
        content = encode_run(run)
        with record_noted(out, path) as note:
            note(content)
        write_whole(path, content)
        taken.append(run)
    shutil.rmtree(out / WORK, ignore_errors=True)
    return taken


def _record(request: Request, about: Attempt, outcome: Outcome) -> Run:
    run = record_of(request, about.round, about.began, about.environment, outcome)
    run = replace(run, summary=_with_mfu(run, request, about.matrix_rate))
    if about.criteria_sha256 is not None:
        run = replace(run, criteria=CriteriaStamp(sha256=about.criteria_sha256, time=about.began))
    return run


def _with_governance(
    run: Run, request: Request, out: Path, scenario: ScenarioName, contacted: tuple[str, ...] | None
) -> Run:
    try:
        typed = request.plan.settings.typed
    except UserError:
        typed = None
    records = f"{FOLDERS[scenario]}/"
    return replace(run, governance=governance_facts(request.job, typed, out, records, "logs/", contacted))


def _with_mfu(run: Run, request: Request, rate: MatrixRate | None) -> Summary:
    """The summary with what the model's products come to over all ranks, as a share of all devices' rate.

    `rate` is that of one device; without one, or of another device than ran, there is no share.
    """
    summary = run.summary
    if request.generation is not None or not summary.step_s_median or not entry(run.engine).needs_torch:
        return summary
    passes = 3.0 if entry(run.engine).order == "first" else summary.forwards
    if passes is None:
        return summary
    real = 1.0 - (summary.padded_share or 0.0)
    flops = real * model_flops(request.shape, request.job.workload, passes)
    device = run.environment.gpu_name or run.environment.cpu
    share = None
    if rate is not None and rate.device == device and request.emulated is None:
        limits = request.job.limits
        devices = limits.ranks if run.environment.gpu_name else limits.nodes
        share = flops / summary.step_s_median / (devices * rate.flops_per_s)
        if share > 1.0:  # the rate was measured on a busier machine than this run had: a share of nothing
            share = None
    return replace(summary, model_flops=flops, mfu=share)


def record_of(request: Request, round_: int, began: str, environment: Environment, outcome: Outcome) -> Run:
    """The record of a run that began at `began`, ISO 8601 in UTC, and ended as `outcome` says. It tells the
    names of the user's files and not where they lie."""
    job, plan = request.job, request.plan
    run = Run(
        id=request.id,
        end_state=outcome.end_state,
        end_reason=None if outcome.end_reason is None else without_paths(outcome.end_reason, *paths_of(job)),
        engine=plan.engine,
        round=round_,
        time=began,
        model=RunModel(
            name=shared_name(job.model.name),
            random_weights=job.model.random_weights,
            parameters=request.shape.parameters,
        ),
        job=shared_values(dumped_job(job)),
        plan=shared_plan(plan),
        samples=outcome.samples,
        summary=replace(
            outcome.summary,
            floor_share=floor_over_step(plan.prediction.floor_s, outcome.summary.step_s_median),
        ),
        predicted=Predicted.of(plan.prediction),
        environment=environment,
        traced=outcome.traced,
        trace_file=outcome.trace_file,
        emulation=_emulation(request, outcome),
        notes=outcome.notes,
        disturbance=outcome.disturbance,
        ranks=outcome.ranks,
    )
    if request.generation is None:
        return run
    return replace(
        run,
        scenario="decode",
        sampling=request.generation,
        first_token_s=outcome.samples[0].step_s if outcome.samples else None,
        tokens=job.batch_size * len(counted_step_s(outcome.samples)),
    )


def floor_over_step(floor_s: float | None, step_s: float | None) -> float | None:
    """Predicted floor over measured step; `None` where either is not there."""
    return floor_s / step_s if floor_s is not None and step_s else None


def _not_run(plan: Plan, missing: str | None) -> Outcome:
    """By its plan, or for want of a library, `missing`: no process has to be started to learn either."""
    is_infeasible = plan.available and not plan.fits
    reason = missing if plan.fits else plan.why_not
    return Outcome(
        end_state="skipped_infeasible" if is_infeasible else "not_available",
        end_reason=reason or "the plan does not fit",
        samples=(),
        summary=Summary(),
        by_user=False,
        contacted=(),
    )


def _emulation(request: Request, outcome: Outcome) -> Emulation | None:
    """What of the emulated machine, if there is one, was asked for and what held."""
    asked, limits = request.emulated, outcome.limits
    if asked is None:
        return None
    copies = entry(request.plan.engine).copies
    return Emulation(
        vram_bytes=asked.vram_bytes,
        threads=asked.threads,
        rates=asked.rates,
        link="emulated" if copies == "own" else "not emulated" if copies == "library" else "unused",
        threads_held=None if limits is None else limits.threads,
        vram_bytes_held=None if limits is None else limits.vram_bytes,
        rates_held=None if limits is None else limits.rates,
    )
