"""Turns of a loop, and one core after another."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from profiles.probe import launches
from profiles.probe.core_speed import LOOP_S, on_core, python_turn_s
from profiles.probe.timing import clock_s
from profiles.system.topology import fastest_cores


def test_a_loop_is_timed_in_little_time() -> None:
    start_s = clock_s()
    assert 1e-9 < python_turn_s() < 1e-5
    assert clock_s() - start_s < 100 * LOOP_S
    assert python_turn_s(0.0) > 0


def clocks(root: Path, highest: dict[int, int]) -> None:
    for core, clock in highest.items():
        folder = root / f"sys/devices/system/cpu/cpu{core}/cpufreq"
        folder.mkdir(parents=True)
        (folder / "cpuinfo_max_freq").write_text(f"{clock}\n")


def test_cores_that_are_slower_by_design_are_left_out(tmp_path: Path) -> None:
    assert fastest_cores({0, 1, 2}, tmp_path) == {0, 1, 2}, "the kernel does not tell"
    clocks(tmp_path, {0: 5_800_000, 1: 5_500_000, 2: 4_300_000})
    assert fastest_cores({0, 1, 2}, tmp_path) == {0, 1}
    assert fastest_cores({2}, tmp_path) == {2}


def test_visits_go_from_core_to_core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: asked.append(set(cores)))
    for visit in range(10):
        with on_core(visit, tmp_path):
            pass
    visited, back = asked[::2], asked[1::2]
    assert all(len(cores) == 1 for cores in visited)
    assert len(set().union(*visited)) >= 9
    assert back == [set(range(16))] * 10


def test_a_core_that_is_gone_stops_no_visit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def gone(pid: int, cores: set[int]) -> None:
        if len(cores) == 1:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(os, "sched_setaffinity", gone)
    with on_core(0, tmp_path):
        pass
    monkeypatch.delattr(os, "sched_setaffinity")
    with on_core(0, tmp_path):
        pass


def test_each_window_is_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where there is no Triton, which says so."""
    monkeypatch.setattr(launches, "DEVICE", "cpu")
    monkeypatch.setattr(launches, "BLOCKS", 1)
    here = os.sched_getaffinity(0)
    windows = launches.Windows()
    assert windows.begin(0.0).count == 1
    windows.take()
    windows.take()
    found = windows.launches()
    assert [each.count for each in (found.python_turn_s, found.forward_s, found.training_s)] == [3, 3, 3]
    assert "of each window" in found.forward_s.method
    assert found.triton_s.value is None
    assert "no such thing on device 'cpu'" in found.triton_s.method
    assert os.sched_getaffinity(0) == here


def test_what_fails_in_a_window_is_absent_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(device: str) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(launches, "_TIMED", {"forward_s": no_memory})
    windows = launches.Windows()
    windows.begin(0.0)
    found = windows.launches()
    assert found.forward_s.value is None
    assert "CUDA out of memory" in found.forward_s.method
    assert found.python_turn_s.count == 1
