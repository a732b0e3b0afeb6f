"""What `probe` measures beyond the figures that predictions need; what time does not allow is left out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from profiles.machine import Cpu, Figure, Gpu, HostMemory, Link, absent
from profiles.probe import adam, cpu, disk, gpu, link, memory, multi_gpu, soak
from profiles.probe.numa import near
from profiles.probe.subprocesses import nvbandwidth, throw_away
from profiles.probe.timing import Meter, figure
from profiles.system import cgroup, nvml
from profiles.system.topology import Port, numa_node_of, port_above

SOAK_S = (3.0, 60.0)
"""Of the default and of the full probe."""
PIN_S = (3.0, 40.0)
PIN_SHARE = 2
"""At most this share of the available host memory is pinned."""
START_S = 20.0
CHILD_S = 12.0
"""A child's start, torch and CUDA: the most that is waited for, and what must be left."""
NVBANDWIDTH_S = (8.0, 40.0)

NUM_DEVICE = 2
"""The limits of memory, nvbandwidth."""


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
    return one + (multi_gpu.NUM_MEASUREMENTS if num_gpus > 1 else 0)


def bandwidth(
    meter: Meter, found: Cpu, memory_found: HostMemory, *, memory_bytes: int, cache_bytes: int | None
) -> tuple[Cpu, HostMemory]:
    """The triad, and AdamW's share of it. Right after AdamW, so that the same neighbours disturb both."""
    triad = meter.optional(
        "host memory triad",
        lambda seconds: memory.triad_bytes_per_s(seconds, memory_bytes, cache_bytes),
        absent,
    )
    share = adam.bandwidth_share(found.adam_elements_per_s, triad)
    return replace(found, adam_bandwidth_share=share), replace(memory_found, triad_bytes_per_s=triad)


def host(meter: Meter, found: Cpu, *, memory_bytes: int, threads: tuple[int, ...]) -> Cpu:
    """With as many threads as torch has now; `threads` are those of AdamW's points."""
    return replace(
        found,
        products=cpu.products(meter),
        adam_points=adam.adam_points(meter, memory_bytes=memory_bytes, threads=threads),
    )


def device(
    meter: Meter,
    gpu_found: Gpu,
    link_found: Link,
    cpu_found: Cpu,
    *,
    elements: int,
    memory_bytes: int,
    full: bool,
    root: Path,
) -> tuple[Gpu, Link, Cpu]:
    """`elements` is the size of AdamW beside copies. With as many threads as torch has now."""
    import torch

    with torch.cuda.device(0):
        handle = open_gpu()
        # Half of the budget for each of the two that run side by side.
        beside_adam = link.beside_adam(meter, elements=elements // 2, memory_bytes=memory_bytes // 2)
        with near_gpu(handle, root):
            beside_matmul = link.beside_matmul(meter, memory_bytes=memory_bytes)
            sweeps = link.sweeps(meter, memory_bytes=memory_bytes)
        gpu_found = replace(gpu_found, **soak.soak(meter, handle, SOAK_S[full]))
        gpu_found = replace(gpu_found, **gpu.more_rates(meter))
        check = meter.optional(
            "nvbandwidth",
            lambda seconds: nvbandwidth(NVBANDWIDTH_S[full], handle.uuid if handle else None),
            lambda why: (absent(why), absent(why)),
            needs_s=NVBANDWIDTH_S[full] if shutil.which("nvbandwidth") else 0.0,
            repeats=False,
        )
    if gpu_found.num_gpus > 1:
        each = multi_gpu.each_gpu(meter, gpu_found.num_gpus, memory_bytes=memory_bytes)
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
    return gpu_found, link_found, cpu_found


def memory_limits(meter: Meter, *, full: bool, root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of `Gpu` and of `HostMemory` by field: what one process can allocate, and what it can pin.

    Found in a process of its own, before this one has a CUDA context. GPU memory is not measured beside other
    processes: one of them might then find none and fail.
    """
    seconds = PIN_S[full]
    refused: bool | None = None

    def take(_: float) -> tuple[Figure, ...]:
        nonlocal refused
        handle = nvml.open_device()
        others = handle.other_processes() if handle else None
        most_bytes = cgroup.host_memory(root).available_bytes // PIN_SHARE
        answer, end = throw_away(
            START_S + 2 * seconds, vram=not others, most_bytes=most_bytes, seconds=seconds
        )
        if not answer:
            raise RuntimeError(f"the child that allocates {end or 'gave no answer'}")
        refused = answer.get("refused")
        usable, context = (answer.get(name) for name in ("usable_bytes", "context_bytes"))
        why = "NVML does not tell the memory in use"
        if others:
            why = f"{len(others)} other processes use the GPU and could run out of memory"
        return (
            absent(why)
            if usable is None
            else figure([float(usable)], "torch.empty until refused, in a process of its own"),
            absent(why)
            if context is None
            else figure([float(context)], "memory in use on the GPU after a context's start less before it"),
            *_pinned(answer, end),
        )

    found = meter.optional(
        "memory to the limit", take, lambda why: (absent(why),) * 4, needs_s=CHILD_S + seconds, repeats=False
    )
    usable, context, amount, rate = found
    return (
        {"usable_bytes": usable, "context_bytes": context},
        {"pinned_bytes": amount, "pinned_refused": refused, "pin_bytes_per_s": rate},
    )


def _pinned(answer: dict[str, Any], end: str) -> tuple[Figure, Figure]:
    """How much was pinned, and how fast."""
    if "pinned_bytes" not in answer:
        missing = absent(f"the child that pins {end or 'gave no answer'}")
        return missing, missing
    stopped = f"the process {end}" if end else answer["stopped"]
    method = f"pinned in steps of {answer['step_bytes'] / 2**20:.0f} MiB until: {stopped}"
    rates = [answer["step_bytes"] / max(step_s, 1e-9) for step_s in answer["steps_s"]]
    return (
        figure([float(answer["pinned_bytes"])], method),
        figure(rates, "torch's pinned allocator, pages touched") if rates else absent(stopped),
    )


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
