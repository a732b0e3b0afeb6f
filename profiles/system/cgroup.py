"""What this process may use of the machine: cores, memory, and the platform it runs on. No torch.

psutil and `os.cpu_count` describe the host; a container is held to less by its control group (cgroup),
version 1 or 2. A limit acts on everything below it, so each level from the process's own group up to
the mount point counts. Control groups may be missing altogether.

Every function takes the root of the file tree to read, so that tests can lay out their own.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

ROOT = Path("/")

_UNLIMITED_V1 = 2**62
"""Version 1 writes the largest number of whole pages where there is no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UsableCores:
    count: int
    """Logical cores, at least 1. A quota of 2.5 cores counts as 2."""
    basis: str
    """What decided it, such as `cgroup quota 2.0 of 16 cores`."""
    total: int
    """Logical cores of the machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMemoryLimit:
    total_bytes: int
    available_bytes: int
    """What can still be taken without swapping: page cache counts as available."""
    swap_bytes: int
    basis: str
    """What decided the total, such as `cgroup limit 2.0 of 15.6 GiB`."""
    swap_used_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class _Group:
    """One directory of the control group tree that holds this process."""

    path: Path
    version: int


def usable_cores(root: Path = ROOT) -> UsableCores:
    """The smallest of scheduler affinity, cgroup cpuset and cgroup CPU quota (rounded down, at least 1)."""
    total = max(1, os.cpu_count() or 1)
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    candidates = [
        (float(total), f"all {total} cores"),
        (float(affinity), f"affinity {affinity} of {total} cores"),
    ]
    for group in _groups(root, "cpuset"):
        names = ("cpuset.cpus.effective",) if group.version == 2 else ("cpuset.effective_cpus", "cpuset.cpus")
        cpus = _count_cpus(_first_text(group.path, names))
        if cpus is not None:
            candidates.append((float(cpus), f"cgroup cpuset {cpus} of {total} cores"))
    for group in _groups(root, "cpu"):
        quota = _quota_cores(group)
        if quota is not None:
            candidates.append((quota, f"cgroup quota {quota:.1f} of {total} cores"))
    cores, basis = min(candidates, key=lambda candidate: candidate[0])  # the first of equals
    return UsableCores(count=max(1, int(cores)), basis=basis, total=total)


def host_memory(root: Path = ROOT) -> HostMemoryLimit:
    """The smaller of the machine's memory and the cgroup's limits (`memory.max`, `memory.high`)."""
    machine = psutil.virtual_memory()
    swapped = psutil.swap_memory()
    total, available, swap = machine.total, machine.available, swapped.total
    for group in _groups(root, "memory"):
        limit = _memory_limit(group)
        if limit is not None:
            total = min(total, limit)
            used = _memory_in_use(group)
            available = min(available, limit if used is None else max(0, limit - used))
        swap_limit = _swap_limit(group)
        if swap_limit is not None:
            swap = min(swap, swap_limit)
    whole = f"{machine.total / 2**30:.1f} GiB"
    basis = f"cgroup limit {total / 2**30:.1f} of {whole}" if total < machine.total else f"all {whole}"
    return HostMemoryLimit(
        total_bytes=total,
        available_bytes=min(available, total),
        swap_bytes=swap,
        basis=basis,
        swap_used_bytes=swapped.used,
    )


def platform_name(root: Path = ROOT) -> str:
    """Kernel and processor architecture, and `WSL1` or `WSL2` where it is one. No host name."""
    release = read_system_file(root / "proc/sys/kernel/osrelease") or platform.release()
    name = f"{platform.system()} {release} {platform.machine()}"
    lowered = release.lower()
    if "microsoft" not in lowered:
        return name
    # Kernels of WSL1 end in '-Microsoft' and carry no version of their own.
    return f"{name} (WSL{2 if 'wsl2' in lowered or 'microsoft-standard' in lowered else 1})"


def cpu_name(root: Path = ROOT) -> str:
    """The processor's model name, else its architecture."""
    match = re.search(r"^model name\s*:\s*(.+)$", read_system_file(root / "proc/cpuinfo") or "", re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine() or "unknown CPU"


def last_level_cache_bytes(root: Path = ROOT) -> int | None:
    """Size of the last-level caches of all cores together; `None` if the kernel does not tell."""
    sizes: dict[tuple[int, str], int] = {}
    for index in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        level, size, shared = (
            read_system_file(index / name) for name in ("level", "size", "shared_cpu_list")
        )
        match = re.fullmatch(r"(\d+)([KM]?)", size or "")
        if level and level.isdecimal() and match and shared:
            sizes[int(level), shared] = int(match[1]) * {"": 1, "K": 2**10, "M": 2**20}[match[2]]
    if not sizes:
        return None
    last = max(level for level, _ in sizes)
    return sum(size for (level, _), size in sizes.items() if level == last)


def throttled_periods(root: Path = ROOT) -> int | None:
    """Periods in which a CPU quota stopped this process's groups since they were made; `None` without one."""
    counts = []
    for group in _groups(root, "cpu"):
        match = re.search(
            r"^nr_throttled (\d+)$", read_system_file(group.path / "cpu.stat") or "", re.MULTILINE
        )
        if match and _quota_cores(group) is not None:
            counts.append(int(match[1]))
    return sum(counts) if counts else None


def locked_limit_bytes() -> int | None:
    """The limit on locked memory (ulimit -l); `None` for none. Root and CUDA's driver may pass it."""
    import resource  # POSIX only

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _groups(root: Path, controller: str) -> Iterator[_Group]:
    """The groups whose limits of `controller` hold this process, innermost first.

    A host with both versions mounted may have the controller in either; the other's files are missing.
    """
    paths = _own_paths(root)
    for mount in (read_system_file(root / "proc/self/mountinfo") or "").splitlines():
        left, _, right = mount.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        version = 2 if kind[0] == "cgroup2" else 1
        if version == 1 and controller not in kind[2].split(","):
            continue
        own = paths.get("" if version == 2 else controller)
        if own is None:
            continue
        top = root / _unescape(fields[4]).lstrip("/")
        # A container may see its own group as the root of the mount.
        inside = _relative(own, _unescape(fields[3]))
        for depth in range(len(inside.parts), -1, -1):
            yield _Group(top.joinpath(*inside.parts[:depth]), version)


def _own_paths(root: Path) -> dict[str, str]:
    """Controller -> path of this process's group; the key of version 2 is empty."""
    paths: dict[str, str] = {}
    for line in (read_system_file(root / "proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            if controller or number == "0":
                paths[controller] = path
    return paths


def _relative(own: str, mount_root: str) -> PurePosixPath:
    """`own` below `mount_root`; the mount point itself if it lies elsewhere."""
    path = PurePosixPath(own)
    if ".." in path.parts or not path.is_relative_to(mount_root):
        return PurePosixPath()
    return path.relative_to(mount_root)


def _quota_cores(group: _Group) -> float | None:
    if group.version == 2:
        words = (read_system_file(group.path / "cpu.max") or "").split()
    else:
        texts = (read_system_file(group.path / name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        words = [text or "" for text in texts]
    if len(words) != 2 or not all(word.isdecimal() for word in words):  # 'max' and -1 are no limit
        return None
    quota_us, period_us = map(int, words)
    return quota_us / period_us if quota_us > 0 and period_us > 0 else None


def _memory_limit(group: _Group) -> int | None:
    names = ("memory.max", "memory.high") if group.version == 2 else ("memory.limit_in_bytes",)
    limits = [limit for name in names if (limit := _number(group.path / name)) is not None]
    return min(limits, default=None)


def _memory_in_use(group: _Group) -> int | None:
    """Memory charged to the group without the page cache that the kernel would drop first."""
    version_2 = group.version == 2
    usage = _number(group.path / ("memory.current" if version_2 else "memory.usage_in_bytes"))
    if usage is None:
        return None
    key = "inactive_file" if version_2 else "total_inactive_file"
    match = re.search(rf"^{key} (\d+)$", read_system_file(group.path / "memory.stat") or "", re.MULTILINE)
    return max(0, usage - (int(match[1]) if match else 0))


def _swap_limit(group: _Group) -> int | None:
    if group.version == 2:
        return _number(group.path / "memory.swap.max")
    both = _number(group.path / "memory.memsw.limit_in_bytes")
    memory = _number(group.path / "memory.limit_in_bytes")
    if both is None or both >= _UNLIMITED_V1 or memory is None:
        return None
    return max(0, both - memory) if memory < _UNLIMITED_V1 else both


def _number(path: Path) -> int | None:
    text = read_system_file(path) or ""
    return int(text) if text.isdecimal() else None


def _count_cpus(text: str | None) -> int | None:
    """How many CPUs a list such as `0-3,8` names; `None` for an empty or unreadable one."""
    count = 0
    for part in (text or "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            return None
        count += int(match[2] or match[1]) - int(match[1]) + 1
    return count if count > 0 else None


def _first_text(folder: Path, names: tuple[str, ...]) -> str | None:
    return next((text for name in names if (text := read_system_file(folder / name))), None)


def read_system_file(path: Path) -> str | None:
    """A small file of the kernel without the blanks around it; `None` if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _unescape(path: str) -> str:
    """mountinfo writes blanks and backslashes as octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
