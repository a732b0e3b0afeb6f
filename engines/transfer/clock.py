"""The engines' clock, and the stream that they compute in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

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


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """What the calling thread enqueues inside goes to `stream`, and after it to where it went before on that
    device, which stays the current one. `torch.cuda.stream` makes an object of the stream before each time
    (see `compute_stream`)."""
    before = compute_stream(stream.device)
    torch_cuda.set_stream(stream)
    try:
        yield
    finally:
        torch_cuda.set_stream(before)


def now_s() -> float:
    """The engines' own clock, in seconds: for busy times and time limits only.

    Runs are timed by `harness.runs.measure`.
    """
    return time.perf_counter()


class EventPair:
    """Work between two recorded CUDA events with timing.

    It asks the driver once: each question takes microseconds, and some hundred pairs are asked each step, by
    more than one clock.
    """

    __slots__ = ("_taken_s", "end", "start")

    def __init__(self, start: Any, end: Any) -> None:
        self.start, self.end = start, end
        self._taken_s: float | None = None

    def seconds(self) -> float | None:
        """From one to the other; `None` while it is under way. Does not wait."""
        if self._taken_s is None and self.end.query():
            self._taken_s = float(self.start.elapsed_time(self.end)) / 1e3
        return self._taken_s


def take_ended_s(pairs: list[EventPair]) -> float:
    """Seconds of those that have ended, which leave the list."""
    total_s, running = 0.0, []
    for pair in pairs:
        seconds = pair.seconds()
        if seconds is None:
            running.append(pair)
        else:
            total_s += seconds
    pairs[:] = running
    return total_s
