"""Measured decoding: random prompts, each run in a process of its own, one record per run. No torch.

`<out>/machine.json` is the machine that predictions and floors are of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engines import generating_engines
from engines.costs.decoding import Decoding
from engines.decoding import Sampling
from engines.errors import UserError
from engines.files.reading import exists
from engines.shapes import ModelShape
from harness.records.environment import read_environment
from harness.records.job import Job
from harness.records.run import Run
from harness.runs.attempt import attempt, dumped_job, record_path
from harness.runs.events import OnRunEvent
from harness.runs.worker import Request
from profiles.documents import adapter
from profiles.machine import Machine
from profiles.planning.budget import budget_of
from profiles.planning.decoding import plan_generation
from profiles.planning.plan import Plan
from profiles.system.nvml import open_device


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingJob:
    """What is to be decoded, with what, and how often.

    A step of `job` is one token of each of its `batch_size` random prompts of `seq_len` tokens; the first
    step of its warm-up is the prefill.
    """

    job: Job
    shape: ModelShape
    engine: str
    sampling: Sampling
    rounds: int = 1
    """Processes, one after the other."""

    def __post_init__(self) -> None:
        """Raises `UserError` for an engine or a model that generates no text, and for more tokens than the
        model takes."""
        if self.engine not in generating_engines():
            raise UserError(
                f"--engine {self.engine}", "does not generate", f"use {' or '.join(generating_engines())}"
            )
        if self.shape.head != "causal_lm":
            raise UserError(f"model '{self.job.model.name}'", "generates no text", "use a decoder")
        if self.job.seq_len + self.new_tokens > self.shape.max_seq_len:
            raise UserError(
                f"--seq-len {self.job.seq_len}",
                f"leaves no room for {self.new_tokens} more of the {self.shape.max_seq_len} tokens that "
                f"{self.shape.name} takes",
                "make it or --max-new-tokens smaller",
            )

    @property
    def new_tokens(self) -> int:
        """Of each sequence. The last one is begun and not counted."""
        return self.job.warmup_steps + self.job.steps + 1

    @property
    def decoding(self) -> Decoding:
        """The sizes that costs are counted with."""
        return Decoding(
            batch_size=self.job.batch_size,
            prompt_tokens=self.job.seq_len,
            new_tokens=self.new_tokens,
            dtype=self.job.dtype,
            sampled=self.sampling.temperature > 0,
        )


def measure_decoding_runs(
    wanted: DecodingJob,
    machine: Machine,
    out: Path,
    *,
    on_event: OnRunEvent,
    on_end: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Run what is wanted and keep a record of each process, beside those that `out` has already.

    A plan that does not fit becomes a record without a run. Raises `UserError` if `out` cannot be written,
    `KeyboardInterrupt` after the record of a run that was stopped.
    """
    job, engine = wanted.job, wanted.engine
    budget = budget_of(machine, job.limits.vram_bytes, job.limits.host_bytes, None)
    plan = plan_generation(engine, machine, wanted.shape, wanted.decoding, job.settings_of(engine), budget)
    environment, device = read_environment(), open_device()
    runs: list[Run] = []
    for _ in range(wanted.rounds):
        run_id, round_ = _next_id(out, wanted, plan)
        request = Request(id=run_id, job=job, shape=wanted.shape, plan=plan, generation=wanted.sampling)
        run, by_user = attempt(
            request, round_, out, environment=environment, device=device, on_event=on_event
        )
        runs.append(run)
        on_end(run)
        if by_user:
            raise KeyboardInterrupt
    return runs


def _next_id(out: Path, wanted: DecodingJob, plan: Plan) -> tuple[str, int]:
    """The id of the first repetition that `out` has no record of, and its number."""
    sampling = adapter(Sampling).dump_python(wanted.sampling, mode="json")
    decides = json.dumps([dumped_job(wanted.job), sampling, plan.engine, dict(plan.settings)], sort_keys=True)
    digest = hashlib.sha256(decides.encode("utf-8")).hexdigest()[:8]
    name = f"{plan.engine}-b{wanted.job.batch_size}-{digest}"
    round_ = 1
    while exists(record_path(out, f"{name}-r{round_}", "decode")):
        round_ += 1
    return f"{name}-r{round_}", round_
