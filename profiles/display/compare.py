"""Machines side by side: those that come with the program, and two against each other. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from profiles.display.tables import link_text
from profiles.figures import FigureRow, Format, reported
from profiles.machine import Figure, Machine
from profiles.units import NOT_MEASURED, format_bytes, format_flops, format_rate

ORIGINS = "m measured, d from a datasheet. GB is 1e9 bytes, GiB is 2**30."


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedValue:
    """One number of one machine."""

    value: float | None
    origin: str
    """`measured`, `datasheet`, `absent`; `as found` for what is counted and not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedFigure:
    """One number of two machines."""

    field: str
    """As in the profile, such as `gpu.copy_bytes_per_s`."""
    first: ComparedValue
    second: ComparedValue
    ratio: float | None
    """Second over first; `None` where either is absent."""


def compare_machines(first: Machine, second: Machine) -> list[ComparedFigure]:
    """The numbers that a report shows, of both machines, in the order of the machine's table."""
    return [_compared(row, first, second) for row in reported()]


def _compared(row: FigureRow, first: Machine, second: Machine) -> ComparedFigure:
    left, right = _of_one(row.find(first)), _of_one(row.find(second))
    ratio = right.value / left.value if right.value is not None and left.value else None
    return ComparedFigure(field=row.path, first=left, second=right, ratio=ratio)


def _of_one(found: Figure | int | None) -> ComparedValue:
    if isinstance(found, Figure):
        return ComparedValue(value=found.value, origin=found.origin)
    return ComparedValue(value=found, origin="absent" if found is None else "as found")


def comparison_table(first: Machine, second: Machine) -> RenderableType:
    """Two machines side by side, and how many times the first the second is."""
    table = Table(box=box.SIMPLE_HEAVY)
    table.add_column("", no_wrap=True)
    for machine in (first, second):
        table.add_column(Text(machine.name), justify="right", overflow="fold")
    table.add_column("second / first", justify="right")
    for row, found in zip(reported(), compare_machines(first, second), strict=True):
        ratio = "-" if found.ratio is None else f"{found.ratio:.2f}x"
        table.add_row(row.label, _cell(found.first, row.form), _cell(found.second, row.form), ratio)
    return Group(table, Text(ORIGINS))


def _cell(value: ComparedValue, form: Format) -> Text:
    mark = {"measured": " m", "datasheet": " d"}.get(value.origin, "")
    return Text(f"{form(value.value)}{mark}")


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
    """A row for each; the machine in its own words last, which takes what is left of the line."""
    table = Table(box=box.SIMPLE_HEAVY, padding=(0, 1, 0, 0), collapse_padding=True, pad_edge=False)
    headings = ("name", "GPU memory", "link", "host to GPU", "bf16 product", "cores", "host memory")
    for heading in headings:
        table.add_column(heading, no_wrap=heading == "name", overflow="fold")
    table.add_column("machine", overflow="fold")
    for one in machines:
        rate = ComparedValue(value=one.h2d_bytes_per_s, origin=one.origin)
        table.add_row(
            one.name, format_bytes(one.gpu_bytes), one.link, _cell(rate, format_rate),
            format_flops(one.matmul_bf16_flops), str(one.cores), format_bytes(one.memory_bytes),
            Text(one.machine),
        )  # fmt: skip
    return Group(table, Text(ORIGINS))
