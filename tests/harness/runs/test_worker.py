"""What the child tells its engine of the machine, and what it makes of an engine's trace."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from scripted_runs import SHAPE, scripted_job, scripted_plan

from engines.base import Context
from engines.errors import NonFiniteLoss, UserError
from engines.methods.scripted import Scripted
from harness.runs import limits, worker
from harness.runs.worker import TRACE, Request, Result
from profiles.system.cgroup import HostMemoryLimit


def test_host_memory_is_what_is_available_held_to_the_jobs_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostMemoryLimit(total_bytes=100, available_bytes=60, swap_bytes=0, basis="all")
    monkeypatch.setattr(limits, "host_memory", lambda: memory)
    assert [limits.usable_host_bytes(limit) for limit in (None, 70, 50)] == [60, 60, 50]


class Silent(Scripted):
    """Keeps no trace, as engines without streams."""

    trace_events: Any = None


class Broken(Scripted):
    """Cannot tell its trace, as after an error of the GPU."""

    def trace_events(self) -> list[dict[str, Any]]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Numberless(Scripted):
    def trace_events(self) -> list[dict[str, Any]]:
        return [{"ts": float("nan")}]


def execute(
    engine: type[Scripted], folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[Result, bool]:
    """Result of a traced run on `engine`, and whether the child told that it was traced."""
    monkeypatch.setattr(worker, "load_engine", lambda name: engine)
    events = io.StringIO()
    plan = scripted_plan(**settings)
    request = Request(id="r", job=scripted_job(), shape=SHAPE, plan=plan, trace=True)
    result = worker.execute(request, events, folder)
    return result, {"traced": True} in [json.loads(line) for line in events.getvalue().splitlines()]


def test_an_engine_without_a_trace_writes_none_and_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result, traced = execute(Silent, tmp_path, monkeypatch)
    assert (result.end_state, traced) == ("ok", False)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("engine", [Broken, Numberless])
def test_a_trace_that_fails_does_not_fail_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine: type[Scripted],
) -> None:
    result, traced = execute(engine, tmp_path, monkeypatch)
    assert (result.end_state, result.end_reason, traced) == ("ok", None, True)
    assert not (tmp_path / TRACE).exists()
    assert "Traceback" in capsys.readouterr().err


def test_a_trace_that_fails_does_not_hide_what_ended_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = execute(Broken, tmp_path, monkeypatch, fail_at_step=1, failure="oom_gpu")
    assert result.end_state == "oom_gpu"


class Overflowing(Scripted):
    """Finds out after the last step that its gradient was not finite."""

    def realized_update_fraction(self) -> float | None:
        raise NonFiniteLoss("the core of step 5 is not finite")


def test_a_gradient_of_the_last_step_that_is_not_finite_ends_the_run_as_nan_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = execute(Overflowing, tmp_path, monkeypatch)
    assert result.end_state == "nan_loss"
    assert str(result.end_reason).startswith("the core of step 5 is not finite")
    assert len(result.samples) == 6


def test_a_trace_that_cannot_be_written_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / TRACE).mkdir()
    result, traced = execute(Scripted, tmp_path, monkeypatch)
    assert (result.end_state, traced) == ("ok", True)


def test_engines_are_told_to_trace_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []

    class Listening(Scripted):
        def __init__(self, settings: Any, context: Context) -> None:
            super().__init__(settings, context)
            told.append(context.trace)

    monkeypatch.setattr(worker, "load_engine", lambda name: Listening)
    for trace in (True, False):
        request = Request(id="r", job=scripted_job(), shape=SHAPE, plan=scripted_plan(), trace=trace)
        worker.execute(request, io.StringIO(), tmp_path)
    assert told == [True, False]


class Refusing(Scripted):
    """Refuses the model when it sees it, as methods do that take decoders only."""

    def setup(self, blueprint: Any) -> None:
        raise UserError("model 'bert'", "is an encoder, which this method does not take", "use native")


class RefusingLate(Scripted):
    def step(self, batches: Any) -> Any:
        raise UserError("the spill file", "cannot be read", "free space")


@pytest.mark.parametrize(("engine", "state"), [(Refusing, "not_available"), (RefusingLate, "crash")])
def test_a_refusal_in_the_set_up_is_not_available_with_its_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine: type[Scripted],
    state: str,
) -> None:
    result, _ = execute(engine, tmp_path, monkeypatch)
    assert (result.end_state, result.samples) == (state, ())
    assert result.end_reason is not None
    assert result.end_reason.startswith(("model 'bert': is an encoder", "the spill file: cannot be read"))
