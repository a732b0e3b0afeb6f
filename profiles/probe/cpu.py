"""What the CPU computes: matrix products, and the fused AdamW that offloaded training waits for."""

from __future__ import annotations

from profiles.machine import Cpu, Figure, absent
from profiles.probe.adam import adam_elements_per_s, adamw_kernel_elements_per_s
from profiles.probe.timing import Meter, host_samples, largest_size, once, rate_figure

MATMUL_SIZES = (128, 256, 512, 1024, 2048, 4096)

PRODUCT_TIMES = 3
"""The large product gets so many times the time of others: on a shared host its rate moves within seconds."""

NUM_MEASUREMENTS = 4


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
            "CPU matrix product fp32",
            lambda seconds: matmul_flops("fp32", PRODUCT_TIMES * seconds, memory_bytes),
            absent,
        ),
        matmul_bf16_flops=meter.measure(
            "CPU matrix product bf16",
            lambda seconds: matmul_flops("bf16", PRODUCT_TIMES * seconds, memory_bytes),
            absent,
        ),
        adam_elements_per_s=meter.measure(
            "CPU fused AdamW", lambda seconds: adam_elements_per_s(seconds, memory_bytes, cache_bytes), absent
        ),
        adamw_kernel_elements_per_s=meter.measure(
            "CPU AdamW of exact-offload",
            lambda seconds: adamw_kernel_elements_per_s(seconds, memory_bytes, cache_bytes),
            absent,
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
    size = largest_size(rough_time_s, fitting, seconds / 3)
    left, right, out = operands(size)
    samples = host_samples(lambda: torch.mm(left, right, out=out), seconds)
    isa = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    method = f"torch.mm {size} x {size}, {threads} threads, {isa}"
    return rate_figure(2.0 * size**3, samples, method)
