"""The engines' clock, and the stream that they compute in."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    pass


torch_cuda: Any = torch.cuda  # most of it is without annotations


_streams: dict[int, torch.cuda.Stream] = {}
"""By the driver's own handle."""


def compute_stream(device: torch.device | None = None) -> torch.cuda.Stream:
    """The stream that kernels go to, as an object that is made once.

    `torch.cuda.current_stream` makes a new one each time: in a profile of OPT-6.7B's steps that took 15 of
    the 22 microseconds that recording an event did, and a step records a thousand."""
    index = device.index if device is not None and device.index is not None else torch_cuda.current_device()
    handle = torch._C._cuda_getCurrentRawStream(index)
    found = _streams.get(handle)
    if found is None or found.device_index != index:
        found = _streams[handle] = torch.cuda.current_stream(index)
    return found


def now_s() -> float:
    """The engines' own clock, in seconds: for busy times and time limits only.

    Runs are timed by `harness.runs.measure`.
    """
    return time.perf_counter()


def take_ended_s(times: list[tuple[Any, Any]]) -> float:
    total_s, running = 0.0, []
    for start, end in times:
        if end.query():
            total_s += start.elapsed_time(end) / 1e3
        else:
            running.append((start, end))
    times[:] = running
    return total_s
