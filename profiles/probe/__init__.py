"""Measures a machine. One file per probe: the GPU and its link, the CPU, memory.

Importing this is cheap; torch is imported when something is measured.
"""

from __future__ import annotations

import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from profiles import limits, nvml
from profiles.machine import Cpu, Gpu, HostMemory, Link, Machine
from profiles.probe import cpu, gpu, link, memory
from profiles.probe.timing import Meter, Progress, now, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS_EACH = 1.0
"""Time for one measurement where the caller sets none: a probe of 4 to 12 s after torch has started."""

MEMORY_SHARE = 8
MEMORY_BYTES_AT_MOST = 2 * 2**30
"""A measurement allocates at most this much host memory, and at most this share of what is available."""

_PACKAGES = ("torch", "triton", "transformers", "torchao", "nvidia-ml-py")


def probe_machine(
    progress: Progress = lambda what, done, total: None, seconds: float | None = None
) -> Machine:
    """Measures this machine, with `cuda:0` if torch sees one.

    `progress` is told what is measured next, how many measurements are done, and of how many. `seconds`
    is the time for all measurements together, which torch's start and allocations come on top of.
    A measurement that fails leaves an absent figure with the reason; no GPU is an answer too.

    A CUDA context stays behind in this process and holds some hundred megabytes of GPU memory until the
    process ends; a program that goes on to fill the GPU from other processes probes in one of its own.
    """
    started = now()
    gpu_reason = why_no_gpu()
    count = cpu.NUM_MEASUREMENTS + memory.NUM_MEASUREMENTS
    if gpu_reason is None:
        count += gpu.NUM_MEASUREMENTS + link.NUM_MEASUREMENTS
    each = SECONDS_EACH if seconds is None else seconds / count
    meter = Meter(seconds_each=each, total=count, progress=progress)
    cpu_found, memory_found = _host(meter)
    gpu_found: Gpu | None = None
    link_found: Link | None = None
    if gpu_reason is None:
        try:
            gpu_found, link_found = _device(meter)
        except Exception as error:  # the driver lets torch see a GPU and then refuses it
            gpu_reason = one_line(error)
    progress("done", count, count)
    return Machine(
        name=f"{gpu_found.name if gpu_found else 'no GPU'}, {cpu_found.name}",
        time=started,
        gpu=gpu_found,
        gpu_absent_reason=gpu_reason,
        link=link_found,
        cpu=cpu_found,
        memory=memory_found,
        platform=limits.platform_name(),
        versions=dict(_versions()),
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


def _host(meter: Meter) -> tuple[Cpu, HostMemory]:
    cores = limits.usable_cores()
    limit = limits.host_memory()
    cache_bytes = limits.last_level_cache_bytes()
    memory_bytes = _memory_budget(limit)
    with cpu.torch_threads(cores.count):
        cpu_found = cpu.probe_cpu(
            meter,
            limits.cpu_name(),
            cores.count,
            cores.basis,
            cores.total,
            memory_bytes=memory_bytes,
            cache_bytes=cache_bytes,
        )
        memory_found = memory.probe_memory(meter, limit, memory_bytes=memory_bytes, cache_bytes=cache_bytes)
    return cpu_found, memory_found


def _device(meter: Meter) -> tuple[Gpu, Link]:
    import torch

    with torch.cuda.device(0):
        properties: Any = torch.cuda.get_device_properties(0)
        # torch before 2.4 or so has no UUID; CUDA_VISIBLE_DEVICES then decides.
        uuid = getattr(properties, "uuid", None)
        device = nvml.open_device(0, None if uuid is None else str(uuid))
        gpu_found = gpu.probe_gpu(meter, 0, device)
        memory_bytes = _memory_budget(limits.host_memory())  # CUDA's start took some of it
        return gpu_found, link.probe_link(meter, device, memory_bytes=memory_bytes)


def _memory_budget(limit: limits.HostMemoryLimit) -> int:
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
