"""How much of what each resource does in a step hides behind the others, from the engines' own clocks.

A resource is *exposed* while it is busy and the GPU is not: that time makes the step longer. The GPU is
exposed while nothing else is busy. What is not exposed is overlapped.

Spans of the GPU and of copies lie between CUDA events, spans of the CPU between readings of the host's clock.
Nothing here waits: a step is looked at when two more have begun, as all that it started has ended by then.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from engines.transfer.clock import compute_stream

Resource = Literal["gpu", "d2h", "cpu", "h2d"]

Interval = tuple[float, float]
"""Begin and end, in seconds of one clock."""

STEPS_BEHIND = 2

_cuda: Any = torch.cuda  # most of it is without annotations


@dataclass(frozen=True, kw_only=True, slots=True)
class Exposed:
    """Seconds of one step. `None`: not measured."""

    gpu_s: float | None = None
    d2h_s: float | None = None
    cpu_s: float | None = None
    h2d_s: float | None = None


def exposed(spans: Mapping[Resource, Iterable[Interval]], window: Interval) -> Exposed:
    """What of the window each resource was exposed. Spans of one may overlap and reach beyond the window.

    `None` for a resource that is not in `spans`, and for all if the GPU is not.
    """
    if "gpu" not in spans:
        return Exposed()
    busy = {name: union(_clipped(each, window)) for name, each in spans.items()}
    others = union(span for name, each in busy.items() if name != "gpu" for span in each)
    alone = {name: length(each) - shared(each, busy["gpu"]) for name, each in busy.items() if name != "gpu"}
    return Exposed(
        gpu_s=length(busy["gpu"]) - shared(busy["gpu"], others),
        d2h_s=alone.get("d2h"),
        cpu_s=alone.get("cpu"),
        h2d_s=alone.get("h2d"),
    )


def union(spans: Iterable[Interval]) -> list[Interval]:
    """The same time as spans that do not touch, ascending."""
    found: list[Interval] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def length(spans: Sequence[Interval]) -> float:
    return sum(end - begin for begin, end in spans)


def shared(left: Sequence[Interval], right: Sequence[Interval]) -> float:
    """The time that is in both. Each as `union` gives it."""
    total, i, j = 0.0, 0, 0
    while i < len(left) and j < len(right):
        total += max(0.0, min(left[i][1], right[j][1]) - max(left[i][0], right[j][0]))
        if left[i][1] <= right[j][1]:
            i += 1
        else:
            j += 1
    return total


def _clipped(spans: Iterable[Interval], window: Interval) -> list[Interval]:
    clipped = ((max(begin, window[0]), min(end, window[1])) for begin, end in spans)
    return [span for span in clipped if span[0] < span[1]]


@dataclass(frozen=True, slots=True)
class _Pair:
    """Work between two CUDA events with timing."""

    resource: Resource
    start: Any
    end: Any
    asked_s: float | None
    """When the host enqueued it, by its clock."""


class ExposureClock:
    """Spans of some steps, and what they come to. May be used from several threads.

    On a CPU device it keeps nothing, and knows nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._lock = threading.Lock()
        self._pairs: list[_Pair] = []
        self._host: list[Interval] = []
        self._marks: list[Any] = []

    def mark(self) -> None:
        """A step begins: a point in the current stream."""
        if not self._is_cuda:
            return
        event = _cuda.Event(enable_timing=True)
        event.record(compute_stream(self._device))
        self._marks.append(event)

    def between(self, resource: Resource, start: Any, end: Any, asked_s: float | None = None) -> None:
        """Work between two recorded CUDA events. For copies, `asked_s` is when the host enqueued `start`."""
        if self._is_cuda:
            with self._lock:
                self._pairs.append(_Pair(resource, start, end, asked_s))

    def on_host(self, start_s: float, end_s: float) -> None:
        """Work of the CPU, by the engines' clock."""
        if self._is_cuda:
            with self._lock:
                self._host.append((start_s, end_s))

    def take(self) -> Exposed:
        """Of the oldest step that has not been taken and has ended; all `None` if there is none yet.

        The GPU's clock is laid on the host's by the copy that began soonest after it was asked for: no copy
        begins before that, and on an idle link it begins some 10 microseconds after.
        """
        if len(self._marks) <= STEPS_BEHIND or not self._marks[STEPS_BEHIND].query():
            return Exposed()
        origin = self._marks.pop(0)
        window = (0.0, _seconds(origin, self._marks[0]))
        with self._lock:
            spans: dict[Resource, list[Interval]] = {}
            later: list[_Pair] = []
            lags_s: list[float] = []
            for pair in self._pairs:
                if not pair.end.query():
                    later.append(pair)
                    continue
                span = _seconds(origin, pair.start), _seconds(origin, pair.end)
                spans.setdefault(pair.resource, []).append(span)
                if pair.asked_s is not None:
                    lags_s.append(span[0] - pair.asked_s)
                if span[1] > window[1]:
                    later.append(pair)
            self._pairs = later
            if self._host and lags_s:
                shift_s = min(lags_s)
                placed = [(start_s + shift_s, end_s + shift_s) for start_s, end_s in self._host]
                spans["cpu"] = placed
                self._host = [span for span, at in zip(self._host, placed, strict=True) if at[1] > window[1]]
        return exposed(spans, window)


def _seconds(earlier: Any, later: Any) -> float:
    return float(earlier.elapsed_time(later)) / 1e3
