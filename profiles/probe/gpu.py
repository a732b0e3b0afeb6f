"""What the GPU does by itself: matrix products, in bursts and under lasting load, copies in its memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from profiles.machine import Figure, Gpu, absent
from profiles.probe.buffers import free
from profiles.probe.timing import (
    OTHERS,
    Action,
    Meter,
    burst_samples,
    cuda_samples,
    figure,
    largest_size,
    once,
    rate_figure,
    soak_samples,
)
from profiles.system import nvml
from profiles.system.nvml import NvmlDevice

MATMUL_SIZES = (512, 1024, 2048, 4096, 8192)
COPY_BYTES = 2**30
SUSTAINED_DTYPE = "bf16"
SUSTAINED_AT_LEAST_S = 1.0
"""An H200 falls to its lasting rate within 0.2 s."""
NUM_MEASUREMENTS = 6
"""Four of `probe_gpu`, workspaces, one of `sustained_flops`."""

WORKSPACE_SIZE = 512
"""Of the product whose workspace is looked at."""


def probe_gpu(
    meter: Meter, index: int, device: NvmlDevice | None, used_before_bytes: int | None = None
) -> Gpu:
    """Measures `cuda:<index>`, which is the current device, all but its rate under lasting load.

    `used_before_bytes` is what NVML said was in use before this process had a CUDA context.
    """
    import torch

    properties: Any = torch.cuda.get_device_properties(index)
    free_bytes, total_bytes = torch.cuda.mem_get_info(index)
    free_bytes += _since_bytes(device, used_before_bytes) or 0
    fixed = device.settings() if device else None
    return Gpu(
        name=properties.name,
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        driver=device.driver if device else None,
        compute_capability=f"{properties.major}.{properties.minor}",
        num_gpus=torch.cuda.device_count(),
        copy_bytes_per_s=_measured(meter, "GPU memory copy", copy_bytes_per_s),
        matmul_bf16_flops=_product(meter, "bf16"),
        matmul_fp16_flops=_product(meter, "fp16"),
        matmul_fp32_flops=_product(meter, "fp32"),
        sm_clock_max_hz=fixed.sm_clock_max_hz if fixed else None,
        ecc_enabled=fixed.ecc_enabled if fixed else None,
        mig_enabled=fixed.mig_enabled if fixed else None,
    )


def _since_bytes(device: NvmlDevice | None, used_before_bytes: int | None) -> int | None:
    """By how much the device's memory in use has grown; `None`: NVML does not tell."""
    used_bytes = None if device is None else device.used_bytes()
    if used_bytes is None or used_before_bytes is None:
        return None
    return max(0, used_bytes - used_before_bytes)


def process_bytes(device: NvmlDevice | None, used_before_bytes: int | None) -> Figure:
    """What this process takes of the device beside torch's memory, when it has used what a training step
    uses: products, attention, a CUDA graph, a Triton kernel. Page tables of pinned memory come on top."""
    import torch

    free()
    since = _since_bytes(device, used_before_bytes)
    if since is None:
        return absent("NVML does not tell how much memory is in use")
    taken = since - int(torch.cuda.memory_reserved())
    method = "NVML's memory in use, less what was in use before CUDA started and what torch had reserved"
    found = figure([float(max(0, taken))], method)
    # What another took or gave back in between is in the difference, too.
    others = device is not None and device.reading("memory in use").other_processes
    return replace(found, disturbance=OTHERS) if others else found


def workspace_bytes(_: float) -> Figure:
    """What torch still holds when a product's tensors are gone."""
    import torch

    free()
    product(SUSTAINED_DTYPE, WORKSPACE_SIZE)()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    # Not what is reserved, whose pages a workspace has in part (`profiles.system.gpu_allocator`).
    held = float(torch.cuda.memory_allocated())
    return figure([held], "what torch keeps allocated after a matrix product, its tensors freed")


def open_gpu() -> NvmlDevice | None:
    """NVML's view of `cuda:0`."""
    import torch

    properties: Any = torch.cuda.get_device_properties(0)
    # torch before 2.4 or so has no UUID; CUDA_VISIBLE_DEVICES then decides.
    uuid = getattr(properties, "uuid", None)
    return nvml.open_device(0, None if uuid is None else str(uuid))


def _measured(meter: Meter, what: str, take: Callable[..., Figure]) -> Figure:
    return meter.measure(what, lambda seconds: _freeing(take, seconds, meter.watch), absent)


def _product(meter: Meter, dtype: str) -> Figure:
    return meter.measure(
        f"GPU matrix product {dtype}",
        lambda seconds: _freeing(matmul_flops, dtype, seconds, meter.watch),
        absent,
    )


def sustained_flops(meter: Meter, seconds: float) -> Figure:
    """FLOP/s of the bf16 product over the last third of `seconds` of it without a pause, or of what is left
    of the probe's time, if that is less: `SUSTAINED_AT_LEAST_S` at least, as every forecast that the GPU
    decides rests on it."""
    seconds = min(seconds, max(meter.left_s(), SUSTAINED_AT_LEAST_S))
    # Throttling is what this one is about: no reason to repeat it.
    return meter.measure(
        "sustained load",
        lambda _: _freeing(_sustained_flops, seconds, meter.watch),
        absent,
        repeats=False,
    )


def _sustained_flops(seconds: float, watch: Action) -> Figure:
    import torch

    size, free_bytes = MATMUL_SIZES[-1], _free_bytes()
    while 5 * 4 * size**2 > free_bytes and size > 512:
        size //= 2
    action = product(SUSTAINED_DTYPE, size)
    action()
    torch.cuda.synchronize()
    samples = soak_samples(action, seconds, watch)
    took_s = samples[-1][0]
    late = [each_s for end_s, each_s in samples if end_s >= took_s * 2 / 3]
    method = f"torch.mm {size} x {size} in {SUSTAINED_DTYPE}, the last third of {took_s:.0f} s"
    return rate_figure(2.0 * size**3, late, method)


def copy_bytes_per_s(seconds: float, watch: Action = lambda: None) -> Figure:
    """Bytes read plus bytes written per second of a copy inside GPU memory, up to 1 GiB."""
    import torch

    num_bytes = min(COPY_BYTES, _free_bytes() // 4)
    source = torch.ones(num_bytes // 4, device="cuda")
    target = torch.empty_like(source)
    copied_bytes = source.numel() * source.element_size()
    samples = cuda_samples(lambda: target.copy_(source), seconds, watch)
    return rate_figure(2.0 * copied_bytes, samples, f"torch copy of {copied_bytes / 2**20:.0f} MiB")


def matmul_flops(dtype: str, seconds: float, watch: Action = lambda: None) -> Figure:
    """FLOP/s of a square product of normally distributed matrices (zeros draw less power and run faster).

    `dtype` is fp32, bf16 or fp16. fp32 runs at the precision that torch is set to; the figure's method names
    it. In bursts from rest: `sustained_flops` has the rate under lasting load.
    """
    import torch

    def rough_time_s(size: int) -> float:
        return once(product(dtype, size), torch.cuda.synchronize)

    budget_bytes = _free_bytes() // 2
    # Matrices are drawn in fp32, then rounded.
    fitting = [size for size in MATMUL_SIZES if 5 * 4 * size**2 <= budget_bytes] or [MATMUL_SIZES[0]]
    size = largest_size(rough_time_s, fitting, seconds / 10)
    samples = burst_samples(product(dtype, size), seconds, watch)
    method = f"torch.mm {size} x {size}, in bursts"
    if dtype == "fp32":
        method += f", float32 precision '{torch.get_float32_matmul_precision()}'"
    return rate_figure(2.0 * size**3, samples, method)


def product(dtype: str, size: int) -> Action:
    """A product of two square matrices on the GPU into a third; nothing is allocated when it is called."""
    import torch

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    left, right = (torch.randn(size, size, device="cuda").to(kind) for _ in range(2))
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
