"""The only clock of runs: warm-up, measured steps, evaluation, peaks and energy of one engine.

A step lasts from one return of `Engine.step` to the next, so it holds everything a user waits for:
the next batch, the step, and whatever the engine still had in flight from the step before. The engine
is drained before the first measured step, and again after the last one, where the time of draining is
added to the last sample: the samples then add up to the time in which exactly the measured steps were
done, no work borrowed from the warm-up and none left over.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from engines.base import Batch, Engine, Evaluation, StepStats, TellsLanding
from engines.decoding import GenerationRequest
from engines.errors import NonFiniteLoss
from harness.records.job import Job
from harness.records.run import Sample, Summary
from harness.records.stats import step_statistics
from harness.runs.emulate import Held
from harness.runs.end_states import OUT_OF_MEMORY, classify

ENERGY_WINDOW_S = 1.0
"""Shortest measured window whose energy is reported: NVML's counter moves every 20 to 100 ms."""

OnSample = Callable[[Sample, StepStats | None], None]


class StepData(Protocol):
    """What `harness.data.batches.Data` offers to a run."""

    @property
    def evaluation(self) -> Sequence[Batch]: ...

    def step_batches(self, step: int) -> Sequence[Batch]: ...


@dataclass(kw_only=True)
class Recording:
    """What a run has yielded so far. Outlives the exception that ends the run."""

    tokens_per_step: int
    steps: list[tuple[Sample, StepStats | None]] = field(default_factory=list)
    setup_s: float | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    eval_s: list[float] = field(default_factory=list)
    """Time of each evaluation."""
    energy_j: float | None = None
    """GPU board, per step."""
    pinned_bytes: int | None = None
    landed_share: float | None = None
    traced: bool = False
    """The engine keeps a trace, which costs time."""
    held: Held | None = None
    """What of an emulated machine the child was held to."""

    @property
    def samples(self) -> tuple[Sample, ...]:
        return tuple(sample for sample, _ in self.steps)

    def summary(self) -> Summary:
        """Statistics of what there is; `None` where nothing was measured."""
        steps = step_statistics(self.samples, self.tokens_per_step)
        measured = [
            (sample, stats) for sample, stats in self.steps if stats is not None and not sample.warmup
        ]
        disk_floor_s = _median([stats.disk_floor_s for _, stats in measured])
        first = self.evaluations[0] if self.evaluations else None
        last = self.evaluations[-1] if len(self.evaluations) > 1 else None
        return replace(
            steps,
            eval_loss_first=None if first is None else first.loss,
            eval_loss_last=None if last is None else last.loss,
            eval_accuracy_first=None if first is None else first.accuracy,
            eval_accuracy_last=None if last is None else last.accuracy,
            # Of the last: the first one loads kernels.
            eval_s=self.eval_s[-1] if last is not None else None,
            setup_s=self.setup_s,
            pinned_bytes=self.pinned_bytes,
            energy_j=self.energy_j,
            gpu_s=_median([stats.gpu_s for _, stats in measured]),
            h2d_s=_median([stats.h2d_s for _, stats in measured]),
            d2h_s=_median([stats.d2h_s for _, stats in measured]),
            cpu_s=_median([stats.cpu_s for _, stats in measured]),
            idle_s=_median(
                [
                    None if stats.gpu_s is None else max(0.0, sample.step_s - stats.gpu_s)
                    for sample, stats in measured
                ]
            ),
            gpu_exposed_s=_median([stats.gpu_exposed_s for _, stats in measured]),
            h2d_exposed_s=_median([stats.h2d_exposed_s for _, stats in measured]),
            d2h_exposed_s=_median([stats.d2h_exposed_s for _, stats in measured]),
            cpu_exposed_s=_median([stats.cpu_exposed_s for _, stats in measured]),
            perturb_s=_median([stats.perturb_s for _, stats in measured]),
            h2d_bytes=_median_count([stats.h2d_bytes for _, stats in measured]),
            d2h_bytes=_median_count([stats.d2h_bytes for _, stats in measured]),
            disk_read_bytes=_median_count([stats.disk_read_bytes for _, stats in measured]),
            disk_s=_median([stats.disk_s for _, stats in measured]),
            disk_direct=measured[0][1].disk_direct if measured else None,
            disk_floor_s=disk_floor_s,
            disk_floor_share=disk_floor_s / steps.step_s_median
            if disk_floor_s is not None and steps.step_s_median
            else None,
            forwards=_median([stats.forwards for _, stats in measured]),
            landed_share=self.landed_share,
        )


def measure(
    engine: Engine,
    blueprint: Any,
    data: StepData,
    job: Job,
    recording: Recording,
    *,
    clock: Callable[[], float] | None = None,
    energy_j: Callable[[], float | None] | None = None,
    on_sample: OnSample = lambda sample, stats: None,
) -> None:
    """Set `engine` up and run the job's warm-up and steps, with an evaluation before and after if asked.

    `blueprint` is a `Blueprint`, or `None` for an engine without a model. `recording` is filled as the
    run goes, and keeps what there is when an exception ends it.
    `clock` in place of the real one is for engines that play a script. `energy_j` reads the GPU's energy
    counter in joules. Raises `NonFiniteLoss` and all that the engine raises.
    """
    clock = clock or time.perf_counter
    _set_up(engine, blueprint, recording, clock)
    if job.eval_batches > 0:
        _evaluate(engine, data, recording, clock)
    _run_steps(engine, data, job, recording, clock, energy_j, on_sample)
    if job.eval_batches > 0:
        _evaluate(engine, data, recording, clock)
    recording.landed_share = _landed_share(engine)


def _evaluate(engine: Engine, data: StepData, recording: Recording, clock: Callable[[], float]) -> None:
    engine.synchronize()
    started_s = clock()
    recording.evaluations.append(engine.evaluate(data.evaluation))
    engine.synchronize()
    recording.eval_s.append(clock() - started_s)


def measure_decoding(
    engine: Any,
    blueprint: Any,
    request: GenerationRequest,
    warmup_steps: int,
    recording: Recording,
    *,
    clock: Callable[[], float] | None = None,
    energy_j: Callable[[], float | None] | None = None,
    on_sample: OnSample = lambda sample, stats: None,
) -> None:
    """Set `engine` (also an `engines.decoding.GeneratingEngine`) up and time the decoding steps of `request`.

    A sample lasts from one token of each sequence to the next, on the host; the first one is the prefill. One
    step is under way whenever tokens arrive, so the last step of `request` is started and not counted. There
    is no loss. The same prefill comes once before, untimed, so that the timed one is not the process's first.
    Raises all that the engine raises.
    """
    clock = clock or time.perf_counter
    _set_up(engine, blueprint, recording, clock)
    _warm_up(engine, request)
    counted = request.max_new_tokens - 1 - warmup_steps
    energy_start_j: float | None = None
    window_start_s = last_s = clock()
    tokens = engine.generate(request)
    for step in range(warmup_steps + counted):
        if step == warmup_steps:
            energy_start_j = energy_j() if energy_j is not None else None
            window_start_s = last_s
        decoded = next(tokens)
        now_s = clock()
        sample = Sample(step=step, warmup=step < warmup_steps, step_s=now_s - last_s, loss=None)
        recording.steps.append((sample, decoded.stats))
        on_sample(sample, decoded.stats)
        last_s = now_s
    tokens.close()
    _take_energy(recording, energy_j, energy_start_j, last_s - window_start_s, counted)
    engine.synchronize()


def _warm_up(engine: Any, request: GenerationRequest) -> None:
    """A prefill of `request`, and the step that is under way when its tokens arrive."""
    tokens = engine.generate(request)
    next(tokens)
    tokens.close()
    engine.synchronize()


def _set_up(engine: Engine, blueprint: Any, recording: Recording, clock: Callable[[], float]) -> None:
    started_s = clock()
    engine.setup(blueprint)
    engine.synchronize()
    recording.setup_s = clock() - started_s
    if blueprint is not None:
        blueprint.release()  # or the peak of host memory would hold a checkpoint that nobody reads any more
    recording.pinned_bytes = engine.pinned_bytes


def _take_energy(
    recording: Recording,
    energy_j: Callable[[], float | None] | None,
    start_j: float | None,
    window_s: float,
    steps: int,
) -> None:
    """Energy per step of a window that is long enough, where there is a counter."""
    if energy_j is None or start_j is None or window_s < ENERGY_WINDOW_S:
        return
    end_j = energy_j()
    if end_j is not None:
        recording.energy_j = (end_j - start_j) / steps


def _landed_share(engine: Engine) -> float | None:
    """What the engine says of it; `None` where it says nothing, lacks the memory or says what is not finite.

    Asked last: all else is measured by then, and cannot be spoiled. What else the engine raises is of the
    last step, whose work may end only now, and ends the run.
    """
    if not isinstance(engine, TellsLanding):
        return None
    try:
        share = engine.landed_share()
    except (MemoryError, RuntimeError) as error:
        # One with a cause is of a thread of the engine, and not of the asking.
        if error.__cause__ is not None or classify(error)[0] not in OUT_OF_MEMORY:
            raise
        return None
    return share if share is None or math.isfinite(share) else None


def _run_steps(
    engine: Engine,
    data: StepData,
    job: Job,
    recording: Recording,
    clock: Callable[[], float],
    energy_j: Callable[[], float | None] | None,
    on_sample: OnSample,
) -> None:
    total = job.warmup_steps + job.steps
    energy_start_j: float | None = None
    window_start_s = last_s = clock()

    def record(step: int, step_s: float, stats: StepStats | None) -> None:
        loss = stats.loss if stats is not None and math.isfinite(stats.loss) else None
        sample = Sample(step=step, warmup=step < job.warmup_steps, step_s=step_s, loss=loss)
        recording.steps.append((sample, stats))
        on_sample(sample, stats)

    for step in range(total):
        if step == job.warmup_steps:
            engine.synchronize()
            energy_start_j = energy_j() if energy_j is not None else None
            window_start_s = last_s = clock()
        try:
            stats = engine.step(data.step_batches(step))
        except NonFiniteLoss:
            record(step, clock() - last_s, None)
            raise
        try:
            if step == total - 1:
                engine.synchronize()
        finally:  # a failure while draining does not lose the step
            now_s = clock()
            record(step, now_s - last_s, stats)
        last_s = now_s
        if not math.isfinite(stats.loss):
            raise NonFiniteLoss(f"the loss became {stats.loss} in step {step}")
    _take_energy(recording, energy_j, energy_start_j, last_s - window_start_s, job.steps)


def gpu_peaks() -> tuple[int | None, int | None]:
    """Peak bytes (allocated, reserved) of torch's CUDA allocator in this process; `None` without CUDA.

    Never imports torch: a run that has not imported it has no peak.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None, None
    return int(torch.cuda.max_memory_allocated()), int(torch.cuda.max_memory_reserved())


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _median_count(values: Sequence[int]) -> int | None:
    return statistics.median_low(values) if values else None
