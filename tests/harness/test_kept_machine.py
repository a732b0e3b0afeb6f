"""The last profile of this machine is taken for plans while the machine is as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tiny_machine import make_machine

from harness.kept_machine import KEPT_FOR, keep_machine, kept_machine, kept_path
from harness.records.environment import read_environment
from profiles.machine import Machine
from profiles.system import cgroup


class Card:
    """What NVML says of a GPU."""

    def __init__(self, machine: Machine, used_bytes: int = 1000) -> None:
        assert machine.gpu is not None
        self.name, self.driver = machine.gpu.name, machine.gpu.driver
        self.total_bytes = machine.gpu.total_bytes
        self._used_bytes = used_bytes

    def used_bytes(self) -> int:
        return self._used_bytes


def this_machine(*, gpu: bool = False, **changes: Any) -> Machine:
    made = make_machine(gpu=gpu)
    known = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": cgroup.platform_name(),
        "cpu": replace(made.cpu, name=cgroup.cpu_name(), cores_usable=cgroup.usable_cores().count),
        "memory": replace(made.memory, total_bytes=cgroup.host_memory().total_bytes, available_bytes=12_345),
        "versions": {"torch": read_environment().torch},
        "depth": "brief",
        **changes,
    }
    return replace(made, **known)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    show(monkeypatch, None)


def show(monkeypatch: pytest.MonkeyPatch, card: Card | None) -> None:
    monkeypatch.setattr("harness.kept_machine.open_device", lambda: card)
    monkeypatch.setattr("harness.kept_machine.visible_gpus", lambda: [] if card is None else ["0", "1"])


def test_what_was_measured_is_taken_with_what_is_free_now() -> None:
    assert kept_machine() is None
    keep_machine(this_machine())
    found = kept_machine()
    assert found is not None
    assert found.cpu == this_machine().cpu
    assert found.memory.available_bytes > 12_345


def test_of_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = this_machine(gpu=True)
    assert machine.gpu is not None
    keep_machine(machine)
    assert kept_machine() is None, "NVML sees no GPU"
    show(monkeypatch, Card(machine, used_bytes=machine.gpu.total_bytes // 4))
    found = kept_machine()
    assert found is not None
    assert found.gpu is not None
    assert found.gpu.free_bytes == machine.gpu.total_bytes - machine.gpu.total_bytes // 4
    other = Card(machine)
    other.driver = "999.1"
    show(monkeypatch, other)
    assert kept_machine() is None, "another driver"


OTHERWISE: dict[str, Callable[[Machine], Machine]] = {
    "kernel": lambda each: replace(each, platform="Linux 1.0 riscv64"),
    "processor": lambda each: replace(each, cpu=replace(each.cpu, name="another")),
    "cores": lambda each: replace(each, cpu=replace(each.cpu, cores_usable=1 + each.cpu.cores_usable)),
    "memory": lambda each: replace(
        each, memory=replace(each.memory, total_bytes=1 + each.memory.total_bytes)
    ),
    "torch": lambda each: replace(each, versions={"torch": "0.1"}),
    "long ago": lambda each: replace(each, time=(datetime.now(UTC) - 2 * KEPT_FOR).isoformat()),
    "years ahead": lambda each: replace(each, time=(datetime.now(UTC) + 2 * KEPT_FOR).isoformat()),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_another_machine_is_not_taken(what: str) -> None:
    keep_machine(OTHERWISE[what](this_machine()))
    assert kept_machine() is None


def test_a_brief_profile_does_not_replace_a_deeper_one_of_this_machine() -> None:
    keep_machine(this_machine(depth="full"))
    keep_machine(this_machine(depth="brief", name="brief"))
    found = kept_machine()
    assert found is not None
    assert found.depth == "full"
    keep_machine(OTHERWISE["torch"](this_machine(depth="full")))
    keep_machine(this_machine(depth="full", name="newer"))
    keep_machine(this_machine(depth="default"))
    found = kept_machine()
    assert found is not None
    assert found.name == "newer"


def test_a_cache_that_cannot_be_read_or_written_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_machine(this_machine())
    kept_path().write_text("{", encoding="utf-8")
    assert kept_machine() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    keep_machine(this_machine())
    assert kept_machine() is None
