"""A run as it is seen from outside its process: peaks of memory, what is left, kills for want of it, and
clocks of its GPUs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

import psutil

from profiles.system.cgroup import host_memory
from profiles.system.held_clock import ClockWatch
from profiles.system.nvml import NvmlDevice

CHANGE_BYTES = 16 << 20
"""What helpers share is looked at again when one of them has grown or shrunk by this much."""

NEARLY_NONE = 0.02
"""Share of the host's memory below which a child that was killed is taken to have been out of memory."""


class MemorySampler:
    """Peaks of host memory of the children and their descendants, and of a GPU's memory in use: of several
    GPUs the one that has most.

    Of a child all resident pages count, of its helpers each its part of those that it shares with others
    (PSS): sixteen processes of torch's compiler, forks of one, are 0.5 GB and not the 7 GB that the sum of
    their resident pages says.
    """

    def __init__(self, pids: Sequence[int], devices: Sequence[NvmlDevice]) -> None:
        self._roots = [psutil.Process(pid) for pid in pids]
        self._devices = devices
        self.clocks = ClockWatch(devices)
        """To be read by itself, which is quick."""
        self.family: dict[int, psutil.Process] = {}
        """Every descendant seen, by process id."""
        self._helpers: tuple[frozenset[tuple[int, int]], int] = (frozenset(), 0)
        """Process ids and resident memory, in steps of `CHANGE_BYTES`, when their bytes were counted."""
        self.peak_host_bytes = 0
        self.peak_gpu_bytes: int | None = None
        self.least_available = 1.0
        """Smallest share of the host's memory that was available."""

    def take(self) -> int:
        """Sample; bytes of children and descendants now. Memory that ranks share as such counts in the first
        alone."""
        for root in self._roots:
            with contextlib.suppress(psutil.Error):
                for relative in root.children(recursive=True):
                    self.family[relative.pid] = relative
        host_bytes = self._helpers_bytes()
        for root in self._roots:
            with contextlib.suppress(psutil.Error):
                host_bytes += root.memory_info().rss
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

    def _helpers_bytes(self) -> int:
        """Of all descendants, each page once. Counting takes milliseconds a process, resident memory none."""
        sizes: dict[int, int] = {}
        for process in self.family.values():
            with contextlib.suppress(psutil.Error):
                sizes[process.pid] = process.memory_info().rss
        seen = frozenset((pid, size // CHANGE_BYTES) for pid, size in sizes.items())
        if seen != self._helpers[0]:
            self._helpers = seen, sum(_part_bytes(pid, size) for pid, size in sizes.items())
        return self._helpers[1]


def _part_bytes(pid: int, resident_bytes: int) -> int:
    """A process's part of the pages that it maps (PSS); all of them where the kernel does not say."""
    with contextlib.suppress(OSError):
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
        match = re.search(r"^Pss:\s+(\d+) kB$", rollup, re.MULTILINE)
        if match is not None:
            return int(match[1]) * 1024
    return resident_bytes


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
