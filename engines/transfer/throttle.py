"""Slows copies over a link down to given rates, so that a fast machine shows what a slower one would.

A copy takes at least its bytes over the rate of its direction, counted from its start or from the end of
the copy before it in the same direction, whichever is later. Deadlines follow from each other and not from
the moments at which they were noticed, so errors do not add up over copies that follow each other closely.
Latency of single copies is not emulated. On a GPU the kernels around a copy and the changes of engine between
them cost some 60 us (on an H200 machine), beside the copy's own time on the real link: copies that should
take less are slower than asked. At 24 GB/s those are copies below 2 MB.

On a GPU the copy's stream is held by a kernel of one warp that reads the GPU's nanosecond clock
(`engines.transfer.throttle_kernels`); neither host nor compute stream waits. On a CPU device the calling
thread sleeps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from engines.errors import NotAvailable
from engines.shapes import Direction

if TYPE_CHECKING:
    from engines.base import LinkRates


HOST_GAP_S = 500e-6
"""Copies that follow each other within this time count as back to back: a sleep ends some 0.1 ms late."""


class HostPace:
    """For copies that the calling thread makes itself. Each direction keeps its own rate whatever the other
    one does."""

    def __init__(
        self,
        rates: LinkRates,
        clock: Callable[[], float],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rates = {"h2d": rates.h2d_bytes_per_s, "d2h": rates.d2h_bytes_per_s}
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free_s = {"h2d": float("-inf"), "d2h": float("-inf")}

    def begin(self, direction: Direction, num_bytes: int) -> float:
        """A copy of `num_bytes` starts now; the time at which it may be over."""
        with self._lock:
            now_s, free_s = self._clock(), self._free_s[direction]
            start_s = free_s if now_s - free_s < HOST_GAP_S else now_s
            self._free_s[direction] = end_s = start_s + num_bytes / self._rates[direction]
        return end_s

    def hold(self, end_s: float) -> None:
        """Return at `end_s`, or at once where that has passed."""
        left_s = end_s - self._clock()
        if left_s > 0:
            self._sleep(left_s)


class GpuPace:
    """For copies on one stream per direction. `begin` and `hold` are enqueued on the current stream, around
    the copy; the caller keeps each direction's triples of begin, copy and hold apart.

    Where the rates with both directions busy are known, a copy slows down for just the time that a copy of
    the other direction is under way. Raises `NotAvailable` without Triton.
    """

    def __init__(self, rates: LinkRates, device: torch.device) -> None:
        try:
            from engines.transfer import throttle_kernels
        except ImportError:
            raise NotAvailable("emulating a link on a GPU needs the package triton") from None
        self._kernels = throttle_kernels
        self._alone = {"h2d": rates.h2d_bytes_per_s, "d2h": rates.d2h_bytes_per_s}
        self._share = {
            "h2d": _share(rates.h2d_duplex_bytes_per_s, rates.h2d_bytes_per_s),
            "d2h": _share(rates.d2h_duplex_bytes_per_s, rates.d2h_bytes_per_s),
        }
        up, down = (throttle_kernels.new_state(device) for _ in range(2))
        self._own = {"h2d": up, "d2h": down}
        self._other = {"h2d": down, "d2h": up}
        # What lies in the states was written on the current stream; copies run on others.
        torch.cuda.synchronize(device)

    def begin(self, direction: Direction) -> None:
        self._kernels.begin(self._own[direction], self._other[direction])

    def hold(self, direction: Direction, num_bytes: int) -> None:
        cost_ns = round(num_bytes / self._alone[direction] * 1e9)
        self._kernels.hold(self._own[direction], self._other[direction], cost_ns, self._share[direction])


def _share(both: float | None, alone: float) -> float:
    """Rate with both directions busy over the rate alone."""
    return 1.0 if both is None else min(1.0, both / alone)
