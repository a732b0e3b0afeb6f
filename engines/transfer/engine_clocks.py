"""The clocks of an engine that copies while it computes: how long each resource was busy in a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from engines.base import Context
from engines.transfer.compute_clock import ComputeClock
from engines.transfer.exposure import ExposureClock
from engines.transfer.link import Link
from engines.transfer.trace import Timeline


class Clocks:
    """The compute stream's clock, and what sets it beside those of the link."""

    def __init__(self, context: Context, device: torch.device) -> None:
        self.timeline = Timeline(device) if context.trace else None
        """`None`: no trace is asked for."""
        self.exposure = ExposureClock(device)
        self.compute = ComputeClock(device, self.timeline, exposure=self.exposure)
        self._context = context
        self._device = device

    def link(self, delay: Callable[[], int] | None = None) -> Link:
        """A link whose copies are timed with the rest. `delay`: see `engines.transfer.link.Link`."""
        return Link(self._device, delay, self.timeline, self._context.link_rates, self.exposure)

    def take_s(self, link: Link) -> dict[str, Any]:
        """Seconds since the last call, by the names of `engines.base.StepStats`. Does not wait."""
        return self.cut(link)()

    def cut(self, link: Link) -> Callable[[], dict[str, Any]]:
        """What tells, asked later, the seconds of all that was begun so far."""
        busy, compute = link.cut_busy(), self.compute.cut()

        def read() -> dict[str, Any]:
            h2d_s, d2h_s = busy()
            seen = self.exposure.take()
            return {
                "h2d_s": h2d_s, "d2h_s": d2h_s, "gpu_s": compute(),
                "gpu_exposed_s": seen.gpu_s, "h2d_exposed_s": seen.h2d_s, "d2h_exposed_s": seen.d2h_s,
                "cpu_exposed_s": seen.cpu_s,
            }  # fmt: skip

        return read

    def trace_events(self) -> list[dict[str, Any]]:
        """Chrome trace events of GPU, link and CPU, in microseconds; asked once, before `close`."""
        return [] if self.timeline is None else self.timeline.events()
