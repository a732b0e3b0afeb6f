"""The child: one run in one process. Started by `harness.runs.launch`, and by nothing else.

`python -P -m harness.runs.worker FOLDER DESCRIPTOR PARENT` reads FOLDER/request.json, reports progress and
each step as lines of JSON on DESCRIPTOR, and leaves FOLDER/result.json whatever happens (where it cannot be
written, DESCRIPTOR gets what it would hold), and FOLDER/trace.json where a trace was asked for. A child that
is killed leaves neither; what it had reported is then all there is. PARENT is the process to live no longer
than. With `-` for FOLDER it reads folders from stdin, a line each, and says after each that it is idle.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, NoReturn

from pydantic import TypeAdapter

from engines import entry, is_external, load_engine
from engines.base import (
    Batch,
    Blueprint,
    Context,
    Evaluation,
    ReportProgress,
    StepStats,
    SupportsNotes,
    SupportsTrace,
)
from engines.decoding import GenerationRequest, Sampling
from engines.errors import NonFiniteLoss, UserError
from engines.shapes import ModelShape
from engines.world import ALONE, Alone, World
from harness.contacts import contacts_watched
from harness.records.job import Job
from harness.records.learning import Learning
from harness.records.metrics import metrics_of
from harness.records.run import EndState, Sample, Summary
from harness.runs.divergence import LossDiagnosis, Point, why_not_finite
from harness.runs.emulate import Emulated, limit_cpus
from harness.runs.end_states import classify
from harness.runs.limits import applied_limits, prepare_torch, usable_host_bytes
from harness.runs.measure import (
    RunRecording,
    Scenario,
    compile_s,
    forget_last_run,
    forward_launch_s,
    gpu_peaks,
    measure,
    own_peak_bytes,
)
from harness.runs.processes import FROM_STDIN, IDLE, of_rank
from harness.runs.ranks import RankPlace, check_alike, place_of, what_to_agree_on
from harness.runs.scenarios import NO_LIMIT, Decode, Learn, StepData, Train
from profiles.documents import to_json, write_whole
from profiles.planning.plan import Plan
from profiles.system.nvml import open_device

REQUEST, RESULT = "request.json", "result.json"
TRACE = "trace.json"
LEARNED = "learned.json"
"""What a child that is watched while it learns leaves, on the way and at its end."""

PR_SET_PDEATHSIG = 1
"""prctl: the signal that the kernel sends to this process when its parent ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a child is to run."""

    id: str
    job: Job
    shape: ModelShape
    plan: Plan
    trace: bool = False
    """Keep what each stream did, where the engine can. Not part of what decides the run's id."""
    emulated: Emulated | None = None
    """The machine to be like."""
    generation: Sampling | None = None
    """Continue random prompts of the job's shape in place of training: a step of the job is one token of
    each, the first one the prefill."""

    learning: Learning | None = None
    """Train until this says, with evaluations on the way, in place of the job's steps."""
    data_file: Path | None = None
    """The job's data in tokens (`harness.data.tokenized`), made once for all; `None`: the run reads it."""

    @property
    def tokens_per_step(self) -> int:
        return self.job.workload.tokens_per_step if self.generation is None else self.job.batch_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a child that was not killed says of its run."""

    end_state: EndState
    end_reason: str | None
    samples: tuple[Sample, ...]
    summary: Summary
    notes: tuple[str, ...] | None = None
    """What of the settings the engine could not have, and why; `None`: the engine was never made."""


class _NoData:
    """For an engine that reads no batches."""

    evaluation: Sequence[Batch] = ()
    test: Sequence[Batch] = ()
    evaluated_in_training = 0

    def step_batches(self, step: int) -> Sequence[Batch]:
        return ()


def main(arguments: Sequence[str]) -> int:
    folder, descriptor, parent_pid = arguments[0], int(arguments[1]), int(arguments[2])
    end_with_parent(parent_pid)
    signal.signal(signal.SIGTERM, _interrupt)
    # Open to the end: the parent takes the end of the pipe for the end of this process.
    events = os.fdopen(descriptor, "w", encoding="utf-8", buffering=1)
    if folder != FROM_STDIN:
        _run_in(Path(folder), events)
        return 0
    for number, line in enumerate(sys.stdin):
        next_folder = Path(line.removesuffix("\n"))
        _write_into(next_folder / "log")
        peak_is_own = number == 0 or forget_last_run()
        _run_in(next_folder, events, peak_is_own=peak_is_own)
        events.write(f"{IDLE}\n")
    return 0


def _run_in(folder: Path, events: IO[str], *, peak_is_own: bool = True) -> None:
    """The request in `folder`, to its result there."""
    request = TypeAdapter(Request).validate_json((folder / REQUEST).read_bytes())
    place = place_of(os.environ) if request.job.limits.ranks > 1 else None
    if request.emulated is not None:
        limit_cpus(request.emulated.threads)
    with contacts_watched(lambda host: events.write(json.dumps({"contacted": host}) + "\n")):
        result = execute(request, events, folder, place)
    if not peak_is_own:
        result = replace(result, summary=replace(result.summary, peak_host_bytes=None))
    try:
        local = 0 if place is None else place.local_rank
        write_whole(folder / of_rank(RESULT, local), to_json(result))
    except UserError:  # the disk is full: the parent has taken room for the record
        events.write(json.dumps({"result": json.loads(to_json(result))}) + "\n")


def _write_into(log: Path) -> None:
    """What this process and its libraries print goes there from now on."""
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)


def execute(request: Request, events: IO[str], folder: Path, place: RankPlace | None = None) -> Result:
    """Run `request`, as the rank at `place` where there are several. Every exception becomes an end state;
    its traceback goes to stderr.

    A trace that was asked for lies in `folder` then, if the engine keeps one.
    """
    recording = RunRecording(tokens_per_step=request.tokens_per_step)
    state: EndState = "ok"
    reason: str | None = None
    try:
        _run(request, recording, events, folder, place)
    except (Exception, KeyboardInterrupt) as error:
        traceback.print_exc()
        state, reason = classify(error, is_set_up=recording.setup_s is not None)
        if isinstance(error, NonFiniteLoss):
            reason = f"{reason}: {_why_not_finite(request, recording, error)}"
    allocated, reserved = gpu_peaks()
    summary = replace(
        recording.summary(),
        peak_gpu_allocated_bytes=allocated,
        peak_gpu_reserved_bytes=reserved,
        peak_host_bytes=own_peak_bytes(),
        compile_s=compile_s(),
        forward_launch_s=forward_launch_s() if state == "ok" else None,  # last: it takes memory of its own
    )
    return Result(
        end_state=state, end_reason=reason, samples=recording.samples, summary=summary, notes=recording.notes
    )


def _run(
    request: Request, recording: RunRecording, events: IO[str], folder: Path, place: RankPlace | None
) -> None:
    """What is asked for, in this order: the device and its limits, the other ranks, data and model, the
    engine and its steps. What happens is told on `events`."""
    job, plan, emulated = request.job, request.plan, request.emulated

    def report(**event: object) -> None:
        events.write(json.dumps(event) + "\n")

    def on_progress(what: str, done: int, total: int) -> None:
        recording.setup_parts.tell(what)
        report(what=what, done=done, total=total)

    def on_sample(sample: Sample, stats: StepStats | None) -> None:
        report(sample=asdict(sample), stats=None if stats is None else asdict(stats))

    on_progress("importing", 0, 1)
    row, engine_class = entry(plan.engine), load_engine(plan.engine)
    vram_bytes, own_copies = _vram_bytes(request), row.copies == "own"
    device_name = prepare_torch(vram_bytes, job.limits.gpus) if row.needs_torch else "cpu"
    world = ALONE if place is None else _met(request, place, on_progress, by_torch=row.needs_torch)
    if emulated is not None:
        on_progress("measuring the emulated link", 0, 1)
        limits = applied_limits(emulated, device_name, vram_bytes, own_copies=own_copies)
        on_progress("measuring the emulated link", 1, 1)
        report(limits=asdict(limits))
    context = Context(
        device=device_name,
        workload=job.workload,
        seed=job.seed,
        total_steps=_total_steps(request),
        vram_bytes=vram_bytes,
        host_bytes=usable_host_bytes(job.limits.host_bytes) // job.limits.gpus,
        trace=request.trace and world.rank == 0,
        link_rates=emulated.rates if emulated is not None and own_copies else None,
        progress=on_progress,
        world=world,
    )
    on_progress("importing", 1, 1)
    data, blueprint = _data_and_model(request, on_progress) if row.needs_torch else (_NoData(), None)
    # An external trainer uses the GPU without torch in this process.
    device = open_device() if device_name != "cpu" or is_external(plan.engine) else None
    engine = engine_class(plan.settings.typed, context)
    # Of several ranks the first: what they do is alike.
    traced = request.trace and isinstance(engine, SupportsTrace) and world.rank == 0
    if traced:
        report(traced=True)
    try:
        measure(
            engine,
            blueprint,
            _scenario(request, data, folder),
            recording,
            clock=getattr(engine, "now", None),
            energy_j=None if device is None else device.energy_j,
            on_sample=on_sample,
        )
    finally:
        recording.notes = tuple(engine.notes) if isinstance(engine, SupportsNotes) else ()
        try:
            if traced:
                write_trace(engine, folder / TRACE)
        finally:
            engine.close()


def _vram_bytes(request: Request) -> int | None:
    """What torch may take of the GPU: of the card that the job is held to CUDA takes its own part. `None`:
    all that there is."""
    vram_bytes = request.job.limits.vram_bytes
    if vram_bytes is not None:
        vram_bytes = max(1, vram_bytes - (request.plan.prediction.gpu_bytes_beside or 0))
    if request.emulated is not None:
        vram_bytes = min(request.emulated.vram_bytes, vram_bytes or request.emulated.vram_bytes)
    return vram_bytes


def _met(request: Request, place: RankPlace, progress: ReportProgress, *, by_torch: bool) -> World:
    """All ranks of the run, which have been asked for the same. Without torch they only know their number."""
    if not by_torch:
        return Alone(rank=place.rank, size=place.size)
    from engines.transfer.process_group import meet

    progress("meeting the other ranks", 0, 1)
    world = meet(place.where, place.rank, place.size, place.local_rank, place.local_size)
    check_alike(world, what_to_agree_on(request.job, request.plan.engine, dict(request.plan.settings)))
    progress("meeting the other ranks", 1, 1)
    return world


def _data_and_model(request: Request, progress: ReportProgress) -> tuple[StepData, Blueprint]:
    from harness.data.batches import batches_of, make_data
    from harness.data.tokenized import load_tokenized
    from harness.models.blueprint import make_blueprint

    progress("data and model", 0, 2)
    if request.data_file is None:
        data = make_data(request.job, request.shape)
    else:
        together = None if request.learning is None else request.learning.rows_evaluated_together
        data = batches_of(load_tokenized(request.data_file), request.job, evaluated_together=together)
    progress("data and model", 1, 2)
    blueprint = make_blueprint(request.job, request.shape, data.step_batches(0)[0])
    progress("data and model", 2, 2)
    return data, blueprint


def _scenario(request: Request, data: StepData, folder: Path) -> Scenario:
    """What the engine is to repeat. The prompts that it continues are the first batch. What is learned is
    written into `folder` on the way."""
    job, learning = request.job, request.learning
    if learning is not None:

        def judge(evaluation: Evaluation) -> dict[str, float]:
            return metrics_of(
                evaluation, request.shape.head, candidates=learning.classes,
                is_regression=learning.is_regression, is_bytes=learning.is_bytes,
            )  # fmt: skip

        return Learn(learning, data, judge, lambda learned: write_whole(folder / LEARNED, to_json(learned)))
    if is_external(request.plan.engine):
        return Train(job=replace(job, eval_batches=0), data=data)
    if request.generation is None:
        return Train(job=job, data=data)
    (batch,) = data.step_batches(0)
    wanted = GenerationRequest(
        prompts=batch.inputs["input_ids"].tolist(),
        max_new_tokens=job.warmup_steps + job.steps + 1,
        sampling=request.generation,
    )
    return Decode(request=wanted, warmup_steps=job.warmup_steps)


def write_trace(engine: SupportsTrace, path: Path) -> None:
    """What `engine` kept, for chrome://tracing and Perfetto. Says on stderr what went wrong, and no more:
    a trace is a help, and after a failure the GPU may have nothing to say."""
    try:
        document = {"traceEvents": engine.trace_events(), "displayTimeUnit": "ms"}
        write_whole(path, json.dumps(document, allow_nan=False))
    except Exception:
        traceback.print_exc()


def _why_not_finite(request: Request, recording: RunRecording, error: NonFiniteLoss) -> LossDiagnosis:
    history = [
        Point(loss=sample.loss, updates=() if stats is None else stats.updates)
        for sample, stats in recording.steps
        if sample.loss is not None
    ]
    return why_not_finite(history, request.plan.engine, request.job.dtype, error.losses)


def _total_steps(request: Request) -> int:
    """For learning-rate schedules, and what is remembered of steps."""
    if request.learning is not None:
        return request.learning.length.steps or NO_LIMIT
    return request.job.warmup_steps + request.job.steps


def end_with_parent(parent_pid: int) -> None:
    """Be killed when the parent ends, however it ends, also while stuck in foreign code."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it ended before the kernel was told
        os.kill(os.getpid(), signal.SIGKILL)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
