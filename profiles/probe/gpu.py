"""What the GPU computes and moves by itself: matrix products and a copy in its own memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from profiles.machine import Figure, Gpu, absent
from profiles.probe.buffers import free
from profiles.probe.timing import (
    Action,
    Meter,
    burst_samples,
    cuda_samples,
    figure,
    host_samples,
    largest_size,
    once,
    rate_figure,
)
from profiles.system.nvml import NvmlDevice

MATMUL_SIZES = (512, 1024, 2048, 4096, 8192)
COPY_BYTES = 2**30
NOISE_ELEMENTS = 2**28
"""512 MiB in bf16: far beyond the last-level cache."""
LAUNCHES = 500
NUM_MEASUREMENTS = 4
NUM_OPTIONAL = 5


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
        copy_bytes_per_s=_measured(meter, "GPU memory copy", copy_bytes_per_s),
        matmul_bf16_flops=_product(meter, "bf16", meter.measure),
        matmul_fp16_flops=_product(meter, "fp16", meter.measure),
        matmul_fp32_flops=_product(meter, "fp32", meter.measure),
    )


def more_rates(meter: Meter) -> dict[str, Any]:
    """Figures of `Gpu` by field, that predictions do without."""
    return {
        "matmul_tf32_flops": _product(meter, "tf32", meter.optional),
        "matmul_fp8_flops": _product(meter, "fp8", meter.optional),
        "matmul_int8_ops": _product(meter, "int8", meter.optional),
        "noise_elements_per_s": meter.optional(
            "GPU noise", lambda seconds: _freeing(noise_elements_per_s, seconds, meter.watch), absent
        ),
        "launch_s": meter.optional("kernel launches", launch_s, absent),
    }


def _measured(meter: Meter, what: str, take: Callable[..., Figure]) -> Figure:
    return meter.measure(what, lambda seconds: _freeing(take, seconds, meter.watch), absent)


def _product(meter: Meter, dtype: str, measure: Callable[..., Figure]) -> Figure:
    return measure(
        f"GPU matrix product {dtype}",
        lambda seconds: _freeing(matmul_flops, dtype, seconds, meter.watch),
        absent,
    )


def copy_bytes_per_s(seconds: float, watch: Action = lambda: None) -> Figure:
    """Bytes read plus bytes written per second of a copy inside GPU memory, up to 1 GiB."""
    import torch

    num_bytes = min(COPY_BYTES, _free_bytes() // 4)
    source = torch.ones(num_bytes // 4, device="cuda")
    target = torch.empty_like(source)
    copied_bytes = source.numel() * source.element_size()
    samples = cuda_samples(lambda: target.copy_(source), seconds, watch)
    return rate_figure(2.0 * copied_bytes, samples, f"torch copy of {copied_bytes / 2**20:.0f} MiB")


def noise_elements_per_s(seconds: float, watch: Action = lambda: None) -> Figure:
    """Normally distributed bf16 numbers per second. torch's generator, not the engines' kernel."""
    import torch

    elements = max(1024, min(NOISE_ELEMENTS, _free_bytes() // 8))
    target = torch.empty(elements, device="cuda", dtype=torch.bfloat16)
    samples = cuda_samples(target.normal_, seconds, watch)
    return rate_figure(float(elements), samples, f"torch normal_ of {elements * 2 / 2**20:.0f} MiB in bf16")


def launch_s(seconds: float) -> Figure:
    """Host time per launch of a kernel on one element, from Python as the engines do it."""
    import torch

    number = torch.zeros(1, device="cuda")

    def launches() -> None:
        for _ in range(LAUNCHES):
            number.add_(1.0)
        torch.cuda.synchronize()

    samples = [sample / LAUNCHES for sample in host_samples(launches, seconds)]
    return figure(samples, f"torch add_ of one number, {LAUNCHES} in a row")


def matmul_flops(dtype: str, seconds: float, watch: Action = lambda: None) -> Figure:
    """FLOP/s of a square product of normally distributed matrices (zeros draw less power and run faster).

    `dtype` is fp32, tf32, bf16, fp16, fp8 or int8. fp32 runs at the precision that torch is set to; the
    figure's method names it. In bursts from rest; `profiles.probe.soak` has the rate under lasting load.
    Raises what torch raises where the GPU does not have a precision.
    """
    import torch

    def rough_time_s(size: int) -> float:
        return once(product(dtype, size), torch.cuda.synchronize)

    budget_bytes = _free_bytes() // 2
    # Matrices are drawn in fp32, then rounded.
    fitting = [size for size in MATMUL_SIZES if 5 * 4 * size**2 <= budget_bytes] or [MATMUL_SIZES[0]]
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        if dtype == "tf32":
            torch.backends.cuda.matmul.allow_tf32 = True
        size = largest_size(rough_time_s, fitting, seconds / 10)
        samples = burst_samples(product(dtype, size), seconds, watch)
        method = f"{_CALLS.get(dtype, 'torch.mm')} {size} x {size}, in bursts"
        if dtype == "fp32":
            method += f", float32 precision '{torch.get_float32_matmul_precision()}'"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return rate_figure(2.0 * size**3, samples, method)


_CALLS = {"fp8": "torch._scaled_mm, e4m3 by e4m3,", "int8": "torch._int_mm"}


def product(dtype: str, size: int) -> Action:
    """A product of two square matrices on the GPU into a third; nothing is allocated when it is called."""
    import torch

    torch_any: Any = torch

    def normal() -> torch.Tensor:
        return torch.randn(size, size, device="cuda")

    if dtype == "int8":
        left, right = ((normal() * 32).clamp(-127, 127).to(torch.int8) for _ in range(2))
        out = torch.empty(size, size, device="cuda", dtype=torch.int32)
        # Column-major: for the other order the library has slow kernels only.
        return lambda: torch_any._int_mm(left, right.t(), out=out)
    if dtype == "fp8":
        left, right = (normal().to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device="cuda")
        out = torch.empty(size, size, device="cuda", dtype=torch.bfloat16)
        # The second operand must be column-major.
        return lambda: torch_any._scaled_mm(
            left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, out=out
        )
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    left, right = (normal().to(kind) for _ in range(2))
    out = torch.empty(size, size, device="cuda", dtype=kind)
    return lambda: torch.mm(left, right, out=out)


def _freeing(measure: Any, *arguments: Any) -> Figure:
    """`measure(*arguments)`, its GPU memory given back to the driver afterwards."""
    try:
        found: Figure = measure(*arguments)
    finally:
        free()
    return found


def _free_bytes() -> int:
    import torch

    free_bytes: int = torch.cuda.mem_get_info()[0]
    return free_bytes
