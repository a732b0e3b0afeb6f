"""The only clock of the probes: samples of an action's time, and the figure made of them."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from profiles.machine import Figure, GpuReading

T = TypeVar("T")

Action = Callable[[], object]
OnMeasurement = Callable[[str, int, int], None]
"""Called before each measurement with what it is, how many are done, and of how many."""

Look = Callable[[str], GpuReading]
"""Reads the GPU's condition; the argument names the measurement."""

AT_LEAST = 3
AT_MOST = 200
"""Samples per figure."""
CUDA_WARM_UP_S = 0.3
"""Load that brings link and clocks up from their idle states."""
BATCH_S = 0.05
BATCH_CALLS = (4, 64)
"""GPU work that is queued without a wait: long enough to read the GPU's condition meanwhile."""
REST_PER_BURST = 4.0
"""Rest between bursts, in times of a burst: the mean power is then far below the limit."""
WATCH_INTERVAL_S = 0.2
"""Between two readings of the GPU's condition: each takes up to some milliseconds."""
OTHERS = "another process on the GPU"
"""What disturbs measurements there."""


@dataclass(kw_only=True)
class Meter:
    """Runs a list of measurements one after the other; a failing one does not stop the rest."""

    seconds_each: float
    """Time for one measurement, warm-up included, as far as the fewest samples allow."""
    total: int
    """Measurements that the whole probe will make."""
    progress: OnMeasurement
    limit_s: float = math.inf
    """Time after which measurements that can be done without are left out."""
    look: Look | None = None
    """Set once a GPU is in use."""
    between: Action | None = None
    """Called after each measurement, for what is looked at again and again while the probe runs."""
    started_s: float = field(default_factory=time.perf_counter)
    """On the clock of `clock_s`."""
    done: int = field(default=0, init=False)
    readings: list[GpuReading] = field(default_factory=list, init=False)
    _what: str = field(default="", init=False)
    _standing: set[str] = field(default_factory=set, init=False)
    _watched_s: float = field(default=-math.inf, init=False)

    def measure(
        self,
        what: str,
        take: Callable[[float], T],
        failed: Callable[[str], T],
        *,
        repeats: bool = True,
    ) -> T:
        """`take(seconds)`, or `failed(reason)` if it raises.

        Anything a measurement raises (no memory, a dtype or a call that is missing here) only means
        that this one number could not be had. One that something disturbed is made again, once; if
        something disturbs that too, its figures say so, and the same thing causes no repetition any more.
        Without `repeats` it is made once.
        """
        self.progress(what, self.done, self.total)
        self._what = what
        try:
            taken, found = self._take(take)
            if repeats and found - self._standing and self.elapsed_s() < self.limit_s:
                taken, found = self._take(take)
                self._standing |= found
            return _marked(taken, found) if found else taken
        except Exception as error:
            return failed(one_line(error))
        finally:
            self.done += 1
            if self.between is not None:
                self.between()

    def optional(
        self,
        what: str,
        take: Callable[[float], T],
        failed: Callable[[str], T],
        *,
        needs_s: float = 0.0,
        repeats: bool = True,
    ) -> T:
        """`take(seconds)` where more than `needs_s` of the probe's time is left, else `failed(reason)`.

        What raises, or is disturbed, is treated as `measure` treats it.
        """
        if self.left_s() > needs_s:
            return self.measure(what, take, failed, repeats=repeats)
        self.done += 1
        return failed(f"the probe's {self.limit_s:.0f} s were used up; --full takes longer")

    def skip(self, count: int) -> None:
        """Count `count` measurements as done that cannot be made."""
        self.done += count

    def watch(self) -> None:
        """Note the GPU's condition while it works; calls in quick succession are passed over."""
        if self.look is not None and time.perf_counter() - self._watched_s >= WATCH_INTERVAL_S:
            self._watched_s = time.perf_counter()
            self.readings.append(self.look(self._what))

    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started_s

    def left_s(self) -> float:
        return max(0.0, self.limit_s - self.elapsed_s())

    def _take(self, take: Callable[[float], T]) -> tuple[T, set[str]]:
        before = len(self.readings)
        self._watched_s = -math.inf  # at least one reading for each measurement
        taken = take(self.seconds_each)
        return taken, {reason for reading in self.readings[before:] for reason in disturbances(reading)}


def disturbances(reading: GpuReading) -> tuple[str, ...]:
    """What besides the measurement acted on the GPU."""
    others = (OTHERS,) if reading.other_processes else ()
    return (*(f"throttled: {reason}" for reason in reading.throttled), *others)


def _marked(taken: T, found: set[str]) -> T:
    """The figures of `taken` with what disturbed them; anything else as it is."""
    marked: Any = taken
    if isinstance(taken, Figure) and taken.value is not None:
        marked = replace(taken, disturbance="; ".join(sorted(found)))
    elif isinstance(taken, tuple):
        marked = tuple(_marked(part, found) for part in taken)
    return marked  # type: ignore[no-any-return]


def clock_s() -> float:
    """The probes' clock, in seconds."""
    return time.perf_counter()


def now() -> str:
    """ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def one_line(error: BaseException) -> str:
    """The first line of an error's message with its type, for the reason of an absent figure. A private type
    says nothing to a reader and is left out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    name = type(error).__name__
    if not lines:
        return name
    return lines[0][:200] if name.startswith("_") else f"{name}: {lines[0][:200]}"


def rate_figure(amount: float, samples_s: Sequence[float], method: str) -> Figure:
    """`amount` (bytes, FLOPs, elements) per second: the median over the samples, slowest and fastest.

    Raises `ValueError` without samples.
    """
    return figure([amount / max(sample, 1e-9) for sample in samples_s], method)


def figure(values: Sequence[float], method: str) -> Figure:
    """The median of measured values, smallest and largest. Raises `ValueError` without any."""
    if not values:
        raise ValueError("no samples")
    return Figure(
        value=statistics.median(values),
        origin="measured",
        method=method,
        time=now(),
        low=min(values),
        high=max(values),
        count=len(values),
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


def cuda_samples(action: Action, seconds: float, watch: Action = lambda: None) -> list[float]:
    """Times in seconds that `action` took on the current CUDA stream, after a warm-up.

    Actions are queued in batches without a wait between them, so that the time to launch one is hidden
    behind the one before; each has its own pair of events. `watch` is called while a batch runs.
    """
    import torch

    cuda: Any = torch.cuda
    action()  # first calls load kernels and allocate
    cuda.synchronize()
    fewest, most = BATCH_CALLS
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < min(CUDA_WARM_UP_S, seconds / 3):
        for _ in range(fewest):
            action()
        cuda.synchronize()
        calls += fewest
    each_s = (time.perf_counter() - start) / calls
    batch = max(fewest, min(most, int(min(BATCH_S, seconds) / max(each_s, 1e-9))))
    events = [cuda.Event(enable_timing=True) for _ in range(batch + 1)]
    samples: list[float] = []
    while len(samples) < AT_LEAST or (len(samples) < AT_MOST and time.perf_counter() - start < seconds):
        samples += _between(events, action, watch, cuda.synchronize)
    return samples


def _between(events: list[Any], action: Action, watch: Action, synchronize: Action) -> list[float]:
    """Seconds between the `events`, each recorded after an `action`; `watch` is called meanwhile.

    The first action starts on an idle stream and would count its own launch: it is left out.
    """
    events[0].record()
    for event in events[1:]:
        action()
        event.record()
    watch()
    synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events[1:])]


def burst_samples(action: Action, seconds: float, watch: Action = lambda: None) -> list[float]:
    """Times in seconds that `action` took on the current CUDA stream, in bursts with rests between.

    A burst lasts about `BATCH_S`; each action has its own pair of events, and `watch` is called meanwhile.
    Without rests a GPU that multiplies reaches its power limit within a tenth of a second, and what is
    measured is the limit: on an H200 790 TFLOP/s in bf16 fall to 650.
    """
    import torch

    cuda: Any = torch.cuda
    action()  # first calls load kernels and allocate
    cuda.synchronize()
    each_s = once(action, cuda.synchronize)
    batch = max(AT_LEAST, min(BATCH_CALLS[1], int(BATCH_S / max(each_s, 1e-9))))
    events = [cuda.Event(enable_timing=True) for _ in range(batch + 2)]
    samples: list[float] = []
    start = time.perf_counter()
    while len(samples) < AT_LEAST or (len(samples) < AT_MOST and time.perf_counter() - start < seconds):
        time.sleep(REST_PER_BURST * batch * each_s)
        samples += _between(events, action, watch, cuda.synchronize)
    return samples


def soak_samples(action: Action, seconds: float, watch: Action) -> list[tuple[float, float]]:
    """(when it ended, how long it took) of `action` over and over, in seconds.

    There is no warm-up; the first call must have been made before.
    """
    import torch

    cuda: Any = torch.cuda
    fewest, _ = BATCH_CALLS
    samples: list[tuple[float, float]] = []
    start, batch = time.perf_counter(), fewest
    while len(samples) < AT_LEAST or time.perf_counter() - start < seconds:
        events = [cuda.Event(enable_timing=True) for _ in range(batch + 1)]
        for event in events[:-1]:
            event.record()
            action()
        events[-1].record()
        watch()
        cuda.synchronize()
        end_s = time.perf_counter() - start
        took_s = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)][1:]
        samples += [(end_s, took) for took in took_s]
        batch = max(fewest, int(BATCH_S / max(statistics.median(took_s), 1e-4)))
    return samples


def overlapping_samples(actions: Sequence[Action], rounds: int) -> list[list[float]]:
    """Times in seconds of CUDA actions, `rounds` calls each, on streams of their own at the same time.

    Only calls count that lie wholly inside the span in which all streams were busy, so that the slower
    ones are not flattered by a rest that they run alone. Any list may be empty.
    """
    import torch

    cuda: Any = torch.cuda
    streams = [cuda.Stream() for _ in actions]
    origin = cuda.Event(enable_timing=True)
    marks = [[cuda.Event(enable_timing=True) for _ in range(rounds + 1)] for _ in actions]
    cuda.synchronize()
    origin.record()
    for stream, row in zip(streams, marks, strict=True):
        stream.wait_event(origin)
        row[0].record(stream)
    for turn in range(1, rounds + 1):
        for action, stream, row in zip(actions, streams, marks, strict=True):
            with cuda.stream(stream):
                action()
            row[turn].record(stream)
    cuda.synchronize()
    # The longer a span, the coarser float32 milliseconds get; a second still has them to 0.1 us.
    times = [[origin.elapsed_time(event) / 1e3 for event in row] for row in marks]
    span = [max(row[0] for row in times), min(row[-1] for row in times)]
    return [inside_overlap(row, span) for row in times]


def inside_overlap(times_s: Sequence[float], others_s: Sequence[float]) -> list[float]:
    """Durations between neighbours of `times_s` that lie wholly between the ends of `others_s`.

    The first duration is left out: the other streams may not have begun.
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
    """Seconds of the fastest of three calls after a first: a rough time to choose sizes by.

    One call may meet a disturbance, and a size chosen by that would be far too small.
    """
    action()
    synchronize()
    times_s = []
    for _ in range(3):
        before = time.perf_counter()
        action()
        synchronize()
        times_s.append(time.perf_counter() - before)
    return min(times_s)
