"""A machine as tables for people. Absent figures are shown as such, with the reason."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from profiles.display.core_speeds import two_speeds_text
from profiles.figures import EACH_GPU, Format, figures_of
from profiles.language import enumerated, translated, word
from profiles.machine import NOT_PROBED, Cpu, Figure, Gpu, HostMemory, LinkFigures, Machine
from profiles.units import NOT_MEASURED, format_bytes, format_seconds, format_span

Cells = tuple[str, str, str, str]
"""What, value, range, origin."""


def machine_table(machine: Machine) -> RenderableType:
    """GPU, link, CPU, memory and disk, each figure with its range and its origin."""
    table = Table(
        title=Text(machine.name), title_justify="left", caption=Text(translated(machine_caption(machine)))
    )
    table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    table.add_column(word("value"), justify="right", overflow="fold")
    table.add_column(word("range"), overflow="fold")
    table.add_column(word("origin"), overflow="fold")
    for section in machine_sections(machine):
        for row in section:
            table.add_row(*(_plain(word(cell)) for cell in row))
        table.add_section()
    speeds = two_speeds_text(machine.cpu)
    return table if speeds is None else Group(table, Text(translated(speeds)))


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
    """Empty where the figure has no range."""
    if figure.low is None or figure.high is None:
        return ""
    return format_span(figure.low, figure.high, form)


def _gpu_rows(gpu: Gpu) -> list[Cells]:
    return [
        ("GPU", gpu.name, "", f"1 of {gpu.num_gpus}"),
        ("driver", gpu.driver or "not known", "", ""),
        ("compute capability", gpu.compute_capability or "not known", "", ""),
        *_counted("gpu", gpu),
        *_measured("gpu", gpu),
        *_conditions(gpu),
    ]


def _conditions(gpu: Gpu) -> list[Cells]:
    """Clocks under load, and what held them down."""
    clocks = [reading.sm_clock_hz for reading in gpu.readings if reading.sm_clock_hz is not None]
    if not clocks:
        return []
    reasons = sorted({reason for reading in gpu.readings for reason in reading.throttled})
    most = "" if gpu.sm_clock_max_hz is None else f" of {gpu.sm_clock_max_hz / 1e6:.0f} MHz"
    span = f"{min(clocks) / 1e6:.0f} to {max(clocks) / 1e6:.0f} MHz"
    readings = f"{len(clocks)} readings"
    if reasons:
        readings += f"; held down by {', '.join(reasons)}"
    return [("GPU clock under load", f"{statistics.median(clocks) / 1e6:.0f} MHz{most}", span, readings)]


def _link_rows(link: LinkFigures) -> list[Cells]:
    best = link_text(link.generation_max, link.width_max)
    of_best = "" if best == NOT_MEASURED else f"of {best}"
    if link.generation_idle is not None:
        of_best += f"; {link_text(link.generation_idle, link.width_idle)} at rest"
    if link.generation_slot_max is not None:
        of_best += f"; the slot has {link_text(link.generation_slot_max, link.width_slot_max)}"
    rows: list[Cells] = [
        ("link under load", link_text(link.generation_loaded, link.width_loaded), "", of_best.lstrip("; ")),
        *_counted("link", link),
    ]
    if link.placement != "not known":
        rows.append(("placement", link.placement, "", ""))
    rows += _measured("link", link)
    for gpu in link.each_gpu:
        rows += _figures(
            (enumerated([f"GPU {gpu.index}", word(row.label)]), row.of(gpu), row.form) for row in EACH_GPU
        )
    return rows


def _cpu_rows(cpu: Cpu) -> list[Cells]:
    counts = (
        (cpu.cores_physical, "physical core"), (cpu.sockets, "socket"), (cpu.numa_nodes, "NUMA node"),
    )  # fmt: skip
    known = enumerated(
        word(f"{count} {name}{'' if count == 1 else 's'}") for count, name in counts if count is not None
    )
    rows: list[Cells] = [
        ("CPU", cpu.name, "", known),
        *_counted("cpu", cpu),
    ]
    if cpu.instruction_sets:
        rows.append(("instruction sets", " ".join(cpu.instruction_sets), "", ""))
    if cpu.governor is not None:
        rows.append(("clock governor", cpu.governor, "", ""))
    return rows + _measured("cpu", cpu)


def _memory_rows(memory: HostMemory) -> list[Cells]:
    return _counted("memory", memory) + _measured("memory", memory)


def _disk_rows(machine: Machine) -> list[Cells]:
    disk = machine.disk
    if disk is None:
        reason = machine.disk_absent_reason
        return [] if reason is None or machine.depth == "brief" else [("disk", "none", "", reason)]
    kind = disk.file_system or "file system not known"
    cache = "" if disk.direct is None else ", direct" if disk.direct else ", through the page cache"
    return [
        ("disk", f"{format_bytes(disk.free_bytes)} free", "", f"{kind}{cache}"),
        *_measured("disk", disk),
    ]


def link_text(generation: int | None, width: int | None) -> str:
    """Such as `PCIe 5 x16`; `not measured` where neither is known."""
    if generation is None and width is None:
        return NOT_MEASURED
    return f"PCIe {'?' if generation is None else generation} x{'?' if width is None else width}"


def _counted(part: str, holder: object) -> list[Cells]:
    """The numbers of one part that are counted, with what is said beside them."""
    return [
        (row.label, row.form(found), "", row.detail(holder) if row.detail else "")
        for row in figures_of(part)
        if isinstance(found := row.of(holder), int)
    ]


def _measured(part: str, holder: object) -> list[Cells]:
    """The figures of one part; the labels of those that were had end with what is said of them."""
    named = []
    for row in figures_of(part):
        found, label = row.of(holder), row.label
        if row.detail is not None and isinstance(found, Figure) and found.value is not None:
            label = enumerated([word(label), word(row.detail(holder))])
        named.append((label, found, row.form))
    return _figures(named)


def _figures(named: Iterable[tuple[str, Figure | int | None, Format]]) -> list[Cells]:
    """Those that the probe took; numbers that are counted are left out."""
    rows = []
    for what, figure, form in named:
        if isinstance(figure, Figure) and figure != NOT_PROBED:
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
