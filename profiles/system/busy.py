"""What other processes take of the CPU while something is measured. No torch."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from profiles.system.cgroup import ROOT, read_system_file

TOLERATED_SHARE = 0.1
"""Of the threads of a measurement: with fewer of them sharing their core, figures are sound."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuTimes:
    """CPU time of the whole machine and of this process with its ended children, by the clock."""

    clock_s: float
    machine_s: float
    own_s: float


def cpu_times(root: Path = ROOT) -> CpuTimes | None:
    """As of now; `None` where the kernel does not say."""
    first = (read_system_file(root / "proc/stat") or "").partition("\n")[0].split()
    try:
        user, nice, system, _idle, _iowait, *rest = (int(word) for word in first[1:])
    except ValueError:
        return None
    ticks = user + nice + system + sum(rest[:3])  # interrupts and what the hypervisor took
    own = os.times()
    return CpuTimes(
        clock_s=time.monotonic(),
        machine_s=ticks / os.sysconf("SC_CLK_TCK"),
        own_s=own.user + own.system + own.children_user + own.children_system,
    )


def cores_of_others(before: CpuTimes | None, after: CpuTimes | None) -> float | None:
    """How many cores other processes kept busy between the two; `None` where that is not known."""
    if before is None or after is None or after.clock_s <= before.clock_s:
        return None
    others_s = (after.machine_s - before.machine_s) - (after.own_s - before.own_s)
    return max(0.0, others_s) / (after.clock_s - before.clock_s)


def disturbance(others_cores: float | None, threads: int, cores_total: int) -> str | None:
    """What disturbed figures that were measured with so many threads; `None` where cores were enough."""
    if others_cores is None or others_cores + threads - cores_total <= TOLERATED_SHARE * threads:
        return None
    return f"other processes kept {others_cores:.1f} of {cores_total} cores busy"


def pressure(root: Path = ROOT) -> str | None:
    """Share of the last ten seconds in which something waited for a core, as the kernel words it (PSI)."""
    return (read_system_file(root / "proc/pressure/cpu") or "").partition("\n")[0] or None
