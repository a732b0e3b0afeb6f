"""Memory of a run as it is seen from outside its process: peaks, what is left, and kills for want of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

import psutil

from profiles.system.cgroup import host_memory
from profiles.system.nvml import NvmlDevice

NEARLY_NONE = 0.02
"""Share of the host's memory below which a child that was killed is taken to have been out of memory."""


class MemorySampler:
    """Peaks of resident host memory of the children and their descendants, and of a GPU's memory in use: of
    several GPUs the one that has most."""

    def __init__(self, pids: Sequence[int], devices: Sequence[NvmlDevice]) -> None:
        self._roots = [psutil.Process(pid) for pid in pids]
        self._devices = devices
        self.family: dict[int, psutil.Process] = {}
        """Every descendant seen, by process id."""
        self.peak_host_bytes = 0
        self.peak_gpu_bytes: int | None = None
        self.least_available = 1.0
        """Smallest share of the host's memory that was available."""

    def take(self) -> int:
        """Sample; resident bytes of children and descendants now. Pages that they share are counted in each,
        but memory that ranks share as such in the first alone."""
        for root in self._roots:
            with contextlib.suppress(psutil.Error):
                for relative in root.children(recursive=True):
                    self.family[relative.pid] = relative
        host_bytes = 0
        for process in (*self._roots, *self.family.values()):
            with contextlib.suppress(psutil.Error):
                host_bytes += process.memory_info().rss
        for root in self._roots[1:]:
            host_bytes -= _shared_bytes(root.pid)
        self.peak_host_bytes = max(self.peak_host_bytes, host_bytes)
        memory = host_memory()
        self.least_available = min(self.least_available, memory.available_bytes / memory.total_bytes)
        for device in self._devices:
            used_bytes = device.used_bytes()
            if used_bytes is not None:
                self.peak_gpu_bytes = max(self.peak_gpu_bytes or 0, used_bytes)
        return host_bytes


def _shared_bytes(pid: int) -> int:
    """Resident memory of a process that others can map too (RssShmem), files left out."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        match = re.search(r"^RssShmem:\s+(\d+) kB$", status, re.MULTILINE)
        if match is not None:
            return int(match[1]) * 1024
    return 0


def read_oom_kills() -> int | None:
    """Processes of this control group that the kernel killed for want of memory, so far.

    Where the control group does not count them, those of the whole machine; `None` if nothing does.
    """
    paths: list[Path] = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers == "":
                paths.append(Path(f"/sys/fs/cgroup{group}/memory.events"))
            elif "memory" in controllers.split(","):
                paths.append(Path(f"/sys/fs/cgroup/memory{group}/memory.oom_control"))
    for path in (*paths, Path("/proc/vmstat")):
        with contextlib.suppress(OSError):
            match = re.search(r"^oom_kill (\d+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            if match is not None:
                return int(match[1])
    return None
