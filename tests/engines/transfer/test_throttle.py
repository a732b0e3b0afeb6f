from __future__ import annotations

import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.base import LinkRates
from engines.transfer.calibrate import measure_rates
from engines.transfer.link import Link
from engines.transfer.pinned import HostSlab
from engines.transfer.throttle import HOST_GAP_S, HostPace

MIB = 2**20
CPU = torch.device("cpu")


class Clock:
    """A clock that goes on by itself only while somebody sleeps, and wakes him late."""

    def __init__(self, late_s: float = 0.0) -> None:
        self.now_s = 100.0
        self.late_s = late_s

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds + self.late_s


def rates(up: float = 1e9, down: float = 5e8, **duplex: float) -> LinkRates:
    return LinkRates(h2d_bytes_per_s=up, d2h_bytes_per_s=down, **duplex)


@given(
    sizes=st.lists(st.integers(1, 10**8), min_size=1, max_size=20),
    late_s=st.floats(0, 0.9 * HOST_GAP_S),
)
def test_copies_back_to_back_take_their_bytes_over_the_rate_however_late_one_wakes(
    sizes: list[int], late_s: float
) -> None:
    clock = Clock(late_s)
    pace = HostPace(rates(), clock, clock.sleep)
    for size in sizes:
        pace.hold(pace.begin("h2d", size))
    asked_s = sum(sizes) / 1e9
    # A copy that is due before its predecessor's late end costs no more sleep; nothing adds up.
    assert asked_s - 1e-9 <= clock.now_s - 100.0 <= asked_s + 2 * HOST_GAP_S


def test_an_idle_link_gives_no_credit() -> None:
    clock = Clock()
    pace = HostPace(rates(), clock, clock.sleep)
    pace.hold(pace.begin("h2d", 10**6))
    clock.now_s += 1.0
    begun_s = clock.now_s
    pace.hold(pace.begin("h2d", 10**6))
    assert clock.now_s - begun_s == pytest.approx(1e-3)


def test_directions_have_rates_of_their_own() -> None:
    clock = Clock()
    pace = HostPace(rates(), clock, clock.sleep)
    up, down = pace.begin("h2d", 10**6), pace.begin("d2h", 10**6)
    assert (up - 100.0, down - 100.0) == (pytest.approx(1e-3), pytest.approx(2e-3))


def test_a_copy_slower_than_asked_is_not_held() -> None:
    clock = Clock()
    pace = HostPace(rates(), clock, clock.sleep)
    end_s = pace.begin("h2d", 10**6)
    clock.now_s += 0.5
    pace.hold(end_s)
    assert clock.now_s == 100.5


def test_copies_of_two_threads_share_one_direction() -> None:
    pace = HostPace(rates(up=1e8), time.perf_counter)
    ends: list[float] = []

    def copy() -> None:
        end_s = pace.begin("h2d", 10**6)
        pace.hold(end_s)
        ends.append(end_s)

    begun_s = time.perf_counter()
    threads = [threading.Thread(target=copy) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(ends) - begun_s >= 4 * 0.01


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="h2d_bytes_per_s must be positive"):
        rates(up=rate)


def test_a_throttled_link_on_the_cpu_copies_the_same_bits_no_faster_than_asked() -> None:
    link = Link(CPU, rates=rates(up=1e8, down=5e7))
    source, there, back = torch.arange(10**6, dtype=torch.uint8), *torch.zeros(2, 10**6, dtype=torch.uint8)
    begun_s = time.perf_counter()
    link.upload(source, there)
    up_s = time.perf_counter() - begun_s
    link.download(there, back)
    both_s = time.perf_counter() - begun_s
    assert torch.equal(source, back)
    assert up_s >= 0.01
    assert both_s >= 0.03
    assert (link.h2d_bytes, link.d2h_bytes) == (10**6, 10**6)


def test_calibration_on_the_cpu_measures_what_a_link_does() -> None:
    """On a loaded machine copies may be slower than asked, never faster."""
    seen = measure_rates(CPU, rates(up=1e9, down=4e8))
    assert 0 < seen.h2d_bytes_per_s <= 1.001e9
    assert 0 < seen.d2h_bytes_per_s <= 4.004e8
    assert (seen.h2d_duplex_bytes_per_s, seen.d2h_duplex_bytes_per_s) == (None, None)


SHORTEST_S = 100e-6
"""What a held copy takes at least on a GPU, with some reserve: see `engines.transfer.throttle`. Shorter ones
are only never faster than asked."""


# --- on a GPU -----------------------------------------------------------------------------------------


def rate_of(link: Link, direction: str, size: int, count: int) -> float:
    """Bytes per second of copies of `size` back to back, from the first one's end to the last one's."""
    device = link.device
    slab = HostSlab(size, device)
    host, gpu = slab.view(0, (size,), torch.uint8), torch.zeros(size, dtype=torch.uint8, device=device)
    torch.cuda.synchronize()
    # All copies are queued before the first may begin: to start one takes the host longer than 1 MiB lasts.
    torch.cuda._sleep(100_000_000)
    gate = link.record()
    events = [
        link.upload(host, gpu, after=gate) if direction == "h2d" else link.download(gpu, host, after=gate)
        for _ in range(count + 1)
    ]
    link.synchronize()
    slab.close()
    assert events[0].cuda is not None
    assert events[-1].cuda is not None
    return count * size / (events[0].cuda.elapsed_time(events[-1].cuda) / 1e3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("size", "up", "down"),
    [
        (size, up, down)
        for size in (MIB, 4 * MIB, 32 * MIB)
        for up, down in ((24e9, 22e9), (12e9, 11e9), (2e9, 3e9))
        if size / up > SHORTEST_S
    ],
)
def test_rates_are_held_within_five_percent(size: int, up: float, down: float) -> None:
    link = Link(torch.device("cuda", 0), rates=rates(up, down))
    count = max(8, min(100, round(0.1 * up / size)))
    rate_of(link, "h2d", size, 4), rate_of(link, "d2h", size, 4)  # compiles
    assert rate_of(link, "h2d", size, count) == pytest.approx(up, rel=0.05)
    assert rate_of(link, "d2h", size, count) == pytest.approx(down, rel=0.05)


@pytest.mark.gpu
def test_small_copies_are_never_faster_than_asked() -> None:
    link = Link(torch.device("cuda", 0), rates=rates(24e9, 24e9))
    for size in (4096, 65536, 262144, MIB):
        rate_of(link, "h2d", size, 4)
        assert rate_of(link, "h2d", size, 100) <= 24e9 * 1.02
        assert rate_of(link, "d2h", size, 100) <= 24e9 * 1.02


@pytest.mark.gpu
def test_a_copy_alone_takes_its_time() -> None:
    """After a rest there is no credit: each copy by itself lasts its bytes over the rate."""
    link = Link(torch.device("cuda", 0), rates=rates(12e9, 12e9))
    rate_of(link, "h2d", MIB, 4)
    link.take_busy_s()
    for _ in range(5):
        time.sleep(0.01)
        rate_of(link, "h2d", 32 * MIB, 1)
        busy_s, _ = link.take_busy_s()
        assert busy_s is not None
        assert 2 * 32 * MIB / busy_s == pytest.approx(12e9, rel=0.05)


@pytest.mark.gpu
def test_both_directions_at_once_are_slower_only_where_the_profile_says_so() -> None:
    device = torch.device("cuda", 0)
    both = {"h2d_duplex_bytes_per_s": 9e9, "d2h_duplex_bytes_per_s": 8e9}
    seen = measure_rates(device, rates(12e9, 11e9, **both))
    assert seen.h2d_bytes_per_s == pytest.approx(12e9, rel=0.05)
    assert seen.d2h_bytes_per_s == pytest.approx(11e9, rel=0.05)
    assert seen.h2d_duplex_bytes_per_s == pytest.approx(9e9, rel=0.05)
    assert seen.d2h_duplex_bytes_per_s == pytest.approx(8e9, rel=0.05)
    free = {"h2d_duplex_bytes_per_s": 12e9, "d2h_duplex_bytes_per_s": 11e9}
    seen = measure_rates(device, rates(12e9, 11e9, **free))
    assert seen.h2d_duplex_bytes_per_s == pytest.approx(12e9, rel=0.05)
    assert seen.d2h_duplex_bytes_per_s == pytest.approx(11e9, rel=0.05)


@pytest.mark.gpu
def test_throttled_copies_keep_their_order_and_their_bits() -> None:
    """A value goes up, is changed, goes down and up again, each time held to the rate."""
    device = torch.device("cuda", 0)
    link = Link(device, rates=rates(4e9, 3e9, h2d_duplex_bytes_per_s=2e9, d2h_duplex_bytes_per_s=2e9))
    slab = HostSlab(4 * MIB, device)
    host = slab.view(0, (MIB,), torch.float32)
    host.fill_(1.0)
    buffer = torch.zeros(MIB, device=device)
    home = None
    for _ in range(5):
        link.wait(link.upload(host, buffer, after=home))
        buffer.mul_(2.0)
        home = link.download(buffer, host, after=link.record())
    assert home is not None
    link.host_wait(home)
    assert torch.equal(host, torch.full_like(host, 32.0))
    h2d_s, d2h_s = link.take_busy_s()
    assert h2d_s is not None
    assert d2h_s is not None
    assert h2d_s >= 5 * 4 * MIB / 4e9 * 0.99
    assert d2h_s >= 5 * 4 * MIB / 3e9 * 0.99
    slab.close()


@pytest.mark.gpu
def test_rates_hold_while_the_gpu_multiplies() -> None:
    device = torch.device("cuda", 0)
    link = Link(device, rates=rates(12e9, 12e9))
    rate_of(link, "h2d", MIB, 4)
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    product, side = torch.empty_like(matrix), torch.cuda.Stream(device)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(300):
            torch.matmul(matrix, matrix, out=product)
    rate = rate_of(link, "h2d", 32 * MIB, 20)
    assert rate <= 12e9 * 1.02
    assert rate >= 12e9 * 0.9  # the holding kernels find a place beside the products
