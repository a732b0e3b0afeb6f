"""Checks of cores, memory, pinning and disk."""

from __future__ import annotations

import re

from profiles.display.core_speeds import two_speeds_text
from profiles.doctor.findings import Answer, Finding
from profiles.machine import LinkFigures, Machine
from profiles.rates import COPY_WRITE_ALLOCATE
from profiles.system.busy import disturbance
from profiles.system.unprobed import System
from profiles.units import format_bytes, format_rate

ONE_CHANNEL_BYTES_PER_S = 25.6e9
"""One channel of DDR4-3200, the fastest of its kind."""

TRIAD_WRITE_ALLOCATE = 4 / 3
"""Host memory traffic over what STREAM's triad counts: four arrays move for three, since a CPU reads a line
before it writes it. Of a copy, three move for two."""

ENOUGH_CORES = 4
"""With fewer, the cores and not the memory limit a copy."""

PINNED_SHARE = 0.5
"""A pinned limit below this share of host memory will be met by a model that is offloaded."""

FULL_BYTES, NEARLY_FULL_BYTES = 10**9, 20 * 10**9
"""Free disk: too little for a report and its runs; too little for a model and a checkpoint."""

FULL_PROBE = "probe with 'lspzo-bench probe --full --out m.json', then 'lspzo-bench doctor --profile m.json'"


def check_pinned_limit(link: LinkFigures, machine: Machine) -> Answer:
    memory = machine.memory
    remedy = "raise the limit on locked memory (ulimit -l unlimited; in a container --ulimit memlock=-1)"
    if link.h2d_pinned_bytes_per_s.value is None and link.h2d_pageable_bytes_per_s.value is not None:
        return Finding(
            severity="problem",
            title="host memory cannot be pinned",
            evidence=link.h2d_pinned_bytes_per_s.method,
            cause="a limit on locked memory, WSL2, or too little free memory",
            remedy=remedy,
        )
    if memory.pinned_bytes.value is None or memory.pinned_refused is None:
        return f"the pinned limit was not measured; {FULL_PROBE}"
    if not memory.pinned_refused or memory.pinned_bytes.value >= PINNED_SHARE * memory.total_bytes:
        return None
    return Finding(
        severity="warning",
        title="only a part of host memory can be pinned",
        evidence=f"{format_bytes(memory.pinned_bytes.value)} of {format_bytes(memory.total_bytes)}, then "
        "the driver refused",
        cause="WSL2 allows a few GiB per process" if "WSL" in machine.platform
        else f"a limit on locked memory ({_limit(memory.locked_limit_bytes)})",
        remedy="run on Linux itself" if "WSL" in machine.platform else remedy,
    )  # fmt: skip


def check_busy(machine: Machine) -> Answer:
    cpu = machine.cpu
    if cpu.others_cores is None:
        return "what other processes took of the CPU was not measured"
    why = disturbance(cpu.others_cores, cpu.threads, cpu.cores_total)
    if why is None:
        return None
    return Finding(
        severity="warning",
        title="the machine was busy while it was measured",
        evidence=why + (f"; {cpu.pressure}" if cpu.pressure else ""),
        cause="other processes, or another tenant of this machine",
        remedy="stop them and probe again: figures of CPU and memory, and plans on them, are too slow",
    )


def check_core_speeds(machine: Machine) -> Answer:
    cpu = machine.cpu
    if cpu.python_turn_s.value is None:
        return "how fast its cores run was not measured, which a probe with a GPU does"
    evidence = two_speeds_text(cpu)
    if evidence is None:
        return None
    return Finding(
        severity="warning",
        title="cores run at two speeds",
        evidence=evidence,
        cause="each core of a virtual machine is one half of a physical one, and its other half is busy or "
        "not",
        remedy="a host of one's own, or physical cores; else compare methods by several rounds, interleaved "
        "('compare --rounds 5')",
    )


def check_threads(machine: Machine) -> Answer:
    cpu = machine.cpu
    if not re.search(r"quota|affinity|cpuset", cpu.cores_basis):
        return None
    have = cpu.cores_physical or cpu.cores_total // 2
    if cpu.cores_usable >= have and not cpu.throttled_periods:
        return None
    stopped = f"; the quota stopped it in {cpu.throttled_periods} periods" if cpu.throttled_periods else ""
    return Finding(
        severity="warning",
        title="this process may use few of the machine's cores",
        evidence=f"{cpu.cores_usable} of {cpu.cores_total} logical cores: {cpu.cores_basis}{stopped}",
        cause="a container's CPU quota or set, or a job scheduler's affinity",
        remedy="give the container more CPUs (--cpus, resources.limits.cpu), or the job more cores: "
        "offloaded Adam needs them",
    )


def check_governor(machine: Machine) -> Answer:
    if machine.cpu.governor is None:
        return "the kernel shows no governor of clock frequencies"
    if machine.cpu.governor != "powersave":
        return None
    return Finding(
        severity="note",
        title="the CPU's clocks are governed by 'powersave'",
        evidence="scaling_governor is powersave",
        cause="the distribution's default; intel_pstate and amd-pstate raise clocks under load all the same, "
        "other drivers do not",
        remedy="for steady measurements: sudo cpupower frequency-set -g performance",
    )


def check_memory_channels(machine: Machine) -> Answer:
    triad, copy = machine.memory.triad_bytes_per_s, machine.memory.copy_bytes_per_s
    rates = [
        figure.value * factor
        for figure, factor in ((triad, TRIAD_WRITE_ALLOCATE), (copy, COPY_WRITE_ALLOCATE))
        if figure.value is not None and figure.origin == "measured"
    ]
    if not rates:
        return "host memory bandwidth was not measured"
    if machine.cpu.cores_usable < ENOUGH_CORES:
        return f"with {machine.cpu.cores_usable} usable cores, these and not the memory limit a copy"
    if max(rates) >= ONE_CHANNEL_BYTES_PER_S:
        return None
    return Finding(
        severity="warning",
        title="host memory is as slow as a single channel",
        evidence=f"{format_rate(max(rates))} with {machine.cpu.threads} threads; one channel of DDR4-3200 "
        f"has {format_rate(ONE_CHANNEL_BYTES_PER_S)}",
        cause="one memory module, or all in slots of one channel; in a virtual machine, its neighbours",
        remedy="fill one slot of each channel; 'sudo dmidecode -t memory' lists the modules",
    )


def check_swap(machine: Machine) -> Answer:
    memory = machine.memory
    if memory.swap_bytes == 0:
        return None
    used = memory.swap_used_bytes or 0
    return Finding(
        severity="warning" if used else "note",
        title="swap is in use" if used else "swap is on",
        evidence=f"{format_bytes(memory.swap_bytes)} of swap, {format_bytes(memory.swap_used_bytes)} in use",
        cause="the system's default",
        remedy="a run that outgrows memory becomes slow instead of failing: sudo swapoff -a while measuring",
    )


def check_disk(machine: Machine, system: System | None) -> Answer:
    if system is not None:
        folder, free, total = system.folder, system.disk_free_bytes, system.disk_total_bytes
    elif machine.disk is not None:
        folder, free, total = machine.disk.folder, machine.disk.free_bytes, machine.disk.total_bytes
    else:
        return machine.disk_absent_reason or "the profile holds no disk"
    if free >= NEARLY_FULL_BYTES:
        return None
    return Finding(
        severity="problem" if free < FULL_BYTES else "warning",
        title="the disk is full" if free < FULL_BYTES else "the disk is nearly full",
        evidence=f"{format_bytes(free)} of {format_bytes(total)} free at {folder}",
        cause="models, checkpoints and caches",
        remedy="free space, or name another --out (and HF_HOME for downloads)",
    )


def _limit(limit_bytes: int | None) -> str:
    return "ulimit -l is unlimited" if limit_bytes is None else f"ulimit -l is {format_bytes(limit_bytes)}"
