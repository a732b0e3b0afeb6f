"""Copies from 4 KiB to 1 GiB, and the latency and bandwidth that describe them all."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from profiles.machine import CopyPoint, CopySweep, Direction, Figure, HostKind, absent
from profiles.probe.buffers import Buffers
from profiles.probe.timing import held_samples, host_samples, now

SIZES = tuple(4**power * 4096 for power in range(10))
"""4 KiB to 1 GiB."""
CALLS = (1, 32)
"""Fewest and most copies in one sample of a pinned sweep."""
ROUNDS = 7
EXPECTED_BYTES_PER_S = 20e9


def sweep(buffers: Buffers, direction: Direction, host_memory: HostKind, seconds: float) -> CopySweep:
    """Copies of every size that the buffers hold, one direction; each size's data is verified.

    Pinned copies are timed on the GPU, queued back to back. Pageable ones return when the data has left or
    reached the host, so they are timed on the host, one by one. Raises `RuntimeError` for changed data.
    """
    sizes = [size for size in SIZES if size <= buffers.num_bytes]
    points = tuple(_point(buffers, direction, host_memory, size, seconds / len(sizes)) for size in sizes)
    latency, rate = fit(points)
    return CopySweep(
        direction=direction, host_memory=host_memory, latency_s=latency, bytes_per_s=rate, points=points
    )


def absent_sweep(direction: Direction, host_memory: HostKind, reason: str) -> CopySweep:
    return CopySweep(
        direction=direction, host_memory=host_memory, latency_s=absent(reason), bytes_per_s=absent(reason)
    )


def fit(points: Sequence[CopyPoint]) -> tuple[Figure, Figure]:
    """Latency in seconds and bandwidth in bytes per second of the line through `points`.

    Low and high come from the lines through each size's fastest and slowest samples. Raises `ValueError`
    for fewer than two sizes.
    """
    if len({point.num_bytes for point in points}) < 2:
        raise ValueError("a line needs copies of two sizes")
    sizes = [point.num_bytes for point in points]
    lines = [
        fit_line(sizes, times_s)
        for times_s in (
            [point.time_s for point in points],
            [point.low_s for point in points],
            [point.high_s for point in points],
        )
    ]
    method = (
        f"time = latency + bytes / bandwidth, least squares of relative errors over {len(points)} sizes, "
        f"{sizes[0]} to {sizes[-1]} bytes, data verified"
    )
    count = sum(point.count for point in points)
    latency, rate = (
        Figure(
            value=values[0], origin="measured", method=method, time=now(), low=min(values),
            high=max(values), count=count,
        )
        for values in zip(*lines, strict=True)
    )  # fmt: skip
    return latency, rate


def fit_line(sizes: Sequence[int], times_s: Sequence[float]) -> tuple[float, float]:
    """(latency, bandwidth) that minimise the sum of squared relative errors of `latency + size / bandwidth`.

    A latency below zero means nothing: the line through zero is taken instead.
    """
    weights = [1 / max(time_s, 1e-12) ** 2 for time_s in times_s]
    total = sum(weights)
    mean_size = sum(w * s for w, s in zip(weights, sizes, strict=True)) / total
    mean_time = sum(w * t for w, t in zip(weights, times_s, strict=True)) / total
    covariance = sum(
        w * (s - mean_size) * (t - mean_time) for w, s, t in zip(weights, sizes, times_s, strict=True)
    )
    slope = covariance / sum(w * (s - mean_size) ** 2 for w, s in zip(weights, sizes, strict=True))
    latency = mean_time - slope * mean_size
    if latency < 0:
        latency = 0.0
        slope = sum(w * s * t for w, s, t in zip(weights, sizes, times_s, strict=True)) / sum(
            w * s * s for w, s in zip(weights, sizes, strict=True)
        )
    if slope <= 0:
        raise ValueError("larger copies took no longer")
    return latency, 1 / slope


def _point(
    buffers: Buffers, direction: Direction, host_memory: HostKind, num_bytes: int, seconds: float
) -> CopyPoint:
    target, source = buffers.part(direction, num_bytes)
    buffers.forget(direction, num_bytes)
    if host_memory == "pinned":
        fewest, most = CALLS
        expected_s = num_bytes / EXPECTED_BYTES_PER_S + 1e-6
        calls = max(fewest, min(most, int(seconds / ROUNDS / expected_s)))
        held_samples(lambda: target.copy_(source, non_blocking=True), calls, 1)
        samples = held_samples(lambda: target.copy_(source, non_blocking=True), calls, ROUNDS)
    else:
        import torch

        def whole() -> None:
            target.copy_(source)
            torch.cuda.synchronize()

        samples = host_samples(whole, seconds)
    buffers.check(direction, num_bytes)
    return CopyPoint(
        num_bytes=num_bytes, time_s=statistics.median(samples), low_s=min(samples), high_s=max(samples),
        count=len(samples),
    )  # fmt: skip
