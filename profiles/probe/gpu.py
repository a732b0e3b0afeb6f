"""What the GPU computes and moves by itself: matrix products and a copy in its own memory."""

from __future__ import annotations

from typing import Any

from profiles.machine import Figure, Gpu, absent
from profiles.nvml import NvmlDevice
from profiles.probe.timing import Meter, cuda_samples, largest_size, once, rate_figure

MATMUL_SIZES = (512, 1024, 2048, 4096, 8192)
COPY_BYTES = 2**30
NUM_MEASUREMENTS = 4


def probe_gpu(meter: Meter, index: int, nvml: NvmlDevice | None) -> Gpu:
    """Measures `cuda:<index>`, which is the current device."""
    import torch

    properties: Any = torch.cuda.get_device_properties(index)
    free_bytes, total_bytes = torch.cuda.mem_get_info(index)
    return Gpu(
        name=properties.name,
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        driver=nvml.driver if nvml else None,
        compute_capability=f"{properties.major}.{properties.minor}",
        num_gpus=torch.cuda.device_count(),
        copy_bytes_per_s=meter.measure(
            "GPU memory copy", lambda seconds: _freeing(copy_bytes_per_s, seconds), absent
        ),
        matmul_bf16_flops=meter.measure(
            "GPU matrix product bf16", lambda seconds: _freeing(matmul_flops, "bf16", seconds), absent
        ),
        matmul_fp16_flops=meter.measure(
            "GPU matrix product fp16", lambda seconds: _freeing(matmul_flops, "fp16", seconds), absent
        ),
        matmul_fp32_flops=meter.measure(
            "GPU matrix product fp32", lambda seconds: _freeing(matmul_flops, "fp32", seconds), absent
        ),
    )


def copy_bytes_per_s(seconds: float) -> Figure:
    """Bytes read plus bytes written per second of a copy inside GPU memory, up to 1 GiB."""
    import torch

    num_bytes = min(COPY_BYTES, _free_bytes() // 4)
    source = torch.ones(num_bytes // 4, device="cuda")
    target = torch.empty_like(source)
    copied_bytes = source.numel() * source.element_size()
    samples = cuda_samples(lambda: target.copy_(source), seconds)
    return rate_figure(2.0 * copied_bytes, samples, f"torch copy of {copied_bytes / 2**20:.0f} MiB")


def matmul_flops(dtype: str, seconds: float) -> Figure:
    """FLOP/s of a square product of normally distributed matrices (zeros draw less power and run faster).

    fp32 runs at the precision that torch is set to; the figure's method names it.
    """
    import torch

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]

    def operands(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        left, right = (torch.randn(size, size, device="cuda", dtype=kind) for _ in range(2))
        return left, right, torch.empty(size, size, device="cuda", dtype=kind)

    def rough_time_s(size: int) -> float:
        left, right, out = operands(size)
        return once(lambda: torch.mm(left, right, out=out), torch.cuda.synchronize)

    budget_bytes = _free_bytes() // 2
    fitting = [size for size in MATMUL_SIZES if 3 * 4 * size**2 <= budget_bytes] or [MATMUL_SIZES[0]]
    size = largest_size(rough_time_s, fitting, seconds / 10)
    left, right, out = operands(size)
    samples = cuda_samples(lambda: torch.mm(left, right, out=out), seconds)
    method = f"torch.mm {size} x {size}"
    if dtype == "fp32":
        method += f", float32 precision '{torch.get_float32_matmul_precision()}'"
    return rate_figure(2.0 * size**3, samples, method)


def _freeing(measure: Any, *arguments: Any) -> Figure:
    """`measure(*arguments)`, its GPU memory given back to the driver afterwards."""
    import torch

    try:
        figure: Figure = measure(*arguments)
    finally:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return figure


def _free_bytes() -> int:
    import torch

    free_bytes: int = torch.cuda.mem_get_info()[0]
    return free_bytes
