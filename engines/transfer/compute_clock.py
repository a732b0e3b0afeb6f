"""How long the compute stream was at work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from engines.transfer.exposure import ExposureClock
    from engines.transfer.trace import Span, Timeline
from engines.transfer.clock import EventPair, compute_stream, take_ended_s, torch_cuda


class ComputeClock:
    """Adds up the time that the compute stream spends between `start` and `stop`, without waiting for it.

    What the stream itself waits for belongs outside the pairs. Gaps between kernels are counted. With a
    `timeline`, each pair is a span of its stream `stream`, named by `label`.
    """

    def __init__(
        self,
        device: torch.device,
        timeline: Timeline | None = None,
        stream: str = "compute",
        exposure: ExposureClock | None = None,
    ) -> None:
        self._device = device if device.type == "cuda" else None
        self._timeline = timeline
        self._exposure = exposure
        self._stream = stream
        self.label = stream
        self._span: Span | None = None
        self._begun: Any = None
        self._times: list[EventPair] = []
        self.is_running = False
        """Between `start` and `stop`."""

    def start(self) -> None:
        self.is_running = True
        self._begun = self._event()
        if self._timeline is not None:
            self._span = self._timeline.begin(self._stream, self.label)

    def go_on_with(self, label: str) -> None:
        """What comes now has another name. Without a timeline nobody asks for it, and two events are
        spared."""
        if self._timeline is None and self.is_running:
            return
        self.stop()
        self.label = label
        self.start()

    @contextmanager
    def standing(self) -> Iterator[None]:
        """What happens in here is no compute; then it goes on, if it was going on."""
        computes = self.is_running
        self.stop()
        yield
        if computes:
            self.start()

    def stop(self) -> None:
        self.is_running = False
        if self._timeline is not None and self._span is not None:
            self._timeline.end(self._span)
            self._span = None
        if self._begun is not None:
            pair = EventPair(self._begun, self._event())
            self._times.append(pair)
            if self._exposure is not None:
                self._exposure.between("gpu", pair)
            self._begun = None

    def take_s(self) -> float | None:
        """Seconds of the pairs that ended since the last call; `None` on a CPU device."""
        return self.cut()()

    def cut(self) -> Callable[[], float | None]:
        """What tells, asked later, the seconds of the pairs of events so far.

        Asking some hundred events for their times takes the CPU milliseconds. An engine cuts where a step's
        work begins, and asks where it would wait for the GPU anyway.
        """
        if self._device is None:
            return lambda: None
        times, self._times = self._times, []

        def read() -> float:
            total_s = take_ended_s(times)
            self._times[:0] = times
            return total_s

        return read

    def _event(self) -> Any:
        if self._device is None:
            return None
        event = torch_cuda.Event(enable_timing=True)
        event.record(compute_stream(self._device))
        return event
