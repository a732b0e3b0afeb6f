"""`run` on several processes: real ones, of which one leads and is this one."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from train_runs import assert_same_weights, log_of, run, tiny_job

from engines.errors import UserError
from harness.progress import Progress
from harness.records.job import Job, Limits


def job_of(gpus: int, **fields: Any) -> Job:
    return replace(tiny_job(accumulation=4, batch_size=1, **fields), limits=Limits(gpus=gpus))


@pytest.fixture(autouse=True)
def _nothing_left_behind(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    yield
    assert psutil.Process().children(recursive=True) == []


class Stop(BaseException):
    """As abrupt as a kill."""


def stopped_after(monkeypatch: pytest.MonkeyPatch, step: int, act: Any) -> None:
    """Once so many steps are done, `act` is called before the next."""
    original = Progress.update

    def update(self: Progress, what: str, done: int, total: int, **more: Any) -> None:
        original(self, what, done, total, **more)
        if what == "training" and done == step:
            act()

    monkeypatch.setattr(Progress, "update", update)


def test_a_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four, then one, then two, each ended without notice; the weights are those of one that never was."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, "zo2", job_of(1))

    def stop() -> None:
        raise Stop

    for gpus, until in ((4, 2), (1, 4)):
        with monkeypatch.context() as patched:
            stopped_after(patched, until, stop)
            with pytest.raises(Stop):
                run(parts, "zo2", job_of(gpus), resume=gpus == 1)
    run(parts, "zo2", job_of(2), resume=True)
    assert log_of(whole) == log_of(parts)
    assert (whole / "updates.log").read_bytes() == (parts / "updates.log").read_bytes()
    assert_same_weights(whole / "model", parts / "model")


def test_a_process_that_is_killed_is_told_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from a full checkpoint."""
    out = tmp_path / "out"

    def kill() -> None:
        for child in psutil.Process().children():
            if child.environ().get("RANK") == "1":
                child.send_signal(signal.SIGKILL)

    with monkeypatch.context() as patched:
        stopped_after(patched, 3, kill)
        with pytest.raises(UserError, match=r"rank 1: was killed by signal 9 .*--resume"):
            run(out, "mezo", job_of(2), save_every=2)
    run(out, "mezo", job_of(2), save_every=2, resume=True)
    run(tmp_path / "whole", "mezo", job_of(1))
    assert_same_weights(tmp_path / "whole" / "model", out / "model")


@pytest.mark.parametrize(
    ("engine", "why"), [("native", "native runs on one GPU"), ("exact-offload", "measured on several GPUs")]
)
def test_methods_for_one_gpu_say_so(engine: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=why):
        run(tmp_path / "out", engine, job_of(2))
    assert not (tmp_path / "out").exists()
