"""The memory that a plan may use, and whether what it costs fits into it. Pure; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from engines.costs.traffic import Traffic
from engines.costs.transformer import PROCESS_HOST_BYTES_WITHOUT_GPU
from profiles.machine import Machine
from profiles.units import format_bytes

CONTEXT_BYTES = 600_000_000
"""What CUDA's context and its libraries' workspaces take of a GPU beside tensors: 0.3 to 0.6 GB."""

FRAGMENTATION = 0.05
ALLOCATOR_BYTES = 300_000_000
"""What torch reserves over the tensors' peak: a share of it, and blocks that are cut in pieces, whatever the
model's size. With both, 33 of the 44 reserved peaks in reports/results are within 7 % of the prediction."""

FREE_SHARE = 0.10
"""Share of the GPU that zo2's resident blocks leave free where the user has named no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """The memory that a plan may use."""

    gpu_bytes: int | None
    """`None`: there is no GPU."""
    host_bytes: int
    pinned_bytes: int | None
    """`None`: no limit is known."""
    gpu_named: bool
    """Whether the user named the GPU's limit."""
    disk_bytes: int | None = None
    """Free on the disk of the profile; `None`: none is known."""


def budget_of(machine: Machine, vram: int | None, host: int | None, pinned: int | None) -> Budget:
    available = machine.memory.available_bytes
    gpu = None
    if machine.gpu is not None:
        gpu = min(machine.gpu.free_bytes, machine.gpu.total_bytes)
        gpu = gpu if vram is None else min(gpu, vram)
    return Budget(
        gpu_bytes=gpu,
        host_bytes=available if host is None else min(available, host),
        pinned_bytes=_least(pinned, pinned_limit_bytes(machine)),
        gpu_named=vram is not None,
        disk_bytes=None if machine.disk is None else machine.disk.free_bytes,
    )


def pinned_limit_bytes(machine: Machine) -> int | None:
    """What the driver let a process pin, where the probe was refused more; `None`: no limit was met. Where
    the probe stopped by itself, to spare the machine, there may be none."""
    figure = machine.memory.pinned_bytes
    return int(figure.value) if machine.memory.pinned_refused and figure.value is not None else None


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def why_missing(cost: Traffic, budget: Budget) -> str | None:
    """What memory is missing, each kind that is, or `None`."""
    short = shortages(cost, budget)
    return " and ".join(each.text for each in short) or None


@dataclass(frozen=True, kw_only=True, slots=True)
class Shortage:
    """One kind of memory of which there is too little."""

    what: str
    needed_bytes: int
    usable_bytes: int

    @property
    def missing_bytes(self) -> int:
        return self.needed_bytes - self.usable_bytes

    @property
    def text(self) -> str:
        return (
            f"needs {format_bytes(self.needed_bytes)} of {self.what}, {format_bytes(self.usable_bytes)} are "
            f"usable: {format_bytes(self.missing_bytes)} missing"
        )


def shortages(cost: Traffic, budget: Budget) -> tuple[Shortage, ...]:
    """Of GPU memory, pinned memory, host memory and disk, those of which there is too little. The GPU's is
    with what CUDA and fragmentation take; of the disk, what a step reads must have room on it."""
    on_gpu = budget.gpu_bytes is not None
    wanted = (
        ("GPU memory, CUDA and fragmentation included", gpu_bytes_needed(cost), budget.gpu_bytes),
        ("pinned memory", cost.pinned_bytes if on_gpu else 0, budget.pinned_bytes),
        ("host memory", host_bytes_needed(cost, budget), budget.host_bytes),
        ("disk", cost.disk_bytes, budget.disk_bytes),
    )
    return tuple(
        Shortage(what=what, needed_bytes=needed, usable_bytes=usable)
        for what, needed, usable in wanted
        if usable is not None and needed > usable
    )


def host_bytes_needed(cost: Traffic, budget: Budget) -> int:
    return cost.peak_host_bytes if budget.gpu_bytes is not None else host_bytes_without_gpu(cost)


def host_bytes_without_gpu(cost: Traffic) -> int:
    """What a GPU would hold is there too, but not what a process with CUDA takes."""
    process = cost.host_memory_bytes["process"]
    smaller = min(process, PROCESS_HOST_BYTES_WITHOUT_GPU)
    return cost.peak_gpu_bytes + cost.peak_host_bytes - process + smaller


def gpu_bytes_needed(cost: Traffic) -> int:
    """GPU memory to reserve: the tensors' peak, fragmentation, CUDA graphs and CUDA's context."""
    return reserved_bytes(cost) + cost.gpu_held_bytes + CONTEXT_BYTES


def reserved_bytes(cost: Traffic) -> int:
    """What torch's allocator takes from the driver for tensors whose peak the cost model knows."""
    return int(cost.peak_gpu_bytes * (1 + FRAGMENTATION)) + ALLOCATOR_BYTES
