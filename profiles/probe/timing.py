"""The only clock of the probes: samples of an action's time, and the figure made of them."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from profiles.machine import Figure

T = TypeVar("T")

Action = Callable[[], object]
Progress = Callable[[str, int, int], None]

AT_LEAST = 3
AT_MOST = 200
"""Samples per figure."""
CUDA_WARM_UP_S = 0.3
"""Load that brings link and clocks up from their idle states."""


@dataclass(kw_only=True)
class Meter:
    """Runs a list of measurements one after the other; a failing one does not stop the rest."""

    seconds_each: float
    """Time for one measurement, warm-up included, as far as the fewest samples allow."""
    total: int
    """Measurements that the whole probe will make."""
    progress: Progress
    done: int = field(default=0, init=False)

    def measure(self, what: str, take: Callable[[float], T], failed: Callable[[str], T]) -> T:
        """`take(seconds)`, or `failed(reason)` if it raises.

        Anything a measurement raises (no memory, a dtype or a call that is missing here) only means
        that this one number could not be had.
        """
        self.progress(what, self.done, self.total)
        try:
            return take(self.seconds_each)
        except Exception as error:
            return failed(one_line(error))
        finally:
            self.done += 1

    def skip(self, count: int) -> None:
        """Count `count` measurements as done that cannot be made."""
        self.done += count


def now() -> str:
    """ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def one_line(error: BaseException) -> str:
    """The first line of an error's message with its type, for the reason of an absent figure."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def rate_figure(amount: float, samples_s: Sequence[float], method: str) -> Figure:
    """`amount` (bytes, FLOPs, elements) per second: the median over the samples, slowest and fastest.

    Raises `ValueError` without samples.
    """
    if not samples_s:
        raise ValueError("no samples")
    rates = [amount / max(sample, 1e-9) for sample in samples_s]
    return Figure(
        value=statistics.median(rates),
        origin="measured",
        method=method,
        time=now(),
        low=min(rates),
        high=max(rates),
        count=len(rates),
    )


def host_samples(action: Action, seconds: float) -> list[float]:
    """Times of `action` in seconds, after a warm-up of at least one call and a fifth of `seconds`.

    `action` returns when its work is done; a copy to or from a GPU ends with a synchronisation.
    """
    action()  # first calls import and allocate, for seconds at times
    start = time.perf_counter()
    while time.perf_counter() - start < seconds / 5:
        action()
    samples: list[float] = []
    while len(samples) < AT_LEAST or (len(samples) < AT_MOST and time.perf_counter() - start < seconds):
        before = time.perf_counter()
        action()
        samples.append(time.perf_counter() - before)
    return samples


def cuda_samples(action: Action, seconds: float) -> list[float]:
    """Times in seconds that `action` took on the current CUDA stream, after a warm-up.

    Actions are queued in batches without a wait between them, so that the time to launch one is hidden
    behind the one before; each has its own pair of events.
    """
    import torch

    cuda: Any = torch.cuda
    action()  # first calls load kernels and allocate
    cuda.synchronize()
    start = time.perf_counter()
    while time.perf_counter() - start < min(CUDA_WARM_UP_S, seconds / 3):
        for _ in range(4):
            action()
        cuda.synchronize()
    samples: list[float] = []
    while len(samples) < AT_LEAST or (len(samples) < AT_MOST and time.perf_counter() - start < seconds):
        events = [cuda.Event(enable_timing=True) for _ in range(5)]
        events[0].record()
        for event in events[1:]:
            action()
            event.record()
        cuda.synchronize()
        # The first of a batch starts on an idle stream and would count its own launch.
        samples += [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events[1:])]
    return samples


def overlapping_samples(actions: tuple[Action, Action], rounds: int) -> tuple[list[float], list[float]]:
    """Times in seconds of two CUDA actions that run on streams of their own at the same time.

    Only calls count that lie wholly inside the span in which both streams were busy, so that the slower
    of the two is not flattered by a rest that it runs alone. Either list may be empty.
    """
    import torch

    cuda: Any = torch.cuda
    streams = [cuda.Stream(), cuda.Stream()]
    origin = cuda.Event(enable_timing=True)
    marks = [[cuda.Event(enable_timing=True) for _ in range(rounds + 1)] for _ in actions]
    cuda.synchronize()
    origin.record()
    for stream, row in zip(streams, marks, strict=True):
        stream.wait_event(origin)
        row[0].record(stream)
    for turn in range(1, rounds + 1):
        for stream, row, action in zip(streams, marks, actions, strict=True):
            with cuda.stream(stream):
                action()
            row[turn].record(stream)
    cuda.synchronize()
    # The longer a span, the coarser float32 milliseconds get; a second still has them to 0.1 us.
    times = [[origin.elapsed_time(event) / 1e3 for event in row] for row in marks]
    first, second = (inside_overlap(row, other) for row, other in zip(times, times[::-1], strict=True))
    return first, second


def inside_overlap(times_s: Sequence[float], others_s: Sequence[float]) -> list[float]:
    """Durations between neighbours of `times_s` that lie wholly between the ends of `others_s`.

    The first duration is left out: the other stream may not have begun.
    """
    return [
        end - start
        for start, end in itertools.pairwise(times_s[1:])
        if start >= others_s[0] and end <= others_s[-1]
    ]


def largest_size(
    time_s: Callable[[int], float], sizes: Sequence[int], limit_s: float, growth: float = 8.0
) -> int:
    """The largest of `sizes` (ascending) that can be expected to take at most `limit_s`.

    `time_s(size)` times one call. Sizes are tried from the smallest on; `growth` is how much longer the
    next takes, so a processor that is slow beyond all expectation is found out on a small size.
    """
    chosen = sizes[0]
    for size, following in zip(sizes, [*sizes[1:], None], strict=True):
        chosen = size
        if following is None or time_s(size) * growth > limit_s:
            break
    return chosen


def once(action: Action, synchronize: Action = lambda: None) -> float:
    """Seconds of the second of two calls: a rough time to choose sizes by."""
    action()
    synchronize()
    before = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - before
