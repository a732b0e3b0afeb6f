"""The memory that a plan may use, and whether what it costs fits into it. Pure; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from engines.costs.resources.disk import fewest_on_disk
from engines.costs.resources.traffic import FREE_SHARE, Traffic
from engines.costs.transformer import PROCESS_HOST_BYTES_WITHOUT_GPU
from profiles.machine import Figure, Gpu, Machine
from profiles.system.gpu_allocator import allocator_setting, is_expandable
from profiles.units import format_bytes

CONTEXT_BYTES = 800_000_000
"""What CUDA's context, libraries and kernels take of a GPU where the machine's profile does not say it. One
H200's 0.73 to 0.8 GB (NVML's reading in reports/results, less what torch reserved and less the 0.645 GB that
the card keeps from every process); cards with fewer multiprocessors take less."""

PINNED_BYTES_PER_PAGE_TABLE_BYTE = 512
"""The GPU keeps 8 bytes for each page of 4 KiB of pinned host memory: 0.34 GB for 178 GB of OPT-175B's
weights, and in the same proportion in the ten other records of zo2 (reports/results, one H200)."""

WORKSPACE_BYTES = 33_554_432
"""What torch has for a workspace of matrix products where the machine's profile does not say it: 32 MiB
on a Hopper GPU, where others take 8."""

TRITON_NEEDS = 7
"""Major version of CUDA's compute capability."""

FRAGMENTATION = 0.01
ALLOCATOR_BYTES = 80_000_000
"""What torch reserves over tensors, over what lies apart (`Traffic.gpu_apart_bytes`) and over workspaces,
where it has room: a share, and places that are cut in pieces, whatever the model's size."""

PIECES_BYTES = 50_000_000
"""Of these, what it cannot do without: before memory runs out it gives back every segment of which no part
is taken. Jobs of `mezo` and `zo2` of 0.9 to 14 GB that ran near their limit had 12 to 101 MB beside what is
counted, those that ran out up to 27; small ones of `exact-offload` and `lsp` ran with 11 to 56
(`tests/studies/prediction_grid_h200`)."""

PAGES_BYTES, PAGES_SHARE = 30_000_000, 0.007
"""With expandable segments, what torch reserves over tensors, pools and workspaces where it has room: of each
range of addresses a part of the last page, and what lies between tensors there. Of 50 runs of 0.4 to 14 GB
that train few weights or one block at a time 44 had 6 to 130 MB beside what is counted
(`tests/studies/prediction_grid_h200_expandable`, `_last_evening`, `_fifth_evening`)."""

PIECES_AND_ERRORS_BYTES = 55_000_000
"""What a plan asks for over them there, since whole pages that are free go back before memory runs out. Of 15
jobs whose allocations were replayed by the allocator's rules, each at less and less memory until it ended,
those without gradients of all weights needed 13 to 108 MB over what they had allocated."""

LASTING = ("weights", "optimizer", "gradients", "adapters", "projectors", "cores")
"""Kinds of GPU memory whose size a model's shape and the settings say to the byte."""

LASTING_MARGIN, PASSING_MARGIN = 0.005, 0.04
"""By what share these may be more than is counted, and all others, which code that a compiler makes decides:
of 72 runs 70 had allocated no more than 2.2 % of the others over what is counted, two 5.7 %."""

BETWEEN_GRADIENTS_RESERVED = 0.5
"""Of `Traffic.gpu_between_gradients_bytes`, what torch reserves on the average."""


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
    context_bytes: int = CONTEXT_BYTES
    """What CUDA itself takes of the GPU."""
    workspace_bytes: int = WORKSPACE_BYTES
    """What torch has for each workspace of products."""
    has_triton: bool = True
    """Its kernels run there."""
    is_expandable: bool = False
    """torch's allocator has expandable segments."""

    @property
    def fillable_gpu_bytes(self) -> int | None:
        """Up to which a plan fills the GPU with what it could do without, such as blocks that stay there: all
        of a limit that the user named, else with `FREE_SHARE` to spare, since what is free now may be taken
        later. `None`: there is no GPU."""
        return self.filled_but(FREE_SHARE)

    def filled_but(self, spare: float) -> int | None:
        """Likewise with that share to spare."""
        if self.gpu_bytes is None or self.gpu_named:
            return self.gpu_bytes
        return int((1 - spare) * self.gpu_bytes)


def budget_of(
    machine: Machine,
    vram: int | None,
    host: int | None,
    pinned: int | None,
    *,
    expandable: bool | None = None,
) -> Budget:
    """`expandable`: whether torch's allocator has expandable segments; `None`: as in processes that are
    started here."""
    available = machine.memory.available_bytes
    gpu, context, workspaces = None, CONTEXT_BYTES, WORKSPACE_BYTES
    if machine.gpu is not None:
        gpu = min(machine.gpu.free_bytes, machine.gpu.total_bytes)
        gpu = gpu if vram is None else min(gpu, vram)
        context = _measured_or(machine.gpu.process_bytes, CONTEXT_BYTES)
        workspaces = _measured_or(machine.gpu.workspace_bytes, WORKSPACE_BYTES)
    return Budget(
        gpu_bytes=gpu,
        host_bytes=available if host is None else min(available, host),
        pinned_bytes=_least(pinned, pinned_limit_bytes(machine)),
        gpu_named=vram is not None,
        disk_bytes=None if machine.disk is None else machine.disk.free_bytes,
        context_bytes=context,
        workspace_bytes=workspaces,
        has_triton=machine.gpu is not None and _runs_triton(machine.gpu),
        is_expandable=is_expandable(allocator_setting()) if expandable is None else expandable,
    )


def _runs_triton(gpu: Gpu) -> bool:
    """Triton's kernels need a GPU of 2017 or later."""
    return gpu.compute_capability is None or int(gpu.compute_capability.partition(".")[0]) >= TRITON_NEEDS


def _measured_or(figure: Figure, default: int) -> int:
    return default if figure.value is None else int(figure.value)


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
        ("GPU memory, CUDA and fragmentation included", gpu_bytes_needed(cost, budget), budget.gpu_bytes),
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
    """What a GPU would hold is there too, but neither what a process with CUDA takes nor a compiler, which is
    for a GPU's kernels."""
    process = cost.host_memory_bytes["process"]
    smaller = min(process, PROCESS_HOST_BYTES_WITHOUT_GPU)
    there = cost.peak_gpu_bytes + cost.gpu_without_triton_bytes
    compiler = cost.host_memory_bytes.get("compiler", 0)
    return there + cost.peak_host_bytes - process - compiler + smaller


def num_on_disk(cost: Traffic, budget: Budget, local_ranks: int = 1) -> int:
    """Blocks that host memory has no room for; `cost` is that of a step with none on disk, of one process,
    `budget` that of each of the machine's ranks."""
    block_bytes = max(layer.h2d_bytes for layer in cost.layers)
    if not (cost.pinned_bytes and block_bytes):
        return 0
    part = cost.of_a_rank(local_ranks)
    others_bytes = host_bytes_needed(part, budget) - part.pinned_bytes
    streamed = cost.pinned_bytes // block_bytes
    usable = budget.host_bytes - others_bytes
    if budget.pinned_bytes is not None:  # what of the blocks is in host memory is pinned
        usable = min(usable, budget.pinned_bytes)
    if local_ranks > 1 and "blocks, pinned" in cost.shared_host_bytes:  # which they have once
        spare = cost.shared_host_bytes["blocks, pinned"] - cost.host_memory_bytes["blocks, pinned"]
        usable = local_ranks * usable - spare
    return fewest_on_disk([block_bytes] * streamed, usable)


def gpu_bytes_needed(cost: Traffic, budget: Budget) -> int:
    """GPU memory that a plan asks for: what torch cannot do without, with a margin, and what CUDA takes
    itself. That is not what it reserves where it has room, of which it gives a part back."""
    least, beside = _placed_bytes(cost, budget), beside_torch_bytes(cost, budget)
    if not budget.is_expandable:
        least -= cost.gpu_returned_bytes
        return int(least * (1 + cost.gpu_margin)) + PIECES_BYTES + beside
    lasting = sum(cost.gpu_memory_bytes.get(kind, 0) for kind in LASTING)
    margin = LASTING_MARGIN * lasting + PASSING_MARGIN * (least - lasting)
    return least + int(margin) + PIECES_AND_ERRORS_BYTES + cost.gpu_between_gradients_bytes + beside


def beside_torch_bytes(cost: Traffic, budget: Budget) -> int:
    """GPU memory that no allocator of torch's counts: CUDA's context, its graphs, and tables of the pages of
    pinned memory."""
    page_tables = cost.pinned_bytes // PINNED_BYTES_PER_PAGE_TABLE_BYTE
    return budget.context_bytes + cost.gpu_held_bytes + page_tables


def reserved_bytes(cost: Traffic, budget: Budget) -> int:
    """What torch's allocator takes from the driver, where there is room, for tensors whose peak the cost
    model knows."""
    workspaces = cost.workspaces * budget.workspace_bytes
    tensors = _placed_bytes(cost, budget) - workspaces
    if budget.is_expandable:
        # Where activations are small, gradients have no places of theirs to be among.
        between = max(
            int(BETWEEN_GRADIENTS_RESERVED * cost.gpu_between_gradients_bytes), cost.gpu_small_bytes
        )
        return int(tensors * (1 + PAGES_SHARE)) + PAGES_BYTES + between + workspaces
    return int(tensors * (1 + FRAGMENTATION)) + ALLOCATOR_BYTES + workspaces


def _placed_bytes(cost: Traffic, budget: Budget) -> int:
    """Tensors at their peak, what lies apart of them, and workspaces."""
    apart = cost.gpu_pool_bytes if budget.is_expandable else cost.gpu_apart_bytes
    without_triton = 0 if budget.has_triton else cost.gpu_without_triton_bytes
    workspaces = cost.workspaces * budget.workspace_bytes
    return cost.peak_gpu_bytes + apart + without_triton + workspaces


def taken_bytes(cost: Traffic, budget: Budget) -> int:
    """What torch's allocator comes to in this budget: of what it needs for a plan that fits, no more than the
    GPU has for it, since it gives back free places before memory runs out."""
    reserved = reserved_bytes(cost, budget)
    if budget.gpu_bytes is None or gpu_bytes_needed(cost, budget) > budget.gpu_bytes:
        return reserved
    return min(reserved, budget.gpu_bytes - beside_torch_bytes(cost, budget))
