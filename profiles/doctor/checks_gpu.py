"""Checks of the GPU and of what stands between it and torch."""

from __future__ import annotations

import re

from profiles.doctor.findings import NO_GPU, Answer, Finding
from profiles.machine import Gpu, Machine
from profiles.system.unprobed import System
from profiles.units import format_bytes

SHARED_SHARE = 0.1
"""GPU memory in use before the program has begun."""

LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
"""By CUDA's major version (NVIDIA, CUDA compatibility: minor version compatibility)."""


def check_gpu_usable(machine: Machine, system: System | None) -> Answer:
    """Driver and torch that do not match, and a card that torch does not reach."""
    if machine.gpu is None:
        reason = machine.gpu_absent_reason or ""
        too_old = re.search(r"driver .*too old|driver version is insufficient", reason)
        card = system is not None and (system.driver_gpu is not None or system.nvidia_on_bus)
        if not too_old and system is None:
            return NO_GPU
        if not too_old and not card:
            return None
        seen = "a card" if system is None or system.driver_gpu is None else system.driver_gpu
        built_without = "without GPU support" in reason
        return Finding(
            severity="problem",
            title="there is a GPU, and torch cannot use it",
            evidence=f"{seen} is there; {reason or 'no reason was given'}",
            cause="this torch is a build for CPUs" if built_without
            else "the driver is missing, too old for this torch, or not visible in this container",
            remedy="install a torch built for the driver's CUDA (pytorch.org, 'Get Started')" if built_without
            else "update the driver (nvidia-smi shows it), or install a torch built for an older CUDA; in a "
            "container, start it with the GPU (--gpus all)",
        )  # fmt: skip
    cuda, driver = machine.versions.get("cuda"), machine.gpu.driver
    if cuda is None or driver is None:
        return "versions of CUDA and driver are not both known"
    least = LEAST_DRIVER.get(int(cuda.split(".")[0]))
    if least is None or int(driver.split(".")[0]) >= least:
        return None
    return Finding(
        severity="warning",
        title="the driver is older than this torch's CUDA wants",
        evidence=f"driver {driver}, CUDA {cuda}, which wants driver {least} or newer",
        cause="torch was updated and the driver was not",
        remedy=f"update the driver to {least} or newer, or install a torch built for an older CUDA",
    )


def check_wsl(machine: Machine) -> Answer:
    if "WSL" not in machine.platform:
        return None
    return Finding(
        severity="warning",
        title="this is Windows' subsystem for Linux",
        evidence=machine.platform,
        cause="Linux runs in a virtual machine; pinned memory is limited and copies are slower",
        remedy="figures are not those of Linux on the same hardware: run Linux itself to decide",
    )


def check_spilling(machine: Machine) -> Answer:
    if "WSL" not in machine.platform:
        return None
    if machine.gpu is None:
        return NO_GPU
    return Finding(
        severity="warning",
        title="GPU memory that runs out may spill into host memory unseen",
        evidence=f"{machine.platform}, {machine.gpu.name}",
        cause="Windows' driver backs GPU memory with host memory, so what does not fit still runs, ten times "
        "slower",
        remedy="cap runs with --vram below the card's dedicated memory, and set 'CUDA - Sysmem Fallback "
        "Policy' to 'Prefer No Sysmem Fallback' in the NVIDIA control panel (WSL2 may ignore it)",
    )


def check_mig(gpu: Gpu, _: Machine) -> Answer:
    if gpu.mig_enabled is None and "MIG" not in gpu.name:
        return "the driver does not say whether the GPU is partitioned"
    if not gpu.mig_enabled and "MIG" not in gpu.name:
        return None
    return Finding(
        severity="warning",
        title="the GPU is partitioned (MIG)",
        evidence=f"{gpu.name}, {format_bytes(gpu.total_bytes)}",
        cause="an administrator divided the card; its slices share the link",
        remedy="take figures of the link as those of a shared one, or ask for the whole card",
    )


def check_shared_gpu(gpu: Gpu, _: Machine) -> Answer:
    others = max((reading.other_processes or 0 for reading in gpu.readings), default=0)
    used_bytes = gpu.total_bytes - gpu.free_bytes
    if not others and used_bytes <= SHARED_SHARE * gpu.total_bytes:
        return None
    processes = f"{others} other processes; " if others else ""
    return Finding(
        severity="warning",
        title="something else uses the GPU",
        evidence=f"{processes}{format_bytes(used_bytes)} of {format_bytes(gpu.total_bytes)} in use",
        cause="a desktop, a notebook that was left open, or another user's job",
        remedy="see 'nvidia-smi' for who it is, end it, and probe again",
    )


def check_throttled(gpu: Gpu, _: Machine) -> Answer:
    if not gpu.readings:
        return "the GPU's conditions were not read"
    why = sorted({reason for reading in gpu.readings for reason in reading.throttled})
    if not why:
        return None
    return Finding(
        severity="note",
        title="the GPU's clocks were held down while it was measured",
        evidence=", ".join(why),
        cause="heat, or the board's power limit; large products reach that limit on most cards",
        remedy="check the cooling and 'nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER'",
    )


def check_ecc(gpu: Gpu, _: Machine) -> Answer:
    if gpu.ecc_enabled is None:
        return "the driver does not say, or the card has none"
    if gpu.ecc_enabled:
        return None
    return Finding(
        severity="note",
        title="the GPU's memory is not checked for errors",
        evidence="ECC is off",
        cause="the default of workstation cards, where ECC costs memory and bandwidth",
        remedy="for long runs: sudo nvidia-smi -e 1, and start the machine again",
    )
