"""Whether something held a GPU's clock low while it worked: its power limit, heat, or who runs the machine.
No torch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

from profiles.system.nvml import NvmlDevice

LOW_SHARE = 0.7
"""Of a GPU's highest clock: an H200 that its power limit holds under lasting products stays above 0.96."""

OFTEN = 0.2
"""Share of the readings while the GPU worked from which a low clock says something of a run's times."""

FEWEST_READINGS, EVERY_S = 3, 0.04

WHY = {
    "sw_power_cap": "its power limit",
    "hw_slowdown": "the card itself, for heat or power",
    "sync_boost": "another card that it keeps step with",
    "sw_thermal_slowdown": "heat",
    "hw_thermal_slowdown": "heat",
    "hw_power_brake_slowdown": "the power supply",
}
"""What holds clocks down, by the names of `profiles.system.nvml.THROTTLES`."""


class ClockWatch:
    """Readings of the clocks of GPUs that work."""

    def __init__(self, devices: Sequence[NvmlDevice], clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._next_s = 0.0
        self._devices = [(device, device.highest_clock_hz()) for device in devices]
        self._readings = 0
        self._low: list[tuple[float, float]] = []
        """Clock and highest clock."""
        self._why: Counter[str] = Counter()

    def take(self) -> None:
        """Read every GPU's clock, not more often than every `EVERY_S`; that of a GPU that idles does not
        count."""
        if self._clock_s() < self._next_s:
            return
        self._next_s = self._clock_s() + EVERY_S
        for device, highest_hz in self._devices:
            clock = device.clock()
            if clock is None or highest_hz is None or clock.is_idle:
                continue
            self._readings += 1
            if clock.held_by and clock.sm_clock_hz < LOW_SHARE * highest_hz:
                self._low.append((clock.sm_clock_hz, highest_hz))
                self._why.update({WHY[name] for name in clock.held_by})

    @property
    def disturbance(self) -> str | None:
        """What held a clock low, in a sentence; `None`: nothing did, or NVML does not say."""
        if len(self._low) < max(FEWEST_READINGS, OFTEN * self._readings):
            return None
        clock_hz, highest_hz = sorted(self._low)[len(self._low) // 2]
        ((why, _),) = self._why.most_common(1)
        return (
            f"the GPU's clock was held at {clock_hz / 1e9:.2f} of {highest_hz / 1e9:.2f} GHz in "
            f"{len(self._low) / self._readings:.0%} of the time that it worked, by {why}"
        )
