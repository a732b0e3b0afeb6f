"""The way between host and GPU: two copy streams, the events that order them, and what they have moved.

Shared by all offloading engines. On a CPU device the same calls copy at once, events are no-ops and
the counters count the same bytes, so that an engine has one code path.

A copy between pinned memory and the GPU runs behind the back of the host and of the compute stream.
The rules that keep it safe are the callers': a buffer that a copy writes is read only after the copy's
event, and a buffer that a copy reads is written only after it. Buffers that cross streams are therefore
allocated once and owned by the engine; nothing here relies on the caching allocator's bookkeeping
(`record_stream`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engines.shapes import Direction
from engines.transfer.clock import EventPair, compute_stream, now_s, on_stream, take_ended_s, torch_cuda
from engines.transfer.throttle import GpuPace, HostPace

if TYPE_CHECKING:
    from engines.base import LinkRates
    from engines.transfer.exposure import ExposureClock
    from engines.transfer.trace import Timeline


class Event:
    """A point in a stream. On a CPU device everything before it is already done."""

    __slots__ = ("cuda",)

    def __init__(self, cuda: torch.cuda.Event | None = None) -> None:
        self.cuda = cuda


After = Event | Sequence[Event] | None
"""What a copy waits for."""


class Link:
    """The way between host and GPU: one stream up, one stream down, and what went over it.

    `delay` is for stress tests: asked before each copy, it answers with a number of GPU clock cycles
    for which the copy's stream is held up.

    `rates` slow the link down to those of another one: see `engines.transfer.throttle`. On a CUDA device this
    raises `NotAvailable` without Triton.

    Counters and copies may be used from several threads.
    """

    def __init__(
        self,
        device: torch.device,
        delay: Callable[[], int] | None = None,
        timeline: Timeline | None = None,
        rates: LinkRates | None = None,
        exposure: ExposureClock | None = None,
    ) -> None:
        self.device = device
        self._timeline = timeline
        self._exposure = exposure
        self.h2d_bytes = 0
        self.d2h_bytes = 0
        self._delay = delay
        self._lock = threading.Lock()
        """Of the counters and of the times."""
        self._is_cuda = device.type == "cuda"
        self._gpu_pace = GpuPace(rates, device) if rates is not None and self._is_cuda else None
        self._host_pace = HostPace(rates, now_s) if rates is not None and not self._is_cuda else None
        up = threading.Lock()
        down = threading.Lock() if self._gpu_pace is None else up  # its kernels are started by one at a time
        self._enqueues: dict[Direction, threading.Lock] = {"h2d": up, "d2h": down}
        """Held while copies of that stream are enqueued: who sends down need not wait for who sends up."""
        if self._is_cuda:
            # The pace's kernels are small and must not queue behind those of the compute stream.
            priority = 0 if self._gpu_pace is None else -1
            self._up = torch_cuda.Stream(device, priority)
            self._down = torch_cuda.Stream(device, priority)
        self._h2d_times: list[EventPair] = []
        self._d2h_times: list[EventPair] = []

    def upload(self, host: Tensor, out: Tensor, after: After = None, name: str = "copy") -> Event:
        """Copy `host` to `out` on the GPU once `after` has happened; the event of its end.

        `name` is for traces.

        HAZARD: until that event `host` must not be written and `out` neither read nor written. The
        upload stream knows nothing of the compute stream: pass in `after` the last use of `out`.
        """
        _check_copy(host, out)
        with self._lock:
            self.h2d_bytes += host.nbytes
        if not self._is_cuda:
            return self._copy_on_host("h2d", host, out)
        return self._copy(self._up, [(host, out)], after, "h2d", name)[0]

    def download(self, gpu: Tensor, out: Tensor, after: After = None, name: str = "copy") -> Event:
        """Copy `gpu` to `out` on the host once `after` has happened; the event of its end.

        `name` is for traces.

        HAZARD: until that event `gpu` must not be written and `out` neither read nor written. Pass in
        `after` the kernel that wrote `gpu`.
        """
        return self.download_each([(gpu, out)], after, name)[0]

    def download_each(
        self, pairs: Sequence[tuple[Tensor, Tensor]], after: After = None, name: str = "copy"
    ) -> list[Event]:
        """`download` of each pair, in their order; the event of each one's end.

        All wait for the same `after`, and are one span of clocks and traces: what comes after the first costs
        the CPU a copy and an event, and no more.
        """
        for gpu, out in pairs:
            _check_copy(gpu, out)
        with self._lock:
            self.d2h_bytes += sum(gpu.nbytes for gpu, _ in pairs)
        if not self._is_cuda:
            return [self._copy_on_host("d2h", gpu, out) for gpu, out in pairs]
        return self._copy(self._down, pairs, after, "d2h", name)

    def _copy_on_host(self, direction: Direction, source: Tensor, out: Tensor) -> Event:
        end_s = self._host_pace.begin(direction, source.nbytes) if self._host_pace is not None else None
        out.copy_(source)
        if self._host_pace is not None and end_s is not None:
            self._host_pace.hold(end_s)
        return Event()

    def _copy(
        self,
        stream: torch.cuda.Stream,
        pairs: Sequence[tuple[Tensor, Tensor]],
        after: After,
        direction: Direction,
        name: str,
    ) -> list[Event]:
        """Copy the first of each pair to the second."""
        label = "upload" if direction == "h2d" else "download"
        start, ends = torch_cuda.Event(enable_timing=True), list[Event]()
        # One lock for the whole sequence: two threads must not put their waits and copies between
        # each other's timing events.
        with self._enqueues[direction], on_stream(stream):
            for event in (after,) if isinstance(after, Event) else after or ():
                if event.cuda is not None:
                    stream.wait_event(event.cuda)
            self._hold_up()
            span = self._timeline.begin(label, name, stream) if self._timeline is not None else None
            asked_s = now_s()
            start.record(stream)
            for source, out in pairs:
                if ends:
                    self._hold_up()
                if self._gpu_pace is not None:
                    self._gpu_pace.begin(direction)
                out.copy_(source, non_blocking=True)
                if self._gpu_pace is not None:
                    self._gpu_pace.hold(direction, source.nbytes)
                # Blocking: a thread that waits sleeps, and leaves its core to those that work.
                end = torch_cuda.Event(enable_timing=len(ends) == len(pairs) - 1, blocking=True)
                end.record(stream)
                ends.append(Event(end))
            if span is not None and self._timeline is not None:
                self._timeline.end(span, stream)
            pair = EventPair(start, ends[-1].cuda)
            with self._lock:
                (self._h2d_times if direction == "h2d" else self._d2h_times).append(pair)
            if self._exposure is not None:
                self._exposure.between(direction, pair, asked_s)
        return ends

    def _hold_up(self) -> None:
        """The stream of a copy, for stress tests."""
        if self._delay is not None:
            torch_cuda._sleep(self._delay())

    def record(self) -> Event:
        """A point in the current compute stream: all work enqueued on it so far."""
        if not self._is_cuda:
            return Event()
        event = torch_cuda.Event(blocking=True)
        event.record(compute_stream(self.device))
        return Event(event)

    def wait(self, event: Event) -> None:
        """Hold the current compute stream until `event`. The host goes on."""
        if event.cuda is not None:
            compute_stream(self.device).wait_event(event.cuda)

    def host_wait(self, event: Event) -> None:
        """Hold the calling thread until `event`."""
        if event.cuda is not None:
            event.cuda.synchronize()

    def take_busy_s(self) -> tuple[float | None, float | None]:
        """Seconds of copying (up, down) that ended since the last call; `None` on a CPU device.

        Copies still in flight are counted by a later call. Does not wait.
        """
        return self.cut_busy()()

    def cut_busy(self) -> Callable[[], tuple[float | None, float | None]]:
        """What tells, asked later, the busy seconds (up, down) of the copies that were begun so far."""
        if not self._is_cuda:
            return lambda: (None, None)
        with self._lock:
            up, down = self._h2d_times, self._d2h_times
            self._h2d_times, self._d2h_times = [], []

        def read() -> tuple[float, float]:
            up_s, down_s = take_ended_s(up), take_ended_s(down)
            with self._lock:
                self._h2d_times[:0], self._d2h_times[:0] = up, down
            return up_s, down_s

        return read

    def has_happened(self, event: Event) -> bool:
        """Whether there is nothing to wait for."""
        return event.cuda is None or bool(event.cuda.query())  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        """Wait for the copies and for the current compute stream."""
        if self._is_cuda:
            self._up.synchronize()
            self._down.synchronize()
            torch.cuda.current_stream(self.device).synchronize()


def _check_copy(source: Tensor, out: Tensor) -> None:
    if source.shape != out.shape or source.dtype != out.dtype:
        raise ValueError(
            f"a copy over the link keeps shape and dtype: {tuple(source.shape)} {source.dtype} "
            f"to {tuple(out.shape)} {out.dtype}"
        )
    if not (source.is_contiguous() and out.is_contiguous()):
        # torch would stage it through a temporary of the caching allocator, off the books.
        raise ValueError("a copy over the link is of contiguous tensors")
