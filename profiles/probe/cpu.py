"""What the CPU computes: matrix products, and the fused AdamW that offloaded training waits for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from profiles.machine import Cpu, Figure, absent
from profiles.probe.timing import Meter, host_samples, largest_size, once, rate_figure

MATMUL_SIZES = (128, 256, 512, 1024, 2048, 4096)

ADAM_TENSOR_ELEMENTS = 1024 * 1024
"""One layer's share: an LSP subspace of d = 1024, or a matrix of a small model."""
ADAM_BYTES_PER_ELEMENT = 16
"""Weight, gradient and two moments in fp32."""
ADAM_BYTES_AT_LEAST = 256 * 2**20
"""Working set where the caches are small or unknown."""

NUM_MEASUREMENTS = 3


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch computes with `count` threads inside, with as many as before after it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def probe_cpu(
    meter: Meter, name: str, cores: int, basis: str, total: int, *, memory_bytes: int, cache_bytes: int | None
) -> Cpu:
    """Measures with as many threads as torch has now (see `torch_threads`).

    `memory_bytes` is the most that a measurement may allocate, `cache_bytes` the size of the last-level
    caches, if known.
    """
    import torch

    return Cpu(
        name=name,
        cores_usable=cores,
        cores_basis=basis,
        cores_total=total,
        threads=torch.get_num_threads(),
        matmul_fp32_flops=meter.measure(
            "CPU matrix product fp32", lambda seconds: matmul_flops("fp32", seconds, memory_bytes), absent
        ),
        matmul_bf16_flops=meter.measure(
            "CPU matrix product bf16", lambda seconds: matmul_flops("bf16", seconds, memory_bytes), absent
        ),
        adam_elements_per_s=meter.measure(
            "CPU fused AdamW", lambda seconds: adam_elements_per_s(seconds, memory_bytes, cache_bytes), absent
        ),
    )


def matmul_flops(dtype: str, seconds: float, memory_bytes: int) -> Figure:
    """FLOP/s of a square product of normally distributed `fp32` or `bf16` matrices into a given output.

    The size follows from the time of small ones: bf16 without support in the processor can be a
    hundred times slower than fp32.
    """
    import torch

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    generator = torch.Generator().manual_seed(0)

    def operands(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        left, right = (torch.randn(size, size, generator=generator).to(kind) for _ in range(2))
        return left, right, torch.empty(size, size, dtype=kind)

    def rough_time_s(size: int) -> float:
        left, right, out = operands(size)
        return once(lambda: torch.mm(left, right, out=out))

    # Room for the operands twice: a normal matrix is drawn in fp32 before it is rounded.
    fitting = [size for size in MATMUL_SIZES if 2 * 3 * 4 * size**2 <= memory_bytes] or [MATMUL_SIZES[0]]
    size = largest_size(rough_time_s, fitting, seconds / 6)
    left, right, out = operands(size)
    samples = host_samples(lambda: torch.mm(left, right, out=out), seconds)
    isa = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    method = f"torch.mm {size} x {size}, {threads} threads, {isa}"
    return rate_figure(2.0 * size**3, samples, method)


def adam_elements_per_s(seconds: float, memory_bytes: int, cache_bytes: int | None) -> Figure:
    """Elements per second of `torch.optim.AdamW(fused=True)` over many fp32 tensors of one layer's size.

    All tensors together are four times the last-level caches where memory allows, so that a step
    streams from memory as it does in training: 28 bytes per element, 16 read and 12 written.
    """
    import torch

    wanted_bytes = min(max(4 * (cache_bytes or 0), ADAM_BYTES_AT_LEAST), memory_bytes)
    elements = max(wanted_bytes // ADAM_BYTES_PER_ELEMENT, 1024)
    each = min(ADAM_TENSOR_ELEMENTS, elements)
    count = elements // each
    # Normally distributed, drawn once: the values do not matter as long as none is subnormal.
    drawn = torch.randn(each, generator=torch.Generator().manual_seed(0))
    parameters = [drawn.clone().requires_grad_() for _ in range(count)]
    for parameter in parameters:
        parameter.grad = drawn.clone()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    samples = host_samples(optimizer.step, seconds)
    total_bytes = count * each * ADAM_BYTES_PER_ELEMENT
    method = (
        f"torch.optim.AdamW fused, fp32, {count} tensors of {each} elements "
        f"({total_bytes / 2**20:.0f} MiB), {torch.get_num_threads()} threads"
    )
    if cache_bytes and total_bytes < 2 * cache_bytes:
        method += "; partly from cache"
    return rate_figure(float(count * each), samples, method)
