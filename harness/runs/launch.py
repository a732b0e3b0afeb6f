"""The one place that starts processes: one child per run, in a session of its own.

The parent sleeps on the child's pipe, and wakes to read it and to sample memory. It must not take part
in the measurement: a parent that polls would take a core from the CPU optimizer that is being timed.

Nothing is left behind, however a run ends. The child's process group and every descendant seen are
killed after it; a guard process does the same if this process is killed itself. The guard is a shell
that waits for the end of a pipe that only this process holds open.

Longer than 400 lines: starting, watching and ending a child are one promise.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path

import psutil
from pydantic import TypeAdapter, ValidationError

import harness
from engines.base import StepStats
from engines.errors import UserError
from harness.records.job import Job
from harness.records.run import EndState, Sample, Summary
from harness.records.shared import paths_of, without_paths
from harness.runs.emulate import Held
from harness.runs.end_states import REASON_LENGTH
from harness.runs.measure import RunRecording
from harness.runs.memory_sampler import NEARLY_NONE, MemorySampler, read_oom_kills
from harness.runs.worker import TRACE, Request, Result
from profiles.documents import adapter, to_json, write_whole
from profiles.machine import Machine
from profiles.system.cgroup import usable_cores
from profiles.system.nvml import NvmlDevice

SAMPLE_INTERVAL_S = 0.05
SAMPLE_SHARE = 0.02
"""Most of one core that sampling may take: on a host with many processes it is done less often."""

ENDING_INTERVAL_S = 0.01
"""Between two looks at a child that has closed its pipe and is about to end."""

GUARD = 'read -r group && { read -r rest; kill -s KILL -- "-$group"; }'
"""Reads the process group, then nothing until the pipe ends; then kills the group."""

REQUEST, RESULT = "request.json", "result.json"
WORK = ".work"
"""Folder below the results that holds what a run in progress needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingUp:
    """Slow work of a run's set-up."""

    run_id: str
    what: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Stepped:
    """A step of a run is done."""

    run_id: str
    sample: Sample
    total: int
    """Steps of the run, warm-up included."""


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
    held: Held | None = None
    """What of an emulated machine the run was held to; `None`: nothing, or the child did not say."""
    notes: tuple[str, ...] | None = None
    """What of the settings the engine could not have; `None`: the child did not say."""


@dataclass(frozen=True, slots=True)
class _Stop:
    """Why this process ended the child."""

    end_state: EndState
    reason: str
    by_user: bool = False


OnRunEvent = Callable[[SettingUp | Stepped], None]


def launch_child(request: Request, out: Path, *, device: NvmlDevice | None, on_event: OnRunEvent) -> Outcome:
    """Run `request` in a child process and wait for its end.

    Every end of the child is an outcome, Ctrl-C included. Where the run failed, `<out>/logs/<id>.log`
    keeps what the child wrote; where it was traced, `<out>/traces/<id>.json` keeps the trace, if the child
    lived to write it. What else it left stays until `clear_work`, for the case that its record cannot be
    written. Raises `UserError` if the child cannot be started.
    """
    work = work_folder(out, request.id)
    try:
        write_whole(work / REQUEST, to_json(request))
        outcome = _run_child(request, work, device, on_event)
        _clean_log(work / "log", request.job)
        _keep(work / "log", out / "logs" / f"{request.id}.log", wanted=outcome.end_state != "ok")
        trace_file = f"traces/{request.id}.json"
        kept = _keep(work / TRACE, out / trace_file, wanted=outcome.traced)
        return replace(outcome, trace_file=trace_file if kept else None)
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
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=_child_environment(), check=False
    )
    if done.returncode != 0:
        raise UserError(
            "the probe",
            f"ended with code {done.returncode}",
            "run 'lspzo-bench probe' by itself, or give a saved machine with --profile",
        )
    return TypeAdapter(Machine).validate_json(done.stdout)


def _run_child(request: Request, work: Path, device: NvmlDevice | None, on_event: OnRunEvent) -> Outcome:
    recording = RunRecording(tokens_per_step=request.tokens_per_step)
    oom_kills_before = read_oom_kills()
    child = _Child(work, None if request.emulated is None else request.emulated.threads)
    sampler = MemorySampler(child.process.pid, device)
    stop: _Stop | None = None
    try:
        stop = _watch(child, sampler, request, recording, on_event)
    except KeyboardInterrupt:
        stop = _Stop("interrupted", "stopped by a signal", by_user=True)
    finally:
        code = child.finish(sampler.family)
    _take_lines(child.read_rest(), request, recording, lambda event: None)

    result = recording.told or read_result(work / RESULT)
    if result is not None:  # complete, even if the child was stopped while it was ending
        state, reason, samples, summary = (
            result.end_state,
            result.end_reason,
            result.samples,
            result.summary,
        )
    else:
        samples, summary = recording.samples, recording.summary()
        if stop is not None:
            state, reason = stop.end_state, stop.reason
        else:
            state, reason = _judge_code(code, oom_kills_before, sampler, work / "log")
    peak_host_bytes = max(sampler.peak_host_bytes, summary.peak_host_bytes or 0)
    return Outcome(
        end_state=state,
        end_reason=reason,
        samples=samples,
        summary=replace(
            summary, peak_host_bytes=peak_host_bytes or None, peak_gpu_nvml_bytes=sampler.peak_gpu_bytes
        ),
        by_user=stop is not None and stop.by_user,
        traced=recording.traced,
        held=recording.held,
        notes=None if result is None else result.notes,
    )


def _watch(
    child: _Child, sampler: MemorySampler, request: Request, recording: RunRecording, on_event: OnRunEvent
) -> _Stop | None:
    """Follow the child to its end, or say why it is to be stopped."""
    limits = request.job.limits
    deadline_s = time.monotonic() + limits.timeout_s
    next_sample_s = time.monotonic()
    while not child.has_ended():
        now_s = time.monotonic()
        if now_s >= deadline_s:
            return _Stop("timeout", f"took longer than {limits.timeout_s:g} s")
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
        lines = child.read_lines(max(0.0, min(next_sample_s, deadline_s) - time.monotonic()))
        _take_lines(lines, request, recording, on_event)
    return None


class _Child:
    """The worker process, its pipe and its guard."""

    def __init__(self, work: Path, threads: int | None) -> None:
        """Start all three, with at most `threads` threads. Raises `UserError` where the system refuses."""
        self._rest = b""
        self._open = True
        started: list[subprocess.Popen[bytes]] = []
        read_end, write_end = os.pipe()
        self._pipe = read_end
        try:
            with (work / "log").open("wb") as log:
                self._guard = subprocess.Popen(
                    ["/bin/sh", "-c", GUARD],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
                started.append(self._guard)
                # -P: a folder `harness` where the user stands must not shadow ours.
                worker = [sys.executable, "-P", "-m", "harness.runs.worker"]
                self.process = subprocess.Popen(
                    [*worker, str(work.resolve()), str(write_end), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(write_end,),
                    env=_child_environment(threads),
                    start_new_session=True,
                )
                started.append(self.process)
            assert self._guard.stdin is not None
            self._guard.stdin.write(b"%d\n" % self.process.pid)
            self._guard.stdin.flush()
        except OSError as error:
            for process in started:
                process.kill()
                process.communicate()
            os.close(read_end)
            raise UserError(
                "the run's process",
                f"cannot be started ({error.strerror or error})",
                "free memory or disk space, or raise the limit on processes (ulimit -u)",
            ) from None
        finally:
            os.close(write_end)
        os.set_blocking(read_end, False)

    def has_ended(self) -> bool:
        """Does not reap: until `finish` the dead child keeps its number, so that killing its group
        cannot hit a stranger."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def read_lines(self, timeout_s: float) -> list[str]:
        """Whole lines that came within `timeout_s`; waits no longer than until the first bytes."""
        if not self._open:  # the child is on its way out
            time.sleep(min(timeout_s, ENDING_INTERVAL_S))
            return []
        return self.read_rest() if wait([self._pipe], timeout_s) else []

    def read_rest(self) -> list[str]:
        """Whole lines that are in the pipe now."""
        while self._open:
            try:
                chunk = os.read(self._pipe, 65536)
            except BlockingIOError:
                break
            if not chunk:
                os.close(self._pipe)
                self._open = False
            self._rest += chunk
        *lines, self._rest = self._rest.split(b"\n")
        return [line.decode("utf-8") for line in lines]

    def finish(self, family: Mapping[int, psutil.Process]) -> int:
        """Kill what is left of the child, its group and `family`; its exit code, or minus its signal."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for relative in family.values():  # those that left the group; psutil knows a reused number
            with contextlib.suppress(psutil.Error):
                relative.kill()
        code = self.process.wait()
        self._guard.kill()
        self._guard.communicate()
        return code


def _take_lines(
    lines: list[str],
    request: Request,
    recording: RunRecording,
    on_event: OnRunEvent,
) -> None:
    total = request.job.warmup_steps + request.job.steps
    for line in lines:
        event = json.loads(line)
        if "sample" in event:
            sample = Sample(**event["sample"])
            stats = event["stats"]
            recording.steps.append((sample, None if stats is None else StepStats(**stats)))
            on_event(Stepped(run_id=request.id, sample=sample, total=total))
        elif "traced" in event:
            recording.traced = True
        elif "result" in event:
            recording.told = adapter(Result).validate_python(event["result"])
        elif "held" in event:
            recording.held = TypeAdapter(Held).validate_python(event["held"])
        else:
            on_event(SettingUp(run_id=request.id, **event))


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
        return "crash", f"killed by signal {-code} ({signal.Signals(-code).name})"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = f": {lines[-1].strip()[:REASON_LENGTH]}" if lines else ""
    return "crash", f"ended with exit code {code} and no result{last}"


def _child_environment(at_most: int | None = None) -> dict[str, str]:
    usable = usable_cores().count
    threads = str(usable if at_most is None else min(usable, at_most))
    root = Path(harness.__file__).parent.parent
    environment = {
        **os.environ,
        # CUDA and NVML then count GPUs alike.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        # Read when the libraries are loaded, before torch can be told.
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONFAULTHANDLER": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if (root / "pyproject.toml").exists():  # a checkout need not be installed
        before = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = str(root) if not before else f"{root}{os.pathsep}{before}"
    return environment


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
