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
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from engines.transfer.clock import EventPair, compute_stream

Resource = Literal["gpu", "d2h", "cpu", "h2d"]

Interval = tuple[float, float]
"""Begin and end, in seconds of one clock."""

Spans = NDArray[np.float64]
"""(spans, 2): begin and end of each, in those seconds."""

STEPS_BEHIND = 2

_cuda: Any = torch.cuda  # most of it is without annotations


@dataclass(frozen=True, kw_only=True, slots=True)
class Exposed:
    """Seconds of one step. `None`: not measured."""

    gpu_s: float | None = None
    d2h_s: float | None = None
    cpu_s: float | None = None
    h2d_s: float | None = None


def exposed(spans: Mapping[Resource, Sequence[Interval]], window: Interval) -> Exposed:
    """What of the window each resource was exposed. Spans of one may overlap and reach beyond the window.

    `None` for a resource that is not in `spans`, and for all if the GPU is not.
    """
    if "gpu" not in spans:
        return Exposed()
    busy = {name: _clipped(each, window) for name, each in spans.items()}
    on_gpu = busy.pop("gpu")
    gpu_s, others = covered_s(on_gpu), np.concatenate([on_gpu[:0], *busy.values()])
    alone = {name: max(0.0, covered_s(np.concatenate([on_gpu, each])) - gpu_s) for name, each in busy.items()}
    return Exposed(
        gpu_s=max(0.0, covered_s(np.concatenate([on_gpu, others])) - covered_s(others)),
        d2h_s=alone.get("d2h"),
        cpu_s=alone.get("cpu"),
        h2d_s=alone.get("h2d"),
    )


def covered_s(spans: Spans) -> float:
    """The time that any span has."""
    begins, ends = spans[spans[:, 0].argsort()].T
    until = np.maximum.accumulate(ends)
    # Each adds what comes after all that began before it.
    return float((until[1:] - np.maximum(begins[1:], until[:-1])).sum() + (ends[:1] - begins[:1]).sum())


def _clipped(spans: Sequence[Interval], window: Interval) -> Spans:
    found = np.array(spans, dtype=np.float64).reshape(-1, 2).clip(*window)
    clipped: Spans = found[found[:, 0] < found[:, 1]]
    return clipped


class _Asked(NamedTuple):
    """Work on the GPU or the link, as it was enqueued."""

    resource: Resource
    pair: EventPair
    asked_s: float | None
    """When the host enqueued it, by its clock."""


class _Placed(NamedTuple):
    """The same, once it has ended, by the clock of steps."""

    resource: Resource
    span: Interval
    asked_s: float | None


class ExposureClock:
    """Spans of some steps, and what they come to. May be used from several threads.

    On a CPU device it keeps nothing, and knows nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._lock = threading.Lock()
        self._asked: list[_Asked] = []
        self._placed: list[_Placed] = []
        """Since the oldest of `_marks`: of the thread that takes."""
        self._host: list[Interval] = []
        self._marks: list[Any] = []
        self._begin_s = 0.0
        """Of the oldest of `_marks`, by a clock that begins with the first: the seconds between marks, added
        up."""

    def mark(self) -> None:
        """A step begins: a point in the current stream."""
        if not self._is_cuda:
            return
        event = _cuda.Event(enable_timing=True)
        event.record(compute_stream(self._device))
        self._marks.append(event)

    def between(self, resource: Resource, pair: EventPair, asked_s: float | None = None) -> None:
        """Work between recorded CUDA events. For copies, `asked_s` is when the host enqueued the first."""
        if self._is_cuda:
            with self._lock:
                self._asked.append(_Asked(resource, pair, asked_s))

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
        origin, begin_s = self._marks.pop(0), self._begin_s
        self._begin_s = end_s = begin_s + _seconds(origin, self._marks[0])
        # HAZARD: those who start copies and run Adam want the lock, too, and what follows takes milliseconds:
        # with the lock held, a fifth of a step of `lsp` at 1.3B passed in which nothing was started.
        with self._lock:
            asked, self._asked = self._asked, []
            host, self._host = self._host, []
        running = self._place(origin, begin_s, asked)
        spans: dict[Resource, list[Interval]] = {}
        for placed in self._placed:
            spans.setdefault(placed.resource, []).append(placed.span)
        lags_s = [each.span[0] - each.asked_s for each in self._placed if each.asked_s is not None]
        if host and lags_s:
            shift_s = min(lags_s)
            on_host = [(start_s + shift_s, stop_s + shift_s) for start_s, stop_s in host]
            spans["cpu"] = on_host
            host = [span for span, at in zip(host, on_host, strict=True) if at[1] > end_s]
        self._placed = [each for each in self._placed if each.span[1] > end_s]
        with self._lock:
            self._asked[:0], self._host[:0] = running, host
        return exposed(spans, (begin_s, end_s))

    def _place(self, origin: Any, begin_s: float, asked: Iterable[_Asked]) -> list[_Asked]:
        """Find the time of what has ended, `begin_s` being that of `origin`; the rest."""
        running: list[_Asked] = []
        for each in asked:
            taken_s = each.pair.seconds()
            if taken_s is None:
                running.append(each)
                continue
            start_s = begin_s + _seconds(origin, each.pair.start)
            self._placed.append(_Placed(each.resource, (start_s, start_s + taken_s), each.asked_s))
        return running


def _seconds(earlier: Any, later: Any) -> float:
    return float(earlier.elapsed_time(later)) / 1e3
