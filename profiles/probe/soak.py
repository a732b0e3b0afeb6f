"""How the GPU holds up: the rate from rest, the rate after a long run, and what both draw."""

from __future__ import annotations

import time
from typing import Any

from profiles.machine import Figure, absent
from profiles.probe import gpu
from profiles.probe.buffers import free
from profiles.probe.gpu import product
from profiles.probe.timing import Meter, clock_s, figure, rate_figure, soak_samples
from profiles.system.nvml import NvmlDevice

REST_S = 1.5
"""Longer than the second over which many sensors average."""
BURST_S = 0.1
"""From rest: before the power limit and heat act. On an H200 the clock falls after 0.1 s."""
DTYPE = "bf16"
NUM_MEASUREMENTS = 1


def soak(meter: Meter, nvml: NvmlDevice | None, seconds: float) -> dict[str, Any]:
    """Figures of `Gpu` by field. `seconds` of products without a pause; the last third of them counts."""
    names = ("matmul_burst_flops", "matmul_sustained_flops", "idle_power_w", "load_power_w", "load_energy_w")

    def take(_: float) -> tuple[Figure, ...]:
        return _soak(meter, nvml, seconds)

    # Throttling is what this one is about: no reason to repeat it.
    figures = meter.optional(
        "sustained load",
        take,
        lambda why: tuple(absent(why) for _ in names),
        needs_s=seconds + REST_S,
        repeats=False,
    )
    free()
    return dict(zip(names, figures, strict=True))


def _soak(meter: Meter, nvml: NvmlDevice | None, seconds: float) -> tuple[Figure, ...]:
    import torch

    size = gpu.MATMUL_SIZES[-1]
    free_bytes = torch.cuda.mem_get_info()[0]
    while 5 * 4 * size**2 > free_bytes and size > 512:
        size //= 2
    action = product(DTYPE, size)
    action()
    torch.cuda.synchronize()
    rest_s = min(REST_S, seconds)
    time.sleep(rest_s)
    idle_w = nvml.power_w() if nvml else None
    powers_w: list[tuple[float, float]] = []
    start_s, energy_j = clock_s(), nvml.energy_j() if nvml else None

    def watch() -> None:
        meter.watch()
        power_w = nvml.power_w() if nvml else None
        if power_w is not None:
            powers_w.append((clock_s() - start_s, power_w))

    samples = soak_samples(action, seconds, watch)
    took_s = clock_s() - start_s
    after_j = nvml.energy_j() if nvml else None
    late_s = samples[-1][0] * 2 / 3
    early = [took for end_s, took in samples if end_s <= BURST_S] or [samples[0][1]]
    late = [took for end_s, took in samples if end_s >= late_s]
    method = f"torch.mm {size} x {size} in {DTYPE}"
    flops = 2.0 * size**3
    no_sensor = "NVML gives no power of this GPU"
    late_w = [power for at_s, power in powers_w if at_s >= late_s]
    return (
        rate_figure(flops, early, f"{method}, the first {BURST_S} s after {rest_s:.1f} s at rest"),
        rate_figure(flops, late, f"{method}, the last third of {took_s:.0f} s"),
        absent(no_sensor) if idle_w is None else figure([idle_w], f"sensor after {rest_s:.1f} s at rest"),
        figure(late_w, f"sensor, the last third of {took_s:.0f} s of products")
        if late_w
        else absent(no_sensor),
        absent("NVML gives no energy counter of this GPU")
        if energy_j is None or after_j is None
        else figure([(after_j - energy_j) / took_s], f"energy counter over {took_s:.0f} s of products"),
    )
