"""A child that stays for several runs: each is as it would be in a process of its own, killed for real."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forked import children
from left_behind import children_left
from scripted_runs import SHAPE, scripted_job, scripted_plan
from settings_given import given_settings

from harness.records.job import make_job
from harness.resolve import resolve_shape
from harness.runs.events import SettingUp, Stepped
from harness.runs.launch import Outcome, launch_child
from harness.runs.processes import KeptChild
from harness.runs.worker import Request


@pytest.fixture
def kept() -> Iterator[KeptChild]:
    child = KeptChild()
    yield child
    child.close()
    assert children_left() == []


def start(
    kept: KeptChild, out: Path, name: str, on_event: Any = lambda event: None, **settings: Any
) -> Outcome:
    request = Request(id=name, job=scripted_job(), shape=SHAPE, plan=scripted_plan(**settings))
    return launch_child(request, out, device=None, on_event=on_event, kept=kept)


def workers() -> list[int]:
    return [each.pid for each in children(recursive=False) if "harness.runs.worker" in each.cmdline()]


def test_runs_share_a_process_and_nothing_else(tmp_path: Path, kept: KeptChild) -> None:
    first = start(kept, tmp_path, "a", loss="6,5,4,3,2,1", host_allocation_bytes=200 * 2**20)
    before = workers()
    events: list[SettingUp | Stepped] = []
    second = start(kept, tmp_path, "b", events.append, loss="3,2,1,1,1,0.5")
    assert workers() == before
    assert [each.end_state for each in (first, second)] == ["ok", "ok"]
    assert (first.summary.loss_last, second.summary.loss_last) == (1.0, 0.5)
    assert [each.sample for each in events if isinstance(each, Stepped)] == list(second.samples)
    assert first.summary.peak_host_bytes is not None
    assert second.summary.peak_host_bytes is not None
    assert second.summary.peak_host_bytes < first.summary.peak_host_bytes - 100 * 2**20
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("failure", "reason"), [("oom_gpu", "CUDA out of memory"), ("kill", "killed by signal 9")]
)
def test_after_a_run_that_failed_the_next_has_a_new_process(
    tmp_path: Path, kept: KeptChild, failure: str, reason: str
) -> None:
    start(kept, tmp_path, "a")
    before = workers()
    failed = start(kept, tmp_path, "b", fail_at_step=3, failure=failure, num_children=1)
    assert reason in str(failed.end_reason)
    assert len(failed.samples) == 3
    assert (tmp_path / "logs" / "b.log").exists() == (failure != "kill")
    assert workers() == []
    assert start(kept, tmp_path, "c").end_state == "ok"
    assert len(workers()) == 1
    assert workers() != before


def test_a_worker_that_died_between_two_runs_is_replaced(tmp_path: Path, kept: KeptChild) -> None:
    start(kept, tmp_path, "a")
    (worker,) = workers()
    os.kill(worker, signal.SIGKILL)
    os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)
    assert start(kept, tmp_path, "b").end_state == "ok"


def test_ctrl_c_is_an_outcome_and_ends_the_process(tmp_path: Path, kept: KeptChild) -> None:
    def press(event: SettingUp | Stepped) -> None:
        if isinstance(event, Stepped):
            os.kill(os.getpid(), signal.SIGINT)

    start(kept, tmp_path, "a")
    outcome = start(kept, tmp_path, "b", press, fail_at_step=1, failure="hang")
    assert (outcome.end_state, outcome.by_user) == ("interrupted", True)
    assert workers() == []


@pytest.mark.usefixtures("forked_programs")
def test_a_method_learns_the_same_behind_others_in_one_process(tmp_path: Path, kept: KeptChild) -> None:
    """Bit for bit: nothing of a run reaches the next one, whatever engine it is of."""
    given: dict[str, Any] = {
        "model": {"name": "tiny-llama", "random_weights": True}, "seq_len": 16, "batch_size": 2, "steps": 3,
        "warmup_steps": 0, "dtype": "fp32", "data": {"train": "builtin"}, "eval_batches": 1,
    }  # fmt: skip
    job = make_job(given, "test job")
    shape = resolve_shape(job)

    def losses(engine: str, **settings: Any) -> list[float | None]:
        plan = replace(scripted_plan(), engine=engine, settings=given_settings(engine, settings))
        request = Request(id=engine, job=job, shape=shape, plan=plan)
        outcome = launch_child(request, tmp_path, device=None, on_event=lambda event: None, kept=kept)
        assert outcome.end_state == "ok"
        return [*(each.loss for each in outcome.samples), outcome.summary.eval_loss_last]

    in_a_process_of_its_own = losses("lsp", d=16, learning_rate=1e-2)
    native = losses("native")
    assert losses("lsp", d=16, learning_rate=1e-2) == in_a_process_of_its_own
    assert losses("native") == native
