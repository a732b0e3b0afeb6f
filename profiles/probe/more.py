"""What `probe` measures beyond the figures that predictions need; what time does not allow is left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from profiles import limits, nvml
from profiles.machine import Cpu, Figure, Gpu, HostMemory, Link, absent
from profiles.probe import adam, cpu, disk, gpu, link, memory, several, soak
from profiles.probe.outside import nvbandwidth, throw_away
from profiles.probe.placement import near
from profiles.probe.timing import Meter, figure
from profiles.topology import Port, numa_node_of, port_above

SOAK_S = (4.0, 60.0)
"""Of the default and of the full probe."""
PIN_S = (5.0, 40.0)
PIN_SHARE = 2
"""At most this share of the available host memory is pinned."""
START_S = 20.0
"""A child's start: torch and CUDA."""

NUM_DEVICE = 3
"""Usable GPU memory, pinned memory, nvbandwidth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bus:
    """Where the GPU is plugged in."""

    numa_node: int | None
    port: Port


def count_host(memory_bytes: int, threads: tuple[int, ...]) -> int:
    return (
        cpu.NUM_PRODUCTS
        + memory.NUM_OPTIONAL
        + adam.num_points(memory_bytes, threads)
        + disk.NUM_MEASUREMENTS
    )


def count_gpu(num_gpus: int) -> int:
    if num_gpus == 0:
        return 0
    one = gpu.NUM_OPTIONAL + soak.NUM_MEASUREMENTS + link.NUM_OPTIONAL + NUM_DEVICE
    return one + (several.NUM_MEASUREMENTS if num_gpus > 1 else 0)


def host(
    meter: Meter,
    found: Cpu,
    memory_found: HostMemory,
    *,
    memory_bytes: int,
    cache_bytes: int | None,
    threads: tuple[int, ...],
) -> tuple[Cpu, HostMemory]:
    """With as many threads as torch has now."""
    triad = meter.optional(
        "host memory triad",
        lambda seconds: memory.triad_bytes_per_s(seconds, memory_bytes, cache_bytes),
        absent,
    )
    found = replace(
        found,
        products=cpu.products(meter),
        adam_points=adam.adam_points(meter, memory_bytes=memory_bytes, threads=threads),
        adam_bandwidth_share=adam.bandwidth_share(found.adam_elements_per_s, triad),
    )
    return found, replace(memory_found, triad_bytes_per_s=triad)


def device(
    meter: Meter,
    gpu_found: Gpu,
    link_found: Link,
    cpu_found: Cpu,
    memory_found: HostMemory,
    *,
    elements: int,
    memory_bytes: int,
    full: bool,
    root: Path,
) -> tuple[Gpu, Link, Cpu, HostMemory]:
    """`elements` is the size of AdamW beside copies. With as many threads as torch has now."""
    import torch

    with torch.cuda.device(0):
        handle = open_gpu()
        with near_gpu(handle, root):
            sweeps = link.sweeps(meter, memory_bytes=memory_bytes)
            beside_matmul = link.beside_matmul(meter, memory_bytes=memory_bytes)
        beside_adam = link.beside_adam(meter, elements=elements // 2, memory_bytes=memory_bytes // 2)
        gpu_found = replace(gpu_found, **gpu.more_rates(meter))
        memory_found = pinned(meter, memory_found, PIN_S[full], root)
        gpu_found = replace(gpu_found, **soak.soak(meter, handle, SOAK_S[full]))
        check = meter.optional(
            "nvbandwidth",
            lambda seconds: nvbandwidth(min(30.0, meter.left_s() + 5), handle.uuid if handle else None),
            lambda why: (absent(why), absent(why)),
        )
    if gpu_found.num_gpus > 1:
        each = several.each_gpu(meter, gpu_found.num_gpus, memory_bytes=memory_bytes)
        link_found = replace(link_found, each_gpu=each)
    if handle is not None:
        fixed = handle.settings()
        gpu_found = replace(
            gpu_found,
            power_limit_w=fixed.power_limit_w,
            sm_clock_max_hz=fixed.sm_clock_max_hz,
            ecc_enabled=fixed.ecc_enabled,
            mig_enabled=fixed.mig_enabled,
            persistence_enabled=fixed.persistence_enabled,
        )
    gpu_found = replace(gpu_found, matmul_during_copies_flops=beside_matmul.work_per_s)
    link_found = replace(
        link_found,
        sweeps=sweeps,
        h2d_during_adam_bytes_per_s=beside_adam.h2d_bytes_per_s,
        d2h_during_adam_bytes_per_s=beside_adam.d2h_bytes_per_s,
        h2d_during_matmul_bytes_per_s=beside_matmul.h2d_bytes_per_s,
        d2h_during_matmul_bytes_per_s=beside_matmul.d2h_bytes_per_s,
        h2d_nvbandwidth_bytes_per_s=check[0],
        d2h_nvbandwidth_bytes_per_s=check[1],
    )
    cpu_found = replace(cpu_found, adam_during_copies_elements_per_s=beside_adam.work_per_s)
    return gpu_found, link_found, cpu_found, memory_found


def vram(meter: Meter) -> dict[str, Any]:
    """Figures of `Gpu` by field: what one process can allocate, and its context.

    To be called before this process has a context.

    Not measured beside other processes: one of them might then find no memory and fail.
    """

    def take(seconds: float) -> tuple[Figure, Figure]:
        handle = nvml.open_device()
        others = handle.other_processes() if handle else None
        if others:
            raise RuntimeError(f"{len(others)} other processes use the GPU and could run out of memory")
        answer, end = throw_away("vram", START_S + 20)
        if not answer:
            raise RuntimeError(f"the child that allocates {end or 'gave no answer'}")
        context = answer["context_bytes"]
        return (
            figure([float(answer["usable_bytes"])], "torch.empty until refused, in a process of its own"),
            absent("NVML does not tell the memory in use")
            if context is None
            else figure([float(context)], "memory in use on the GPU after a context's start less before it"),
        )

    usable, context = meter.optional("usable GPU memory", take, lambda why: (absent(why), absent(why)))
    return {"usable_bytes": usable, "context_bytes": context}


def pinned(meter: Meter, found: HostMemory, seconds: float, root: Path) -> HostMemory:
    """`found` with how much host memory a process can pin, and how fast, found in a process of its own."""
    refused: bool | None = None

    def take(_: float) -> tuple[Figure, Figure]:
        nonlocal refused
        most_bytes = limits.host_memory(root).available_bytes // PIN_SHARE
        answer, end = throw_away("pinned", START_S + 2 * seconds, most_bytes=most_bytes, seconds=seconds)
        if not answer:
            raise RuntimeError(f"the child that pins {end or 'gave no answer'}")
        refused = answer["refused"]
        stopped = f"the process {end}" if end else answer["stopped"]
        method = f"pinned in steps of {answer['step_bytes'] / 2**20:.0f} MiB until: {stopped}"
        rates = [answer["step_bytes"] / max(step_s, 1e-9) for step_s in answer["steps_s"]]
        return (
            figure([float(answer["pinned_bytes"])], method),
            figure(rates, "torch's pinned allocator, pages touched") if rates else absent(stopped),
        )

    amount, rate = meter.optional("pinned memory", take, lambda why: (absent(why), absent(why)))
    return replace(found, pinned_bytes=amount, pinned_refused=refused, pin_bytes_per_s=rate)


@contextmanager
def near_gpu(handle: nvml.NvmlDevice | None, root: Path) -> Iterator[tuple[Bus, str]]:
    """This thread near the GPU inside; yields where the GPU is and where the thread runs."""
    bus_id = handle.settings().bus_id if handle else None
    node = None if bus_id is None else numa_node_of(bus_id, root)
    port = Port(generation_max=None, width_max=None) if bus_id is None else port_above(bus_id, root)
    with near(node, root) as placement:
        yield Bus(numa_node=node, port=port), placement


def open_gpu() -> nvml.NvmlDevice | None:
    """NVML's view of `cuda:0`."""
    import torch

    properties: Any = torch.cuda.get_device_properties(0)
    # torch before 2.4 or so has no UUID; CUDA_VISIBLE_DEVICES then decides.
    uuid = getattr(properties, "uuid", None)
    return nvml.open_device(0, None if uuid is None else str(uuid))
