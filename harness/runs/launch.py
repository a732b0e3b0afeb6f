"""One run, from the start of its process to what is known at its end; of its processes, where it has several.

The parent sleeps on the pipes of the children, and wakes to read them and to sample memory. It must not take
part in the measurement: a parent that polls would take a core from the CPU optimizer that is being timed.
`harness.runs.processes` starts the children and sees to it that nothing is left of them.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from engines.errors import PEER_LOST, UserError
from harness.records.job import Job
from harness.records.run import EndState, Sample, Summary
from harness.records.shared import paths_of, without_paths
from harness.runs.emulate import AppliedLimits
from harness.runs.end_states import REASON_LENGTH
from harness.runs.events import OnRunEvent, RankProgress
from harness.runs.memory_sampler import NEARLY_NONE, MemorySampler, read_oom_kills
from harness.runs.processes import Group, KeptChild, child_environment, of_rank
from harness.runs.ranks import MEETING, devices_of, of_group, of_one, places
from harness.runs.worker import REQUEST, RESULT, TRACE, Request, Result
from harness.signals import named_signal
from profiles.documents import adapter, to_json, write_whole
from profiles.machine import Machine
from profiles.system.nvml import NvmlDevice

SAMPLE_INTERVAL_S = 0.05
SAMPLE_SHARE = 0.02
"""Most of one core that sampling may take: on a host with many processes it is done less often."""

ENDING_TOGETHER_S = 30.0
"""For which the other ranks may go on after one has failed."""

WORK = ".work"
"""Folder below the results that holds what a run in progress needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a run ended and what it yielded until then."""

    end_state: EndState
    end_reason: str | None
    samples: tuple[Sample, ...]
    summary: Summary
    by_user: bool
    """Stopped by a signal to the sweep, such as Ctrl-C: it is to stop too."""
    traced: bool = False
    """The engine kept a trace, which costs time, whether or not it could be written."""
    trace_file: str | None = None
    """Relative to the folder of results."""
    limits: AppliedLimits | None = None
    """What of an emulated machine the run was held to; `None`: nothing, or the child did not say."""
    contacted: tuple[str, ...] | None = None
    """Hosts that the child contacted; `None`: not known."""
    ranks: tuple[Summary, ...] = ()
    """Of each process of this machine, where there are several; `summary` is then that of the first, its
    peaks those of the largest GPU and of the machine."""
    notes: tuple[str, ...] | None = None
    """What of the settings the engine could not have; `None`: the child did not say."""
    disturbance: str | None = None
    """What held the GPU back while it ran; `None`: nothing that NVML knows of."""


@dataclass(frozen=True, slots=True)
class _Stop:
    """Why this process ended the child."""

    end_state: EndState
    reason: str
    by_user: bool = False
    after: int | None = None
    """The rank that had failed before, whose story it is."""


_End = tuple[EndState, str | None]
"""End state and reason."""


def launch_child(
    request: Request,
    out: Path,
    *,
    device: NvmlDevice | None,
    on_event: OnRunEvent,
    kept: KeptChild | None = None,
) -> Outcome:
    """Run `request` in a child process and wait for its end; in `kept`, which stays if the run goes well.

    Every end of the child is an outcome, Ctrl-C included. Where the run failed, `<out>/logs/<id>.log`
    keeps what the child wrote; where it was traced, `<out>/traces/<id>.json` keeps the trace, if the child
    lived to write it. What else it left stays until `clear_work`, for the case that its record cannot be
    written. Raises `UserError` if the child cannot be started.
    """
    work = work_folder(out, request.id)
    try:
        write_whole(work / REQUEST, to_json(request))
        (work / MEETING).unlink(missing_ok=True)
        outcome = _run_child(request, work, device, on_event, kept)
        if kept is not None and outcome.end_state != "ok":
            kept.close()
        _join_logs(work, request.job.limits.gpus)
        _clean_log(work / "log", request.job)
        _keep(work / "log", out / "logs" / f"{request.id}.log", wanted=outcome.end_state != "ok")
        trace_file = f"traces/{request.id}.json"
        is_kept = _keep(work / TRACE, out / trace_file, wanted=outcome.traced)
        return replace(outcome, trace_file=trace_file if is_kept else None)
    except UserError:
        clear_work(out, request.id)
        raise


def work_folder(out: Path, run_id: str) -> Path:
    """Where a run in progress has its files."""
    return out / WORK / run_id


def clear_work(out: Path, run_id: str) -> None:
    """Take away what a run left there."""
    work = work_folder(out, run_id)
    shutil.rmtree(work, ignore_errors=True)
    with contextlib.suppress(OSError):
        work.parent.rmdir()


def launch_probe(*, quiet: bool) -> Machine:
    """This machine, measured in a process of its own, so that its CUDA context and buffers end with it.

    Its progress goes to stderr. Raises `UserError` if it fails.
    """
    command = [
        sys.executable,
        "-P",
        "-m",
        "harness",
        "probe",
        "--json",
        "--brief",
        *(["--quiet"] if quiet else []),
    ]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=child_environment(), check=False
    )
    if done.returncode != 0:
        raise UserError(
            "the probe",
            f"ended with code {done.returncode}",
            "run 'lspzo-bench probe' by itself, or give a saved machine with --profile",
        )
    return TypeAdapter(Machine).validate_json(done.stdout)


def _run_child(
    request: Request, work: Path, device: NvmlDevice | None, on_event: OnRunEvent, kept: KeptChild | None
) -> Outcome:
    oom_kills_before = read_oom_kills()
    placed = places(request.job.limits, work)
    ranks = [RankProgress(request) for _ in range(max(1, len(placed)))]
    threads = None if request.emulated is None else request.emulated.threads
    group = Group(work, placed, threads) if kept is None else kept.begin(work, threads)
    sampler = MemorySampler(group.pids, devices_of(placed, device))
    stop: _Stop | None = None
    try:
        stop = _watch(group, work, sampler, request, ranks, on_event)
    except KeyboardInterrupt:
        stop = _Stop("interrupted", "stopped by a signal", by_user=True)
    finally:
        codes = group.finish(sampler.family)
    _take_lines(group.read_rest(), ranks, lambda event: None)

    results = [each.result or read_result(work / of_rank(RESULT, rank)) for rank, each in enumerate(ranks)]
    # A result is complete, even if its process was stopped while it was ending.
    ends = [None if each is None else (each.end_state, each.end_reason) for each in results]
    for rank, code in enumerate(codes):
        if ends[rank] is None and (stop is None or stop.after == rank):
            ends[rank] = _judge_code(code, oom_kills_before, sampler, work / of_rank("log", rank))
    state, reason = _judge(ends, stop)
    summaries = [
        rank.recording.summary() if result is None else result.summary
        for result, rank in zip(results, ranks, strict=True)
    ]
    first = results[0]
    summary = of_group(summaries)
    peak_host_bytes = max(sampler.peak_host_bytes, summary.peak_host_bytes or 0)
    return Outcome(
        end_state=state,
        end_reason=reason,
        samples=ranks[0].recording.samples if first is None else first.samples,
        summary=replace(
            summary, peak_host_bytes=peak_host_bytes or None, peak_gpu_nvml_bytes=sampler.peak_gpu_bytes
        ),
        by_user=stop is not None and stop.by_user,
        traced=ranks[0].traced,
        limits=ranks[0].limits,
        contacted=tuple(dict.fromkeys(host for each in ranks for host in each.contacted)),
        ranks=tuple(map(of_one, summaries)) if placed else (),
        notes=None if first is None else first.notes,
        disturbance=sampler.clocks.disturbance,
    )


def _judge(ends: Sequence[_End | None], stop: _Stop | None) -> _End:
    """How a group ended by what is known of each rank, `None` of one that was stopped: the first that failed
    of itself says it, then what stopped them, then one that missed another."""
    several = len(ends) > 1
    failures = [
        (state, f"rank {rank}: {reason}" if several else reason)
        for rank, (state, reason) in ((rank, end) for rank, end in enumerate(ends) if end is not None)
        if state != "ok"
    ]
    own = [end for end in failures if end[1] is None or not end[1].endswith(PEER_LOST)]
    if own:
        return own[0]
    if stop is not None and None in ends:
        return stop.end_state, stop.reason
    return failures[0] if failures else ("ok", None)


def _watch(
    group: Group,
    work: Path,
    sampler: MemorySampler,
    request: Request,
    ranks: Sequence[RankProgress],
    on_event: OnRunEvent,
) -> _Stop | None:
    """Follow the processes to their end, or say why they are to be stopped."""
    limits = request.job.limits
    deadline_s = time.monotonic() + limits.timeout_s
    next_sample_s = time.monotonic()
    failed: int | None = None
    late = _Stop("timeout", f"took longer than {limits.timeout_s:g} s")
    while not group.has_ended():
        now_s = time.monotonic()
        if now_s >= deadline_s:
            return late
        if failed is None and (failed := _failed(group, work)) is not None:
            # The others miss it, and end by themselves unless they hang.
            late = _Stop("crash", f"rank {failed} ended, and the others did not", after=failed)
            deadline_s = min(deadline_s, now_s + ENDING_TOGETHER_S)
        if now_s >= next_sample_s:
            busy_s = time.thread_time()
            host_bytes = sampler.take()
            if limits.host_bytes is not None and host_bytes > limits.host_bytes:
                return _Stop(
                    "oom_host",
                    f"used {host_bytes / 1e9:.2f} GB of host memory, the limit is "
                    f"{limits.host_bytes / 1e9:.2f} GB",
                )
            # CPU time: a driver that lets NVML wait costs nothing, and a peak must not be missed for it.
            cost_s = time.thread_time() - busy_s
            next_sample_s = now_s + max(SAMPLE_INTERVAL_S, cost_s / SAMPLE_SHARE)
        sampler.clocks.take()  # each time: that is quick, and to look at many processes is not
        wakes_s = min(next_sample_s, now_s + SAMPLE_INTERVAL_S, deadline_s)
        lines = group.read_lines(max(0.0, wakes_s - time.monotonic()))
        _take_lines(lines, ranks, on_event)
    return None


def _failed(group: Group, work: Path) -> int | None:
    """The first rank that has ended and not well, where there are several."""
    for rank, worker in enumerate(group.workers if len(group.workers) > 1 else ()):
        status = worker.exit_status()
        if status is None:
            continue
        result = read_result(work / of_rank(RESULT, rank))
        if status != 0 or (result is not None and result.end_state != "ok"):
            return rank
    return None


def _take_lines(
    of_ranks: Sequence[Sequence[str]], ranks: Sequence[RankProgress], on_event: OnRunEvent
) -> None:
    """What the ranks have told. Events are those of the first."""
    for number, (lines, rank) in enumerate(zip(of_ranks, ranks, strict=True)):
        for line in lines:
            event = rank.take(line)
            if event is not None and number == 0:
                on_event(event)


def read_result(path: Path) -> Result | None:
    """What a child left; `None` if it left nothing, or nothing whole."""
    try:
        found: Result = adapter(Result).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return found


def _judge_code(
    code: int, oom_kills_before: int | None, sampler: MemorySampler, log: Path
) -> tuple[EndState, str]:
    """End state of a child that left no result."""
    if code == -signal.SIGKILL:
        kills = read_oom_kills()
        if kills is not None and oom_kills_before is not None and kills > oom_kills_before:
            return "oom_host", "killed by the kernel: out of host memory"
        if sampler.least_available < NEARLY_NONE:
            return "oom_host", (
                f"killed by signal 9 when {sampler.least_available:.1%} of host memory was available"
            )
        return "crash", "killed by signal 9"
    if code < 0:
        return "crash", f"killed by {named_signal(-code)}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = f": {lines[-1].strip()[:REASON_LENGTH]}" if lines else ""
    return "crash", f"ended with exit code {code} and no result{last}"


def _join_logs(work: Path, count: int) -> None:
    """What each of several ranks wrote, one after the other, in the log of the first."""
    with contextlib.suppress(OSError):
        for rank in range(1, count):
            text = (work / of_rank("log", rank)).read_text(encoding="utf-8", errors="replace")
            if text:
                with (work / "log").open("a", encoding="utf-8") as log:
                    log.write(f"--- rank {rank}\n{text}")


def _clean_log(log: Path, job: Job) -> None:
    """Names for paths in a log, which is looked at elsewhere too. Only a help, as `_keep` is."""
    with contextlib.suppress(OSError):
        text = log.read_text(encoding="utf-8", errors="replace")
        log.write_text(without_paths(text, *paths_of(job)), encoding="utf-8")


def _keep(file: Path, kept: Path, *, wanted: bool) -> bool:
    """Whether `file` now lies at `kept`, in place of what an earlier run of the same id left there.

    Logs and traces are a help, not a measurement: a disk that is full does not make them an error.
    """
    with contextlib.suppress(OSError):
        kept.unlink(missing_ok=True)
        if wanted and file.stat().st_size > 0:
            kept.parent.mkdir(exist_ok=True)
            file.replace(kept)
            return True
    return False
