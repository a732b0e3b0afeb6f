"""What host and GPU exchange: copies each way, pinned and pageable, and both ways at once."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from profiles.machine import Figure, LinkFigures, absent
from profiles.probe.buffers import Buffers, free, largest_buffers
from profiles.probe.timing import (
    Meter,
    cuda_samples,
    host_samples,
    once,
    one_line,
    overlapping_samples,
    rate_figure,
)
from profiles.system.nvml import LinkState, NvmlDevice

BUFFER_BYTES = 256 * 2**20
DUPLEX_ROUNDS = (6, 64)
"""Fewest and most copies in each direction."""
DUPLEX_ATTEMPTS = 4
DUPLEX_ATTEMPTS_PER_S = 4
"""Where a measurement gets more time, it is tried more often."""
DUPLEX_REST_S = 0.7
STEADY = 0.03
NUM_MEASUREMENTS = 5

UNKNOWN_LINK = LinkState(generation_now=None, width_now=None, generation_max=None, width_max=None)


def probe_link(meter: Meter, nvml: NvmlDevice | None, *, memory_bytes: int) -> LinkFigures:
    """Measures the current CUDA device. `memory_bytes` is the most host memory it may allocate."""
    pinned, loaded = _pinned(meter, nvml, memory_bytes)
    free()
    pageable = _pageable(meter, memory_bytes)
    free()
    return LinkFigures(
        generation_max=loaded.generation_max,
        generation_loaded=loaded.generation_now,
        width_max=loaded.width_max,
        width_loaded=loaded.width_now,
        generation_gpu_max=loaded.generation_gpu_max,
        h2d_pinned_bytes_per_s=pinned[0],
        d2h_pinned_bytes_per_s=pinned[1],
        h2d_duplex_bytes_per_s=pinned[2],
        d2h_duplex_bytes_per_s=pinned[3],
        h2d_pageable_bytes_per_s=pageable[0],
        d2h_pageable_bytes_per_s=pageable[1],
    )


def _pinned(
    meter: Meter, nvml: NvmlDevice | None, memory_bytes: int
) -> tuple[tuple[Figure, Figure, Figure, Figure], LinkState]:
    """H2D, D2H, H2D and D2H while the other runs; the link's state under load."""
    idle = nvml.link() if nvml else UNKNOWN_LINK
    try:
        meter.progress("pinned buffers", meter.done, meter.total)
        buffers = largest_buffers(BUFFER_BYTES, memory_bytes, pinned=True)
        _verify(buffers)
    except Exception as error:  # what fails here is a fact about this machine
        meter.skip(3)
        missing = absent(one_line(error))
        return (missing, missing, missing, missing), LinkState(
            generation_now=None, width_now=None, generation_max=idle.generation_max,
            width_max=idle.width_max, generation_gpu_max=idle.generation_gpu_max,
        )  # fmt: skip
    size = f"{buffers.num_bytes / 2**20:.0f} MiB, pinned"
    h2d = meter.measure(
        "link to GPU, pinned",
        lambda seconds: rate_figure(buffers.num_bytes, cuda_samples(buffers.up, seconds, meter.watch), size),
        absent,
    )
    # The link is warm from the copies just made; its state holds only while the next ones run.
    loaded = _link_under_load(buffers, nvml) if nvml else UNKNOWN_LINK
    d2h = meter.measure(
        "link from GPU, pinned",
        lambda seconds: rate_figure(
            buffers.num_bytes, cuda_samples(buffers.down, seconds, meter.watch), size
        ),
        absent,
    )
    both = meter.measure(
        "link both ways", lambda seconds: _duplex(buffers, seconds), lambda why: (absent(why), absent(why))
    )
    return (h2d, d2h, *both), loaded


def _verify(buffers: Buffers) -> None:
    """Raises `RuntimeError` if a copy of the whole buffer, either way, changes data."""
    buffers.forget("h2d")
    buffers.up()
    buffers.check("h2d")
    buffers.forget("d2h")
    buffers.down()
    buffers.check("d2h")


def _duplex(buffers: Buffers, seconds: float) -> tuple[Figure, Figure]:
    """Each direction while the other is busy. HAZARD: two streams, so no buffer is used by both.

    On a host that others use too, their traffic slows the copies for a second or so: up to
    `DUPLEX_ATTEMPTS` attempts or more are made, with rests between them, until one is steady. The fastest
    counts.
    """
    import torch

    fewest, most = DUPLEX_ROUNDS
    alone_s = once(buffers.up, torch.cuda.synchronize)
    rounds = max(fewest, min(most, int(seconds / max(alone_s, 1e-6))))
    actions = (buffers.up, buffers.down)
    overlapping_samples(actions, fewest)  # warm-up
    attempts: list[list[list[float]]] = []
    for attempt in range(max(DUPLEX_ATTEMPTS, int(DUPLEX_ATTEMPTS_PER_S * seconds))):
        time.sleep(DUPLEX_REST_S if attempt else 0.0)
        attempts.append(overlapping_samples(actions, rounds))
        if all(_is_steady(samples) for samples in attempts[-1]):
            break
    up_s, down_s = min(attempts, key=_turn_s)
    method = f"{buffers.num_bytes / 2**20:.0f} MiB, pinned, the other direction busy"
    if len(attempts) > 1:
        method += f", the fastest of {len(attempts)} attempts"
    up, down = (
        rate_figure(buffers.num_bytes, samples, method) if samples else absent("the copies did not overlap")
        for samples in (up_s, down_s)
    )
    return up, down


def _is_steady(samples: Sequence[float]) -> bool:
    """The middle half of the samples is within `STEADY` of their median."""
    if len(samples) < 4:
        return True
    low, middle, high = statistics.quantiles(samples, n=4)
    return high - low <= STEADY * middle


def _turn_s(attempt: Sequence[Sequence[float]]) -> float:
    """Of an attempt at both directions: a copy's time up and down together, as if one followed the other."""
    return sum(statistics.median(samples) if samples else math.inf for samples in attempt)


def _link_under_load(buffers: Buffers, nvml: NvmlDevice) -> LinkState:
    """The link's state read while copies are in flight; its present values `None` if that did not succeed."""
    import torch

    cuda: Any = torch.cuda
    copies, state = 16, UNKNOWN_LINK
    for _ in range(3):
        last = cuda.Event()
        for _ in range(copies):
            buffers.up()
        last.record()
        state = nvml.link()
        running = not last.query()
        cuda.synchronize()
        if running:
            return state
        copies *= 4  # the copies were over before the answer came
    return LinkState(
        generation_now=None, width_now=None, generation_max=state.generation_max,
        width_max=state.width_max, generation_gpu_max=state.generation_gpu_max,
    )  # fmt: skip


def _pageable(meter: Meter, memory_bytes: int) -> tuple[Figure, Figure]:
    """H2D and D2H of ordinary memory, which the driver stages through a pinned buffer of its own."""

    def take(copy: Callable[[Buffers], Callable[[], None]]) -> Callable[[float], Figure]:
        def measured(seconds: float) -> Figure:
            import torch

            buffers = largest_buffers(BUFFER_BYTES, memory_bytes, pinned=False)
            action = copy(buffers)

            def whole() -> None:
                action()
                torch.cuda.synchronize()

            method = f"{buffers.num_bytes / 2**20:.0f} MiB, pageable"
            return rate_figure(buffers.num_bytes, host_samples(whole, seconds), method)

        return measured

    h2d = meter.measure("link to GPU, pageable", take(lambda buffers: buffers.up), absent)
    d2h = meter.measure("link from GPU, pageable", take(lambda buffers: buffers.down), absent)
    return h2d, d2h
