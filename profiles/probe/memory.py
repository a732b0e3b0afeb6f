"""What the host's memory moves."""

from __future__ import annotations

from dataclasses import replace

from profiles.machine import Figure, HostMemory, absent
from profiles.probe.timing import Meter, host_samples, rate_figure
from profiles.system.cgroup import HostMemoryLimit, locked_limit_bytes

COPY_BYTES_AT_LEAST = 256 * 2**20
"""Size of the array to copy where the caches are small or unknown."""

NUM_MEASUREMENTS = 1
NUM_TRIAD = 1


def probe_memory(
    meter: Meter, limit: HostMemoryLimit, *, memory_bytes: int, cache_bytes: int | None, triad: bool
) -> HostMemory:
    """`memory_bytes` is the most that a measurement may allocate; `triad` asks for STREAM's triad too."""
    found = HostMemory(
        total_bytes=limit.total_bytes,
        available_bytes=limit.available_bytes,
        total_basis=limit.basis,
        swap_bytes=limit.swap_bytes,
        swap_used_bytes=limit.swap_used_bytes,
        locked_limit_bytes=locked_limit_bytes(),
        copy_bytes_per_s=meter.measure(
            "host memory copy",
            lambda seconds: copy_bytes_per_s(seconds, memory_bytes, cache_bytes),
            absent,
        ),
    )
    if not triad:
        return found
    rate = meter.optional(
        "host memory triad", lambda seconds: triad_bytes_per_s(seconds, memory_bytes, cache_bytes), absent
    )
    return replace(found, triad_bytes_per_s=rate)


def copy_bytes_per_s(seconds: float, memory_bytes: int, cache_bytes: int | None) -> Figure:
    """Bytes read plus bytes written per second of a copy of four times the caches, as in STREAM.

    The read that a store without a non-temporal hint makes of the line it overwrites is not counted.
    """
    import torch

    array_bytes = min(max(4 * (cache_bytes or 0), COPY_BYTES_AT_LEAST), memory_bytes // 2)
    source = torch.ones(max(array_bytes // 4, 1024))
    target = torch.zeros_like(source)
    array_bytes = source.numel() * source.element_size()
    samples = host_samples(lambda: target.copy_(source), seconds)
    method = f"torch copy of {array_bytes / 2**20:.0f} MiB, {torch.get_num_threads()} threads"
    if cache_bytes and array_bytes < cache_bytes:
        method += "; partly from cache"
    return rate_figure(2.0 * array_bytes, samples, method)


def triad_bytes_per_s(seconds: float, memory_bytes: int, cache_bytes: int | None) -> Figure:
    """Bytes read plus bytes written per second of `a = b + 3 c`: 12 per fp32 element, as in STREAM."""
    import torch

    array_bytes = min(max(4 * (cache_bytes or 0), COPY_BYTES_AT_LEAST), memory_bytes // 3)
    first = torch.ones(max(array_bytes // 4, 1024))
    second, out = torch.ones_like(first), torch.zeros_like(first)
    array_bytes = first.numel() * first.element_size()
    samples = host_samples(lambda: torch.add(first, second, alpha=3.0, out=out), seconds)
    method = f"torch.add, arrays of {array_bytes / 2**20:.0f} MiB, {torch.get_num_threads()} threads"
    if cache_bytes and array_bytes < cache_bytes:
        method += "; partly from cache"
    return rate_figure(3.0 * array_bytes, samples, method)
