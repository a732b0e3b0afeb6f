"""What this machine shows unmeasured: graphics cards on the bus, the driver's word, the disk. No torch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from profiles.system.cgroup import ROOT
from profiles.system.nvml import open_device

NVIDIA = "0x10de"
"""The vendor's number on PCI."""


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """Facts that a saved profile does not hold."""

    nvidia_on_bus: bool
    """The kernel sees an NVIDIA display or compute device."""
    driver_gpu: str | None
    """Name of the GPU that the driver gives; `None`: it gives none."""
    folder: str
    disk_total_bytes: int
    disk_free_bytes: int
    """Of the folder's file system, for this user."""


def read_system(folder: Path, root: Path = ROOT) -> System:
    """The facts now. Raises `OSError` where `folder` is not there. `root` is the file tree of the kernel."""
    usage = shutil.disk_usage(folder)
    device = open_device()
    return System(
        nvidia_on_bus=any(_is_gpu(path) for path in (root / "sys/bus/pci/devices").glob("*")),
        driver_gpu=None if device is None else device.name or "a GPU",
        folder=str(folder),
        disk_total_bytes=usage.total,
        disk_free_bytes=usage.free,
    )


def _is_gpu(device: Path) -> bool:
    """PCI class 0x03: display controllers, compute accelerators of NVIDIA among them."""
    try:
        vendor, kind = ((device / name).read_text(encoding="ascii").strip() for name in ("vendor", "class"))
    except (OSError, UnicodeDecodeError):
        return False
    return vendor == NVIDIA and kind.startswith("0x03")
