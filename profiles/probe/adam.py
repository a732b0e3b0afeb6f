"""The fused AdamW that offloaded training waits for, from cache-resident sizes to far larger ones."""

from __future__ import annotations

from typing import Any

from profiles.machine import AdamPoint, Figure, absent
from profiles.probe.timing import Meter, figure, host_samples, rate_figure

TENSOR_ELEMENTS = 16 * 2**20
"""Tensors of 64 MiB: all threads have work for long, and one tensor's overhead does not show."""
BYTES_PER_ELEMENT = 16
"""Weight, gradient and two moments in fp32."""
MOVED_BYTES_PER_ELEMENT = 28
"""16 read; weight and moments written back. The read before a write hits the same lines."""
WRITE_ALLOCATE = 4 / 3
"""The triad's stores read the lines that they overwrite: 16 bytes move for 12 that are counted."""
BYTES_AT_LEAST = 2**30
"""Working set where the caches are small or unknown."""
POINT_ELEMENTS = (2**16, 2**20, 2**22, 2**24)
"""1 MiB to 256 MiB: an LSP subspace of d = 256 to 4096."""


def make_optimizer(elements: int, tensor_elements: int = TENSOR_ELEMENTS) -> tuple[Any, int]:
    """`torch.optim.AdamW(fused=True)` over fp32 tensors with gradients, and how many elements they have."""
    import torch

    each = min(tensor_elements, max(elements, 1024))
    # Normally distributed, drawn once: the values do not matter as long as none is subnormal.
    drawn = torch.randn(each, generator=torch.Generator().manual_seed(0))
    parameters = [drawn.clone().requires_grad_() for _ in range(max(1, elements // each))]
    for parameter in parameters:
        parameter.grad = drawn.clone()
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True), len(parameters) * each


def large_elements(memory_bytes: int, cache_bytes: int | None) -> int:
    """Elements whose working set is four times the last-level caches, where memory allows."""
    # Room for one more tensor: the one that is drawn.
    room_bytes = memory_bytes * 3 // 4
    return max(min(max(4 * (cache_bytes or 0), BYTES_AT_LEAST), room_bytes) // BYTES_PER_ELEMENT, 1024)


def adam_elements_per_s(seconds: float, memory_bytes: int, cache_bytes: int | None) -> Figure:
    """Elements per second over a working set far larger than the caches, streamed as in training."""
    import torch

    optimizer, elements = make_optimizer(large_elements(memory_bytes, cache_bytes))
    samples = host_samples(optimizer.step, seconds)
    total_bytes = elements * BYTES_PER_ELEMENT
    count = len(optimizer.param_groups[0]["params"])
    method = (
        f"torch.optim.AdamW fused, fp32, {count} tensors of {elements // count} elements "
        f"({total_bytes / 2**20:.0f} MiB), {torch.get_num_threads()} threads"
    )
    if cache_bytes and total_bytes < 2 * cache_bytes:
        method += "; partly from cache"
    return rate_figure(float(elements), samples, method)


def thread_counts(cores: int, cores_physical: int | None) -> tuple[int, ...]:
    """One, a half, all physical and all usable cores, ascending."""
    wanted = {1, cores // 2, min(cores, cores_physical or cores), cores}
    return tuple(sorted(count for count in wanted if count > 0))


def num_points(memory_bytes: int, threads: tuple[int, ...]) -> int:
    return len(_sizes(memory_bytes)) * len(threads)


def adam_points(meter: Meter, *, memory_bytes: int, threads: tuple[int, ...]) -> tuple[AdamPoint, ...]:
    """Every size that memory allows, one tensor each, with every count of threads."""
    from profiles.probe.numa import torch_threads

    found = []
    for elements in _sizes(memory_bytes):
        for count in threads:

            def take(seconds: float, elements: int = elements, count: int = count) -> Figure:
                with torch_threads(count):
                    optimizer, total = make_optimizer(elements)
                    samples = host_samples(optimizer.step, seconds / 2)
                return rate_figure(float(total), samples, f"one tensor, {count} threads")

            what = f"CPU AdamW, {elements} elements, {count} threads"
            rate = meter.optional(what, take, absent)
            found.append(AdamPoint(elements=elements, threads=count, elements_per_s=rate))
    return tuple(found)


def bandwidth_share(adam: Figure, triad: Figure) -> Figure:
    """The bytes that AdamW moves over those that the triad moves, both per second."""
    for name, rate in (("AdamW", adam), ("the triad", triad)):
        if rate.value is None:
            return absent(f"{name} was not measured: {rate.method}")
    assert adam.value is not None
    assert triad.value is not None
    values = [
        MOVED_BYTES_PER_ELEMENT * rate / (WRITE_ALLOCATE * triad.value)
        for rate in (adam.value, adam.low, adam.high)
        if rate
    ]
    return figure(
        values,
        f"{MOVED_BYTES_PER_ELEMENT} bytes per element of AdamW over 4/3 of the triad's (reads before writes)",
    )


def _sizes(memory_bytes: int) -> tuple[int, ...]:
    room = [size for size in POINT_ELEMENTS if 2 * size * BYTES_PER_ELEMENT <= memory_bytes]
    return tuple(room) or POINT_ELEMENTS[:1]
