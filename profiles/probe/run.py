"""Measures a machine: one file per probe, here their order and what each depth of probe takes.

Importing this is cheap; torch is imported when something is measured.
"""

from __future__ import annotations

import platform
import warnings
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from profiles.machine import Cpu, Depth, Disk, Figure, Gpu, HostMemory, LinkFigures, Machine, absent
from profiles.probe import cpu, disk, gpu, launches, link, memory, multi_gpu, numa, pinned_limit
from profiles.probe.timing import Meter, OnMeasurement, clock_s, now, one_line
from profiles.system import busy, cgroup, nvml
from profiles.system.topology import Port, port_above, processors

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS_EACH: dict[Depth, float] = {"brief": 1.0, "default": 0.5, "full": 2.0}
"""Time for one measurement where the caller sets none."""
LIMIT_S: dict[Depth, float] = {"brief": 50.0, "default": 54.0, "full": 280.0}
"""When nothing that can be done without is begun any more: the whole ends within 60 s, or five minutes."""

SUSTAINED_S: dict[Depth, float] = {"brief": 1.0, "default": 3.0, "full": 60.0}
"""Time under load; an H200 has its lasting rate after 0.2 s, others as heat builds up."""

MEMORY_SHARE = 8
MEMORY_BYTES_AT_MOST = 2 * 2**30
"""A measurement allocates at most this much host memory, and at most this share of what is available."""

_PACKAGES = ("torch", "triton", "transformers", "torchao", "nvidia-ml-py")


def probe_machine(
    progress: OnMeasurement = lambda what, done, total: None,
    seconds: float | None = None,
    *,
    depth: Depth = "default",
    folder: Path | None = None,
    root: Path = cgroup.ROOT,
) -> Machine:
    """Measures this machine, with `cuda:0` if torch sees one.

    `progress` is called with what is measured next, how many measurements are done and of how many. `seconds`
    is the time for all measurements together, which torch's start and allocations come on top of. A `brief`
    probe takes the figures that predictions need, in some 15 s. `folder` is where the disk is measured; by
    default where the user stands. `root` is the file tree whose limits and topology hold.
    A measurement that fails leaves an absent figure with the reason; no GPU is an answer too.

    A CUDA context stays behind in this process and holds some hundred megabytes of GPU memory until the
    process ends; a program that goes on to fill the GPU from other processes probes in one of its own.
    """
    started, started_s = now(), clock_s()
    throttled_before = cgroup.throttled_periods(root)
    gpu_reason = why_no_gpu()
    host = _Usable(root)
    brief, full = depth == "brief", depth == "full"
    num_gpus = 0 if gpu_reason is not None else _num_gpus()
    count = _count(num_gpus, brief=brief)
    each = SECONDS_EACH[depth] if seconds is None else seconds / count
    meter = Meter(
        seconds_each=each, total=count, progress=progress, limit_s=LIMIT_S[depth], started_s=started_s
    )
    cpu_found, memory_found = _host(meter, host, triad=not brief)
    gpu_found: Gpu | None = None
    link_found: LinkFigures | None = None
    if gpu_reason is None:
        try:
            if not brief:  # before this process has a CUDA context
                most, refused = pinned_limit.pinned_limit(meter, full=full, root=root)
                memory_found = replace(memory_found, pinned_bytes=most, pinned_refused=refused)
            gpu_found, link_found, started_by_cpu = _device(meter, root, SUSTAINED_S[depth])
            cpu_found = _with_launches(cpu_found, started_by_cpu)
            if num_gpus > 1:
                budget = memory_budget(cgroup.host_memory(root))
                each_gpu = multi_gpu.each_gpu(meter, num_gpus, memory_bytes=budget)
                link_found = replace(link_found, each_gpu=each_gpu)
        except Exception as error:  # the driver lets torch see a GPU and then refuses it
            meter.between, gpu_reason = None, one_line(error)
            gpu_found = link_found = None
    disk_found: Disk | None = None
    disk_reason: str | None = "a brief probe measures no disk"
    if not brief:
        disk_found, disk_reason = disk.probe_disk(meter, folder or Path.cwd(), root)
    if gpu_found is not None:
        gpu_found = replace(gpu_found, readings=tuple(meter.readings))
    throttled = cgroup.throttled_periods(root)
    if throttled is not None and throttled_before is not None:
        cpu_found = replace(cpu_found, throttled_periods=throttled - throttled_before)
    progress("done", count, count)
    return Machine(
        name=f"{gpu_found.name if gpu_found else 'no GPU'}, {cpu_found.name}",
        time=started,
        gpu=gpu_found,
        gpu_absent_reason=gpu_reason,
        link=link_found,
        cpu=cpu_found,
        memory=memory_found,
        platform=cgroup.platform_name(root),
        versions=dict(_versions()),
        disk=disk_found,
        disk_absent_reason=disk_reason,
        depth=depth,
        duration_s=meter.elapsed_s(),
    )


def why_no_gpu() -> str | None:
    """Why torch cannot use a GPU here; `None` if it can."""
    import torch

    with warnings.catch_warnings(record=True) as caught:  # torch warns of a driver that is too old
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without GPU support"
    if caught:
        return " ".join(str(caught[0].message).split())
    return nvml.why_no_device() or "torch sees no CUDA device, though the driver does"


def _count(num_gpus: int, *, brief: bool) -> int:
    """How many measurements a probe makes."""
    count = cpu.NUM_MEASUREMENTS + memory.NUM_MEASUREMENTS
    if num_gpus > 0:
        count += gpu.NUM_MEASUREMENTS + launches.NUM_MEASUREMENTS + link.NUM_MEASUREMENTS
    if num_gpus > 1:
        count += multi_gpu.NUM_MEASUREMENTS
    if brief:
        return count
    count += memory.NUM_TRIAD + disk.NUM_MEASUREMENTS
    if num_gpus > 0:
        count += pinned_limit.NUM_MEASUREMENTS
    return count


class _Usable:
    """What this process may use, read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cores = cgroup.usable_cores(root)
        self.limit = cgroup.host_memory(root)
        self.cache_bytes = cgroup.last_level_cache_bytes(root)
        self.memory_bytes = memory_budget(self.limit)
        self.processors = processors(root)


PartT = TypeVar("PartT", Cpu, HostMemory)


def _marked(part: PartT, why: str | None) -> PartT:
    """With its measured figures marked as disturbed, where `why` says by what."""
    values = {field.name: getattr(part, field.name) for field in fields(part)} if why else {}
    marked: dict[str, Any] = {
        name: replace(value, disturbance=value.disturbance or why)
        for name, value in values.items()
        if isinstance(value, Figure) and value.value is not None
    }
    return replace(part, **marked)


def _host(meter: Meter, host: _Usable, *, triad: bool) -> tuple[Cpu, HostMemory]:
    waiting, before = busy.pressure(host.root), busy.cpu_times(host.root)
    with numa.torch_threads(host.cores.count):
        cpu_found = cpu.probe_cpu(
            meter,
            cgroup.cpu_name(host.root),
            host.cores.count,
            host.cores.basis,
            host.cores.total,
            memory_bytes=host.memory_bytes,
            cache_bytes=host.cache_bytes,
        )
        memory_found = memory.probe_memory(
            meter,
            host.limit,
            memory_bytes=host.memory_bytes,
            cache_bytes=host.cache_bytes,
            triad=triad,
        )
    others = busy.cores_of_others(before, busy.cpu_times(host.root))
    why = busy.disturbance(others, cpu_found.threads, host.cores.total)
    found = host.processors
    cpu_found = replace(
        _marked(cpu_found, why),
        others_cores=others,
        pressure=waiting,
        cores_physical=found.cores_physical,
        sockets=found.sockets,
        numa_nodes=found.numa_nodes,
        instruction_sets=found.instruction_sets,
        governor=found.governor,
    )
    return cpu_found, _marked(memory_found, why)


def _device(meter: Meter, root: Path, sustained_s: float) -> tuple[Gpu, LinkFigures, launches.Launches]:
    """`cuda:0`, its link and what it takes to start its work; the long load comes last, when nothing is left
    that its heat could slow down."""
    import torch

    before = nvml.open_device(0, None)
    used_bytes = None if before is None else before.used_bytes()
    with torch.cuda.device(0):
        device = gpu.open_gpu()
        if device is not None:
            meter.look = device.reading
        bus_id = device.settings().bus_id if device else None
        port = Port(generation_max=None, width_max=None) if bus_id is None else port_above(bus_id, root)
        idle = device.link() if device else link.UNKNOWN_LINK
        replays = device.replays() if device else None
        gpu_found = gpu.probe_gpu(meter, 0, device, used_bytes)
        windows = launches.Windows()
        meter.measure("starting operations", windows.begin, absent)
        meter.between = windows.take  # until the GPU is left
        graphs = launches.probe_graphs(meter, gpu_found.matmul_bf16_flops)
        gpu_found = replace(
            gpu_found,
            product_s=graphs["product_s"],
            workspace_bytes=meter.measure("workspaces of products", gpu.workspace_bytes, absent),
            process_bytes=gpu.process_bytes(device, used_bytes),
        )
        # CUDA's start took some of the memory.
        memory_bytes = memory_budget(cgroup.host_memory(root))
        with numa.near_device(bus_id, root) as placement:
            link_found = link.probe_link(meter, device, memory_bytes=memory_bytes)
        after = device.replays() if device else None
        link_found = replace(
            link_found,
            generation_idle=idle.generation_now,
            width_idle=idle.width_now,
            generation_slot_max=port.generation_max,
            width_slot_max=port.width_max,
            placement=placement,
            replays=None if after is None or replays is None else after - replays,
        )
        sustained = gpu.sustained_flops(meter, sustained_s)
        meter.between = None
        found = windows.launches(**graphs)
        return replace(gpu_found, matmul_sustained_flops=sustained), link_found, found


def _with_launches(part: Cpu, found: launches.Launches) -> Cpu:
    return replace(
        part,
        python_turn_s=found.python_turn_s,
        forward_launch_s=found.forward_s,
        training_launch_s=found.training_s,
        graph_launch_s=found.graph_s,
        triton_launch_s=found.triton_s,
    )


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def memory_budget(limit: cgroup.HostMemoryLimit) -> int:
    return min(limit.available_bytes // MEMORY_SHARE, MEMORY_BYTES_AT_MOST)


def _versions() -> Iterator[tuple[str, str]]:
    import torch

    yield "python", platform.python_version()
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        yield "cuda", torch.version.cuda
