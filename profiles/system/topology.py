"""What the kernel tells of processors, NUMA nodes and PCI Express ports. No torch.

Every function takes the root of the file tree to read, so that tests can lay out their own.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from profiles.system.cgroup import ROOT, read_system_file

INSTRUCTION_SETS = (
    "avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni", "amx_tile", "amx_bf16",
    "amx_int8", "asimd", "asimddp", "bf16", "sve", "sve2",
)  # fmt: skip
"""Flags of /proc/cpuinfo that decide how fast products and AdamW are; the last five are Arm's."""

_GENERATIONS = {"2.5": 1, "5.0": 2, "5": 2, "8.0": 3, "8": 3, "16.0": 4, "32.0": 5, "64.0": 6}
"""Gigatransfers per second per lane, as sysfs writes them (older kernels without `.0`) -> generation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Processors:
    """Absent where the kernel does not tell, as in some virtual machines."""

    cores_physical: int | None
    sockets: int | None
    numa_nodes: int | None
    instruction_sets: tuple[str, ...]
    governor: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Port:
    """The PCI Express port above a device: what the slot can do."""

    generation_max: int | None
    width_max: int | None


def processors(root: Path = ROOT) -> Processors:
    """Of the whole machine, whatever this process may use of it."""
    cpus = root / "sys/devices/system/cpu"
    cores, sockets, governors = set(), set(), set()
    for cpu in cpus.glob("cpu[0-9]*"):
        package, core = (
            read_system_file(cpu / "topology" / name) for name in ("physical_package_id", "core_id")
        )
        if package is not None and core is not None:
            sockets.add(package)
            cores.add((package, core))
        governors.add(read_system_file(cpu / "cpufreq/scaling_governor"))
    flags = re.search(
        r"^(?:flags|Features)\s*:\s*(.+)$", read_system_file(root / "proc/cpuinfo") or "", re.MULTILINE
    )
    words = set(flags[1].split()) if flags else set()
    return Processors(
        cores_physical=len(cores) or None,
        sockets=len(sockets) or None,
        numa_nodes=len(numa_nodes(root)) or None,
        instruction_sets=tuple(name for name in INSTRUCTION_SETS if name in words),
        governor=", ".join(sorted(name for name in governors if name)) or None,
    )


def numa_nodes(root: Path = ROOT) -> tuple[int, ...]:
    """Nodes that have processors."""
    nodes = (root / "sys/devices/system/node").glob("node[0-9]*")
    return tuple(sorted(int(node.name[4:]) for node in nodes if read_system_file(node / "cpulist")))


def cpus_of_node(node: int, root: Path = ROOT) -> frozenset[int]:
    """Empty where the kernel does not tell."""
    cpus: set[int] = set()
    for part in (read_system_file(root / f"sys/devices/system/node/node{node}/cpulist") or "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match:
            cpus.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(cpus)


SLOWER_BY_DESIGN = 0.9
"""Of the highest clock of any core: less is another kind of core, as the efficient ones of a hybrid CPU."""


def fastest_cores(cores: Collection[int], root: Path = ROOT) -> frozenset[int]:
    """Those of `cores` whose clock may rise as high as any other's; all of them where the kernel does not
    tell, as in a virtual machine."""
    highest = {}
    for core in cores:
        text = read_system_file(root / f"sys/devices/system/cpu/cpu{core}/cpufreq/cpuinfo_max_freq") or ""
        highest[core] = int(text) if text.isdecimal() else 0
    least = SLOWER_BY_DESIGN * max(highest.values(), default=0)
    return frozenset(core for core, clock in highest.items() if clock >= least)


def numa_node_of(bus_id: str, root: Path = ROOT) -> int | None:
    """The node that the PCI device `bus_id` (such as `00000000:17:00.0`) hangs on."""
    text = read_system_file(_device(bus_id, root) / "numa_node") or ""
    return int(text) if text.isdecimal() else None  # -1: the firmware does not tell


def port_above(bus_id: str, root: Path = ROOT) -> Port:
    """What the port can do that the device `bus_id` is plugged into."""
    try:
        parent = _device(bus_id, root).resolve().parent
    except OSError:
        return Port(generation_max=None, width_max=None)
    speed = (read_system_file(parent / "max_link_speed") or "").split()
    width = read_system_file(parent / "max_link_width") or ""
    return Port(
        generation_max=_GENERATIONS.get(speed[0]) if speed else None,
        width_max=int(width) if width.isdecimal() and 0 < int(width) < 255 else None,
    )


def _device(bus_id: str, root: Path) -> Path:
    """NVML writes the domain with eight digits, sysfs with four."""
    domain, _, rest = bus_id.lower().partition(":")
    return root / "sys/bus/pci/devices" / f"{domain[-4:]}:{rest}"
