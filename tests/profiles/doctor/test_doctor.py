from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_machine import figure, make_machine

from harness.cli import app
from harness.runs import launch
from profiles.doctor.checks_host import FULL_BYTES, NEARLY_FULL_BYTES
from profiles.doctor.diagnose import CHECKS, Diagnosis, diagnose, diagnosis_text
from profiles.machine import Disk, GpuReading, Machine, absent, save_machine
from profiles.system.unprobed import System, read_system

GIB = 2**30
READING = GpuReading(what="GPU matrix product bf16", sm_clock_hz=1.9e9, throttled=(), other_processes=0)
SYSTEM = System(
    nvidia_on_bus=True, driver_gpu="Fake GPU", folder=".", disk_total_bytes=10**12,
    disk_free_bytes=10**11,
)  # fmt: skip


def healthy() -> Machine:
    """Everything was measured and nothing is wrong."""
    machine = make_machine()
    assert machine.gpu is not None
    assert machine.link is not None
    return replace(
        machine,
        gpu=replace(
            machine.gpu, driver="580.65", mig_enabled=False, ecc_enabled=True, free_bytes=23 * GIB,
            readings=(READING,),
        ),
        link=replace(
            machine.link, width_loaded=16, generation_idle=1, generation_gpu_max=4, generation_slot_max=4,
            width_slot_max=16, replays=0, h2d_pinned_bytes_per_s=figure(26e9),
            d2h_pinned_bytes_per_s=figure(26e9), h2d_pageable_bytes_per_s=figure(22e9),
            d2h_pageable_bytes_per_s=figure(22e9),
        ),
        cpu=replace(
            machine.cpu, cores_basis="all 16 cores", governor="performance", others_cores=0.1,
            python_turn_s=figure(33e-9), forward_launch_s=figure(15e-6),
        ),
        memory=replace(machine.memory, pinned_bytes=figure(50 * GIB), pinned_refused=False),
        versions={"torch": "2.13.0", "cuda": "13.0"},
        disk=Disk(folder="/data", file_system="ext4", total_bytes=10**12, free_bytes=10**11),
    )  # fmt: skip


def change(part: str, **changes: Any) -> Callable[[Machine], Machine]:
    def changed(machine: Machine) -> Machine:
        room = getattr(machine, part)
        return replace(machine, **{part: replace(room, **changes)})

    return changed


def of(**changes: Any) -> Callable[[Machine], Machine]:
    return lambda machine: replace(machine, **changes)


WSL = of(platform="Linux 5.15.90.1-microsoft-standard-WSL2 x86_64 (WSL2)")
NO_CARD = of(
    gpu=None, link=None, gpu_absent_reason="The NVIDIA driver on your system is too old (found 11040)"
)

SICK: list[tuple[str, str, Callable[[Machine], Machine], str]] = [
    ("driver and torch", "problem", NO_CARD, "too old"),
    ("driver and torch", "warning", change("gpu", driver="570.86.15"), "driver 570.86.15, CUDA 13.0"),
    ("link state", "warning", change("link", width_loaded=8), "PCIe 4 x8 under load, PCIe 4 x16 possible"),
    ("link state", "warning", change("link", generation_loaded=1), "PCIe 1 x16 under load"),
    ("slot", "note", change("link", generation_gpu_max=5), "slot PCIe 4 x16, card PCIe 5 x16"),
    ("slot", "note", change("link", width_slot_max=4), "slot PCIe 4 x4"),
    ("link rate", "warning", change("link", d2h_pinned_bytes_per_s=figure(12e9)), "12.0 GB/s from the GPU"),
    ("link errors", "warning", change("link", replays=200), "200 replays"),
    ("pageable copies", "note", change("link", h2d_pageable_bytes_per_s=figure(9e9)), "9.00 GB/s pageable"),
    (
        "pinned limit", "problem", change("link", h2d_pinned_bytes_per_s=absent("CUDA error 2")),
        "CUDA error 2",
    ),
    (
        "pinned limit", "warning", change("memory", pinned_bytes=figure(GIB), pinned_refused=True),
        "1.00 GiB of 64.0 GiB",
    ),
    (
        "CPU threads", "warning",
        change("cpu", cores_usable=2, cores_basis="cgroup quota 2.0 of 16 cores"), "cgroup quota 2.0",
    ),
    (
        "CPU threads", "warning",
        change("cpu", cores_basis="cgroup quota 8.0 of 16 cores", throttled_periods=9), "9 periods",
    ),
    ("busy machine", "warning", change("cpu", others_cores=12.0), "12.0 of 16 cores busy"),
    (
        "core speeds", "warning", change("cpu", python_turn_s=replace(figure(50e-9), low=32e-9, high=62e-9)),
        "a Python loop took 32.0 to 62.0 ns (median 50.0 ns), starting an operation 13.5 to 16.5 us",
    ),
    ("CPU governor", "note", change("cpu", governor="powersave"), "powersave"),
    ("memory channels", "warning", change("memory", copy_bytes_per_s=figure(13e9)), "19.5 GB/s"),
    ("swap", "note", change("memory", swap_bytes=2 * GIB, swap_used_bytes=0), "2.00 GiB of swap, 0 B in use"),
    ("swap", "warning", change("memory", swap_bytes=2 * GIB, swap_used_bytes=GIB), "1.00 GiB in use"),
    ("WSL", "warning", WSL, "microsoft"),
    ("GPU memory spilling", "warning", WSL, "Fake GPU"),
    ("MIG", "warning", change("gpu", mig_enabled=True), "Fake GPU"),
    ("MIG", "warning", change("gpu", name="NVIDIA H200 MIG 1g.18gb", mig_enabled=None), "MIG 1g.18gb"),
    ("shared GPU", "warning", change("gpu", free_bytes=12 * GIB), "12.0 GiB of 24.0 GiB in use"),
    (
        "shared GPU", "warning", change("gpu", readings=(READING, replace(READING, other_processes=2))),
        "2 other processes",
    ),
    (
        "GPU clocks", "note", change("gpu", readings=(replace(READING, throttled=("hw_thermal_slowdown",)),)),
        "hw_thermal_slowdown",
    ),
    ("ECC", "note", change("gpu", ecc_enabled=False), "ECC is off"),
    ("disk", "problem", change("disk", free_bytes=FULL_BYTES - 1), "free at /data"),
    ("disk", "warning", change("disk", free_bytes=NEARLY_FULL_BYTES - 1), "free at /data"),
]  # fmt: skip


def found(diagnosis: Diagnosis) -> dict[str, str]:
    return {finding.name: finding.severity for finding in diagnosis.findings}


def test_a_healthy_machine_has_nothing() -> None:
    diagnosis = diagnose(healthy())
    assert diagnosis.findings == ()
    assert diagnosis.not_judged == {}
    assert diagnosis.in_order == tuple(CHECKS)


@pytest.mark.parametrize(("name", "severity", "hurt", "evidence"), SICK)
def test_each_finding_is_found_where_it_is_with_evidence(
    name: str, severity: str, hurt: Callable[[Machine], Machine], evidence: str
) -> None:
    diagnosis = diagnose(hurt(healthy()))
    (finding,) = [finding for finding in diagnosis.findings if finding.name == name]
    assert finding.severity == severity
    assert evidence in finding.evidence
    assert finding.cause
    assert finding.remedy
    # One illness does not pass for others: WSL2 alone has two, and comes with none of a card.
    expected = {"WSL", "GPU memory spilling"} if hurt is WSL else {name}
    assert set(found(diagnosis)) == expected


def test_every_check_has_a_machine_that_has_its_finding() -> None:
    assert {name for name, *_ in SICK} == set(CHECKS)


@pytest.mark.parametrize(
    ("name", "blind"),
    [
        ("link state", change("link", width_loaded=None)),
        ("slot", change("link", generation_slot_max=None)),
        ("link rate", change("link", generation_loaded=None)),
        ("link errors", change("link", replays=None)),
        (
            "pageable copies",
            change("link", h2d_pageable_bytes_per_s=absent("-"), d2h_pageable_bytes_per_s=absent("-")),
        ),
        ("pinned limit", change("memory", pinned_refused=None)),
        ("CPU governor", change("cpu", governor=None)),
        ("busy machine", change("cpu", others_cores=None)),
        ("core speeds", change("cpu", python_turn_s=absent("no probe looked"))),
        ("memory channels", change("memory", copy_bytes_per_s=absent("no memory"))),
        ("memory channels", change("cpu", cores_usable=2)),
        ("MIG", change("gpu", mig_enabled=None)),
        ("GPU clocks", change("gpu", readings=())),
        ("ECC", change("gpu", ecc_enabled=None)),
        ("disk", of(disk=None)),
        ("driver and torch", change("gpu", driver=None)),
    ],
)  # fmt: skip
def test_what_is_not_known_is_not_taken_to_be_in_order(
    name: str, blind: Callable[[Machine], Machine]
) -> None:
    diagnosis = diagnose(blind(healthy()))
    assert diagnosis.findings == ()
    assert name in diagnosis.not_judged
    assert name not in diagnosis.in_order


def test_a_machine_without_a_gpu_is_judged_for_the_rest() -> None:
    machine = replace(
        make_machine(gpu=False), gpu_absent_reason="torch 2.13.0+cpu is built without GPU support"
    )
    bare = replace(SYSTEM, nvidia_on_bus=False, driver_gpu=None)
    diagnosis = diagnose(machine, bare)
    assert "driver and torch" in diagnosis.in_order
    assert diagnosis.not_judged["link state"] == "there is no GPU in the profile"
    with_card = diagnose(machine, SYSTEM)
    assert found(with_card)["driver and torch"] == "problem"
    assert "build for CPUs" in with_card.findings[0].cause


def test_the_disk_of_this_machine_goes_before_that_of_the_profile() -> None:
    diagnosis = diagnose(healthy(), replace(SYSTEM, disk_free_bytes=0))
    assert found(diagnosis) == {"disk": "problem"}


def test_the_gravest_come_first_and_the_text_says_all() -> None:
    machine = healthy()
    for hurt in (
        change("gpu", ecc_enabled=False), change("disk", free_bytes=0), change("link", width_loaded=8),
        change("link", replays=None),
    ):  # fmt: skip
        machine = hurt(machine)
    diagnosis = diagnose(machine)
    assert [finding.severity for finding in diagnosis.findings] == ["problem", "warning", "note"]
    text = diagnosis_text(diagnosis, machine, "1.2.3")
    assert text.startswith("lspzo-bench 1.2.3 doctor: Fake GPU, Fake CPU\n")
    assert re.findall(r"^(PROBLEM|WARNING|NOTE):", text, re.MULTILINE) == ["PROBLEM", "WARNING", "NOTE"]
    assert len(re.findall(r"^  (?:evidence|likely cause|remedy): ", text, re.MULTILINE)) == 9
    assert "Not judged: link errors: the replay counter is not known." in text
    assert "Nothing found." in diagnosis_text(diagnose(healthy()), healthy(), "1")


def test_the_bus_is_read_for_cards(tmp_path: Path) -> None:
    devices = tmp_path / "sys/bus/pci/devices"
    for name, vendor, kind in (("a", "0x10de", "0x040300"), ("b", "0x8086", "0x030000")):
        (devices / name).mkdir(parents=True)
        (devices / name / "vendor").write_text(f"{vendor}\n")
        (devices / name / "class").write_text(f"{kind}\n")
    assert not read_system(tmp_path, tmp_path).nvidia_on_bus
    (devices / "b" / "vendor").write_text("0x10de\n")
    seen = read_system(tmp_path, tmp_path)
    assert seen.nvidia_on_bus
    assert 0 <= seen.disk_free_bytes <= seen.disk_total_bytes


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_judges_a_saved_machine(
    as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_machine(change("link", width_loaded=8)(healthy()), tmp_path / "m.json")
    flags = ["doctor", "--profile", str(tmp_path / "m.json"), *(["--json"] if as_json else [])]
    monkeypatch.setattr(sys, "argv", ["lspzo-bench", *flags])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert not stop.value.code
    out = capsys.readouterr().out
    if as_json:
        assert [finding["name"] for finding in json.loads(out)["findings"]] == ["link state"]
    else:
        assert "WARNING: the link runs below what card and slot can do [link state]" in out


@pytest.mark.slow
def test_the_command_judges_this_machine(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real probe in a process of its own, in whose home nothing can be written."""
    probed: list[Machine] = []

    def launch_probe(*, quiet: bool) -> Machine:
        with monkeypatch.context() as patched:
            patched.setenv("HOME", "/proc/none")
            patched.setenv("CUDA_VISIBLE_DEVICES", "")
            probed.append(launch.launch_probe(quiet=quiet))
        return probed[0]

    monkeypatch.setattr("harness.cli.machine.launch_probe", launch_probe)
    monkeypatch.setattr(sys, "argv", ["lspzo-bench", "doctor", "--json", "--quiet"])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert not stop.value.code
    assert [machine.gpu for machine in probed] == [None]
    told, errors = capfd.readouterr()
    assert errors == ""
    told = json.loads(told)
    judged = [finding["name"] for finding in told["findings"]] + told["in_order"] + list(told["not_judged"])
    assert sorted(judged) == sorted(CHECKS)
