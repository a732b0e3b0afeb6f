"""The only clock of runs: set-up, warm-up, measured steps and energy of one engine, whatever its steps are.

A step lasts from the end of the one before to its own, so it holds everything a user waits for. Of a training
step (`harness.runs.scenarios.Train`) that is the next batch, the step, and whatever the engine still had in
flight from the step before. The engine is drained before the first measured step, and again after the last
one, where the time of draining is added to the last sample: the samples then add up to the time in which
exactly the measured steps were done, no work borrowed from the warm-up and none left over. Of a decoding step
(`harness.runs.scenarios.Decode`) it is the time from one token of each sequence to the next.
"""

from __future__ import annotations

import contextlib
import gc
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from engines.base import Engine, Evaluation, StepStats
from engines.errors import NonFiniteLoss
from harness.records.metrics import majority_class, share_right
from harness.records.run import Sample, Summary
from harness.records.stats import step_statistics
from profiles.probe.core_speed import python_turn_s
from profiles.probe.launches import DEVICE, forward_s

ENERGY_WINDOW_S = 1.0
"""Shortest measured window whose energy is reported: NVML's counter moves every 20 to 100 ms."""

MEDIANS = (
    "gpu_s", "h2d_s", "d2h_s", "cpu_s", "gpu_exposed_s", "h2d_exposed_s", "d2h_exposed_s", "cpu_exposed_s",
    "perturb_s", "disk_s", "forwards",
)  # fmt: skip
"""Of `StepStats`: a run's summary has their medians over the steps that count."""
COUNTS = ("h2d_bytes", "d2h_bytes", "disk_read_bytes")
"""Likewise, whole numbers."""

Clock = Callable[[], float]
"""Seconds from some moment on."""

OnSample = Callable[[Sample, StepStats | None], None]


class SetUpParts:
    """How long each part of a set-up takes, by what is told of its progress: the time since it was last told
    of anything belongs to what is told of now."""

    def __init__(self) -> None:
        self.parts_s: dict[str, float] = {}
        self._clock: Clock | None = None
        self._told_s = 0.0

    def begin(self, clock: Clock = time.perf_counter) -> None:
        self._clock, self._told_s = clock, clock()

    def tell(self, what: str) -> None:
        """Some of `what` has been done. Before `begin` and after `end`: of no meaning."""
        if self._clock is None:
            return
        name = what.partition(" (")[0]  # what it is counted in
        now_s = self._clock()
        self.parts_s[name] = self.parts_s.get(name, 0.0) + now_s - self._told_s
        self._told_s = now_s

    def end(self) -> None:
        if self.parts_s:
            self.tell("the rest")
        self._clock = None


@dataclass(kw_only=True)
class RunRecording:
    """What a run has yielded so far. Outlives the exception that ends the run."""

    tokens_per_step: int
    """Padding included."""
    real_tokens_per_step: float | None = None
    padded_share: float | None = None
    steps: list[tuple[Sample, StepStats | None]] = field(default_factory=list)
    setup_s: float | None = None
    setup_parts: SetUpParts = field(default_factory=SetUpParts)
    evaluations: list[Evaluation] = field(default_factory=list)
    evaluated_in_training: int = 0
    eval_s: list[float] = field(default_factory=list)
    """Time of each evaluation."""
    energy_j: float | None = None
    """GPU board, per step."""
    python_turn_before_s: float | None = None
    python_turn_after_s: float | None = None
    """Of a Python loop, just before the steps that count and just after them; `None` without CUDA."""
    pinned_bytes: int | None = None
    landed_share: float | None = None
    notes: tuple[str, ...] | None = None
    """What of the settings the engine could not have, and why; `None`: it was never asked."""

    @property
    def samples(self) -> tuple[Sample, ...]:
        return tuple(sample for sample, _ in self.steps)

    def summary(self) -> Summary:
        """Statistics of what there is; `None` where nothing was measured."""
        real = self.real_tokens_per_step
        steps = step_statistics(self.samples, self.tokens_per_step if real is None else real)
        measured = [
            (sample, stats) for sample, stats in self.steps if stats is not None and not sample.warmup
        ]
        of_steps: dict[str, Any] = {
            name: _median([getattr(stats, name) for _, stats in measured]) for name in MEDIANS
        }
        of_steps |= {name: _median_count([getattr(stats, name) for _, stats in measured]) for name in COUNTS}
        disk_floor_s = _median([stats.disk_floor_s for _, stats in measured])
        first = self.evaluations[0] if self.evaluations else None
        last = self.evaluations[-1] if len(self.evaluations) > 1 else None
        return replace(
            steps,
            eval_loss_first=None if first is None else first.loss,
            eval_loss_last=None if last is None else last.loss,
            eval_accuracy_first=None if first is None else share_right(first),
            eval_accuracy_last=None if last is None else share_right(last),
            eval_examples=None if first is None else first.num_examples,
            eval_in_training=self.evaluated_in_training or None,
            eval_majority_class=None if first is None else majority_class(first),
            eval_sequence_labels=() if first is None else first.sequence_labels,
            eval_sequence_losses_first=() if first is None else _in_fp32_digits(first.sequence_losses),
            eval_sequence_losses_last=() if last is None else _in_fp32_digits(last.sequence_losses),
            # Of the last: the first one loads kernels.
            eval_s=self.eval_s[-1] if last is not None else None,
            setup_s=self.setup_s,
            setup_parts_s=dict(self.setup_parts.parts_s),
            pinned_bytes=self.pinned_bytes,
            energy_j=self.energy_j,
            python_turn_before_s=self.python_turn_before_s,
            python_turn_after_s=self.python_turn_after_s,
            idle_s=_median(
                [
                    None if stats.gpu_s is None else max(0.0, sample.step_s - stats.gpu_s)
                    for sample, stats in measured
                ]
            ),
            **of_steps,
            cpu_threads=measured[-1][1].cpu_threads if measured else None,
            disk_direct=measured[0][1].disk_direct if measured else None,
            disk_floor_s=disk_floor_s,
            disk_floor_share=disk_floor_s / steps.step_s_median
            if disk_floor_s is not None and steps.step_s_median
            else None,
            landed_share=self.landed_share,
            real_tokens_per_step=real,
            padded_share=self.padded_share,
        )


class Scenario(Protocol):
    """What a run does with its engine: steps that are timed, and the work before and after them."""

    @property
    def warmup_steps(self) -> int:
        """Steps that come first and do not count."""

    @property
    def steps(self) -> int:
        """Steps that count."""

    @property
    def is_drained(self) -> bool:
        """Whether the engine is drained before the first step that counts and after the last one. Else the
        next step is under way wherever one ends, as much at the start of the window as at its end."""

    @property
    def has_loss(self) -> bool:
        """Whether a step has a loss, which then has to be finite."""

    @property
    def own_s(self) -> float | None:
        """Seconds of the step that was just taken, without what came beside it, such as an evaluation;
        `None`: all of it counts."""

    def before(self, engine: Engine, recording: RunRecording, clock: Clock) -> None:
        """What comes between the set-up and the first step."""

    def take(self, engine: Engine) -> Generator[StepStats, None, None]:
        """One step for each item; none is begun before it is asked for. May end before `steps`."""

    def after(self, engine: Engine, recording: RunRecording, clock: Clock) -> None:
        """What comes after the last step."""


def measure(
    engine: Engine,
    blueprint: Any,
    scenario: Scenario,
    recording: RunRecording,
    *,
    clock: Clock | None = None,
    energy_j: Callable[[], float | None] | None = None,
    on_sample: OnSample = lambda sample, stats: None,
) -> None:
    """Set `engine` up, take the steps of `scenario`, and time each.

    `blueprint` is a `Blueprint`, or `None` for an engine without a model. `recording` is filled as the
    run goes, and keeps what there is when an exception ends it.
    `clock` in place of the real one is for engines that play a script. `energy_j` reads the GPU's energy
    counter in joules. Raises `NonFiniteLoss` and all that the engine raises.
    """
    clock = clock or time.perf_counter
    _set_up(engine, blueprint, recording, clock)
    scenario.before(engine, recording, clock)
    _take_steps(engine, scenario, recording, clock, energy_j, on_sample)
    scenario.after(engine, recording, clock)


def _set_up(engine: Engine, blueprint: Any, recording: RunRecording, clock: Clock) -> None:
    started_s = clock()
    recording.setup_parts.begin()
    engine.setup(blueprint)
    engine.synchronize()
    recording.setup_parts.end()
    recording.setup_s = clock() - started_s
    if blueprint is not None:
        blueprint.release()  # or the peak of host memory would hold a checkpoint that nobody reads any more
    recording.pinned_bytes = engine.pinned_bytes


def _take_steps(
    engine: Engine,
    scenario: Scenario,
    recording: RunRecording,
    clock: Clock,
    energy_j: Callable[[], float | None] | None,
    on_sample: OnSample,
) -> None:
    total = scenario.warmup_steps + scenario.steps
    energy_start_j: float | None = None
    if not scenario.is_drained:  # what is under way between two steps is not to be held up
        recording.python_turn_before_s = core_speed_s()
    window_start_s = last_s = clock()

    def record(step: int, step_s: float, stats: StepStats | None) -> None:
        loss = stats.loss if stats is not None and math.isfinite(stats.loss) else None
        sample = Sample(step=step, warmup=step < scenario.warmup_steps, step_s=step_s, loss=loss)
        recording.steps.append((sample, stats))
        on_sample(sample, stats)

    with contextlib.closing(scenario.take(engine)) as steps:
        for step in range(total):
            if step == scenario.warmup_steps:
                if scenario.is_drained:
                    engine.synchronize()
                    recording.python_turn_before_s = core_speed_s()
                energy_start_j = energy_j() if energy_j is not None else None
                window_start_s = last_s = clock() if scenario.is_drained else last_s
            try:
                stats = next(steps, None)
                if stats is None:  # it ends earlier than it could
                    break
            except NonFiniteLoss:
                record(step, clock() - last_s, None)
                raise
            try:
                if scenario.is_drained and step == total - 1:
                    engine.synchronize()
            finally:  # a failure while draining does not lose the step
                now_s, own_s = clock(), scenario.own_s
                record(step, now_s - last_s if own_s is None else own_s, stats)
            last_s = now_s
            if scenario.has_loss and not math.isfinite(stats.loss):
                raise NonFiniteLoss(f"the loss became {stats.loss} in step {step}")
    counted = sum(not sample.warmup for sample in recording.samples)
    if counted:
        recording.python_turn_after_s = core_speed_s()
    _take_energy(recording, energy_j, energy_start_j, last_s - window_start_s, counted)


def _take_energy(
    recording: RunRecording,
    energy_j: Callable[[], float | None] | None,
    start_j: float | None,
    window_s: float,
    steps: int,
) -> None:
    """Energy per step of a window that is long enough, where there is a counter."""
    if energy_j is None or start_j is None or window_s < ENERGY_WINDOW_S or not steps:
        return
    end_j = energy_j()
    if end_j is not None:
        recording.energy_j = (end_j - start_j) / steps


def _has_cuda() -> bool:
    """Whether this process has a CUDA context of torch's. Never imports torch."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()


def gpu_peaks() -> tuple[int | None, int | None]:
    """Peak bytes (allocated, reserved) of torch's CUDA allocator in this process; `None` without CUDA.

    Never imports torch: a run that has not imported it has no peak.
    """
    if not _has_cuda():
        return None, None
    torch = sys.modules["torch"]
    return int(torch.cuda.max_memory_allocated()), int(torch.cuda.max_memory_reserved())


def own_peak_bytes() -> int | None:
    """Peak resident memory of this process (VmHWM). Not `ru_maxrss`, which outlives exec: it would be
    the parent's where that was larger."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return None if match is None else int(match[1]) * 1024


def forget_last_run() -> bool:
    """Give back what the run before left in this process; whether the peak of host memory begins anew."""
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        # Else its limit on recompilations counts all runs together.
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    try:
        # VmHWM then starts at what is resident now.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def compile_s() -> float | None:
    """Seconds that torch's compiler has taken in this process, forward and backward graphs together; 0:
    nothing was compiled. `None` without torch, which is never imported for it, and where it does not tell."""
    if sys.modules.get("torch") is None:
        return None
    dynamo: Any = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return 0.0
    try:
        return float(dynamo.calculate_time_spent()["total_wall_time"])
    except (AttributeError, KeyError):  # none of it is promised
        return None


def core_speed_s() -> float | None:
    """Seconds that a turn of a Python loop takes this process now, in some 10 ms. `None` without CUDA: what
    waits for a core there is no GPU."""
    return python_turn_s() if _has_cuda() else None


LAUNCHES_S = 0.15
"""For which operations are started and timed after a run."""


def forward_launch_s() -> float | None:
    """Seconds that starting an operation takes this process now, as the probe measures it: the machine's
    profile may be of another host, or of one that was less busy. `None` without CUDA, and where there is no
    GPU memory left for the tiny model."""
    if not _has_cuda():
        return None
    with contextlib.suppress(Exception):  # the run is over and has its result
        return forward_s(LAUNCHES_S, DEVICE).low
    return None


def _in_fp32_digits(values: Sequence[float]) -> tuple[float, ...]:
    """As many digits as fp32 has: a record is not twice as long for what losses do not say."""
    return tuple(float(f"{value:.7g}") for value in values)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _median_count(values: Sequence[int]) -> int | None:
    return statistics.median_low(values) if values else None
