"""The AdamW that offloaded training waits for, torch's and this program's, over more than the caches hold."""

from __future__ import annotations

import warnings
from typing import Any

from profiles.machine import Figure, absent
from profiles.probe.numa import torch_threads
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


def adamw_kernel_elements_per_s(seconds: float, memory_bytes: int, cache_bytes: int | None) -> Figure:
    """Elements per second of `exact-offload`'s AdamW on bf16 weights with fp32 moments, on the threads that
    training leaves it. Absent without a C compiler."""
    import torch

    from engines.cpu_updates.adamw import AdamWMemory, adamw, state_tensors
    from engines.cpu_updates.cpu_adam import compiled
    from engines.cpu_updates.cpu_threads import most_adam_threads

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        library = compiled()
    if library is None:
        return absent(str(said[-1].message) if said else "no C compiler that works")
    elements = large_elements(memory_bytes, cache_bytes)
    drawn = torch.randn(elements, generator=torch.Generator().manual_seed(0)).bfloat16()
    states = {
        name: torch.zeros(shape, dtype=dtype)
        for name, (dtype, shape) in state_tensors(elements, torch.bfloat16, "fp32").items()
    }
    memory = AdamWMemory(
        weight=drawn.clone(),
        rest=states["rest"],
        kind="fp32",
        moment=states["moment"],
        variance=states["variance"],
        moment_scales=None,
        variance_scales=None,
    )

    def update() -> None:
        adamw(
            drawn,
            memory,
            1,
            learning_rate=1e-5,
            weight_decay=0.0,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            scale=1.0,
            key=0,
        )

    with torch_threads(most_adam_threads()):
        samples = host_samples(update, seconds)
        threads = torch.get_num_threads()
    total_bytes = drawn.nbytes + memory.weight.nbytes + sum(each.nbytes for each in states.values())
    method = (
        f"this program's AdamW, bf16 weights, fp32 moments, {elements} elements "
        f"({total_bytes / 2**20:.0f} MiB), {threads} threads"
    )
    if cache_bytes and total_bytes < 2 * cache_bytes:
        method += "; partly from cache"
    return rate_figure(float(elements), samples, method)
