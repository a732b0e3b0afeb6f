"""Real child processes, killed for real."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from forked import children
from left_behind import children_left
from scripted_runs import SHAPE, scripted_job, scripted_plan

import harness.runs.launch
import harness.runs.memory_sampler
from engines.errors import InfeasiblePlan, NonFiniteLoss, NotAvailable, UserError
from harness.records.job import DataSource, Job, Limits, ModelSource
from harness.resolve import resolve_shape
from harness.runs.end_states import classify
from harness.runs.events import SettingUp, Stepped
from harness.runs.launch import Outcome, launch_child
from harness.runs.memory_sampler import read_oom_kills
from harness.runs.worker import Request
from profiles.system.nvml import NvmlDevice, open_device

GIB = 2**30


def start(
    out: Path,
    job: Job | None = None,
    on_event: Any = lambda event: None,
    device: NvmlDevice | None = None,
    trace: bool = False,
    **settings: Any,
) -> Outcome:
    request = Request(
        id="scripted-r1", job=job or scripted_job(), shape=SHAPE, plan=scripted_plan(**settings), trace=trace
    )
    return launch_child(request, out, device=device, on_event=on_event)


@pytest.fixture(autouse=True)
def _nothing_left_behind(tmp_path: Path) -> Any:
    yield
    assert children_left() == []
    left = {path.name for path in (tmp_path / ".work").glob("*/*")}
    assert left <= {"request.json", "result.json", "log"}


@pytest.fixture
def time_out(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Puts the launcher's clock past every time limit."""
    late_s = [0.0]
    clock = SimpleNamespace(
        monotonic=lambda: time.monotonic() + late_s[0], sleep=time.sleep, thread_time=time.thread_time
    )
    monkeypatch.setattr(harness.runs.launch, "time", clock)

    def jump() -> None:
        late_s[0] = 1e6

    return jump


def test_a_run_that_goes_well(tmp_path: Path) -> None:
    events: list[SettingUp | Stepped] = []
    outcome = start(
        tmp_path,
        on_event=events.append,
        step_s="4,2,0.5,0.25,1,0.25",
        loss="6,5,4,3,2,1",
        h2d_bytes=7,
        host_allocation_bytes=64 * 2**20,
    )
    assert (outcome.end_state, outcome.end_reason, outcome.by_user) == ("ok", None, False)
    assert [sample.step_s for sample in outcome.samples] == [4.0, 2.0, 0.5, 0.25, 1.0, 0.25]
    assert outcome.summary.step_s_median == 0.375
    assert outcome.summary.tokens_per_s == 8 / 0.375
    assert (outcome.summary.loss_first, outcome.summary.loss_last) == (6.0, 1.0)
    assert outcome.summary.h2d_bytes == 7
    assert outcome.summary.peak_host_bytes is not None
    assert 64 * 2**20 < outcome.summary.peak_host_bytes < GIB
    assert outcome.summary.peak_gpu_nvml_bytes is None
    assert [event.sample for event in events if isinstance(event, Stepped)] == list(outcome.samples)
    assert SettingUp(run_id="scripted-r1", what="scripted set-up", done=1, total=1) in events
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("failure", "state", "reason"),
    [
        ("crash", "crash", "RuntimeError: scripted crash"),
        ("oom_gpu", "oom_gpu", "CUDA out of memory. Tried to allocate 20.00 GiB"),
        ("oom_host", "oom_host", "host memory"),
        ("pinned_limit", "pinned_limit", "cudaHostRegister"),
        ("not_available", "not_available", "the library is not installed"),
        ("infeasible", "skipped_infeasible", "1 GiB of GPU memory is missing"),
        ("user_error", "crash", "scripted: a setting is wrong; fix it"),
        ("interrupt", "interrupted", "signal"),
        ("kill", "crash", "killed by signal 9"),
    ],
)
def test_every_failure_is_an_end_state_and_keeps_its_samples(
    tmp_path: Path, failure: str, state: str, reason: str
) -> None:
    outcome = start(tmp_path, fail_at_step=3, failure=failure, step_s=0.5, h2d_bytes=9)
    assert outcome.end_state == state
    assert reason in str(outcome.end_reason)
    assert "\n" not in str(outcome.end_reason)
    assert [sample.step_s for sample in outcome.samples] == [0.5, 0.5, 0.5]
    assert (outcome.summary.step_s_median, outcome.summary.h2d_bytes) == (0.5, 9)
    assert not outcome.by_user
    log = tmp_path / "logs" / "scripted-r1.log"
    assert log.exists() == (failure != "kill")  # a killed child writes nothing
    if log.exists():
        assert "Traceback" in log.read_text()


def trace_of(outcome: Outcome, out: Path) -> list[dict[str, Any]]:
    """Spans of the trace that the outcome names."""
    assert outcome.trace_file is not None
    document = json.loads((out / outcome.trace_file).read_text())
    assert document["displayTimeUnit"] == "ms"
    return [event for event in document["traceEvents"] if event["ph"] == "X"]


def test_a_trace_lies_where_the_outcome_says(tmp_path: Path) -> None:
    outcome = start(tmp_path, trace=True, step_s="0.5,0.25")
    assert (outcome.end_state, outcome.traced) == ("ok", True)
    assert outcome.trace_file == "traces/scripted-r1.json"
    spans = trace_of(outcome, tmp_path)
    assert [span["name"] for span in spans] == [f"step {i}" for i in range(6)]
    assert [(span["ts"], span["dur"]) for span in spans[:3]] == [(0, 5e5), (5e5, 2.5e5), (7.5e5, 2.5e5)]


def test_what_was_not_asked_for_is_not_traced_and_an_old_trace_goes(tmp_path: Path) -> None:
    """A run that is done again must not stand beside the trace of the one before."""
    start(tmp_path, trace=True)
    outcome = start(tmp_path)
    assert (outcome.traced, outcome.trace_file) == (False, None)
    assert list((tmp_path / "traces").iterdir()) == []


def test_a_run_that_fails_leaves_its_trace(tmp_path: Path) -> None:
    outcome = start(tmp_path, trace=True, fail_at_step=3, failure="oom_gpu")
    assert outcome.end_state == "oom_gpu"
    assert len(trace_of(outcome, tmp_path)) == 4


def test_a_run_that_is_killed_leaves_no_trace_but_was_traced(tmp_path: Path) -> None:
    outcome = start(tmp_path, trace=True, fail_at_step=3, failure="kill")
    assert (outcome.end_state, outcome.traced, outcome.trace_file) == ("crash", True, None)
    assert len(outcome.samples) == 3


def test_nan_loss(tmp_path: Path) -> None:
    outcome = start(tmp_path, loss="2,2,2,nan")
    assert outcome.end_state == "nan_loss"
    assert [sample.loss for sample in outcome.samples] == [2.0, 2.0, 2.0, None]


@pytest.mark.parametrize(
    ("loss", "cause"),
    [
        ("nan", "no update was made yet"),
        ("2,2,2,nan", "came at once, after 3 updates"),
        ("2,3,9,inf", "had risen from 2 to 9, so the learning rate is likely too large; find one"),
    ],
)
def test_the_likely_cause_of_a_nan_is_in_the_reason(tmp_path: Path, loss: str, cause: str) -> None:
    outcome = start(tmp_path, loss=loss)
    assert outcome.end_state == "nan_loss"
    assert cause in str(outcome.end_reason)
    assert "\n" not in str(outcome.end_reason)


def test_time_limit_kills_grandchildren_too(tmp_path: Path, time_out: Callable[[], None]) -> None:
    family: list[psutil.Process] = []

    def look(event: SettingUp | Stepped) -> None:
        if isinstance(event, Stepped):
            family.extend(children())
            time_out()

    outcome = start(tmp_path, on_event=look, fail_at_step=1, failure="hang", num_children=2)
    assert (outcome.end_state, outcome.end_reason) == ("timeout", "took longer than 60 s")
    assert len(outcome.samples) == 1
    assert len(family) == 4  # guard, worker, and the worker's two
    _, alive = psutil.wait_procs(family, timeout=5)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_leftover_children_of_a_killed_worker_do_not_hold_up_the_end(tmp_path: Path) -> None:
    outcome = start(tmp_path, fail_at_step=1, failure="kill", num_children=1)
    assert outcome.end_state == "crash"


def test_host_memory_limit(tmp_path: Path) -> None:
    job = scripted_job(host_bytes=100 * 10**6)
    outcome = start(tmp_path, job, fail_at_step=1, failure="hang", host_allocation_bytes=200 * 10**6)
    assert outcome.end_state == "oom_host"
    assert "the limit is 0.10 GB" in str(outcome.end_reason)


def test_memory_of_descendants_counts(tmp_path: Path) -> None:
    """Children share the parent's pages; what they have beside those comes to its 115 MiB."""
    job = scripted_job(host_bytes=150 * 2**20)
    settings = {"fail_at_step": 1, "failure": "hang", "host_allocation_bytes": 80 * 2**20}
    outcome = start(tmp_path, job, num_children=3, **settings)
    assert outcome.end_state == "oom_host"
    assert outcome.summary.peak_host_bytes is not None
    assert 150 * 2**20 < outcome.summary.peak_host_bytes < 350 * 2**20, (
        "four times 115, were each page counted"
    )


def test_a_child_killed_while_the_kernel_was_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([4, 5])
    monkeypatch.setattr(harness.runs.launch, "read_oom_kills", lambda: next(counts))
    outcome = start(tmp_path, fail_at_step=1, failure="kill")
    assert (outcome.end_state, outcome.end_reason) == (
        "oom_host",
        "killed by the kernel: out of host memory",
    )


def test_a_child_killed_while_memory_was_nearly_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(available_bytes=GIB, total_bytes=100 * GIB)
    monkeypatch.setattr(harness.runs.memory_sampler, "host_memory", lambda: memory)
    outcome = start(tmp_path, fail_at_step=1, failure="kill")
    assert outcome.end_state == "oom_host"
    assert "1.0% of host memory" in str(outcome.end_reason)


def test_other_signals_are_named(tmp_path: Path) -> None:
    def shoot(event: SettingUp | Stepped) -> None:
        if isinstance(event, Stepped):
            for process in children(recursive=False):
                if "harness.runs.worker" in process.cmdline():
                    process.send_signal(signal.SIGBUS)

    outcome = start(tmp_path, scripted_job(timeout_s=20.0), shoot, fail_at_step=1, failure="hang")
    assert (outcome.end_state, outcome.end_reason) == ("crash", "killed by signal 7 (SIGBUS)")


def test_ctrl_c_is_an_outcome(tmp_path: Path) -> None:
    def press(event: SettingUp | Stepped) -> None:
        if isinstance(event, Stepped):
            os.kill(os.getpid(), signal.SIGINT)

    outcome = start(tmp_path, on_event=press, fail_at_step=1, failure="hang", num_children=1)
    assert (outcome.end_state, outcome.by_user) == ("interrupted", True)
    assert len(outcome.samples) == 1


def test_an_error_of_the_caller_leaves_no_child(tmp_path: Path) -> None:
    def fail(event: SettingUp | Stepped) -> None:
        raise RuntimeError("the display broke")

    with pytest.raises(RuntimeError, match="the display broke"):
        start(tmp_path, on_event=fail, fail_at_step=1, failure="hang")


def test_a_folder_named_like_ours_does_not_shadow_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("harness", "engines", "profiles", "json"):
        (tmp_path / "here" / name).mkdir(parents=True)
        (tmp_path / "here" / name / "__init__.py").write_text("raise SystemExit('shadowed')\n")
    monkeypatch.chdir(tmp_path / "here")
    assert start(Path("../results")).end_state == "ok"


def test_a_worker_that_cannot_start_is_a_crash_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "path" / "pydantic").mkdir(parents=True)
    (tmp_path / "path" / "pydantic" / "__init__.py").write_text("raise ImportError('half installed')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    outcome = start(tmp_path)
    assert outcome.end_state == "crash"
    assert "exit code 1 and no result: ImportError: half installed" in str(outcome.end_reason)
    assert "half installed" in (tmp_path / "logs" / "scripted-r1.log").read_text()


def test_a_system_that_starts_no_process_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.runs.launch.sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="cannot be started"):
        start(tmp_path)


def test_gpu_memory_of_the_device_is_sampled(tmp_path: Path, time_out: Callable[[], None]) -> None:
    class Library:
        NVMLError = RuntimeError

        def __init__(self) -> None:
            self.used = [5, 9, 7]

        def nvmlDeviceGetMemoryInfo(self, handle: object) -> Any:
            if len(self.used) == 1:
                time_out()
            return SimpleNamespace(used=self.used.pop(0))

    outcome = start(tmp_path, device=NvmlDevice(Library(), None), fail_at_step=0, failure="hang")
    assert outcome.summary.peak_gpu_nvml_bytes == 9


def test_a_clock_that_was_held_low_is_told(tmp_path: Path) -> None:
    class Library:
        NVMLError = RuntimeError
        NVML_CLOCK_SM = 1

        def nvmlDeviceGetClockInfo(self, handle: object, domain: int) -> int:
            return 900

        def nvmlDeviceGetMaxClockInfo(self, handle: object, domain: int) -> int:
            return 1980

        def nvmlDeviceGetCurrentClocksEventReasons(self, handle: object) -> int:
            return 0x80

    outcome = start(tmp_path, device=NvmlDevice(Library(), None), step_s=0.2)
    assert outcome.end_state == "ok"
    assert outcome.disturbance is not None
    assert outcome.disturbance.endswith("100% of the time that it worked, by the power supply")
    assert start(tmp_path / "alone").disturbance is None


def test_the_log_of_an_earlier_failure_goes_when_the_run_succeeds(tmp_path: Path) -> None:
    start(tmp_path, fail_at_step=0)
    log = tmp_path / "logs" / "scripted-r1.log"
    assert log.exists()
    start(tmp_path)
    assert not log.exists()


class TorchOutOfMemoryError(RuntimeError):
    """Stands for `torch.OutOfMemoryError`, which has this name and base."""


TorchOutOfMemoryError.__name__ = "OutOfMemoryError"


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (TorchOutOfMemoryError("Allocation on device 0 would exceed allowed memory."), "oom_gpu"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "oom_gpu"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "oom_gpu"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "oom_host"),
        (OSError(12, "Cannot allocate memory"), "oom_host"),
        (MemoryError(), "oom_host"),
        (RuntimeError("cudaHostAlloc returned 2"), "pinned_limit"),
        (RuntimeError("CUDA error: device-side assert triggered"), "crash"),
        (NotAvailable("no torchao"), "not_available"),
        (InfeasiblePlan("too big"), "skipped_infeasible"),
        (NonFiniteLoss("nan"), "nan_loss"),
        (UserError("a", "b", "c"), "crash"),
        (KeyboardInterrupt(), "interrupted"),
        (ValueError(), "crash"),
    ],
)
def test_exceptions_become_end_states(error: BaseException, state: str) -> None:
    found, reason = classify(error)
    assert found == state
    assert reason
    assert "\n" not in reason


def test_what_an_engine_refuses_in_its_set_up_is_not_a_crash() -> None:
    refusal = UserError("model 'x'", "ties its blocks", "use another method")
    wrapped = RuntimeError("the loading thread failed")
    wrapped.__cause__ = refusal
    for error in (refusal, wrapped):
        assert classify(error, is_set_up=False) == ("not_available", str(refusal))
    assert classify(RuntimeError("no"), is_set_up=False) == ("crash", "RuntimeError: no")


def test_an_error_of_a_thread_is_judged_by_its_cause() -> None:
    error = RuntimeError("the update thread failed")
    error.__cause__ = MemoryError("no room")
    assert classify(error) == ("oom_host", "host memory could not be allocated (no room)")


def test_a_refused_pin_is_known_by_the_line_that_asked() -> None:
    def refuse() -> None:
        raise RuntimeError("CUDA error: out of memory")

    tensor = SimpleNamespace(pin_memory=refuse)
    with pytest.raises(RuntimeError) as caught:
        tensor.pin_memory()
    # torch raises from C, so the asking line is the innermost; drop the frame that stands for it.
    assert caught.value.__traceback__ is not None
    caught.value.__traceback__.tb_next = None
    assert classify(caught.value)[0] == "pinned_limit"


def test_the_count_of_kernel_kills_is_a_count_or_unknown() -> None:
    kills = read_oom_kills()
    assert kills is None or kills >= 0


@pytest.mark.gpu
def test_a_cap_on_gpu_memory_is_an_end_state_and_peaks_are_measured(tmp_path: Path) -> None:
    job = Job(
        model=ModelSource(name="opt-125m", random_weights=True),
        data=DataSource(train="random"),
        batch_size=1,
        seq_len=128,
        steps=2,
        warmup_steps=1,
    )
    shape = resolve_shape(job)
    plan = replace(scripted_plan(), engine="native")
    capped = replace(job, limits=Limits(vram_bytes=100 * 2**20))
    ends = {}
    for name, one in (("free", job), ("capped", capped)):
        request = Request(id=name, job=one, shape=shape, plan=plan)
        ends[name] = launch_child(request, tmp_path, device=open_device(), on_event=lambda event: None)
    assert (ends["free"].end_state, ends["capped"].end_state) == ("ok", "oom_gpu")
    summary = ends["free"].summary
    weights_bytes = shape.parameters * 2
    assert summary.peak_gpu_allocated_bytes is not None
    assert summary.peak_gpu_reserved_bytes is not None
    assert summary.peak_gpu_nvml_bytes is not None
    assert weights_bytes < summary.peak_gpu_allocated_bytes <= summary.peak_gpu_reserved_bytes
    assert summary.peak_gpu_nvml_bytes > weights_bytes
