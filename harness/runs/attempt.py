"""One attempt at a run: launched where its plan fits, and one record of how it ended. Imports no torch.

`<out>/runs/<id>.json` is the record of a run that trained, `<out>/generations/<id>.json` of one that decoded,
whose steps are other steps.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engines import entry
from harness.records.job import Job
from harness.records.run import (
    CriteriaStamp,
    Emulation,
    Environment,
    Predicted,
    Run,
    RunModel,
    ScenarioName,
    Summary,
    save_run,
)
from harness.records.stats import counted_step_s
from harness.runs.launch import OnRunEvent, Outcome, launch_child
from harness.runs.worker import Request
from profiles.documents import adapter
from profiles.planning.plan import Plan
from profiles.system.nvml import NvmlDevice

FOLDERS: dict[ScenarioName, str] = {"train": "runs", "decode": "generations"}
"""Of records, below a folder of results."""


def record_path(out: Path, run_id: str, scenario: ScenarioName = "train") -> Path:
    """Where the record of a run lies in the folder of results `out`."""
    return out / FOLDERS[scenario] / f"{run_id}.json"


def dumped_job(job: Job) -> dict[str, Any]:
    """`job` as records keep it."""
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
) -> tuple[Run, bool]:
    """Launch `request`, keep its record in `out`, and say whether it was stopped from the keyboard.

    A plan that does not fit or cannot run here becomes a record without a run. Raises `UserError` if the
    child cannot be started or the record cannot be written.
    """
    began = datetime.now(UTC).isoformat(timespec="seconds")
    if request.plan.fits:
        outcome = launch_child(request, out, device=device, on_event=on_event)
    else:
        outcome = _not_run(request.plan)
    run = record_of(request, round_, began, environment, outcome)
    if criteria_sha256 is not None:
        run = replace(run, criteria=CriteriaStamp(sha256=criteria_sha256, time=began))
    save_run(run, record_path(out, run.id, run.scenario))
    return run, outcome.by_user


def record_of(request: Request, round_: int, began: str, environment: Environment, outcome: Outcome) -> Run:
    """The record of a run that began at `began`, ISO 8601 in UTC, and ended as `outcome` says."""
    job, plan = request.job, request.plan
    run = Run(
        id=request.id,
        end_state=outcome.end_state,
        end_reason=outcome.end_reason,
        engine=plan.engine,
        round=round_,
        time=began,
        model=RunModel(
            name=job.model.name,
            random_weights=job.model.random_weights,
            parameters=request.shape.parameters,
        ),
        job=dumped_job(job),
        plan=plan,
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


def _not_run(plan: Plan) -> Outcome:
    return Outcome(
        end_state="skipped_infeasible" if plan.available else "not_available",
        end_reason=plan.why_not or "the plan does not fit",
        samples=(),
        summary=Summary(),
        by_user=False,
    )


def _emulation(request: Request, outcome: Outcome) -> Emulation | None:
    """What of the emulated machine, if there is one, was asked for and what held."""
    asked, held = request.emulated, outcome.held
    if asked is None:
        return None
    copies = entry(request.plan.engine).copies
    return Emulation(
        vram_bytes=asked.vram_bytes,
        threads=asked.threads,
        rates=asked.rates,
        link="emulated" if copies == "own" else "not emulated" if copies == "library" else "unused",
        threads_held=None if held is None else held.threads,
        vram_bytes_held=None if held is None else held.vram_bytes,
        rates_held=None if held is None else held.rates,
    )
