"""Memory of a run's processes as it is seen from outside."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from harness.runs import processes
from harness.runs.memory_sampler import MemorySampler
from harness.runs.processes import COMPILE_WORKERS, WAITS_OF_THREADS, child_environment
from profiles.system.gpu_allocator import (
    SETTING,
    TOLD,
    allocator_environment,
    allocator_setting,
    is_expandable,
)

HELD = 200_000_000

FORKS = f"""
import os, sys
held = bytearray(os.urandom(1)) * {HELD}
for _ in range(4):
    if os.fork() == 0:
        sys.stdin.read()
        os._exit(0)
print("ready", flush=True)
sys.stdin.read()
"""


def test_pages_that_helpers_share_count_once() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        sampler = MemorySampler([process.pid], [])
        taken = sampler.take()
        again = sampler.take()
        process.stdin.close()
    assert len(sampler.family) == 4
    # All of the process's own, and of each helper a fifth: not five times as much.
    assert HELD < taken < 2.2 * HELD
    assert again == taken == sampler.peak_host_bytes


def test_the_compiler_starts_no_more_helpers_than_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    assert 1 <= int(child_environment()["TORCHINDUCTOR_COMPILE_THREADS"]) <= COMPILE_WORKERS
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "3")
    assert child_environment()["TORCHINDUCTOR_COMPILE_THREADS"] == "3"


def test_on_a_cpu_alone_threads_that_wait_spin_for_a_short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user says how they wait; beside a GPU the library's own way stays."""
    for name in WAITS_OF_THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "open_device", lambda: None)
    assert child_environment()["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert "GOMP_SPINCOUNT" not in child_environment()
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(processes, "open_device", lambda: object())
    assert "GOMP_SPINCOUNT" not in child_environment()


@pytest.mark.parametrize("name", TOLD)
def test_runs_have_expandable_segments_unless_the_user_says_otherwise(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in TOLD:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "release", lambda: "6.18.0-generic")
    assert is_expandable(child_environment()[SETTING])
    monkeypatch.setenv(name, "max_split_size_mb:128")
    assert child_environment()[name] == allocator_setting() == "max_split_size_mb:128"
    assert allocator_environment() == {}
    assert not is_expandable(allocator_setting())


@pytest.mark.parametrize(
    ("system", "release"),
    [("Linux", "6.6.87.2-microsoft-standard-WSL2"), ("Windows", "11"), ("Linux", "5.15.148-tegra")],
)
def test_platforms_without_expandable_segments_are_told_nothing(
    system: str, release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in TOLD:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "release", lambda: release)
    assert SETTING not in child_environment()
    assert allocator_setting() is None


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, False),
        ("expandable_segments:False", False),
        ("expandable_segments:True", True),
        ("max_split_size_mb:64, expandable_segments:True", True),
    ],
)
def test_a_setting_says_whether_segments_are_expandable(setting: str | None, expected: bool) -> None:
    assert is_expandable(setting) == expected
