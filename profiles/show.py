"""A machine as tables for people. Absent figures are shown as such, with the reason."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from profiles.machine import Cpu, Figure, Gpu, HostMemory, Link, Machine
from profiles.units import NOT_MEASURED, format_bytes, format_elements, format_flops, format_rate

Format = Callable[[float | None], str]


def machine_table(machine: Machine) -> RenderableType:
    """GPU, link, CPU and memory, each figure with its range and its origin."""
    table = Table(title=Text(machine.name), title_justify="left", caption=Text(_caption(machine)))
    table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    table.add_column("value", justify="right", overflow="fold")
    table.add_column("range", overflow="fold")
    table.add_column("origin", overflow="fold")
    if machine.gpu is None:
        table.add_row("GPU", "none", "", _plain(machine.gpu_absent_reason or ""))
    else:
        _gpu_rows(table, machine.gpu)
    if machine.link is not None:
        table.add_section()
        _link_rows(table, machine.link)
    table.add_section()
    _cpu_rows(table, machine.cpu)
    table.add_section()
    _memory_rows(table, machine.memory)
    return table


def figure_cells(figure: Figure, form: Format) -> tuple[Text, Text, Text]:
    """Value, range and origin of one figure; an absent one is `not measured`, with the reason."""
    if figure.value is None:
        return _plain(NOT_MEASURED), _plain(""), _plain(f"({figure.method})")
    samples = f", {figure.count} samples" if figure.count else ""
    origin = f"{figure.origin}{samples}: {figure.method}"
    return _plain(form(figure.value)), _plain(_span(figure, form)), _plain(origin)


def _span(figure: Figure, form: Format) -> str:
    """Such as `24.2 to 30.7 GB/s`; empty where the figure has no range."""
    if figure.low is None or figure.high is None:
        return ""
    low, high = form(figure.low), form(figure.high)
    number, _, unit = low.partition(" ")
    return f"{number if high.endswith(f' {unit}') else low} to {high}"


def _gpu_rows(table: Table, gpu: Gpu) -> None:
    table.add_row("GPU", _plain(gpu.name), "", _plain(f"1 of {gpu.num_gpus}"))
    table.add_row("driver", gpu.driver or "not known", "", "")
    table.add_row("compute capability", gpu.compute_capability or "not known", "", "")
    table.add_row("GPU memory", format_bytes(gpu.total_bytes), "", f"{format_bytes(gpu.free_bytes)} free")
    _figure(table, "GPU copy, read + written", gpu.copy_bytes_per_s, format_rate)
    _figure(table, "GPU matrix product bf16", gpu.matmul_bf16_flops, format_flops)
    _figure(table, "GPU matrix product fp16", gpu.matmul_fp16_flops, format_flops)
    _figure(table, "GPU matrix product fp32", gpu.matmul_fp32_flops, format_flops)


def _link_rows(table: Table, link: Link) -> None:
    best = link_text(link.generation_max, link.width_max)
    of_best = "" if best == NOT_MEASURED else f"of {best}"
    table.add_row("link under load", link_text(link.generation_loaded, link.width_loaded), "", of_best)
    _figure(table, "host to GPU, pinned", link.h2d_pinned_bytes_per_s, format_rate)
    _figure(table, "GPU to host, pinned", link.d2h_pinned_bytes_per_s, format_rate)
    _figure(table, "host to GPU, both busy", link.h2d_duplex_bytes_per_s, format_rate)
    _figure(table, "GPU to host, both busy", link.d2h_duplex_bytes_per_s, format_rate)
    _figure(table, "host to GPU, pageable", link.h2d_pageable_bytes_per_s, format_rate)
    _figure(table, "GPU to host, pageable", link.d2h_pageable_bytes_per_s, format_rate)


def _cpu_rows(table: Table, cpu: Cpu) -> None:
    table.add_row("CPU", _plain(cpu.name), "", "")
    table.add_row("usable cores", str(cpu.cores_usable), "", _plain(cpu.cores_basis))
    _figure(table, "CPU matrix product fp32", cpu.matmul_fp32_flops, format_flops)
    _figure(table, "CPU matrix product bf16", cpu.matmul_bf16_flops, format_flops)
    _figure(table, "CPU AdamW, elements", cpu.adam_elements_per_s, format_elements)


def _memory_rows(table: Table, memory: HostMemory) -> None:
    table.add_row("host memory", format_bytes(memory.total_bytes), "", _plain(memory.total_basis))
    table.add_row("available", format_bytes(memory.available_bytes), "", "")
    table.add_row("swap", format_bytes(memory.swap_bytes), "", "")
    _figure(table, "host copy, read + written", memory.copy_bytes_per_s, format_rate)


def link_text(generation: int | None, width: int | None) -> str:
    """Such as `PCIe 5 x16`; `not measured` where neither is known."""
    if generation is None and width is None:
        return NOT_MEASURED
    return f"PCIe {'?' if generation is None else generation} x{'?' if width is None else width}"


def _figure(table: Table, what: str, figure: Figure, form: Format) -> None:
    table.add_row(what, *figure_cells(figure, form))


def _caption(machine: Machine) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    return f"probed {machine.time} on {machine.platform}; {versions}. GB is 1e9 bytes, GiB is 2**30."


def _plain(text: str) -> Text:
    """Text from outside: square brackets in it are no markup."""
    return Text(text)
