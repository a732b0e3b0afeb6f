"""Threads of the CPU that Adam has, and those that it leaves to others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SPARE_THREADS = 2
"""CPU threads that Adam leaves to those that start kernels. One starts them, one runs backward."""


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
