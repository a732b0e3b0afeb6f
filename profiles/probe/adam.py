"""The fused AdamW that offloaded training waits for, over a working set far larger than the caches."""

from __future__ import annotations

from typing import Any

from profiles.machine import Figure
from profiles.probe.timing import host_samples, rate_figure

TENSOR_ELEMENTS = 16 * 2**20
"""Tensors of 64 MiB: all threads have work for long, and one tensor's overhead does not show."""
STATE_BYTES_PER_ELEMENT = 16
"""Weight, gradient and two moments in fp32."""
BYTES_AT_LEAST = 2**30
"""Working set where the caches are small or unknown."""


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
    most_bytes = memory_bytes * 3 // 4
    return max(min(max(4 * (cache_bytes or 0), BYTES_AT_LEAST), most_bytes) // STATE_BYTES_PER_ELEMENT, 1024)


def adam_elements_per_s(seconds: float, memory_bytes: int, cache_bytes: int | None) -> Figure:
    """Elements per second over a working set far larger than the caches, streamed as in training."""
    import torch

    optimizer, elements = make_optimizer(large_elements(memory_bytes, cache_bytes))
    samples = host_samples(optimizer.step, seconds)
    total_bytes = elements * STATE_BYTES_PER_ELEMENT
    count = len(optimizer.param_groups[0]["params"])
    method = (
        f"torch.optim.AdamW fused, fp32, {count} tensors of {elements // count} elements "
        f"({total_bytes / 2**20:.0f} MiB), {torch.get_num_threads()} threads"
    )
    if cache_bytes and total_bytes < 2 * cache_bytes:
        method += "; partly from cache"
    return rate_figure(float(elements), samples, method)
