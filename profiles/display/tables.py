"""A machine as tables for people. Absent figures are shown as such, with the reason."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from profiles.machine import NOT_PROBED, Cpu, Figure, Gpu, HostMemory, Link, Machine
from profiles.units import (
    NOT_MEASURED,
    format_bytes,
    format_elements,
    format_flops,
    format_rate,
    format_seconds,
)

Format = Callable[[float | None], str]


Cells = tuple[str, str, str, str]
"""What, value, range, origin."""


def machine_table(machine: Machine) -> RenderableType:
    """GPU, link, CPU, memory and disk, each figure with its range and its origin."""
    table = Table(title=Text(machine.name), title_justify="left", caption=Text(machine_caption(machine)))
    table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    table.add_column("value", justify="right", overflow="fold")
    table.add_column("range", overflow="fold")
    table.add_column("origin", overflow="fold")
    for section in machine_sections(machine):
        for row in section:
            table.add_row(*map(_plain, row))
        table.add_section()
    return table


def machine_sections(machine: Machine) -> list[list[Cells]]:
    """The rows of a machine, by part. Figures that this depth of probe never takes are left out."""
    gpu = (
        [("GPU", "none", "", machine.gpu_absent_reason or "")]
        if machine.gpu is None
        else _gpu_rows(machine.gpu)
    )
    parts = [
        gpu,
        [] if machine.link is None else _link_rows(machine.link),
        _cpu_rows(machine.cpu),
        _memory_rows(machine.memory),
        _disk_rows(machine),
    ]
    return [part for part in parts if part]


def figure_cells(figure: Figure, form: Format) -> tuple[Text, Text, Text]:
    """Value, range and origin of one figure; an absent one is `not measured`, with the reason."""
    if figure.value is None:
        return _plain(NOT_MEASURED), _plain(""), _plain(f"({figure.method})")
    samples = f", {figure.count} samples" if figure.count else ""
    disturbed = f"; disturbed: {figure.disturbance}" if figure.disturbance else ""
    origin = f"{figure.origin}{samples}: {figure.method}{disturbed}"
    return _plain(form(figure.value)), _plain(_span(figure, form)), _plain(origin)


def _span(figure: Figure, form: Format) -> str:
    """Such as `24.2 to 30.7 GB/s`; empty where the figure has no range."""
    if figure.low is None or figure.high is None:
        return ""
    low, high = form(figure.low), form(figure.high)
    number, _, unit = low.partition(" ")
    return f"{number if high.endswith(f' {unit}') else low} to {high}"


def _gpu_rows(gpu: Gpu) -> list[Cells]:
    return [
        ("GPU", gpu.name, "", f"1 of {gpu.num_gpus}"),
        ("driver", gpu.driver or "not known", "", ""),
        ("compute capability", gpu.compute_capability or "not known", "", ""),
        ("GPU memory", format_bytes(gpu.total_bytes), "", f"{format_bytes(gpu.free_bytes)} free"),
        *_figures(
            ("GPU copy, read + written", gpu.copy_bytes_per_s, format_rate),
            ("GPU matrix product bf16", gpu.matmul_bf16_flops, format_flops),
            ("GPU matrix product fp16", gpu.matmul_fp16_flops, format_flops),
            ("GPU matrix product fp32", gpu.matmul_fp32_flops, format_flops),
            ("bf16 product sustained", gpu.matmul_sustained_flops, format_flops),
        ),
        *_conditions(gpu),
    ]


def _conditions(gpu: Gpu) -> list[Cells]:
    """Clocks under load, and what held them down."""
    clocks = [reading.sm_clock_hz for reading in gpu.readings if reading.sm_clock_hz is not None]
    if not clocks:
        return []
    held = sorted({reason for reading in gpu.readings for reason in reading.throttled})
    most = "" if gpu.sm_clock_max_hz is None else f" of {gpu.sm_clock_max_hz / 1e6:.0f} MHz"
    span = f"{min(clocks) / 1e6:.0f} to {max(clocks) / 1e6:.0f} MHz"
    told = f"{len(clocks)} readings; held down by {', '.join(held)}" if held else f"{len(clocks)} readings"
    return [("GPU clock under load", f"{statistics.median(clocks) / 1e6:.0f} MHz{most}", span, told)]


def _link_rows(link: Link) -> list[Cells]:
    best = link_text(link.generation_max, link.width_max)
    of_best = "" if best == NOT_MEASURED else f"of {best}"
    if link.generation_idle is not None:
        of_best += f"; {link_text(link.generation_idle, link.width_idle)} at rest"
    if link.generation_slot_max is not None:
        of_best += f"; the slot has {link_text(link.generation_slot_max, link.width_slot_max)}"
    rows: list[Cells] = [
        ("link under load", link_text(link.generation_loaded, link.width_loaded), "", of_best.lstrip("; ")),
    ]
    if link.replays is not None:
        rows.append(("packets sent again", str(link.replays), "", "during the probe"))
    if link.placement != "not known":
        rows.append(("placement", link.placement, "", ""))
    rows += _figures(
        ("host to GPU, pinned", link.h2d_pinned_bytes_per_s, format_rate),
        ("GPU to host, pinned", link.d2h_pinned_bytes_per_s, format_rate),
        ("host to GPU, both busy", link.h2d_duplex_bytes_per_s, format_rate),
        ("GPU to host, both busy", link.d2h_duplex_bytes_per_s, format_rate),
        ("host to GPU, pageable", link.h2d_pageable_bytes_per_s, format_rate),
        ("GPU to host, pageable", link.d2h_pageable_bytes_per_s, format_rate),
    )
    for gpu in link.each_gpu:
        rows += _figures(
            (f"GPU {gpu.index}, to it", gpu.h2d_bytes_per_s, format_rate),
            (f"GPU {gpu.index}, from it", gpu.d2h_bytes_per_s, format_rate),
            (f"GPU {gpu.index}, to it, all busy", gpu.h2d_together_bytes_per_s, format_rate),
            (f"GPU {gpu.index}, from it, all busy", gpu.d2h_together_bytes_per_s, format_rate),
        )
    return rows


def _cpu_rows(cpu: Cpu) -> list[Cells]:
    counts = (
        (cpu.cores_physical, "physical core"), (cpu.sockets, "socket"), (cpu.numa_nodes, "NUMA node"),
    )  # fmt: skip
    known = ", ".join(
        f"{count} {name}{'' if count == 1 else 's'}" for count, name in counts if count is not None
    )
    rows: list[Cells] = [
        ("CPU", cpu.name, "", known),
        ("usable cores", str(cpu.cores_usable), "", cpu.cores_basis),
    ]
    if cpu.instruction_sets:
        rows.append(("instruction sets", " ".join(cpu.instruction_sets), "", ""))
    if cpu.governor is not None:
        rows.append(("clock governor", cpu.governor, "", ""))
    if cpu.throttled_periods is not None:
        rows.append(("stopped by quota", f"{cpu.throttled_periods} periods", "", "during the probe"))
    rows += _figures(
        ("CPU matrix product fp32", cpu.matmul_fp32_flops, format_flops),
        ("CPU matrix product bf16", cpu.matmul_bf16_flops, format_flops),
        ("CPU AdamW, elements", cpu.adam_elements_per_s, format_elements),
    )
    return rows


def _memory_rows(memory: HostMemory) -> list[Cells]:
    used = "" if memory.swap_used_bytes is None else f"{format_bytes(memory.swap_used_bytes)} in use"
    bound = "the driver refused more" if memory.pinned_refused else "at least"
    pinned = memory.pinned_bytes
    rows: list[Cells] = [
        ("host memory", format_bytes(memory.total_bytes), "", memory.total_basis),
        ("available", format_bytes(memory.available_bytes), "", ""),
        ("swap", format_bytes(memory.swap_bytes), "", used),
        *_figures(
            ("host copy, read + written", memory.copy_bytes_per_s, format_rate),
            ("host triad, read + written", memory.triad_bytes_per_s, format_rate),
            (f"pinned by one process, {bound}" if pinned.value else "pinned by one process", pinned,
             format_bytes),
        ),
    ]  # fmt: skip
    return rows


def _disk_rows(machine: Machine) -> list[Cells]:
    disk = machine.disk
    if disk is None:
        reason = machine.disk_absent_reason
        return [] if reason is None or machine.depth == "brief" else [("disk", "none", "", reason)]
    kind = disk.file_system or "file system not known"
    cache = "" if disk.direct is None else ", direct" if disk.direct else ", through the page cache"
    return [
        ("disk", f"{format_bytes(disk.free_bytes)} free", "", f"{kind}{cache}"),
        *_figures(
            ("disk, writing", disk.write_bytes_per_s, format_rate),
            ("disk, reading", disk.read_bytes_per_s, format_rate),
        ),
    ]


def link_text(generation: int | None, width: int | None) -> str:
    """Such as `PCIe 5 x16`; `not measured` where neither is known."""
    if generation is None and width is None:
        return NOT_MEASURED
    return f"PCIe {'?' if generation is None else generation} x{'?' if width is None else width}"


def _figures(*named: tuple[str, Figure, Format]) -> list[Cells]:
    rows = []
    for what, figure, form in named:
        if figure != NOT_PROBED:
            value, span, origin = figure_cells(figure, form)
            rows.append((what, value.plain, span.plain, origin.plain))
    return rows


def machine_caption(machine: Machine) -> str:
    if not machine.versions:  # no program has seen it
        return f"written {machine.time} from datasheets. GB is 1e9 bytes, GiB is 2**30."
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    depth = "" if machine.depth is None else f" ({machine.depth}, {format_seconds(machine.duration_s)})"
    return f"probed {machine.time}{depth} on {machine.platform}; {versions}. GB is 1e9 bytes, GiB is 2**30."


def _plain(text: str) -> Text:
    """Text from outside: square brackets in it are no markup."""
    return Text(text)
