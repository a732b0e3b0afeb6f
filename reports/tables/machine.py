"""A machine as a table: each of its numbers with its origin. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from harness.records.columns import Column
from harness.records.run import Environment
from profiles.figures import reported
from profiles.language import translated
from profiles.machine import Cpu, Figure, Gpu, HostMemory, LinkFigures, Machine
from profiles.units import NOT_MEASURED, format_bytes
from reports.format import Table, minute, span
from reports.messages import say


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """Something known of a machine, and how it is known."""

    quantity: str
    value: str
    origin: str


MACHINE: tuple[Column[Fact], ...] = (
    Column("quantity", lambda fact: fact.quantity),
    Column("value", lambda fact: fact.value),
    Column("origin", lambda fact: fact.origin),
)


def machine_facts(machine: Machine | None, environment: Environment) -> Table:
    """From the runs' `environment` where no profile was kept."""
    facts = _of_runs(environment) if machine is None else _of_profile(machine)
    return Table.of(MACHINE, list(facts), say("tablenote.machine"))


def _of_runs(environment: Environment) -> Iterator[Fact]:
    absent = say("machine.from_runs")
    yield _fact("gpu", environment.gpu_name or say("setting.no_gpu"), absent)
    yield _fact("gpu_memory", format_bytes(environment.gpu_total_bytes), absent)
    yield _fact("link", environment.link or NOT_MEASURED, absent)
    yield _fact("cpu", environment.cpu, absent)
    yield _fact("host_memory", format_bytes(environment.host_memory_bytes), absent)
    yield _fact("platform", environment.platform, absent)


def _of_profile(machine: Machine) -> Iterator[Fact]:
    if machine.gpu is None:
        yield _fact("gpu", say("setting.no_gpu"), translated(machine.gpu_absent_reason or ""))
    else:
        yield from _of_gpu(machine.gpu)
    if machine.link is not None:
        yield from _of_link(machine.link)
    yield from _of_cpu(machine.cpu)
    memory = machine.memory
    yield _fact("host_memory", format_bytes(memory.total_bytes), translated(memory.total_basis))
    yield from _figures("memory", memory)
    yield _fact("platform", machine.platform, say("machine.probed", time=minute(machine.time)))


def _of_gpu(gpu: Gpu) -> Iterator[Fact]:
    yield _fact("gpu", gpu.name, say("machine.driver", driver=gpu.driver or say("reproduce.not_known")))
    free = say("machine.free", free=format_bytes(gpu.free_bytes))
    yield _fact("gpu_memory", format_bytes(gpu.total_bytes), free)
    yield from _figures("gpu", gpu)


def _of_link(link: LinkFigures) -> Iterator[Fact]:
    most = say("machine.link_max", link=_lanes(link.generation_max, link.width_max))
    yield _fact("link", _lanes(link.generation_loaded, link.width_loaded), most)
    yield from _figures("link", link)


def _of_cpu(cpu: Cpu) -> Iterator[Fact]:
    basis = translated(cpu.cores_basis)
    yield _fact(
        "cpu", cpu.name, say("machine.cores", usable=cpu.cores_usable, total=cpu.cores_total, basis=basis)
    )
    yield from _figures("cpu", cpu)


def _figures(part: str, holder: Gpu | LinkFigures | Cpu | HostMemory) -> Iterator[Fact]:
    """What was measured of a part, with its range where that shows."""
    for row in reported():
        if row.part != part or not isinstance(found := row.of(holder), Figure):
            continue
        text = row.form(found.value)
        if found.low is not None and found.high is not None and found.low < found.high:
            low, high = row.form(found.low), row.form(found.high)
            if low != high:
                text = say("table.with_range", value=text, range=span(low, high))
        yield _fact(row.path, text, say(f"origin.{found.origin}", method=translated(found.method)))


def _fact(key: str, text: str, origin: str) -> Fact:
    return Fact(quantity=say(f"machine.{key}"), value=text, origin=origin)


def _lanes(generation: int | None, width: int | None) -> str:
    if generation is None or width is None:
        return NOT_MEASURED
    return say("machine.lanes", generation=generation, width=width)
