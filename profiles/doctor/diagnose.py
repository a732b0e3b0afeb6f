"""What is not as it should be on a machine, the likely cause, and the remedy. Pure; no torch.

Each check looks at one thing and says one of three: a finding, in order, or why it cannot be judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from profiles.doctor.checks_gpu import (
    check_ecc,
    check_gpu_usable,
    check_mig,
    check_shared_gpu,
    check_spilling,
    check_throttled,
    check_wsl,
)
from profiles.doctor.checks_host import (
    check_busy,
    check_core_speeds,
    check_disk,
    check_governor,
    check_memory_channels,
    check_pinned_limit,
    check_swap,
    check_threads,
)
from profiles.doctor.checks_link import (
    check_link_rate,
    check_link_state,
    check_pageable,
    check_replays,
    check_slot,
)
from profiles.doctor.findings import Finding, MachineCheck, Severity, of_gpu, of_link, of_machine
from profiles.language import translated, word
from profiles.machine import Gpu, Machine
from profiles.system.unprobed import System
from profiles.units import format_bytes, format_rate

CHECKS: dict[str, MachineCheck] = {
    "driver and torch": check_gpu_usable,
    "link state": of_link(check_link_state),
    "slot": of_link(check_slot),
    "link rate": of_link(check_link_rate),
    "link errors": of_link(check_replays),
    "pageable copies": of_link(check_pageable),
    "pinned limit": of_link(check_pinned_limit),
    "CPU threads": of_machine(check_threads),
    "busy machine": of_machine(check_busy),
    "core speeds": of_machine(check_core_speeds),
    "CPU governor": of_machine(check_governor),
    "memory channels": of_machine(check_memory_channels),
    "swap": of_machine(check_swap),
    "WSL": of_machine(check_wsl),
    "GPU memory spilling": of_machine(check_spilling),
    "MIG": of_gpu(check_mig),
    "shared GPU": of_gpu(check_shared_gpu),
    "GPU clocks": of_gpu(check_throttled),
    "ECC": of_gpu(check_ecc),
    "disk": check_disk,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    machine: str
    findings: tuple[Finding, ...]
    """The gravest first."""
    in_order: tuple[str, ...]
    not_judged: Mapping[str, str]
    """Name of a check -> why."""


def diagnose(machine: Machine, system: System | None = None) -> Diagnosis:
    """All checks on `machine`. `system` is for the machine that this runs on, `None` for a saved one."""
    findings: list[Finding] = []
    in_order: list[str] = []
    not_judged: dict[str, str] = {}
    for name, check in CHECKS.items():
        answer = check(machine, system)
        if isinstance(answer, Finding):
            findings.append(replace(answer, name=name))
        elif answer is None:
            in_order.append(name)
        else:
            not_judged[name] = answer
    order: list[Severity] = ["problem", "warning", "note"]
    return Diagnosis(
        machine=machine.name,
        findings=tuple(sorted(findings, key=lambda finding: order.index(finding.severity))),
        in_order=tuple(in_order),
        not_judged=not_judged,
    )


def diagnosis_text(diagnosis: Diagnosis, machine: Machine, version: str) -> str:
    """One text to paste into a question: the machine in short, findings, what is in order, what is not known.

    Holds no name of a host or a user; the folder of the disk is the one that was named.
    """
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    driver = machine.gpu.driver if machine.gpu is not None else None
    lines = [
        f"lspzo-bench {version} doctor: {translated(diagnosis.machine)}",
        translated(f"{machine.platform}; driver {driver or 'not known'}; {versions or 'no versions'}"),
        translated(_in_short(machine.gpu, machine)),
        "",
    ]
    if not diagnosis.findings:
        lines += [translated("Nothing found."), ""]
    for finding in diagnosis.findings:
        lines += [
            f"{word(finding.severity).upper()}: {translated(finding.title)} [{word(finding.name)}]",
            f"  {translated(f'evidence: {finding.evidence}')}",
            f"  {translated(f'likely cause: {finding.cause}')}",
            f"  {translated(f'remedy: {finding.remedy}')}",
            "",
        ]
    in_order = ", ".join(map(word, diagnosis.in_order)) or word("nothing")
    lines.append(translated(f"In order: {in_order}."))
    lines += [translated(f"Not judged: {word(name)}: {why}.") for name, why in diagnosis.not_judged.items()]
    return "\n".join(lines) + "\n"


def _in_short(gpu: Gpu | None, machine: Machine) -> str:
    cpu, memory = machine.cpu, machine.memory
    card = "no GPU" if gpu is None else f"{gpu.name} {format_bytes(gpu.total_bytes)}"
    rates = ""
    if machine.link is not None:
        up, down = (
            format_rate(figure.value)
            for figure in (machine.link.h2d_pinned_bytes_per_s, machine.link.d2h_pinned_bytes_per_s)
        )
        rates = f"; link {up} up, {down} down"
    host = f"{cpu.cores_usable} cores ({cpu.cores_basis}); {format_bytes(memory.total_bytes)} host memory"
    return f"{card}{rates}; {host}"
