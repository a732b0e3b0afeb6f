"""Single upgrades of a machine, and what each would bring for a job. Pure; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from engines.costs.resources.traffic import FUSED_ADAM_BYTES
from engines.shapes import Workload
from profiles.advice import words
from profiles.advice.outlook import BestMethod, JobToPlan, Outlook, outlook
from profiles.machine import Cpu, Figure, Machine
from profiles.planning.recommend import plan_engine
from profiles.rates import COPY_WRITE_ALLOCATE

LIMITS = frozenset({"vram_bytes", "host_bytes"})

NETWORKS_GBIT = (1, 10)

CARD_GIB = (8, 12, 16, 24, 32, 48, 80, 96, 141)
"""Sizes that cards come in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Upgrade:
    name: str
    """Such as `GPU memory 24 GiB to 32 GiB`."""
    machine: Machine
    lifts: frozenset[str] = frozenset()
    """Limits of the user's own (fields of `JobToPlan`) that are gone with it."""
    is_second_gpu: bool = False
    network_bytes_per_s: float | None = None
    """To a second machine like it; `None`: there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WhatIf:
    """Of one upgrade."""

    outlook: Outlook
    first_saved_s: float | None
    zeroth_saved_s: float | None
    """Expected seconds of the job less than now, by the best method of each kind; `None`: there is none now,
    or none then, or no time."""
    now_fits: tuple[str, ...]
    """Methods that fit then and do not now."""


def held(machine: Machine, job: JobToPlan) -> Machine:
    """`machine` with no more memory than the job's limits leave it: what is bought comes on top of that."""
    memory, gpu = machine.memory, machine.gpu
    if job.host_bytes is not None:
        memory = replace(
            memory,
            total_bytes=min(memory.total_bytes, job.host_bytes),
            available_bytes=min(memory.available_bytes, job.host_bytes),
        )
    if job.vram_bytes is not None and gpu is not None:
        gpu = replace(
            gpu,
            total_bytes=min(gpu.total_bytes, job.vram_bytes),
            free_bytes=min(gpu.free_bytes, job.vram_bytes),
        )
    return replace(machine, memory=memory, gpu=gpu)


LARGER = 1.1
"""Of a card's memory over what is there, from which it counts as a larger one."""


def upgrades(machine: Machine, whole: Machine | None = None) -> tuple[Upgrade, ...]:
    """One thing changed in each; what it is changed to is a size that can be bought, or twice as much. Of a
    larger card as large a share is free as of `whole`'s: `machine` before the job's limits held it."""
    found: list[Upgrade] = []
    gpu, link, memory, cpu = machine.gpu, machine.link, machine.memory, machine.cpu
    if gpu is not None:
        own = (whole or machine).gpu or gpu
        free = own.free_bytes / own.total_bytes
        for gib in [each for each in CARD_GIB if each * 2**30 > LARGER * gpu.total_bytes][:2]:
            total = gib * 2**30
            larger = replace(gpu, total_bytes=total, free_bytes=int(free * total))
            name = words.upgrade_vram(gpu.total_bytes, total)
            found.append(
                Upgrade(name=name, machine=replace(machine, gpu=larger), lifts=frozenset({"vram_bytes"}))
            )
        second = replace(gpu, num_gpus=gpu.num_gpus + 1)
        found.append(
            Upgrade(name=words.UPGRADE_GPU, machine=replace(machine, gpu=second), is_second_gpu=True)
        )
        found += [
            Upgrade(name=words.upgrade_machine(gbit), machine=machine, network_bytes_per_s=gbit * 1e9 / 8)
            for gbit in NETWORKS_GBIT
        ]
    doubled = replace(
        memory,
        total_bytes=2 * memory.total_bytes,
        available_bytes=memory.available_bytes + memory.total_bytes,
    )
    name = words.upgrade_ram(memory.total_bytes, 2 * memory.total_bytes)
    found.append(
        Upgrade(name=name, machine=replace(machine, memory=doubled), lifts=frozenset({"host_bytes"}))
    )
    if link is not None:
        rates: dict[str, Any] = {name: _times(getattr(link, name), 2) for name in _LINK_RATES}
        found.append(Upgrade(name=words.UPGRADE_SLOT, machine=replace(machine, link=replace(link, **rates))))
    channels = replace(memory, copy_bytes_per_s=_times(memory.copy_bytes_per_s, 2))
    faster_adam = replace(
        cpu,
        adam_elements_per_s=_times(cpu.adam_elements_per_s, 2),
        adamw_kernel_elements_per_s=_times(cpu.adamw_kernel_elements_per_s, 2),
    )
    found.append(
        Upgrade(name=words.UPGRADE_CHANNELS, machine=replace(machine, memory=channels, cpu=faster_adam))
    )
    found.append(Upgrade(name=words.UPGRADE_CORES, machine=replace(machine, cpu=_more_cores(machine))))
    return tuple(found)


_LINK_RATES = (
    "h2d_pinned_bytes_per_s", "d2h_pinned_bytes_per_s", "h2d_pageable_bytes_per_s",
    "d2h_pageable_bytes_per_s", "h2d_duplex_bytes_per_s", "d2h_duplex_bytes_per_s",
)  # fmt: skip


def _more_cores(machine: Machine) -> Cpu:
    """Twice as many; AdamW only as far as memory feeds them."""
    cpu = machine.cpu
    adam, kernel, copy = (
        cpu.adam_elements_per_s,
        cpu.adamw_kernel_elements_per_s,
        machine.memory.copy_bytes_per_s,
    )
    if adam.value is not None and copy.value is not None:
        most = max(1.0, copy.value * COPY_WRITE_ALLOCATE / FUSED_ADAM_BYTES / adam.value)
        adam, kernel = (_times(each, min(2.0, most)) for each in (adam, kernel))
    return replace(
        cpu,
        cores_usable=2 * cpu.cores_usable,
        cores_total=2 * cpu.cores_total,
        threads=2 * cpu.threads,
        adam_elements_per_s=adam,
        adamw_kernel_elements_per_s=kernel,
        matmul_fp32_flops=_times(cpu.matmul_fp32_flops, 2),
        matmul_bf16_flops=_times(cpu.matmul_bf16_flops, 2),
    )


def _times(figure: Figure, factor: float) -> Figure:
    if figure.value is None:
        return figure
    supposed = f"{words.SUPPOSED}: {factor:g} times what is there; {figure.method}"
    return replace(figure.scaled(factor), method=supposed)


def what_if(
    now: Outlook, machine: Machine, job: JobToPlan, others: Mapping[str, Machine]
) -> tuple[WhatIf, ...]:
    """A row for each upgrade and each of the `others` as a whole. `now` is the outlook without any: what is
    added may lie idle, so no upgrade is worse."""
    replaced = [Upgrade(name=name, machine=each, lifts=LIMITS) for name, each in others.items()]
    return (
        *(_row(now, each, job, may_lie_idle=True) for each in upgrades(held(machine, job), machine)),
        *(_row(now, each, job) for each in replaced),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepsOn:
    """What is predicted of each method on one machine, with settings chosen anew."""

    name: str
    """Of the upgrade; empty: the machine as it is."""
    step_s: dict[str, float | None]
    """By method that fits; `None`: no time is predicted."""


def steps_with_upgrades(machine: Machine, job: JobToPlan) -> tuple[StepsOn, ...]:
    """The machine as it is, then every single upgrade of it."""
    return (
        _steps_on("", machine, job),
        *(
            _steps_on(each.name, each.machine, _with_upgrade(job, each))
            for each in upgrades(held(machine, job), machine)
        ),
    )


def _steps_on(name: str, machine: Machine, job: JobToPlan) -> StepsOn:
    plans = [plan_engine(job.context(engine, machine), job.settings_of(engine)) for engine in job.engines]
    return StepsOn(name=name, step_s={plan.engine: plan.prediction.step_s for plan in plans if plan.fits})


def _with_upgrade(job: JobToPlan, upgrade: Upgrade) -> JobToPlan:
    gone: dict[str, Any] = dict.fromkeys(upgrade.lifts)
    job = replace(job, **gone)
    if upgrade.is_second_gpu:
        workload = _in_twice_as_many(job.workload, job.ranks)
        job = replace(job, gpus=2 * job.gpus, workload=workload)
    if upgrade.network_bytes_per_s is not None:
        workload = _in_twice_as_many(job.workload, job.ranks)
        rate = upgrade.network_bytes_per_s
        job = replace(job, nodes=2 * job.nodes, workload=workload, network_bytes_per_s=rate)
    return job


def _row(now: Outlook, upgrade: Upgrade, job: JobToPlan, *, may_lie_idle: bool = False) -> WhatIf:
    then = outlook(upgrade.name, upgrade.machine, _with_upgrade(job, upgrade))
    if may_lie_idle:
        then = replace(then, first=_sooner(now.first, then.first), zeroth=_sooner(now.zeroth, then.zeroth))
    return WhatIf(
        outlook=then,
        first_saved_s=_saved(now, then, "first"),
        zeroth_saved_s=_saved(now, then, "zeroth"),
        now_fits=tuple(engine for engine in then.fits if engine not in now.fits),
    )


def goes_to_twice_as_many(workload: Workload, ranks: int) -> bool:
    """Whether a step that `ranks` processes share out has work for twice as many, its micro-batches halved
    where there are too few."""
    return workload.accumulation % (2 * ranks) == 0 or workload.batch_size % 2 == 0


def _in_twice_as_many(workload: Workload, ranks: int) -> Workload:
    """The same sequences a step, in micro-batches that twice as many processes can share, where they can."""
    if workload.accumulation % (2 * ranks) == 0 or not goes_to_twice_as_many(workload, ranks):
        return workload
    return replace(workload, batch_size=workload.batch_size // 2, accumulation=2 * workload.accumulation)


def _sooner(now: BestMethod | None, then: BestMethod | None) -> BestMethod | None:
    """`then`, but for one that is later than what can be had now."""
    if now is None or now.seconds is None:
        return then
    later = then is None or then.seconds is None or then.seconds[1] > now.seconds[1]
    return now if later else then


def _saved(now: Outlook, then: Outlook, kind: str) -> float | None:
    before, after = getattr(now, kind), getattr(then, kind)
    if before is None or after is None or before.seconds is None or after.seconds is None:
        return None
    return float(before.seconds[1] - after.seconds[1])
