"""Threads of the CPU that Adam has, and those that it leaves to others."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from engines.transfer.clock import now_s

SPARE_THREADS = 2
"""CPU threads that Adam leaves to those that start kernels. One starts them, one runs backward."""

FIRST_STEPS, SEEN_STEPS = 2, 4
"""Steps that do not count, in which kernels are compiled and captured, and steps by whose median two numbers
of threads are compared."""


class AdamThreads:
    """How many threads the updates of one engine run on: all but a few, or half of those, whichever steps are
    faster with; both are tried in the first steps. The bits are the same with any number.

    Where the CPU decides how long a step takes, more threads are faster until memory is as busy as it can be.
    Where the GPU does, they are in the way: between two chunks they spin, and those that start the GPU's
    kernels, other ranks and other programs want the same cores. `lsp` at 1.3B, on a host of an H200 with 32
    cores, half of them beside another job: 84 ms a step with all threads and 77 with half (GPU 65), with bf16
    moments 79 and 70, though an update takes a tenth longer (engines/EXPERIMENTS.md).
    """

    def __init__(self, clock_s: Callable[[], float] = now_s) -> None:
        """Of the calling thread's number of threads."""
        self._clock_s = clock_s
        self._most = self.count = max(1, torch.get_num_threads() - SPARE_THREADS)
        """`count`: for the updates from now on."""
        self._fewer = max(1, self._most // 2)
        self._last_s: float | None = None
        self._to_ignore = FIRST_STEPS
        self._seen: list[float] = []
        self._with_most_s: float | None = None
        self._is_settled = self._fewer == self._most

    def step_ended(self) -> None:
        """To be called once at the end of each step."""
        if self._is_settled:
            return
        now, before = self._clock_s(), self._last_s
        self._last_s = now
        if before is None:
            return
        if self._to_ignore > 0:
            self._to_ignore -= 1
            return
        self._seen.append(now - before)
        if len(self._seen) < SEEN_STEPS:
            return
        taken_s = statistics.median(self._seen)
        self._seen.clear()
        if self._with_most_s is None:
            self._with_most_s = taken_s
            self.count = self._fewer
            self._to_ignore = 1  # in it updates of both are made
            return
        self._is_settled = True
        if taken_s > self._with_most_s:
            self.count = self._most


def leave_threads_to_adam() -> None:
    """Let go of the calling thread's own pool of OpenMP threads, but for one.

    HAZARD: libgomp has a pool for each thread that starts parallel regions, and once their threads outnumber
    the cores, all of them sleep at barriers instead of spinning: each of Adam's regions then costs the waking
    of every thread. Measured at 1.3B on 16 cores: 2.2 G elements/s with the main thread's pool beside it, 4.2
    without, which made the step 0.122 s instead of 0.172.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    torch.zeros(1 << 20).add_(1.0)  # a region of two; the others end at its beginning
    torch.set_num_threads(before)


@contextmanager
def adam_threads() -> Iterator[None]:
    """Leave `SPARE_THREADS` out of the calling thread's parallel regions."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before - SPARE_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)
