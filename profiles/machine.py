"""The machine as measured: every number with its origin. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Literal

from engines.errors import UserError
from profiles.documents import read_document, to_json, write_whole

MACHINE_FILE = "machine.json"
"""The profile in a folder of results, and the one that is kept for this machine."""

SCHEMA_VERSION = 2
"""1: the first version. 2: pinned memory, disk, the rate under lasting load, conditions of the GPU; all of it
has defaults that say 'absent', so documents of version 1 load as they are. Both held figures that no
prediction, check or report read, such as copies of all sizes; a document that has them loads without them."""

Origin = Literal["measured", "datasheet", "absent"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One number and where it comes from. The unit is in the name of the field that holds it."""

    value: float | None
    """`None` exactly when `origin` is `absent`."""
    origin: Origin
    method: str
    """How it was measured, the datasheet's title, or why it is absent."""
    time: str | None = None
    """When it was measured, ISO 8601 in UTC."""
    low: float | None = None
    high: float | None = None
    """Smallest and largest sample; `value` is the median."""
    count: int = 0
    """Samples."""
    disturbance: str | None = None
    """What else acted on the samples, twice in a row: the GPU was throttled, or another process used it."""

    def __post_init__(self) -> None:
        if (self.value is None) != (self.origin == "absent"):
            raise ValueError(f"a figure of origin {self.origin} has the value {self.value}")

    def scaled(self, factor: float, why: str | None = None) -> Figure:
        """So many times it; `why` is added to how it was measured. An absent one stays absent."""
        low, value, high = (
            None if each is None else factor * each for each in (self.low, self.value, self.high)
        )
        method = self.method if why is None else f"{self.method}, {why}"
        return replace(self, low=low, value=value, high=high, method=method)


def absent(reason: str) -> Figure:
    """A figure that could not be had, and why."""
    return Figure(value=None, origin="absent", method=reason)


NOT_PROBED = absent("this profile holds no such measurement")
"""Default of the figures that joined after version 1, and that a short probe leaves out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuReading:
    """What NVML said of the GPU while one sample was taken."""

    what: str
    """The measurement, such as `GPU matrix product bf16`."""
    sm_clock_hz: float | None
    throttled: tuple[str, ...]
    """Why clocks were held down, such as `sw_power_cap`; being idle is no such reason."""
    other_processes: int | None
    """Processes that computed on the GPU beside this one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    name: str
    total_bytes: int
    free_bytes: int
    driver: str | None
    compute_capability: str | None
    """Such as `9.0`."""
    num_gpus: int
    copy_bytes_per_s: Figure
    """Device memory bandwidth of a large copy, bytes read plus bytes written."""
    matmul_bf16_flops: Figure
    matmul_fp16_flops: Figure
    matmul_fp32_flops: Figure
    """Matrix product rates in FLOP/s on normally distributed data."""
    matmul_sustained_flops: Figure = NOT_PROBED
    """The bf16 product again, at the end of a long run of it: training loads the GPU without a rest."""
    product_s: Figure = NOT_PROBED
    """What a product of middling size takes longer than its operations at the rate of a large one."""
    process_bytes: Figure = NOT_PROBED
    """What a process takes of the GPU beside torch's memory: CUDA's context, its libraries and kernels. Where
    it is measured, `free_bytes` is what was free before the probe had one."""
    workspace_bytes: Figure = NOT_PROBED
    """What torch has for a workspace of matrix products, beside tensors."""
    sm_clock_max_hz: float | None = None
    ecc_enabled: bool | None = None
    mig_enabled: bool | None = None
    readings: tuple[GpuReading, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuLink:
    """Pinned copies of one of several GPUs, alone and while all of them copy."""

    index: int
    """As CUDA counts."""
    name: str
    h2d_bytes_per_s: Figure
    d2h_bytes_per_s: Figure
    h2d_together_bytes_per_s: Figure = NOT_PROBED
    d2h_together_bytes_per_s: Figure = NOT_PROBED
    from_gpu_bytes_per_s: Figure = NOT_PROBED
    """From the next GPU's memory to its own, while every GPU copies likewise: over NVLink several times what
    the link to the host moves, over PCI Express no more than that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkFigures:
    """Between host and GPU. Rates in bytes per second."""

    generation_max: int | None
    generation_loaded: int | None
    width_max: int | None
    width_loaded: int | None
    """PCI Express generation and lanes: what device and slot can do, and what ran under load."""
    h2d_pinned_bytes_per_s: Figure
    d2h_pinned_bytes_per_s: Figure
    h2d_pageable_bytes_per_s: Figure
    d2h_pageable_bytes_per_s: Figure
    h2d_duplex_bytes_per_s: Figure
    d2h_duplex_bytes_per_s: Figure
    """Each direction while the other is busy too, pinned."""
    generation_idle: int | None = None
    width_idle: int | None = None
    """Before the probe loaded it: power saving lowers the generation."""
    generation_gpu_max: int | None = None
    """What the GPU alone could do, in a better slot."""
    generation_slot_max: int | None = None
    width_slot_max: int | None = None
    """What the port above the GPU can do."""
    replays: int | None = None
    """Packets sent again during the probe: more than a few mean a bad contact."""
    placement: str = "not known"
    """Where threads and host memory of the measurements were, such as `NUMA node 0, the GPU's`."""
    each_gpu: tuple[GpuLink, ...] = ()
    """Every GPU, where there are several: links that share lanes or host memory are slower together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cpu:
    name: str
    cores_usable: int
    """Cores that this process may use."""
    cores_basis: str
    """What decided it, such as `cgroup quota 2.0 of 16 cores`."""
    cores_total: int
    threads: int
    """Threads that the measurements below used."""
    matmul_fp32_flops: Figure
    matmul_bf16_flops: Figure
    adam_elements_per_s: Figure
    """torch's fused AdamW in fp32 on tensors larger than the caches: 28 bytes of memory an element."""
    adamw_kernel_elements_per_s: Figure = NOT_PROBED
    """This program's compiled AdamW (`engines.cpu_updates.adamw`) over bf16 weights with fp32 moments, larger
    than the caches: 26 bytes of memory an element, on the threads that training leaves it."""
    python_turn_s: Figure = NOT_PROBED
    """What one turn of a plain Python loop takes: how fast a core runs, apart from any GPU. Where it was
    measured, it and the times below are over windows: short ones, spread over the probe's time and over the
    cores, of which each counts as one sample. Before, they were of one window and one core."""
    forward_launch_s: Figure = NOT_PROBED
    training_launch_s: Figure = NOT_PROBED
    """What it takes to start one operation of a transformer on the GPU, without and with autograd."""
    graph_launch_s: Figure = NOT_PROBED
    """What one kernel of a CUDA graph takes to start."""
    triton_launch_s: Figure = NOT_PROBED
    """What it takes to start a Triton kernel by Triton's own Python."""
    cores_physical: int | None = None
    sockets: int | None = None
    numa_nodes: int | None = None
    instruction_sets: tuple[str, ...] = ()
    """Those that matrix products and AdamW depend on, as the kernel names them, such as `avx512_bf16`."""
    governor: str | None = None
    """Of the clock frequency, such as `performance`; `None` where the kernel shows none."""
    throttled_periods: int | None = None
    """Periods in which the cgroup's CPU quota stopped this process during the probe."""
    others_cores: float | None = None
    """Cores that other processes kept busy while CPU and memory were measured; `None`: not known."""
    pressure: str | None = None
    """The kernel's line on waiting for cores (PSI, /proc/pressure/cpu) before the measurement."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMemory:
    total_bytes: int
    """As this process may use it: the smaller of the machine's memory and the cgroup's limit."""
    available_bytes: int
    total_basis: str
    swap_bytes: int
    copy_bytes_per_s: Figure
    """Bandwidth of a large copy, bytes read plus bytes written."""
    triad_bytes_per_s: Figure = NOT_PROBED
    """STREAM's triad: two arrays read, one written."""
    swap_used_bytes: int | None = None
    locked_limit_bytes: int | None = None
    """The limit on locked memory (ulimit -l); `None` for none. Root and CUDA's driver may pass it."""
    pinned_bytes: Figure = NOT_PROBED
    """What one process could pin."""
    pinned_refused: bool | None = None
    """The driver refused more than `pinned_bytes`; else the probe stopped there to spare the machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """The file system of one folder."""

    folder: str
    file_system: str | None
    """Such as `ext4`."""
    total_bytes: int
    free_bytes: int
    """For this user."""
    direct: bool | None = None
    """The figures are without the page cache (O_DIRECT)."""
    write_bytes_per_s: Figure = NOT_PROBED
    """Sequential, in large blocks. Set-up writes what a step then reads; so does the probe."""
    read_bytes_per_s: Figure = NOT_PROBED
    """Sequential, several large blocks at a time."""


Depth = Literal["brief", "default", "full"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    name: str
    """Short, without the host's name: GPU and CPU."""
    time: str
    """When the probe ran, ISO 8601 in UTC."""
    gpu: Gpu | None
    gpu_absent_reason: str | None
    link: LinkFigures | None
    cpu: Cpu
    memory: HostMemory
    platform: str
    """Kernel and, where it is one, 'WSL2'."""
    versions: dict[str, str]
    """python, torch, cuda, ... as the probe found them."""
    disk: Disk | None = None
    disk_absent_reason: str | None = None
    depth: Depth | None = None
    """How much was measured: what predictions need, the default, or everything."""
    duration_s: float | None = None
    schema_version: int = SCHEMA_VERSION


def load_machine(path: Path) -> Machine:
    """Versions 1 and 2. Raises `UserError` if `path` is not a machine profile that this version reads, or one
    with a number that no machine has."""
    machine = read_document(path, Machine, SCHEMA_VERSION, "machine profile")
    for name, number in _numbers(machine):
        wrong = _why_impossible(name, number)
        if wrong is not None:
            raise UserError(
                str(path),
                f"field '{name}' is {number}, and {wrong}",
                "restore or delete this machine profile",
            )
    return machine


_POSITIVE = ("total_bytes", "cores_usable", "cores_total", "threads", "num_gpus", "_per_s", "flops")
"""Ends of the names of counts, sizes and rates of which no machine has none."""


def _numbers(part: object, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a document, with the dotted names of their fields."""
    prefix = f"{name}." if name else ""
    if isinstance(part, tuple):
        for index, each in enumerate(part):
            yield from _numbers(each, f"{prefix}{index}")
    elif is_dataclass(part):
        for field in fields(part):
            yield from _numbers(getattr(part, field.name), f"{prefix}{field.name}")
    elif isinstance(part, int | float) and not isinstance(part, bool):
        yield name, part


def _why_impossible(name: str, number: float) -> str | None:
    if not math.isfinite(number):
        return "must be a finite number"
    if name.removesuffix(".value").endswith(_POSITIVE):
        return None if number > 0 else "must be positive"
    return None if number >= 0 else "must not be negative"


def save_machine(machine: Machine, path: Path) -> None:
    """Raises `UserError` if `path` cannot be written."""
    write_whole(path, to_json(machine))
