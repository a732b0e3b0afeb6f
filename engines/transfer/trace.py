"""What each stream of a GPU did and when, as events of a Chrome trace. Records without waiting for anything.

A span lies between two points of one CUDA stream. Reading the spans back is what waits, so an engine does
it once, after its last step. On a CPU device, where a copy or a kernel is done when its call returns, a
span lies between two readings of the engines' clock.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass
from typing import Any

import torch

from engines.transfer.clock import now_s

STREAMS = ("upload", "download", "compute", "perturb", "apply", "cpu adam")
"""In the order in which a viewer shows them. Other names are taken too, and shown below these."""

REFERENCE_INTERVAL_S = 10.0
"""CUDA tells the time between two events as a 32-bit float of milliseconds: exact to a microsecond over
ten seconds, but not over minutes. Spans are therefore placed against a reference point near them."""

_cuda: Any = torch.cuda  # most of it is without annotations


@dataclass(kw_only=True, slots=True, eq=False)
class Span:
    """One piece of work of one stream; the token that `begin` gives and `end` takes."""

    stream: str
    name: str
    reference: int
    """Index of the reference point that was the newest at its beginning."""
    start: Any
    """A CUDA event, or seconds of the engines' clock."""
    stop: Any = None
    """`None`: not ended."""


class Timeline:
    """Spans of named streams of one device, from its making on. May be used from several threads.

    `perturb` is for kernels that run on the compute stream too: a line of its own shows what they take.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self._references: list[Any] = []
        self._host_spans: list[tuple[str, str, float, float]] = []
        if self._is_cuda:
            _cuda.synchronize(device)  # the first reference then happens at once, and has a time of the host
        self._refer()
        self._zero_s = self._referred_s

    def begin(self, stream: str, name: str, on: torch.cuda.Stream | None = None) -> Span:
        """Work called `name` begins on `stream`: a point in the CUDA stream `on`, else in the current one.

        HAZARD: what the CUDA stream waits for before that work belongs before this call, or is counted.
        """
        with self._lock:
            if now_s() - self._referred_s >= REFERENCE_INTERVAL_S:
                self._refer()
            reference = len(self._references) - 1
            span = Span(stream=stream, name=name, reference=reference, start=self._point(on))
            self._spans.append(span)
        return span

    def end(self, span: Span, on: torch.cuda.Stream | None = None) -> None:
        """The work of `span` ends here. `on` as it was for `begin`."""
        span.stop = self._point(on)

    def host_span(self, stream: str, name: str, start_s: float, end_s: float) -> None:
        """Work of the CPU between two readings of the engines' clock."""
        with self._lock:
            self._host_spans.append((stream, name, start_s, end_s))

    def events(self) -> list[dict[str, Any]]:
        """Every span that has ended, as Chrome trace events: `ts` and `dur` in microseconds, one `tid` for
        each named stream, and the events that give the streams their names.

        Waits for the device. May be called again. Raises what CUDA raises, also of earlier work.
        """
        if self._is_cuda:
            _cuda.synchronize(self._device)
        with self._lock:
            spans = [span for span in self._spans if span.stop is not None]
            points = list(self._references)
            host_spans = list(self._host_spans)
        offsets_us = [0.0]
        for before, after in itertools.pairwise(points):
            offsets_us.append(offsets_us[-1] + self._between_us(before, after))
        used = dict.fromkeys((*(span.stream for span in spans), *(each[0] for each in host_spans)))
        lanes = {name: tid for tid, name in enumerate({**dict.fromkeys(STREAMS), **used})}
        events = [_names("process", 0, "name", str(self._device))]
        for name in used:
            events += [
                _names("thread", lanes[name], "name", name),
                _names("thread", lanes[name], "sort_index", lanes[name]),
            ]
        for span in spans:
            start_us = offsets_us[span.reference] + self._between_us(points[span.reference], span.start)
            events.append(
                _span(span.name, start_us, self._between_us(span.start, span.stop), lanes[span.stream])
            )
        for stream, name, start_s, end_s in host_spans:
            start_us = (start_s - self._zero_s) * 1e6
            events.append(_span(name, start_us, (end_s - start_s) * 1e6, lanes[stream]))
        return events

    def _refer(self) -> None:
        self._references.append(self._point(None))
        self._referred_s = now_s()

    def _point(self, on: torch.cuda.Stream | None) -> Any:
        if not self._is_cuda:
            return now_s()
        event = _cuda.Event(enable_timing=True)
        event.record(on if on is not None else torch.cuda.current_stream(self._device))
        return event

    def _between_us(self, earlier: Any, later: Any) -> float:
        if self._is_cuda:
            return float(earlier.elapsed_time(later)) * 1e3
        return float(later - earlier) * 1e6


def _span(name: str, start_us: float, length_us: float, tid: int) -> dict[str, Any]:
    return {"name": name, "ph": "X", "ts": start_us, "dur": length_us, "pid": 0, "tid": tid}


def _names(what: str, tid: int, key: str, value: str | int) -> dict[str, Any]:
    """The event that tells a viewer `key` of a process or thread."""
    return {"name": f"{what}_{key}", "ph": "M", "pid": 0, "tid": tid, "args": {key: value}}
