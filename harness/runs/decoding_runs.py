"""Measured generations: random prompts, each run in a process of its own, one record per run. No torch.

`<out>/generations/<id>.json`, apart from the runs of training, whose steps are other steps: here one is one
token of every sequence. `<out>/machine.json` is the machine that predictions and floors are of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engines import generating_engines
from engines.costs.decoding import Decoding
from engines.decoding import Sampling
from engines.errors import UserError
from engines.shapes import ModelShape
from harness.records.environment import read_environment
from harness.records.job import Job
from harness.records.run import EndState, Environment, Predicted, RunModel, Sample, Summary
from harness.records.stats import counted_step_s
from harness.runs.launch import OnRunEvent, Outcome, launch
from harness.runs.sweep import floor_share
from harness.runs.worker import Request
from profiles.documents import adapter, read_document, to_json, write_whole
from profiles.machine import Machine
from profiles.planning.budget import budget_of
from profiles.planning.decoding import plan_generation
from profiles.planning.plan import Plan
from profiles.system.nvml import open_device

SCHEMA_VERSION = 1
"""1: first version (0.1.0)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRun:
    """One measured generation. Names are those of `harness.records.run.Run`."""

    id: str
    end_state: EndState
    end_reason: str | None
    engine: str
    round: int
    """Which repetition in its folder, from 1."""
    time: str
    """When the run began, ISO 8601 in UTC."""
    model: RunModel
    job: dict[str, Any]
    """`batch_size` prompts of `seq_len` tokens; `warmup_steps`, of which the first is the prefill, and then
    `steps` decoding steps that count."""
    sampling: Sampling
    plan: Plan
    samples: tuple[Sample, ...]
    """From one token of every sequence to the next, on the host."""
    summary: Summary
    """`tokens_per_s` of all sequences together."""
    first_token_s: float | None
    """The prefill, in which the next step is already begun; `None`: not measured. In records without `tokens`
    it was the first of its process, start-up included."""
    predicted: Predicted
    """`floor_s`: the largest of uploads, arithmetic, and one read of weights and cache from GPU memory."""
    environment: Environment
    tokens: int | None = None
    """Of all sequences, in the steps that count. `None`: a record of before this was kept."""
    schema_version: int = SCHEMA_VERSION


def load_generation(path: Path) -> GenerationRun:
    """Raises `UserError` if `path` is not a record of a generation that this version reads."""
    return read_document(path, GenerationRun, SCHEMA_VERSION, "generation record")


def check_measurable(job: Job, shape: ModelShape) -> None:
    """Raises `UserError` for a model that generates no text, and for more tokens than it takes."""
    if shape.head != "causal_lm":
        raise UserError(f"model '{job.model.name}'", "generates no text", "use a decoder")
    new_tokens = job.warmup_steps + job.steps + 1
    if job.seq_len + new_tokens > shape.max_seq_len:
        raise UserError(
            f"--seq-len {job.seq_len}",
            f"leaves no room for {new_tokens} more of the {shape.max_seq_len} tokens that {shape.name} takes",
            "make it or --max-new-tokens smaller",
        )


def measure_generations(
    job: Job,
    shape: ModelShape,
    engine: str,
    sampling: Sampling,
    machine: Machine,
    out: Path,
    *,
    rounds: int,
    on_event: OnRunEvent,
    on_end: Callable[[GenerationRun], None] = lambda run: None,
) -> list[GenerationRun]:
    """Run `rounds` processes and keep a record of each, beside those that `out` has already.

    A plan that does not fit becomes a record without a run. Raises `UserError` if the engine does not
    generate or `out` cannot be written, `KeyboardInterrupt` after the record of a run that was stopped.
    """
    if engine not in generating_engines():
        raise UserError(f"--engine {engine}", "does not generate", f"use {' or '.join(generating_engines())}")
    decoding = Decoding(
        batch_size=job.batch_size,
        prompt_tokens=job.seq_len,
        new_tokens=job.warmup_steps + job.steps + 1,
        dtype=job.dtype,
        sampled=sampling.temperature > 0,
    )
    budget = budget_of(machine, job.limits.vram_bytes, job.limits.host_bytes, None)
    plan = plan_generation(engine, machine, shape, decoding, job.settings_of(engine), budget)
    environment, device = read_environment(), open_device()
    runs: list[GenerationRun] = []
    for _ in range(rounds):
        run_id, round_ = _next_id(out, job, plan, sampling)
        began = datetime.now(UTC).isoformat(timespec="seconds")
        if plan.fits:
            request = Request(id=run_id, job=job, shape=shape, plan=plan, generation=sampling)
            outcome = launch(request, out, device=device, on_event=on_event)
        else:
            outcome = Outcome(
                end_state="skipped_infeasible", end_reason=plan.why_not, samples=(), summary=Summary(),
                by_user=False,
            )  # fmt: skip
        run = _record(run_id, round_, job, shape, plan, sampling, outcome, began, environment)
        write_whole(_path(out, run_id), to_json(run))
        runs.append(run)
        on_end(run)
        if outcome.by_user:
            raise KeyboardInterrupt
    return runs


def _next_id(out: Path, job: Job, plan: Plan, sampling: Sampling) -> tuple[str, int]:
    """The id of the first repetition that `out` has no record of, and its number."""
    what = [
        adapter(each).dump_python(value, mode="json") for each, value in ((Job, job), (Sampling, sampling))
    ]
    told = json.dumps([*what, plan.engine, dict(plan.settings)], sort_keys=True)
    digest = hashlib.sha256(told.encode("utf-8")).hexdigest()[:8]
    round_ = 1
    while _path(out, run_id := f"{plan.engine}-b{job.batch_size}-{digest}-r{round_}").exists():
        round_ += 1
    return run_id, round_


def _path(out: Path, run_id: str) -> Path:
    return out / "generations" / f"{run_id}.json"


def _record(
    run_id: str,
    round_: int,
    job: Job,
    shape: ModelShape,
    plan: Plan,
    sampling: Sampling,
    outcome: Outcome,
    began: str,
    environment: Environment,
) -> GenerationRun:
    told = plan.prediction
    return GenerationRun(
        id=run_id,
        end_state=outcome.end_state,
        end_reason=outcome.end_reason,
        engine=plan.engine,
        round=round_,
        time=began,
        model=RunModel(
            name=job.model.name, random_weights=job.model.random_weights, parameters=shape.parameters
        ),
        job=adapter(Job).dump_python(job, mode="json"),
        sampling=sampling,
        plan=plan,
        samples=outcome.samples,
        summary=replace(
            outcome.summary, floor_share=floor_share(told.floor_s, outcome.summary.step_s_median)
        ),
        first_token_s=outcome.samples[0].step_s if outcome.samples else None,
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
        tokens=job.batch_size * len(counted_step_s(outcome.samples)),
    )
