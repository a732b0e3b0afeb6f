"""What host and GPU exchange: pinned and pageable copies each way, and both ways at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from profiles.machine import Figure, Link, absent
from profiles.nvml import LinkState, NvmlDevice
from profiles.probe.timing import (
    Meter,
    cuda_samples,
    host_samples,
    once,
    one_line,
    overlapping_samples,
    rate_figure,
)

BUFFER_BYTES = 256 * 2**20
SMALLEST_BUFFER_BYTES = 2**20
DUPLEX_ROUNDS = (6, 24)
"""Fewest and most copies in each direction."""
NUM_MEASUREMENTS = 5

_UNKNOWN_LINK = LinkState(generation_now=None, width_now=None, generation_max=None, width_max=None)


class _Buffers:
    """A host and a device buffer for each direction, so that both can be in flight."""

    def __init__(self, num_bytes: int, *, pinned: bool) -> None:
        import torch

        self.num_bytes = num_bytes
        self.host_up, self.host_down = (
            torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)
        )
        self.device_up, self.device_down = (
            torch.empty(num_bytes, dtype=torch.uint8, device="cuda") for _ in range(2)
        )
        # First touch, and a pattern without a short period for `check`.
        words = self.host_up.view(torch.int32)
        torch.arange(words.numel(), dtype=torch.int32, out=words)
        self.host_down.zero_()
        self.device_down.zero_()
        torch.cuda.synchronize()

    def up(self) -> None:
        self.device_up.copy_(self.host_up, non_blocking=True)

    def down(self) -> None:
        self.host_down.copy_(self.device_down, non_blocking=True)

    def check(self) -> None:
        """Raises `RuntimeError` if what goes up does not come down."""
        import torch

        self.up()
        self.device_down.copy_(self.device_up)
        self.down()
        torch.cuda.synchronize()
        if not torch.equal(self.host_up, self.host_down):
            raise RuntimeError("a copy to the GPU and back changed the data")


def probe_link(meter: Meter, nvml: NvmlDevice | None, *, memory_bytes: int) -> Link:
    """Measures the current CUDA device. `memory_bytes` is the most host memory it may allocate."""
    pinned, loaded = _pinned(meter, nvml, memory_bytes)
    _free()
    pageable = _pageable(meter, memory_bytes)
    _free()
    return Link(
        generation_max=loaded.generation_max,
        generation_loaded=loaded.generation_now,
        width_max=loaded.width_max,
        width_loaded=loaded.width_now,
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
    idle = nvml.link() if nvml else _UNKNOWN_LINK
    try:
        meter.progress("pinned buffers", meter.done, meter.total)
        buffers = _largest_buffers(memory_bytes, pinned=True)
        buffers.check()
    except Exception as error:  # what fails here is a fact about this machine
        meter.skip(3)
        missing = absent(one_line(error))
        return (missing, missing, missing, missing), LinkState(
            generation_now=None, width_now=None, generation_max=idle.generation_max, width_max=idle.width_max
        )
    size = f"{buffers.num_bytes / 2**20:.0f} MiB, pinned"
    h2d = meter.measure(
        "link to GPU, pinned",
        lambda seconds: rate_figure(buffers.num_bytes, cuda_samples(buffers.up, seconds), size),
        absent,
    )
    # The link is warm from the copies just made; its state holds only while the next ones run.
    loaded = _link_under_load(buffers, nvml) if nvml else _UNKNOWN_LINK
    d2h = meter.measure(
        "link from GPU, pinned",
        lambda seconds: rate_figure(buffers.num_bytes, cuda_samples(buffers.down, seconds), size),
        absent,
    )
    both = meter.measure(
        "link both ways", lambda seconds: _duplex(buffers, seconds), lambda why: (absent(why), absent(why))
    )
    return (h2d, d2h, *both), loaded


def _duplex(buffers: _Buffers, seconds: float) -> tuple[Figure, Figure]:
    """Each direction while the other is busy. HAZARD: two streams, so no buffer is used by both."""
    import torch

    fewest, most = DUPLEX_ROUNDS
    alone_s = once(buffers.up, torch.cuda.synchronize)
    rounds = max(fewest, min(most, int(seconds / max(alone_s, 1e-6))))
    overlapping_samples((buffers.up, buffers.down), fewest)  # warm-up
    up_s, down_s = overlapping_samples((buffers.up, buffers.down), rounds)
    method = f"{buffers.num_bytes / 2**20:.0f} MiB, pinned, the other direction busy"
    up, down = (
        rate_figure(buffers.num_bytes, samples, method) if samples else absent("the copies did not overlap")
        for samples in (up_s, down_s)
    )
    return up, down


def _link_under_load(buffers: _Buffers, nvml: NvmlDevice) -> LinkState:
    """The link's state read while copies are in flight; its present values `None` if that did not succeed."""
    import torch

    cuda: Any = torch.cuda
    copies, state = 16, _UNKNOWN_LINK
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
        generation_now=None, width_now=None, generation_max=state.generation_max, width_max=state.width_max
    )


def _pageable(meter: Meter, memory_bytes: int) -> tuple[Figure, Figure]:
    """H2D and D2H of ordinary memory, which the driver stages through a pinned buffer of its own."""

    def take(copy: Callable[[_Buffers], Callable[[], None]]) -> Callable[[float], Figure]:
        def measured(seconds: float) -> Figure:
            import torch

            buffers = _largest_buffers(memory_bytes, pinned=False)
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


def _largest_buffers(memory_bytes: int, *, pinned: bool) -> _Buffers:
    """Buffers of 256 MiB, or smaller where memory or a limit on pinned memory (WSL2) asks for it.

    Sizes are powers of two: torch's pinned allocator rounds up to one. Raises what the smallest raised.
    """
    import torch

    free_bytes = torch.cuda.mem_get_info()[0]
    num_bytes = BUFFER_BYTES
    while num_bytes > SMALLEST_BUFFER_BYTES and (2 * num_bytes > memory_bytes or 4 * num_bytes > free_bytes):
        num_bytes //= 2
    while True:
        try:
            return _Buffers(num_bytes, pinned=pinned)
        except (RuntimeError, MemoryError):
            if num_bytes <= SMALLEST_BUFFER_BYTES:
                raise
        # Only here, after the handler: the traceback kept alive what had been allocated.
        num_bytes = max(num_bytes // 4, SMALLEST_BUFFER_BYTES)
        _free()


def _free() -> None:
    """Give device memory, and pinned memory where this torch can, back to the system."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None)
    if empty_host_cache is not None:
        empty_host_cache()
