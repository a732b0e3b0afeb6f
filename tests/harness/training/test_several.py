"""`run` on several processes: real ones, of which one leads and is this one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import children, is_rank
from left_behind import children_left
from train_runs import ROOT, assert_same_weights, log_of, run, tiny_job, weights_of

from engines.errors import UserError
from harness.progress import Progress
from harness.records.job import Job, Limits


def job_of(gpus: int, **fields: Any) -> Job:
    return replace(tiny_job(accumulation=4, batch_size=1, **fields), limits=Limits(gpus=gpus))


@pytest.fixture(autouse=True)
def _nothing_left_behind(monkeypatch: pytest.MonkeyPatch, forked_programs: None) -> Any:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    yield
    assert children_left() == []


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


ON_DISK = {"disk_blocks": 1, "estimator": "lozo", "lozo_rank": 2, "lozo_window": 2}
"""Blocks on disk that are written anew every second step."""


@pytest.mark.parametrize("settings", [{}, ON_DISK])
def test_a_run_goes_on_with_another_number_of_processes(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four, then one, then two, each ended without notice; the weights are those of one that never was."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, "zo2", job_of(1), **settings)

    def stop() -> None:
        raise Stop

    for gpus, until in ((4, 2), (1, 4)):
        with monkeypatch.context() as patched:
            stopped_after(patched, until, stop)
            with pytest.raises(Stop):
                run(parts, "zo2", job_of(gpus), resume=gpus == 1, **settings)
    run(parts, "zo2", job_of(2), resume=True, **settings)
    assert log_of(whole) == log_of(parts)
    assert (whole / "updates.log").read_bytes() == (parts / "updates.log").read_bytes()
    assert_same_weights(whole / "model", parts / "model")


@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        pytest.param("mezo", {}, marks=pytest.mark.slow),
        ("zo2", ON_DISK),
        pytest.param("native", {}, marks=pytest.mark.slow),
        pytest.param("exact-offload", {}, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_killed_is_told_and_the_run_goes_on(
    engine: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from a full checkpoint, and where ranks are about to write what they have on disk anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    out = tmp_path / "out"

    def kill() -> None:
        for child in children():
            if is_rank(child, 1):
                child.send_signal(signal.SIGKILL)

    with monkeypatch.context() as patched:
        stopped_after(patched, 4 if engine == "zo2" else 3, kill)
        with pytest.raises(UserError, match=r"rank 1: was killed by signal 9 .*--resume"):
            run(out, engine, job_of(2), save_every=2, **settings)
    run(out, engine, job_of(2), save_every=2, resume=True, **settings)
    run(tmp_path / "whole", engine, job_of(1 if engine in ("mezo", "zo2") else 2), **settings)
    spill = tmp_path / "lspzo-bench" / "spill"
    assert not spill.exists() or list(spill.iterdir()) == []
    assert_same_weights(tmp_path / "whole" / "model", out / "model")


@pytest.mark.slow
def test_torchrun_starts_a_command_on_each_machine(tmp_path: Path) -> None:
    """Itself, twice on this one, as for two machines, each with two processes: the run is that of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = [
        "--model=tiny-llama", "--random-weights", "--engine=zo2", "--batch-size=1", "--seq-len=32",
        "--dtype=fp32", "--accumulation=4", "--steps=4", "--set=learning_rate=1e-5", "--quiet",
    ]  # fmt: skip
    where = ["--master-addr=127.0.0.1", f"--master-port={port}", "--nnodes=2", "--nproc-per-node=1"]
    torchrun, harness = [sys.executable, "-P", "-m", "torch.distributed.run"], ["-m", "harness", "run"]
    processes = [
        subprocess.Popen(
            [*torchrun, *where, f"--node-rank={node}", *harness, *job, "--nodes=2", "--gpus=2",
             f"--out={tmp_path / str(node)}"],
            cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    ends = [(process.communicate(timeout=300)[1], process.returncode) for process in processes]
    assert [code for _, code in ends] == [0, 0], ends
    assert not (tmp_path / "1").exists()
    alone = [sys.executable, "-P", *harness, *job, f"--out={tmp_path / 'alone'}"]
    assert subprocess.run(alone, cwd=ROOT, capture_output=True).returncode == 0
    assert log_of(tmp_path / "0") == log_of(tmp_path / "alone")
    assert_same_weights(tmp_path / "0" / "model", tmp_path / "alone" / "model")


@pytest.mark.slow
def test_a_rank_that_hangs_without_another_says_so_and_ends(tmp_path: Path) -> None:
    """As in what cannot be interrupted: here the process that leads sleeps when the other is killed."""
    script = f"""
import sys, time
sys.path[:0] = {[str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]!r}
from pathlib import Path
from dataclasses import replace
from forked import children, is_rank
from train_runs import run, tiny_job
from harness.records.job import Limits
from harness.progress import Progress
from harness.training import leader
leader.LOOK_S = leader.HANGING_S = 0.2
def hang(self, what, done, total, **more):
    if what == "training" and done == 2:
        [child.kill() for child in children() if is_rank(child, 1)]
        time.sleep(60)
Progress.update = hang
job = replace(tiny_job(accumulation=2, batch_size=1), limits=Limits(gpus=2))
run(Path({str(tmp_path / "out")!r}), "mezo", job)
"""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "error: rank 1: was killed by signal 9 (SIGKILL); go on with"
    )


@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        pytest.param("exact-offload", {}, marks=pytest.mark.slow),
        pytest.param("lsp", {"check_every": 3}, marks=pytest.mark.slow),
        ("native", {"max_grad_norm": 0.5}),
        pytest.param("lora", {"learning_rate": 1e-3}, marks=pytest.mark.slow),
    ],
)
def test_first_order_methods_go_on_with_another_number_of_processes(
    engine: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two, then one, then two, from full checkpoints; a micro-batch each, in fp32, so that the sums of one
    process are theirs; but for native, whose gradients FSDP2 sums."""
    pytest.importorskip("peft")
    job = tiny_job(accumulation=2, batch_size=1, eval_batches=1, eval_every=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, engine, job, **settings)

    def stop() -> None:
        raise Stop

    for gpus, until in ((2, 3), (1, 4)):
        with monkeypatch.context() as patched:
            stopped_after(patched, until, stop)
            on = replace(job, limits=Limits(gpus=gpus))
            with pytest.raises(Stop):
                run(parts, engine, on, save_every=2, resume=gpus == 1, **settings)
    run(parts, engine, replace(job, limits=Limits(gpus=2)), save_every=2, resume=True, **settings)
    assert_nearly_the_same_log(log_of(whole), log_of(parts))
    if engine != "native":
        assert_same_weights(whole / "model", parts / "model")
        return
    ours, theirs = weights_of(whole / "model"), weights_of(parts / "model")
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-3, atol=1e-4)


def assert_nearly_the_same_log(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    """Losses of ranks are summed as they are handed round."""
    assert [each["step"] for each in one] == [each["step"] for each in other]
    for ours, theirs in zip(one, other, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_methods_for_one_gpu_say_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="galore runs on one GPU"):
        run(tmp_path / "out", "galore", job_of(2))
    assert not (tmp_path / "out").exists()
