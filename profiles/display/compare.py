"""Machines side by side: those that come with the program, and two against each other. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from profiles.display.tables import Format, link_text
from profiles.machine import Figure, Machine
from profiles.units import NOT_MEASURED, format_bytes, format_elements, format_flops, format_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One number of one machine."""

    value: float | None
    origin: str
    """`measured`, `datasheet`, `absent`; `as found` for what is counted and not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One number of two machines."""

    field: str
    """As in the profile, such as `gpu.copy_bytes_per_s`."""
    first: Side
    second: Side
    ratio: float | None
    """Second over first; `None` where either is absent."""


_FIELDS: tuple[tuple[str, str, Format], ...] = (
    ("gpu.total_bytes", "GPU memory", format_bytes),
    ("gpu.copy_bytes_per_s", "GPU copy, read + written", format_rate),
    ("gpu.matmul_bf16_flops", "GPU matrix product bf16", format_flops),
    ("gpu.matmul_fp16_flops", "GPU matrix product fp16", format_flops),
    ("gpu.matmul_fp32_flops", "GPU matrix product fp32", format_flops),
    ("link.h2d_pinned_bytes_per_s", "host to GPU, pinned", format_rate),
    ("link.d2h_pinned_bytes_per_s", "GPU to host, pinned", format_rate),
    ("link.h2d_duplex_bytes_per_s", "host to GPU, both busy", format_rate),
    ("link.d2h_duplex_bytes_per_s", "GPU to host, both busy", format_rate),
    ("link.h2d_pageable_bytes_per_s", "host to GPU, pageable", format_rate),
    ("link.d2h_pageable_bytes_per_s", "GPU to host, pageable", format_rate),
    ("cpu.cores_usable", "usable cores", lambda count: NOT_MEASURED if count is None else f"{count:g}"),
    ("cpu.matmul_fp32_flops", "CPU matrix product fp32", format_flops),
    ("cpu.matmul_bf16_flops", "CPU matrix product bf16", format_flops),
    ("cpu.adam_elements_per_s", "CPU AdamW, elements", format_elements),
    ("memory.total_bytes", "host memory", format_bytes),
    ("memory.copy_bytes_per_s", "host copy, read + written", format_rate),
)


def compare_machines(first: Machine, second: Machine) -> list[Row]:
    """Every number that predictions rest on, of both machines, in the order of the machine's table."""
    return [_row(field, first, second) for field, _, _ in _FIELDS]


def _row(field: str, first: Machine, second: Machine) -> Row:
    left, right = _side(first, field), _side(second, field)
    ratio = right.value / left.value if right.value is not None and left.value else None
    return Row(field=field, first=left, second=right, ratio=ratio)


def _side(machine: Machine, field: str) -> Side:
    part, _, name = field.partition(".")
    room: Any = getattr(machine, part)
    found = None if room is None else getattr(room, name)
    if isinstance(found, Figure):
        return Side(value=found.value, origin=found.origin)
    return Side(value=found, origin="absent" if found is None else "as found")


def comparison_table(first: Machine, second: Machine) -> RenderableType:
    """Two machines side by side, and how many times the first the second is."""
    table = Table(box=box.SIMPLE_HEAVY)
    table.add_column("", no_wrap=True)
    for machine in (first, second):
        table.add_column(Text(machine.name), justify="right", overflow="fold")
    table.add_column("second / first", justify="right")
    for row, (_, what, form) in zip(compare_machines(first, second), _FIELDS, strict=True):
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}x"
        table.add_row(what, _cell(row.first, form), _cell(row.second, form), ratio)
    return Group(table, Text("m measured, d from a datasheet. GB is 1e9 bytes, GiB is 2**30."))


def _cell(side: Side, form: Format) -> Text:
    mark = {"measured": " m", "datasheet": " d"}.get(side.origin, "")
    return Text(f"{form(side.value)}{mark}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """A machine that comes with the program, in short."""

    name: str
    """What `--profile` and `--emulate` take."""
    machine: str
    origin: str
    gpu_bytes: int | None
    link: str
    h2d_bytes_per_s: float | None
    matmul_bf16_flops: float | None
    cores: int
    memory_bytes: int


def list_machine(name: str, machine: Machine) -> Listed:
    """`origin` is that of its link, the figure that offloading hangs on."""
    link, gpu = machine.link, machine.gpu
    return Listed(
        name=name,
        machine=machine.name,
        origin="absent" if link is None else link.h2d_pinned_bytes_per_s.origin,
        gpu_bytes=None if gpu is None else gpu.total_bytes,
        link=NOT_MEASURED if link is None else link_text(link.generation_max, link.width_max),
        h2d_bytes_per_s=None if link is None else link.h2d_pinned_bytes_per_s.value,
        matmul_bf16_flops=None if gpu is None else gpu.matmul_bf16_flops.value,
        cores=machine.cpu.cores_usable,
        memory_bytes=machine.memory.total_bytes,
    )


def list_table(machines: Sequence[Listed]) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAVY)
    headings = ("name", "origin", "GPU memory", "link", "host to GPU", "bf16 product", "cores", "host memory")
    for heading in headings:
        table.add_column(heading, no_wrap=heading == "name", overflow="fold")
    table.add_column("machine", overflow="fold")
    for one in machines:
        table.add_row(
            one.name, one.origin, format_bytes(one.gpu_bytes), one.link, format_rate(one.h2d_bytes_per_s),
            format_flops(one.matmul_bf16_flops), str(one.cores), format_bytes(one.memory_bytes),
            Text(one.machine),
        )  # fmt: skip
    return table
