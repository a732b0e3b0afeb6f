"""A card whose clock was held low while it worked, by a fake NVML."""

from __future__ import annotations

from itertools import count

import pytest

from profiles.language import speaking, translated
from profiles.system.held_clock import WHY, ClockWatch
from profiles.system.nvml import THROTTLES, NvmlDevice
from tests.profiles.system.test_nvml import FakeNvml

POWER_CAP, BRAKE, IDLE = 0x4, 0x80, 0x1


def watched(readings: list[tuple[int, int]]) -> ClockWatch:
    """After readings of a clock, in MHz of 1,980, and of what holds it."""
    library = FakeNvml()
    watch = ClockWatch([NvmlDevice(library, 0)], clock_s=count().__next__)
    for clock, reasons in readings:
        library.nvmlDeviceGetClockInfo = lambda handle, domain, clock=clock: clock
        library.nvmlDeviceGetCurrentClocksEventReasons = lambda handle, reasons=reasons: reasons
        watch.take()
    return watch


def test_a_card_at_half_of_its_clock_is_told_with_the_reason() -> None:
    found = watched([(1980, 0)] * 2 + [(930, POWER_CAP)] * 5 + [(930, BRAKE)]).disturbance
    assert found == (
        "the GPU's clock was held at 0.93 of 1.98 GHz in 75% of the time that it worked, by its power limit"
    )


@pytest.mark.parametrize(
    "readings",
    [
        [(1920, POWER_CAP)] * 9,  # products that last, on a card that is well
        [(210, IDLE)] * 9,
        [(900, 0)] * 9,  # a laptop that saves power where there is little to do
        [(930, POWER_CAP)] * 2,
        [(1980, 0)] * 30 + [(930, POWER_CAP)] * 3,
        [],
    ],
)
def test_a_card_that_is_well_idles_or_is_seldom_held_is_not(readings: list[tuple[int, int]]) -> None:
    assert watched(readings).disturbance is None


def test_time_in_which_it_idled_does_not_count() -> None:
    held = watched([(210, IDLE)] * 90 + [(930, BRAKE)] * 4).disturbance
    assert held is not None
    assert "in 100% of the time" in held


def test_a_driver_that_tells_no_clock_says_nothing() -> None:
    library = FakeNvml()
    library.broken = {name for name in vars(library) if name.startswith("nvmlDevice")}
    watch = ClockWatch([NvmlDevice(library, 0)])
    for _ in range(5):
        watch.take()
    assert watch.disturbance is None


def test_every_reason_has_a_word_and_its_japanese() -> None:
    assert set(WHY) == set(THROTTLES.values())
    held = watched([(930, POWER_CAP)] * 4).disturbance
    with speaking("ja"):
        for why in WHY.values():
            assert translated(why) != why
        assert held is not None
        assert translated(held).endswith("電力制限")
