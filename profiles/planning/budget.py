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
"""Share of the peak that the caching allocator cannot use: 5 to 10 % is common, 2 % was the largest excess
of measured peaks over predicted ones on an H200."""

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


def budget_of(machine: Machine, vram: int | None, host: int | None, pinned: int | None) -> Budget:
    available = machine.memory.available_bytes
    gpu = None
    if machine.gpu is not None:
        gpu = min(machine.gpu.free_bytes, machine.gpu.total_bytes)
        gpu = gpu if vram is None else min(gpu, vram)
    return Budget(
        gpu_bytes=gpu,
        host_bytes=available if host is None else min(available, host),
        pinned_bytes=pinned,
        gpu_named=vram is not None,
    )


def why_missing(cost: Traffic, budget: Budget) -> str | None:
    """What memory is missing, or `None`. Whether the disk is large enough the engine finds, where it is."""
    if budget.gpu_bytes is None:
        return _short("host memory", host_bytes_needed(cost, budget), budget.host_bytes)
    return (
        _short("GPU memory, CUDA and fragmentation included", gpu_bytes_needed(cost), budget.gpu_bytes)
        or _short("pinned memory", cost.pinned_bytes, budget.pinned_bytes)
        or _short("host memory", host_bytes_needed(cost, budget), budget.host_bytes)
    )


def host_bytes_needed(cost: Traffic, budget: Budget) -> int:
    return cost.peak_host_bytes if budget.gpu_bytes is not None else host_bytes_without_gpu(cost)


def host_bytes_without_gpu(cost: Traffic) -> int:
    """What a GPU would hold is there too, but not what a process with CUDA takes."""
    process = cost.host_memory_bytes["process"]
    smaller = min(process, PROCESS_HOST_BYTES_WITHOUT_GPU)
    return cost.peak_gpu_bytes + cost.peak_host_bytes - process + smaller


def _short(what: str, needed: int, usable: int | None) -> str | None:
    """`None` if `needed` bytes are there, or if no limit is known."""
    if usable is None or needed <= usable:
        return None
    return (
        f"needs {format_bytes(needed)} of {what}, {format_bytes(usable)} are usable: "
        f"{format_bytes(needed - usable)} missing"
    )


def gpu_bytes_needed(cost: Traffic) -> int:
    """GPU memory to reserve: the tensors' peak, fragmentation, CUDA graphs and CUDA's context."""
    return int(cost.peak_gpu_bytes * (1 + FRAGMENTATION)) + cost.gpu_held_bytes + CONTEXT_BYTES
