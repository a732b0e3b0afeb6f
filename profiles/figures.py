"""The numbers of a machine as rows: where each is, its label and unit, which probe takes it, who reads it.

Every printer goes through `FIGURES`, in its order. A new figure is the function of a probe that measures it,
a field of `profiles.machine` and a row here; one that a report is to show has a label in its text too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from profiles.machine import Cpu, Depth, Figure, Gpu, HostMemory, LinkFigures, Machine
from profiles.units import (
    NOT_MEASURED,
    format_bytes,
    format_elements,
    format_flops,
    format_nanoseconds,
    format_rate,
    format_seconds,
)

Format = Callable[[float | None], str]
"""A number for people; `None` is 'not measured'."""


Reader = Literal["predict", "doctor", "report", "person"]
"""Predictions and plans; the checks of `doctor`; reports and comparisons of machines; or only a person who
decides about offloading, for the reason beside the row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FigureRow:
    """One number of a machine: a `Figure`, or what is counted and not measured."""

    path: str
    """Part of the machine and field, such as `gpu.copy_bytes_per_s`."""
    label: str
    form: Format
    """Its unit, as it is written for people."""
    depth: Depth
    """The shortest probe that takes it."""
    used_by: tuple[Reader, ...]
    detail: Callable[[Any], str] | None = None
    """What the part says about it: beside a counted number, after the label of a measured one."""

    @property
    def part(self) -> str:
        return self.path.partition(".")[0]

    @property
    def field(self) -> str:
        return self.path.partition(".")[2]

    def find(self, machine: Machine) -> Figure | int | None:
        """`None` where the machine lacks the part, or the part the number."""
        return self.of(getattr(machine, self.part))

    def of(self, part: object) -> Figure | int | None:
        """The number in `part`, such as `Machine.gpu`."""
        found: Figure | int | None = None if part is None else getattr(part, self.field)
        return found


def _row(
    path: str,
    label: str,
    form: Format,
    depth: Depth,
    *used_by: Reader,
    detail: Callable[[Any], str] | None = None,
) -> FigureRow:
    return FigureRow(path=path, label=label, form=form, depth=depth, used_by=used_by, detail=detail)


def format_count(count: float | None) -> str:
    return NOT_MEASURED if count is None else f"{count:g}"


def format_periods(count: float | None) -> str:
    return NOT_MEASURED if count is None else f"{count:g} periods"


def _free(gpu: Gpu) -> str:
    return f"{format_bytes(gpu.free_bytes)} free"


def _cores(cpu: Cpu) -> str:
    return cpu.cores_basis


def _total(memory: HostMemory) -> str:
    return memory.total_basis


def _swap_used(memory: HostMemory) -> str:
    return "" if memory.swap_used_bytes is None else f"{format_bytes(memory.swap_used_bytes)} in use"


def _bound(memory: HostMemory) -> str:
    return "the driver refused more" if memory.pinned_refused else "at least"


def _during(_: Cpu | LinkFigures) -> str:
    return "during the probe"


FIGURES: tuple[FigureRow, ...] = (
    _row("gpu.total_bytes", "GPU memory", format_bytes, "brief", "predict", "doctor", "report", detail=_free),
    _row("gpu.copy_bytes_per_s", "GPU copy, read + written", format_rate, "brief", "predict", "report"),
    _row("gpu.matmul_bf16_flops", "GPU matrix product bf16", format_flops, "brief", "predict", "report"),
    _row("gpu.matmul_fp16_flops", "GPU matrix product fp16", format_flops, "brief", "predict", "report"),
    _row("gpu.matmul_fp32_flops", "GPU matrix product fp32", format_flops, "brief", "predict", "report"),
    _row("gpu.matmul_sustained_flops", "bf16 product sustained", format_flops, "brief", "predict"),
    _row("gpu.product_s", "a product, beside that rate", format_seconds, "brief", "predict"),
    _row("gpu.process_bytes", "CUDA itself, a process", format_bytes, "brief", "predict"),
    _row("gpu.workspace_bytes", "workspaces of products", format_bytes, "brief", "predict"),
    _row("link.replays", "packets sent again", format_count, "brief", "doctor", detail=_during),
    _row(
        "link.h2d_pinned_bytes_per_s", "host to GPU, pinned", format_rate, "brief", "predict", "doctor",
        "report",
    ),
    _row(
        "link.d2h_pinned_bytes_per_s", "GPU to host, pinned", format_rate, "brief", "predict", "doctor",
        "report",
    ),
    _row("link.h2d_pageable_bytes_per_s", "host to GPU, pageable", format_rate, "brief", "doctor", "report"),
    _row("link.d2h_pageable_bytes_per_s", "GPU to host, pageable", format_rate, "brief", "doctor", "report"),
    _row("link.h2d_duplex_bytes_per_s", "host to GPU, both busy", format_rate, "brief", "predict", "report"),
    _row("link.d2h_duplex_bytes_per_s", "GPU to host, both busy", format_rate, "brief", "predict", "report"),
    _row(
        "cpu.cores_usable", "usable cores", format_count, "brief", "predict", "doctor", "report",
        detail=_cores,
    ),
    _row("cpu.throttled_periods", "stopped by quota", format_periods, "brief", "doctor", detail=_during),
    _row("cpu.matmul_fp32_flops", "CPU matrix product fp32", format_flops, "brief", "predict", "report"),
    _row("cpu.matmul_bf16_flops", "CPU matrix product bf16", format_flops, "brief", "predict", "report"),
    _row("cpu.adam_elements_per_s", "CPU AdamW, elements", format_elements, "brief", "predict", "report"),
    _row("cpu.adamw_kernel_elements_per_s", "this program's AdamW", format_elements, "brief", "predict"),
    _row("cpu.python_turn_s", "a turn of a Python loop", format_nanoseconds, "brief", "predict", "doctor"),
    _row("cpu.forward_launch_s", "starting an operation", format_seconds, "brief", "predict"),
    _row("cpu.training_launch_s", "the same with autograd", format_seconds, "brief", "predict"),
    _row("cpu.graph_launch_s", "a kernel of a CUDA graph", format_seconds, "brief", "predict"),
    _row("cpu.triton_launch_s", "starting a Triton kernel", format_seconds, "brief", "predict"),
    _row("memory.total_bytes", "host memory", format_bytes, "brief", "doctor", "report", detail=_total),
    _row("memory.available_bytes", "available", format_bytes, "brief", "predict"),
    _row("memory.swap_bytes", "swap", format_bytes, "brief", "doctor", detail=_swap_used),
    _row(
        "memory.copy_bytes_per_s", "host copy, read + written", format_rate, "brief", "predict", "doctor",
        "report",
    ),
    _row("memory.triad_bytes_per_s", "host triad, read + written", format_rate, "default", "doctor"),
    _row(
        "memory.pinned_bytes", "pinned by one process", format_bytes, "default", "predict", "doctor",
        detail=_bound,
    ),
    # The probe has to write what it reads; the rate tells how long blocks take to be put on this disk.
    _row("disk.write_bytes_per_s", "disk, writing", format_rate, "default", "predict"),
    _row("disk.read_bytes_per_s", "disk, reading", format_rate, "default", "predict"),
)  # fmt: skip
"""In the order in which they are shown."""

EACH_GPU: tuple[FigureRow, ...] = (
    _row("each_gpu.h2d_bytes_per_s", "to it", format_rate, "brief", "person"),
    _row("each_gpu.d2h_bytes_per_s", "from it", format_rate, "brief", "person"),
    _row("each_gpu.h2d_together_bytes_per_s", "to it, all busy", format_rate, "brief", "person"),
    _row("each_gpu.d2h_together_bytes_per_s", "from it, all busy", format_rate, "brief", "person"),
    _row("each_gpu.from_gpu_bytes_per_s", "from the next GPU", format_rate, "brief", "person"),
)
"""Of each `profiles.machine.GpuLink`, where there are several GPUs."""


def figures_of(part: str) -> tuple[FigureRow, ...]:
    return tuple(row for row in FIGURES if row.part == part)


def reported() -> tuple[FigureRow, ...]:
    """What a report and a comparison of machines show."""
    return tuple(row for row in FIGURES if "report" in row.used_by)
