"""A machine held to what a smaller one has, in real child processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from scripted_runs import SHAPE, scripted_job, scripted_plan
from tiny_machine import figure, make_machine

from engines.base import LinkRates
from engines.errors import UserError
from harness.cli import app
from harness.records.memory_limits import EMULATED_CONTEXT_BYTES
from harness.records.run import Emulation, load_run
from harness.runs.emulate import Emulated, emulated, what_is_short
from harness.runs.sweep import SweepOptions, grid, run_sweep
from profiles.machine import Machine, absent, save_machine
from reports.load import load_folder, refuse_unlike

RATES = LinkRates(h2d_bytes_per_s=2e9, d2h_bytes_per_s=1e9)
LIKE = Emulated(machine="Small, Small CPU", vram_bytes=10**9, threads=1, rates=RATES)
GIB = 2**30


def small_machine() -> Machine:
    """Slower than memory anywhere copies, so that rates can be held to."""
    machine = make_machine()
    assert machine.link is not None
    link = replace(
        machine.link,
        h2d_pinned_bytes_per_s=figure(2e8), d2h_pinned_bytes_per_s=figure(1e8),
        h2d_duplex_bytes_per_s=figure(1.5e8), d2h_duplex_bytes_per_s=figure(1e8),
    )  # fmt: skip
    return replace(machine, name="Small GPU, Small CPU", link=link, cpu=replace(machine.cpu, cores_usable=1))


def test_caps_are_those_of_the_profile() -> None:
    caps = emulated(make_machine())
    assert caps.vram_bytes == 22 * GIB - EMULATED_CONTEXT_BYTES  # what is free, less what CUDA takes
    assert caps.threads == 8
    assert caps.rates == LinkRates(
        h2d_bytes_per_s=13e9, d2h_bytes_per_s=12e9, h2d_duplex_bytes_per_s=10e9, d2h_duplex_bytes_per_s=9e9
    )


def test_a_machine_without_gpu_or_rates_cannot_be_emulated() -> None:
    with pytest.raises(UserError, match="no GPU"):
        emulated(make_machine(gpu=False))
    machine = make_machine()
    assert machine.link is not None
    with pytest.raises(UserError, match="rate to the GPU \\(no driver\\)"):
        emulated(replace(machine, link=replace(machine.link, h2d_pinned_bytes_per_s=absent("no driver"))))
    assert machine.gpu is not None
    with pytest.raises(UserError, match="beside CUDA's context"):
        emulated(replace(machine, gpu=replace(machine.gpu, free_bytes=10**8)))


def test_emulated_runs_have_ids_of_their_own_and_the_others_keep_theirs() -> None:
    job, plans = scripted_job(), [scripted_plan()]
    ids = {grid(job, plans, 1, like)[0].id for like in (None, LIKE, replace(LIKE, threads=2))}
    assert len(ids) == 3
    assert grid(job, plans, 1)[0].id == grid(job, plans, 1, None)[0].id


def test_the_child_runs_on_so_many_cpus_and_says_so(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    (run,) = run_sweep(scripted_job(), SHAPE, [scripted_plan()], tmp_path, SweepOptions(emulated=LIKE))
    assert run.environment.emulated == "Small, Small CPU"
    assert run.emulation == Emulation(vram_bytes=10**9, threads=1, rates=RATES, link="unused", threads_held=1)
    assert load_run(tmp_path / "runs" / f"{run.id}.json") == run
    assert os.sched_getaffinity(0) == before  # this process keeps its own


def test_limited_threads_are_limited_for_every_thread_of_the_process() -> None:
    """Affinity, not only torch's count: an engine's own threads are held too."""
    code = (
        "import os, threading; from harness.runs.emulate import limit_cpus; limit_cpus(1); seen = [];"
        "t = threading.Thread(target=lambda: seen.append(len(os.sched_getaffinity(0)))); t.start(); t.join();"
        "print(seen, len(os.sched_getaffinity(0)))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[1]", "1"]


def test_a_folder_holds_one_machine(tmp_path: Path) -> None:
    job, plans = scripted_job(), [scripted_plan()]
    run_sweep(job, SHAPE, plans, tmp_path, SweepOptions(emulated=LIKE))
    for other in (None, replace(LIKE, rates=LinkRates(h2d_bytes_per_s=3e9, d2h_bytes_per_s=1e9))):
        with pytest.raises(UserError, match="its runs are of another machine"):
            run_sweep(job, SHAPE, plans, tmp_path, SweepOptions(resume=True, emulated=other))
    runs = run_sweep(job, SHAPE, plans, tmp_path, SweepOptions(rounds=2, resume=True, emulated=LIKE))
    assert len(runs) == 2
    assert len(load_folder(tmp_path).runs) == 2


def test_emulated_and_real_runs_are_not_compared(tmp_path: Path) -> None:
    real = run_sweep(scripted_job(), SHAPE, [scripted_plan()], tmp_path / "a")
    like = run_sweep(scripted_job(), SHAPE, [scripted_plan()], tmp_path / "b", SweepOptions(emulated=LIKE))
    with pytest.raises(UserError, match="emulated machine"):
        refuse_unlike([*real, *like])
    faster = replace(LIKE, rates=replace(RATES, h2d_bytes_per_s=3e9))
    other = run_sweep(scripted_job(), SHAPE, [scripted_plan()], tmp_path / "c", SweepOptions(emulated=faster))
    with pytest.raises(UserError, match="emulated link"):
        refuse_unlike([*like, *other])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"link": "not emulated", "rates_held": None}, ["link not emulated: a library"]),
        ({"threads_held": 3}, ["3 CPU threads instead of 4"]),
        ({"vram_bytes_held": GIB}, ["1.00 GiB of GPU memory instead of 4.00 GiB"]),
        (
            {"rates_held": LinkRates(h2d_bytes_per_s=1.8e9, d2h_bytes_per_s=1.04e9)},
            ["link to the GPU 1.80 GB/s instead of 2.00 GB/s"],
        ),
    ],
)
def test_what_was_not_held_is_said(changes: dict[str, object], told: list[str]) -> None:
    whole = Emulation(
        vram_bytes=4 * GIB, threads=4, rates=RATES, link="emulated", threads_held=4, vram_bytes_held=4 * GIB,
        rates_held=RATES,
    )  # fmt: skip
    lines = what_is_short(replace(whole, **changes))  # type: ignore[arg-type]
    assert len(lines) == len(told)
    assert all(line.startswith(start) for line, start in zip(lines, told, strict=True))


@pytest.mark.usefixtures("forked_programs")
def test_compare_emulates_and_records_asked_and_measured_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profile, out = tmp_path / "small.json", tmp_path / "out"
    save_machine(small_machine(), profile)
    flags = (
        f"compare --model tiny-llama --random-weights --data random --seq-len 16 --steps 2 --warmup-steps 1 "
        f"--dtype fp32 --engines zo2,torchao-offload --rounds 1 --quiet --emulate {profile} --out {out}"
    )
    monkeypatch.setattr(sys, "argv", ["lspzo-bench", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert "Measured, emulating Small GPU, Small CPU" in shown
    assert "link not emulated" in shown
    runs = {run.engine: run for run in load_folder(out).runs}
    zo2 = runs["zo2"]
    assert zo2.end_state == "ok"
    assert zo2.emulation is not None
    assert zo2.emulation.link == "emulated"
    held = zo2.emulation.rates_held
    assert held is not None
    assert 0 < held.h2d_bytes_per_s <= 2e8 * 1.01  # a loaded machine may be slower, never faster
    assert 0 < held.d2h_bytes_per_s <= 1e8 * 1.01
    assert zo2.emulation.threads_held == 1
    assert zo2.summary.step_s_median is not None
    assert zo2.summary.h2d_bytes is not None
    assert zo2.summary.step_s_median >= zo2.summary.h2d_bytes / 2e8
    assert f"--emulate {profile.name}" in zo2.plan.verify_command
    assert runs["torchao-offload"].emulation is not None
    assert runs["torchao-offload"].emulation.link == "not emulated"
    assert json.loads((out / "machine.json").read_text())["name"] == "Small GPU, Small CPU"


def test_emulate_and_profile_say_the_same_thing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "compare --model tiny-llama --random-weights --emulate t4 --profile l4"
    monkeypatch.setattr(sys, "argv", ["lspzo-bench", *flags.split(), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert stop.value.code == 2
    assert "--emulate names the machine already" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_the_caps_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    flags = (
        "compare --model opt-125m --random-weights --data random --seq-len 256 --steps 5 --warmup-steps 2 "
        f"--dtype bf16 --engines zo2,lsp,native --rounds 1 --quiet --emulate rtx-a1000-laptop --out {out}"
    )
    monkeypatch.setattr(sys, "argv", ["lspzo-bench", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert not stop.value.code
    runs = {run.engine: run for run in load_folder(out).runs}
    for run in runs.values():
        assert run.emulation is not None
        assert run.emulation.vram_bytes_held == run.emulation.vram_bytes
        assert run.summary.peak_gpu_reserved_bytes is not None
        assert run.summary.peak_gpu_reserved_bytes <= run.emulation.vram_bytes
    for engine in ("zo2", "lsp"):
        emulation = runs[engine].emulation
        assert emulation is not None
        assert emulation.rates_held is not None
        for name in LinkRates.__slots__:
            asked, held = getattr(emulation.rates, name), getattr(emulation.rates_held, name)
            assert held == pytest.approx(asked, rel=0.05), name
