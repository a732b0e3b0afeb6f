from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from scripted_runs import scripted_job

from engines.base import Batch, Context, Evaluation, StepStats
from engines.decoding import Decoded, GenerationRequest
from engines.errors import NonFiniteLoss
from engines.methods.scripted import Scripted
from engines.settings.scripted import ScriptedSettings
from harness.records.job import Job
from harness.records.run import Sample, Summary
from harness.runs import measure as measuring
from harness.runs.measure import RunRecording, SetUpParts, forward_launch_s, gpu_peaks, measure
from harness.runs.ranks import of_one
from harness.runs.scenarios import Decode, Train
from profiles.documents import to_json


class NumberedData:
    """Remembers which steps were asked for."""

    evaluation: Sequence[Batch] = ()
    evaluated_in_training = 0

    def __init__(self) -> None:
        self.asked: list[int] = []

    def step_batches(self, step: int) -> Sequence[Batch]:
        self.asked.append(step)
        return ()


def record(
    job: Job,
    engine: Scripted,
    energy_j: Callable[[], float | None] | None = None,
    told: list[Sample] | None = None,
) -> RunRecording:
    recording = RunRecording(tokens_per_step=job.workload.tokens_per_step)
    run(job, engine, recording, energy_j, told)
    return recording


def run(
    job: Job,
    engine: Any,
    recording: RunRecording,
    energy_j: Callable[[], float | None] | None = None,
    told: list[Sample] | None = None,
    data: NumberedData | None = None,
) -> None:
    blueprint: Any = None
    measure(
        engine,
        blueprint,
        Train(job=job, data=data or NumberedData()),
        recording,
        clock=engine.now,
        energy_j=energy_j,
        on_sample=lambda sample, stats: (told if told is not None else []).append(sample),
    )


def make_engine(job: Job, **settings: Any) -> Scripted:
    context = Context(device="cpu", workload=job.workload, seed=0, total_steps=job.warmup_steps + job.steps)
    return Scripted(ScriptedSettings(**settings), context)


def test_medians_rates_and_losses_are_exact() -> None:
    job = scripted_job(batch_size=2, seq_len=16, accumulation=2)
    told: list[Sample] = []
    engine = make_engine(
        job,
        setup_s=8.0,
        step_s=(4.0, 2.0, 0.5, 0.25, 1.0, 0.25),
        loss=(6.0, 5.0, 4.0, 3.0, 2.0, 1.0),
        gpu_s=(0.125,),
        h2d_bytes=100,
        d2h_bytes=50,
        pinned_bytes=77,
    )
    recording = record(job, engine, told=told)
    assert [sample.step_s for sample in recording.samples] == [4.0, 2.0, 0.5, 0.25, 1.0, 0.25]
    assert [sample.warmup for sample in recording.samples] == [True, True, False, False, False, False]
    assert [sample.step for sample in recording.samples] == [0, 1, 2, 3, 4, 5]
    assert tuple(told) == recording.samples
    summary = recording.summary()
    assert (summary.step_s_median, summary.step_s_low, summary.step_s_high) == (0.375, 0.25, 1.0)
    assert summary.tokens_per_s == 64 / 0.375
    assert (summary.loss_first, summary.loss_last) == (6.0, 1.0)
    assert (summary.gpu_s, summary.idle_s, summary.h2d_s, summary.cpu_s) == (0.125, 0.25, None, None)
    assert (summary.h2d_bytes, summary.d2h_bytes) == (100, 50)
    assert (summary.setup_s, summary.pinned_bytes) == (8.0, 77)
    assert summary.eval_loss_first is None


def test_measured_steps_add_up_to_exactly_their_own_work() -> None:
    """What the warm-up left in flight is not in the first sample; what the last left is in the last."""
    job = scripted_job()
    recording = record(job, make_engine(job, step_s=(1.0,), drain_s=0.5))
    assert [sample.step_s for sample in recording.samples] == [1.0, 1.0, 1.0, 1.0, 1.0, 1.5]


def test_every_step_asks_for_its_own_batches() -> None:
    job, data = scripted_job(), NumberedData()
    run(job, make_engine(job), RunRecording(tokens_per_step=8), data=data)
    asked, counted = data.asked[:6], data.asked[6:]
    assert asked == [0, 1, 2, 3, 4, 5]
    assert counted == asked[job.warmup_steps :]  # once more, for their padding, when all is measured


def test_tokens_per_second_leave_padding_out() -> None:
    ids = torch.ones(2, 8, dtype=torch.int64)
    mask = torch.tensor([[1] * 6 + [0] * 2, [1] * 4 + [0] * 4])

    class Padded(NumberedData):
        def step_batches(self, step: int) -> Any:
            return [Batch(inputs={"input_ids": ids, "attention_mask": mask})]

    job = scripted_job()
    recording = RunRecording(tokens_per_step=16)
    run(job, make_engine(job, step_s=(0.5,)), recording, data=Padded())
    summary = recording.summary()
    assert (summary.real_tokens_per_step, summary.padded_share) == (10.0, 1 - 10 / 16)
    assert summary.tokens_per_s == 20.0


def test_evaluates_before_and_after_only_when_asked() -> None:
    job = scripted_job(eval_batches=1)
    engine = make_engine(
        job, eval_loss=(3.0, 1.0), eval_accuracy=(0.25, 0.75), eval_s=(4.0, 2.0), step_s=(0.5,)
    )
    summary = record(job, engine).summary()
    assert (summary.eval_loss_first, summary.eval_loss_last) == (3.0, 1.0)
    assert (summary.eval_accuracy_first, summary.eval_accuracy_last) == (0.25, 0.75)
    assert summary.eval_s == 2.0
    assert (summary.step_s_low, summary.step_s_high) == (0.5, 0.5)  # no evaluation is in a step's time
    assert record(scripted_job(), make_engine(job)).evaluations == []


def test_what_accuracy_rests_on_is_kept() -> None:
    found = Evaluation(loss=1.0, accuracy=0.5, num_labels=4, num_examples=4, expected=(1, 0, 1, 1))
    recording = RunRecording(tokens_per_step=8, evaluations=[found, found], eval_s=[1.0, 1.0])
    summary = recording.summary()
    assert (summary.eval_examples, summary.eval_majority_class) == (4, 0.75)
    numbers = replace(found, expected=(1.0, 0.5, 2.0, 1.0))
    recording.evaluations = [numbers, numbers]
    summary = recording.summary()
    assert summary.eval_accuracy_first is summary.eval_accuracy_last is summary.eval_majority_class is None
    assert summary.eval_loss_last == 1.0
    recording.evaluations = [found, found]
    of_text = replace(recording.evaluations[0], num_examples=None, expected=())
    recording.evaluations = [of_text, of_text]
    assert recording.summary().eval_examples is recording.summary().eval_majority_class is None


def test_losses_of_held_out_sequences_are_kept_in_the_digits_of_fp32() -> None:
    recording = RunRecording(tokens_per_step=8, eval_s=[1.0, 1.0])
    assert "eval_sequence" not in to_json(recording.summary())  # nothing was evaluated
    before = Evaluation(
        loss=2.0, accuracy=0.5, num_labels=4, sequence_losses=(6.0, 1.23456789123), sequence_labels=(3, 1)
    )
    recording.evaluations = [before, replace(before, sequence_losses=(3.0, 1.0))]
    summary = recording.summary()
    assert summary.eval_sequence_labels == (3, 1)
    assert summary.eval_sequence_losses_first == (6.0, 1.234568)
    assert summary.eval_sequence_losses_last == (3.0, 1.0)
    assert TypeAdapter(Summary).validate_json(to_json(summary)) == summary
    kept = of_one(summary)  # each rank evaluates the same
    assert kept.eval_sequence_labels == kept.eval_sequence_losses_last == ()


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_non_finite_loss_ends_the_run_and_keeps_the_samples(value: str) -> None:
    job = scripted_job()
    recording = RunRecording(tokens_per_step=8)
    with pytest.raises(NonFiniteLoss, match="step 3"):
        run(job, make_engine(job, loss=(2.0, 2.0, 2.0, float(value))), recording)
    assert [sample.loss for sample in recording.samples] == [2.0, 2.0, 2.0, None]
    assert recording.summary().step_s_median is not None


class RaisingEngine(Scripted):
    """Finds the non-finite loss by itself, as real engines may."""

    def step(self, batches: Sequence[Batch]) -> StepStats:
        stats = super().step(batches)
        if self.now() > 0.035:
            raise NonFiniteLoss("found by the engine")
        return stats


def test_a_step_whose_loss_the_engine_refuses_is_kept_too() -> None:
    job = scripted_job()
    engine = RaisingEngine(
        ScriptedSettings(), Context(device="cpu", workload=job.workload, seed=0, total_steps=6)
    )
    recording = RunRecording(tokens_per_step=8)
    with pytest.raises(NonFiniteLoss, match="found by the engine"):
        run(job, engine, recording)
    assert [sample.loss for sample in recording.samples] == [1.0, 1.0, 1.0, None]


class LeakyEngine(Scripted):
    """Fails while its last work is drained."""

    def synchronize(self) -> None:
        super().synchronize()
        if self.now() > 5.0:
            raise RuntimeError("lost in flight")


def test_a_failure_while_draining_does_not_lose_the_last_step() -> None:
    job = scripted_job()
    engine = LeakyEngine(
        ScriptedSettings(step_s=(1.0,)),
        Context(device="cpu", workload=job.workload, seed=0, total_steps=6),
    )
    recording = RunRecording(tokens_per_step=8)
    with pytest.raises(RuntimeError, match="lost in flight"):
        run(job, engine, recording)
    assert len(recording.samples) == 6


def test_energy_is_per_step_of_the_measured_window() -> None:
    job = scripted_job()
    engine = make_engine(job, setup_s=50.0, step_s=(1.0,))
    # 100 W from the start: the set-up and the warm-up must not be in it.
    recording = record(job, engine, energy_j=lambda: 100.0 * engine.now())
    assert recording.summary().energy_j == 100.0


def test_energy_of_a_window_shorter_than_the_counter_can_tell_is_not_measured() -> None:
    job = scripted_job()
    engine = make_engine(job, step_s=(0.125,))
    assert record(job, engine, energy_j=lambda: engine.now()).summary().energy_j is None


def test_energy_counter_that_fails_is_not_measured() -> None:
    job = scripted_job()
    readings: Iterator[float | None] = iter([1.0, None])
    recording = record(job, make_engine(job, step_s=(1.0,)), energy_j=lambda: next(readings))
    assert recording.summary().energy_j is None


def test_a_run_without_measured_steps_has_an_empty_summary() -> None:
    job = scripted_job()
    recording = RunRecording(tokens_per_step=8)
    with pytest.raises(RuntimeError):
        run(job, make_engine(job, fail_at_step=-1), recording)
    summary = recording.summary()
    assert (summary.step_s_median, summary.tokens_per_s, summary.h2d_bytes, summary.setup_s) == (None,) * 4


class NoisyEngine(Scripted):
    """Says how much of each step went into noise."""

    def step(self, batches: Sequence[Batch]) -> StepStats:
        stats = super().step(batches)
        return replace(stats, perturb_s=self.now() / 8)


def test_noise_is_a_median_of_the_measured_steps() -> None:
    job = scripted_job()
    recording = RunRecording(tokens_per_step=8)
    context = Context(device="cpu", workload=job.workload, seed=0, total_steps=6)
    run(job, NoisyEngine(ScriptedSettings(step_s=(8.0, 8.0, 1.0)), context), recording)
    assert recording.summary().perturb_s == (18 + 19) / 2 / 8
    assert record(job, make_engine(job)).summary().perturb_s is None


class ThreadedEngine(Scripted):
    """Has chosen its threads after some steps."""

    def step(self, batches: Sequence[Batch]) -> StepStats:
        self.taken = getattr(self, "taken", 0) + 1
        return replace(super().step(batches), cpu_threads=4 if self.taken < 4 else 2)


def test_threads_are_those_that_the_method_has_chosen_in_the_end() -> None:
    job = scripted_job()
    recording = RunRecording(tokens_per_step=8)
    context = Context(device="cpu", workload=job.workload, seed=0, total_steps=6)
    run(job, ThreadedEngine(ScriptedSettings(step_s=(8.0, 8.0, 1.0)), context), recording)
    assert recording.summary().cpu_threads == 2
    assert record(job, make_engine(job)).summary().cpu_threads is None


class ReadingEngine(Scripted):
    """Says what it read from disk."""

    def step(self, batches: Sequence[Batch]) -> StepStats:
        stats = super().step(batches)
        return replace(stats, disk_read_bytes=100, disk_s=0.75, disk_floor_s=0.5, disk_direct=False)


def test_what_was_read_from_disk_and_how_near_it_came_to_reading_alone() -> None:
    job = scripted_job()
    recording = RunRecording(tokens_per_step=8)
    context = Context(device="cpu", workload=job.workload, seed=0, total_steps=6)
    run(job, ReadingEngine(ScriptedSettings(step_s=(8.0, 8.0, 2.0)), context), recording)
    summary = recording.summary()
    assert (summary.disk_read_bytes, summary.disk_s, summary.disk_direct) == (100, 0.75, False)
    assert (summary.disk_floor_s, summary.disk_floor_share) == (0.5, 0.25)
    without = record(job, make_engine(job)).summary()
    assert without.disk_read_bytes == 0
    assert (without.disk_s, without.disk_direct, without.disk_floor_share) == (None, None, None)


class RealizingEngine(Scripted):
    """Says what is asked of it how much of its update arrived, and when it was asked."""

    told: Any = None

    def realized_update_fraction(self) -> float | None:
        self.asked_s = self.now()
        if isinstance(self.told, BaseException):
            raise self.told
        share: float | None = self.told
        return share


def realizing_engine(job: Job, told: object) -> RealizingEngine:
    context = Context(device="cpu", workload=job.workload, seed=0, total_steps=6)
    engine = RealizingEngine(ScriptedSettings(step_s=(1.0,), drain_s=0.5), context)
    engine.told = told
    return engine


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        (0.25, 0.25),
        (1, 1.0),
        (None, None),
        (float("nan"), None),
        (RuntimeError("CUDA error: out of memory"), None),
        (MemoryError(), None),
    ],
)
def test_the_share_that_landed_is_asked_last_and_too_little_memory_for_it_fails_no_run(
    told: object, kept: float | None
) -> None:
    job = scripted_job(eval_batches=1)
    engine = realizing_engine(job, told)
    recording = RunRecording(tokens_per_step=8)
    run(job, engine, recording)
    assert recording.summary().landed_share == kept
    assert engine.asked_s == 7.0  # six steps, and draining before and after the measured ones
    assert len(recording.evaluations) == 2


def failed_thread() -> RuntimeError:
    error = RuntimeError("the CPU update failed")
    error.__cause__ = MemoryError()
    return error


@pytest.mark.parametrize(
    "error", [NonFiniteLoss("a core of step 5"), RuntimeError("CUDA error: launch failed"), failed_thread()]
)
def test_what_the_last_step_comes_to_when_the_share_is_asked_ends_the_run(error: Exception) -> None:
    job = scripted_job()
    recording = RunRecording(tokens_per_step=8)
    with pytest.raises(type(error)):
        run(job, realizing_engine(job, error), recording)
    assert len(recording.samples) == 6


def test_engines_that_cannot_tell_are_not_asked() -> None:
    job = scripted_job()
    assert record(job, make_engine(job)).summary().landed_share is None


def test_peaks_need_torch_and_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        max_memory_allocated=lambda: 3,
        max_memory_reserved=lambda: 5,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert gpu_peaks() == (3, 5)
    cuda.is_available = lambda: False
    assert gpu_peaks() == (None, None)
    monkeypatch.delitem(sys.modules, "torch")
    assert gpu_peaks() == (None, None)


def test_starting_operations_is_timed_after_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the probe's own measure, here on the CPU; without CUDA, and where it fails, there is no figure."""
    assert forward_launch_s() is None
    # Before CUDA seems to be there: what transformers imports for the model would use it.
    importlib.import_module("transformers.models.llama.modeling_llama")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(measuring, "DEVICE", "cpu")
    taken = forward_launch_s()
    assert taken is not None
    assert 1e-7 < taken < 1e-2

    def fails(seconds: float, device: str) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(measuring, "forward_s", fails)
    assert forward_launch_s() is None


def test_the_speed_of_the_core_is_looked_at_around_the_steps_that_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Outside their time, which is that of the script; not without CUDA."""
    job = scripted_job()
    assert record(job, make_engine(job)).summary().python_turn_before_s is None
    events: list[object] = []
    turns = iter((33e-9, 61e-9))

    def turn_s() -> float:
        events.append("looked")
        return next(turns)

    class Stepping(Scripted):
        def step(self, batches: Any) -> Any:
            events.append(len(events))
            return super().step(batches)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(measuring, "python_turn_s", turn_s)
    context = Context(device="cpu", workload=job.workload, seed=0, total_steps=6)
    recording = RunRecording(tokens_per_step=8)
    run(job, Stepping(ScriptedSettings(step_s=(1.0,)), context), recording)
    summary = recording.summary()
    assert (summary.python_turn_before_s, summary.python_turn_after_s) == (33e-9, 61e-9)
    assert [sample.step_s for sample in recording.samples] == [1.0] * 6
    assert events.index("looked") == job.warmup_steps
    assert events[-1] == "looked"


class SpeakingEngine(Scripted):
    """Decoding steps that take the scripted times, the first of them in the generation that warms up."""

    ended = 0

    def generate(self, request: GenerationRequest) -> Iterator[Decoded]:
        try:
            for _ in range(request.max_new_tokens):
                self.step(())
                stats = StepStats(loss=math.nan, h2d_bytes=7, h2d_s=0.5)
                yield Decoded(tokens=(1,) * len(request.prompts), stats=stats)
        finally:
            self.ended += 1


def decode(engine: SpeakingEngine, new_tokens: int, warmup_steps: int, **more: Any) -> RunRecording:
    recording = RunRecording(tokens_per_step=2)
    request = GenerationRequest(prompts=[[1], [2]], max_new_tokens=new_tokens)
    scenario = Decode(request=request, warmup_steps=warmup_steps)
    measure(engine, None, scenario, recording, clock=engine.now, **more)
    return recording


def test_decoding_steps_are_timed_and_the_last_one_under_way_is_given_up() -> None:
    job = scripted_job()
    context = Context(device="cpu", workload=job.workload, seed=0, total_steps=9)
    script = ScriptedSettings(
        setup_s=20.0, step_s=(50.0, 9.0, 5.0, 1.0, 2.0, 4.0, 100.0), drain_s=3.0, pinned_bytes=6
    )
    engine = SpeakingEngine(script, context)
    told: list[Sample] = []
    recording = decode(
        engine,
        6,
        2,
        energy_j=lambda: 10.0 * engine.now(),
        on_sample=lambda sample, stats: told.append(sample),
    )
    assert [(s.step, s.warmup, s.step_s, s.loss) for s in recording.samples] == [
        (0, True, 9.0, None), (1, True, 5.0, None), (2, False, 1.0, None), (3, False, 2.0, None),
        (4, False, 4.0, None),
    ]  # fmt: skip
    assert tuple(told) == recording.samples
    assert engine.ended == 2
    summary = recording.summary()
    assert (summary.step_s_median, summary.tokens_per_s, summary.loss_last) == (2.0, 1.0, None)
    assert (summary.step_s_p10, summary.step_s_p90) == pytest.approx((1.2, 3.6))
    assert (summary.h2d_bytes, summary.h2d_s, summary.gpu_s) == (7, 0.5, None)
    assert (summary.setup_s, summary.pinned_bytes) == (20.0, 6)
    assert summary.energy_j == pytest.approx(10.0 * 7.0 / 3)


def test_a_decoding_step_that_fails_keeps_the_samples_before_it() -> None:
    job = scripted_job()
    context = Context(device="cpu", workload=job.workload, seed=0, total_steps=9)
    engine = SpeakingEngine(ScriptedSettings(step_s=(1.0,), fail_at_step=4), context)
    recording = RunRecording(tokens_per_step=2)
    request = GenerationRequest(prompts=[[1]], max_new_tokens=6)
    with pytest.raises(RuntimeError):
        measure(engine, None, Decode(request=request, warmup_steps=1), recording, clock=engine.now)
    assert [sample.step_s for sample in recording.samples] == [1.0] * 3


class LoggingEngine(SpeakingEngine):
    """Notes what is asked of it, and when its clock is read."""

    def __init__(self, settings: ScriptedSettings, context: Context) -> None:
        super().__init__(settings, context)
        self.log: list[str] = []

    def setup(self, blueprint: Any) -> None:
        self.log.append("set up")
        super().setup(blueprint)

    def step(self, batches: Sequence[Batch]) -> StepStats:
        self.log.append("step")
        return super().step(batches)

    def synchronize(self) -> None:
        self.log.append("drain")
        super().synchronize()

    def evaluate(self, batches: Sequence[Batch]) -> Any:
        self.log.append("evaluate")
        return super().evaluate(batches)

    def clock(self) -> float:
        self.log.append("clock")
        return self.now()

    def energy_j(self) -> float:
        self.log.append("energy")
        return self.now()


SET_UP = ["clock", "set up", "drain", "clock"]
EVALUATION = ["drain", "clock", "evaluate", "drain", "clock"]


@pytest.mark.parametrize("scenario", ["train", "decode"])
def test_where_the_clock_is_read(scenario: str) -> None:
    job = scripted_job(warmup_steps=1, steps=2, eval_batches=1)
    context = Context(device="cpu", workload=job.workload, seed=0, total_steps=3)
    engine = LoggingEngine(ScriptedSettings(step_s=(1.0,), eval_loss=(1.0,), eval_accuracy=(0.5,)), context)
    request = GenerationRequest(prompts=[[1]], max_new_tokens=4)
    measure(
        engine,
        None,
        Train(job=job, data=NumberedData())
        if scenario == "train"
        else Decode(request=request, warmup_steps=1),
        RunRecording(tokens_per_step=8),
        clock=engine.clock,
        energy_j=engine.energy_j,
    )
    timed = ["step", "clock"]
    if scenario == "train":
        window = ["drain", "energy", "clock", *timed, "step", "drain", "clock", "energy"]
        assert engine.log == [*SET_UP, *EVALUATION, "clock", *timed, *window, *EVALUATION]
    else:
        warm_up = ["step", "drain"]
        assert engine.log == [
            *SET_UP, *warm_up, "clock", *timed, "energy", *timed, *timed, "energy", "drain"
        ]  # fmt: skip


def test_parts_of_a_set_up_are_what_it_tells_of_and_the_rest() -> None:
    parts, now = SetUpParts(), [10.0]
    parts.tell("importing")
    parts.begin(lambda: now[0])
    for what, seconds in (("pinning (bytes)", 1.0), ("filling blocks", 2.0), ("pinning (bytes)", 4.0)):
        now[0] += seconds
        parts.tell(what)
    now[0] += 8.0
    parts.end()
    parts.tell("training")
    assert parts.parts_s == {"pinning": 5.0, "filling blocks": 2.0, "the rest": 8.0}
