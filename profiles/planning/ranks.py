"""What one of several processes has of a machine: its GPU's link while all links are in use, its part of the
cores and of host memory and its bandwidth. Pure; no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engines.shapes import ModelShape, Workload
from profiles.machine import Figure, LinkFigures, Machine
from profiles.planning.budget import budget_of
from profiles.planning.context import PlanningContext


def context_of_a_rank(
    engine: str,
    machine: Machine,
    shape: ModelShape,
    workload: Workload,
    *,
    vram_bytes: int | None = None,
    host_bytes: int | None = None,
    pinned_limit_bytes: int | None = None,
    gpus: int = 1,
    nodes: int = 1,
    network_bytes_per_s: float | None = None,
) -> PlanningContext:
    """What the plan of the slowest of `gpus` processes on each of `nodes` machines is made for: its part of
    the step, on its part of the machine. The limits are the machine's."""
    part = machine_of_a_rank(machine, gpus)

    def of(limit: int | None) -> int | None:
        return None if limit is None else limit // gpus

    return PlanningContext(
        engine=engine,
        machine=part,
        shape=shape,
        workload=workload.of_a_rank(gpus * nodes),
        budget=budget_of(part, vram_bytes, of(host_bytes), of(pinned_limit_bytes)),
        ranks=gpus * nodes,
        local_ranks=gpus,
        micro_batches=workload.accumulation,
        network_bytes_per_s=network_bytes_per_s,
    )


def machine_of_a_rank(machine: Machine, gpus: int) -> Machine:
    """The machine as the slowest of `gpus` processes finds it, one for each GPU; itself for one process.

    Links are those measured with all GPUs copying, where the probe has; else as fast as the one that was
    measured alone. Busy in both directions they are together no faster than host memory (`_within_memory`).
    """
    if gpus == 1:
        return machine
    cpu, memory, link = machine.cpu, machine.memory, machine.link
    if link is not None:
        link = _within_memory(_slowest(link, gpus), machine, gpus)
    return replace(
        machine,
        link=link,
        cpu=replace(
            cpu,
            cores_usable=max(1, cpu.cores_usable // gpus),
            threads=max(1, cpu.threads // gpus),
            matmul_fp32_flops=_shared(cpu.matmul_fp32_flops, gpus),
            matmul_bf16_flops=_shared(cpu.matmul_bf16_flops, gpus),
            adam_elements_per_s=_shared(cpu.adam_elements_per_s, gpus),
            adamw_kernel_elements_per_s=_shared(cpu.adamw_kernel_elements_per_s, gpus),
        ),
        memory=replace(
            memory,
            total_bytes=memory.total_bytes // gpus,
            available_bytes=memory.available_bytes // gpus,
            copy_bytes_per_s=_shared(memory.copy_bytes_per_s, gpus),
            triad_bytes_per_s=_shared(memory.triad_bytes_per_s, gpus),
        ),
    )


def _shared(figure: Figure, count: int) -> Figure:
    return figure.scaled(1 / count, f"shared by {count} processes")


def _slowest(link: LinkFigures, gpus: int) -> LinkFigures:
    """Every rate of the link by as much less as the slowest GPU's is while all of them copy."""
    together = link.each_gpu[:gpus]
    found: dict[str, Any] = {}
    for direction in ("h2d", "d2h"):
        alone = getattr(link, f"{direction}_pinned_bytes_per_s")
        rates = [
            rate for each in together if (rate := getattr(each, f"{direction}_together_bytes_per_s").value)
        ]
        if len(rates) < gpus or not alone.value:
            continue
        factor = min(1.0, min(rates) / alone.value)
        for name in (f"{direction}_pinned_bytes_per_s", f"{direction}_duplex_bytes_per_s"):
            found[name] = getattr(link, name).scaled(factor, f"of {gpus} GPUs that copy at once")
    return replace(link, **found)


def _within_memory(link: LinkFigures, machine: Machine, gpus: int) -> LinkFigures:
    """Links busy in both directions, which together read and write host memory no faster than it can.

    What it can is what a copy by all cores reads and writes, or one link in both directions, if that is more.
    On a host with two H200s (100.7 GB/s either way) steps of `zo2` moved 103 to 106 GB/s over both links,
    where each link alone moves 97 (records of 29 November 2026 in reports/results, `*-2gpus_*`).
    """
    names = ("h2d_duplex_bytes_per_s", "d2h_duplex_bytes_per_s")
    alone = machine.link
    copy = machine.memory.copy_bytes_per_s.value
    both = [getattr(link, name).value for name in names]
    if alone is None or copy is None or not all(both):
        return link
    most = max(copy, sum(getattr(alone, name).value or 0.0 for name in names))
    factor = most / gpus / sum(both)
    if factor >= 1.0:
        return link
    why = f"as host memory allows {gpus} links"
    found: dict[str, Any] = {name: getattr(link, name).scaled(factor, why) for name in names}
    return replace(link, **found)
