"""What goes wrong on a GPU: no memory in the middle of a step, a child killed while its ring is full, streams
that are late for a thousand steps. Two minutes on an H200.
"""

from __future__ import annotations

import gc
import hashlib
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from left_behind import children_left
from settings_given import given_settings
from train_runs import finish, log_of, start_program
from zeroth_order_runs import KNOBS, assert_same_weights, make_mezo

from engines import load_engine
from engines.base import Batch, Context
from engines.methods.lsp import Lsp
from engines.methods.zo2 import Zo2
from engines.settings.lsp import LspSettings
from engines.settings.zeroth_order import Zo2Settings
from engines.shapes import Workload
from engines.transfer.link import Link
from harness.records.job import DataSource, Job, Limits, ModelSource
from harness.records.run import load_run
from harness.resolve import resolve_shape
from harness.runs.end_states import classify
from harness.runs.sweep import SweepOptions, run_sweep
from profiles.planning.plan import Plan, Prediction
from tiny_models import TinyBlueprint, tiny_batches, tiny_blueprint

pytestmark = pytest.mark.gpu

ROWS = 16384
"""Sequences of a batch whose activations are far larger than its model."""
STEPS = 1000
EAGER: dict[str, dict[str, Any]] = {
    "native": {"compile": False, "graphs": False},
    "lsp": {"compile": False, "d": 6, "r": 2},
    "exact-offload": {"compile": False},
    "mezo": {},
    "zo2": {"resident_blocks": 1},
}


def made(name: str, blueprint: TinyBlueprint) -> Any:
    workload = Workload(batch_size=ROWS, seq_len=16, dtype="bf16", checkpointing=True)
    context = Context(device="cuda:0", workload=workload, seed=7, total_steps=8)
    settings = given_settings(name, {"learning_rate": 1e-3, **EAGER[name]})
    engine: Any = load_engine(name)(settings.typed, context)
    engine.setup(blueprint)
    return engine


def losses(name: str, batches: list[Batch]) -> list[float]:
    engine = made(name, tiny_blueprint("opt", num_blocks=4))
    try:
        return [engine.step([batch]).loss for batch in batches]
    finally:
        engine.close()


def emptied() -> int:
    """Bytes of GPU memory in use, once what nobody holds is given back."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@pytest.fixture
def capped() -> Iterator[Any]:
    """Caps what torch may take of the GPU's memory."""
    total = torch.cuda.get_device_properties(0).total_memory

    def cap(num_bytes: int) -> None:
        torch.cuda.set_per_process_memory_fraction(num_bytes / total, 0)

    yield cap
    torch.cuda.set_per_process_memory_fraction(1.0, 0)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", EAGER)
def test_out_of_memory_in_the_middle_of_a_step_leaves_nothing(name: str, capped: Any) -> None:
    """It is told as what it is, nothing waits, and the next engine of the process has all that it had."""
    batches = tiny_batches(3, "opt", batch_size=ROWS)
    expected = losses(name, batches)
    before, threads = emptied(), threading.active_count()
    engine = made(name, tiny_blueprint("opt", num_blocks=4))
    emptied()
    capped(torch.cuda.memory_reserved() + 2 * 2**20)
    state = None
    try:
        engine.step(batches[:1])
    except Exception as error:
        state = classify(error)[0]
    capped(torch.cuda.get_device_properties(0).total_memory)
    engine.close()
    del engine
    assert state == "oom_gpu"
    assert emptied() <= before
    assert threading.active_count() == threads
    assert losses(name, batches) == pytest.approx(expected, rel=1e-3)  # kernels may sum in any order


def test_a_sweep_has_a_record_of_a_child_that_runs_out_in_a_step_and_goes_on(tmp_path: Path) -> None:
    job = Job(
        model=ModelSource(name="tiny-opt", random_weights=True), data=DataSource(train="random"),
        batch_size=512, seq_len=128, dtype="bf16", steps=2, warmup_steps=0,
        limits=Limits(timeout_s=60.0, vram_bytes=96 * 2**20),
    )  # fmt: skip
    prediction = Prediction(
        step_s_low=0.1, step_s=0.1, step_s_high=0.1, peak_gpu_bytes=1, peak_host_bytes=1, pinned_bytes=0,
        h2d_bytes=0, d2h_bytes=0, bottleneck="compute", basis="made up",
    )  # fmt: skip
    plans = [
        Plan(
            engine=name, settings=given_settings(name, {**EAGER.get(name, {}), **more}), fits=True,
            why_not=None, prediction=prediction, reasons=(), verify_command="",
        )
        for name, more in (("native", {}), ("lsp", {"d": 16, "r": 4}), ("scripted", {}))
    ]  # fmt: skip
    run_sweep(job, resolve_shape(job), plans, tmp_path / "out", SweepOptions(rounds=1))
    runs = {run.engine: run for run in map(load_run, (tmp_path / "out" / "runs").glob("*.json"))}
    assert {name: run.end_state for name, run in runs.items()} == {
        "native": "oom_gpu", "lsp": "oom_gpu", "scripted": "ok",
    }  # fmt: skip
    assert runs["native"].summary.setup_s is not None
    assert children_left() == []


def _lacking(free_gpu: int, free_host: int) -> str:
    """What there is where far less is free than before; empty where it is not."""
    gpu, host = torch.cuda.mem_get_info()[0], psutil.virtual_memory().available
    return "" if gpu >= free_gpu - 2**28 and host >= free_host - 2**30 else f"{gpu=} {host=}"


def test_a_child_that_is_killed_with_its_ring_full_gives_all_back_and_resumes(tmp_path: Path) -> None:
    """Nothing is resident, so that in every moment blocks are on their way in pinned memory."""
    command = (
        "run", "--engine", "zo2", "--model", "opt-125m", "--random-weights", "--data", "random", "--dtype",
        "fp16", "--batch-size", "1", "--seq-len", "512", "--steps", "40", "--set", "zo2.resident_blocks=0",
        "--set", "learning_rate=1e-6",
    )  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "killed"
    ended = finish(start_program(*command, "--out", str(whole)))
    assert ended[0] == 0, ended
    emptied()
    free_gpu, free_host = torch.cuda.mem_get_info()[0], psutil.virtual_memory().available
    process = start_program(*command, "--out", str(out))
    log, deadline = out / "log.jsonl", time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") >= 5):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    deadline = time.monotonic() + 20  # the driver takes its time to unpin
    while (
        torch.cuda.mem_get_info()[0] < free_gpu - 2**28
        or psutil.virtual_memory().available < free_host - 2**30
    ):
        assert time.monotonic() < deadline, (torch.cuda.mem_get_info(), psutil.virtual_memory())
        time.sleep(0.2)
    assert children_left() == []
    assert 5 <= len(log_of(out)) < 40
    ended = finish(start_program(*command, "--out", str(out), "--resume"))
    assert ended[0] == 0, ended
    for file in ("log.jsonl", "model/model.safetensors"):
        digests = [hashlib.sha256((folder / file).read_bytes()).hexdigest() for folder in (whole, out)]
        assert digests[0] == digests[1], file


@pytest.mark.timeout(300)
def test_zo2_with_late_streams_equals_mezo_for_a_thousand_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.offload.ring.UPLOAD_BYTES", 500)
    where = Context(
        device="cuda:0", workload=Workload(batch_size=2, seq_len=16, dtype="bf16"), seed=7, total_steps=STEPS
    )
    delays, batches = random.Random(2), tiny_batches(50, "opt")
    mezo = make_mezo(tiny_blueprint("opt", num_blocks=6), where)
    streamed = Zo2(Zo2Settings(**KNOBS, resident_blocks=1, fold_every=4), where)
    streamed.link_delay = lambda: delays.choice((0, 0, 50_000, 300_000))
    streamed.setup(tiny_blueprint("opt", num_blocks=6))
    try:
        for step in range(STEPS):
            batch = batches[step % len(batches)]
            expected, found = mezo.step([batch]), streamed.step([batch])
            assert (found.loss, found.updates) == (expected.loss, expected.updates), step
        assert_same_weights(mezo, streamed)
    finally:
        streamed.close()


@pytest.mark.timeout(300)
def test_lsp_with_late_streams_equals_its_twin_for_a_thousand_steps() -> None:
    """Pairs of projectors are looked for anew on the way."""
    workload = Workload(batch_size=2, seq_len=16, dtype="bf16", checkpointing=True)
    where = Context(device="cuda:0", workload=workload, seed=7, total_steps=STEPS)
    late, batches = random.Random(3), tiny_batches(50, "llama")

    def trained(*, offload: bool) -> tuple[list[float], dict[str, Any]]:
        settings = LspSettings(
            learning_rate=1e-3, schedule="cosine", warmup_steps=2, d=6, r=2, check_every=100, learn_steps=3,
            learn_timeout_s=1e9, compile=False, offload=offload,
        )  # fmt: skip
        engine = Lsp(settings, where)
        if offload:
            engine.link = Link(engine.device, delay=lambda: late.choice((0, 0, 100_000, 500_000)))
        try:
            engine.setup(tiny_blueprint("llama", num_blocks=4))
            found = [engine.step([batches[step % len(batches)]]).loss for step in range(STEPS)]
            return found, {name: tensor.clone() for name, tensor in engine.weights()}
        finally:
            engine.close()

    # The fused attention kernels may sum in any order in backward.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected, found = trained(offload=False), trained(offload=True)
    assert found[0] == expected[0]
    for name, tensor in expected[1].items():
        assert torch.equal(found[1][name], tensor), name
