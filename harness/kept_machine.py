"""The last profile of this machine, in the user's cache, so that a plan need not wait for a measurement.

`probe` keeps what it measured; `recommend` takes it while the machine is as it was. What is free of both
memories is asked anew. Imports no torch.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from engines.errors import UserError
from engines.files.reading import exists
from profiles.machine import MACHINE_FILE, Gpu, Machine, load_machine, save_machine
from profiles.system import cgroup
from profiles.system.nvml import open_device, visible_gpus

KEPT_FOR = timedelta(days=30)
"""After which a machine is measured anew, whatever it looks like."""

DEPTHS = ("brief", "default", "full")


def kept_path() -> Path:
    """lspzo-bench/machine.json below $XDG_CACHE_HOME or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "lspzo-bench" / MACHINE_FILE


def keep_machine(machine: Machine) -> None:
    """For the next plan, unless more is known of this machine already. A cache that cannot be written is no
    error."""
    with contextlib.suppress(UserError, OSError, RuntimeError):  # RuntimeError: there is no home
        known = kept_machine()
        if known is not None and _depth(known) > _depth(machine):
            return
        path = kept_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_machine(machine, path)


def kept_machine() -> Machine | None:
    """The profile that was kept, if it is of this machine as it is now, with what is free now."""
    with contextlib.suppress(UserError, OSError, RuntimeError):
        path = kept_path()
        if exists(path):
            machine = load_machine(path)
            if _is_this_one(machine):
                return _as_it_is_now(machine)
    return None


def _depth(machine: Machine) -> int:
    return DEPTHS.index(machine.depth or "brief")


def _is_this_one(machine: Machine) -> bool:
    """The same kernel, processor, cores, memory, GPUs, driver and torch, not long ago."""
    taken = datetime.fromisoformat(machine.time)
    return (
        abs(datetime.now(UTC) - taken) < KEPT_FOR  # a clock that was wrong makes no profile last for years
        and machine.platform == cgroup.platform_name()
        and machine.cpu.name == cgroup.cpu_name()
        and machine.cpu.cores_usable == cgroup.usable_cores().count
        and machine.memory.total_bytes == cgroup.host_memory().total_bytes
        and machine.versions.get("torch") == _torch_version()
        and _has_its_gpus(machine.gpu)
    )


def _torch_version() -> str | None:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def _has_its_gpus(gpu: Gpu | None) -> bool:
    device = open_device()
    if gpu is None or device is None:
        return gpu is None and device is None
    same = (gpu.name, gpu.driver, gpu.num_gpus) == (device.name, device.driver, len(visible_gpus()))
    return same and device.used_bytes() is not None


def _as_it_is_now(machine: Machine) -> Machine:
    memory = replace(machine.memory, available_bytes=cgroup.host_memory().available_bytes)
    gpu, device = machine.gpu, open_device()
    if gpu is not None and device is not None:
        total_bytes, used_bytes = device.total_bytes, device.used_bytes()
        if total_bytes is not None and used_bytes is not None:
            # NVML counts what the card keeps from every process as in use.
            free_bytes = total_bytes - used_bytes
            gpu = replace(gpu, free_bytes=max(1, min(gpu.total_bytes, free_bytes)))
    return replace(machine, memory=memory, gpu=gpu)
