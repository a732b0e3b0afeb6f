"""What a link that is held to given rates really moves: measured before a run, for its record."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engines.base import LinkRates
from engines.transfer.clock import now_s
from engines.transfer.link import Event, Link
from engines.transfer.pinned import HostSlab

COPY_BYTES = 16 * 2**20
SECONDS_EACH = 0.15
"""Time for one measurement at the asked rate, as far as the fewest copies allow."""
FEWEST_COPIES = 6
MOST_COPIES = 400


def measure_rates(device: torch.device, rates: LinkRates) -> LinkRates:
    """Rates of a `Link` that is asked for `rates`: bytes over the time from one copy's end to another's.

    Takes about half a second and some 64 MiB, which are freed. Those with both directions busy are
    measured where they are asked for and there is a GPU. Raises `NotAvailable` as `Link` does.
    """
    slab = HostSlab(2 * COPY_BYTES, device)
    try:
        return _measure(device, rates, slab)
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        slab.close()


def _measure(device: torch.device, rates: LinkRates, slab: HostSlab) -> LinkRates:
    link = Link(device, rates=rates)
    up, down = (slab.view(i * COPY_BYTES, (COPY_BYTES,), torch.uint8) for i in range(2))
    gpu_up, gpu_down = (torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    ready = link.record()  # the zeros were written on the compute stream

    def upload() -> Event:
        return link.upload(up, gpu_up, after=ready)

    def download() -> Event:
        return link.download(gpu_down, down, after=ready)

    upload(), download()  # the first ones compile kernels
    link.synchronize()
    h2d = _rate(link, upload, _count(rates.h2d_bytes_per_s))
    d2h = _rate(link, download, _count(rates.d2h_bytes_per_s))
    h2d_both, d2h_both = rates.h2d_duplex_bytes_per_s, rates.d2h_duplex_bytes_per_s
    if device.type != "cuda" or h2d_both is None or d2h_both is None:
        return LinkRates(h2d_bytes_per_s=h2d, d2h_bytes_per_s=d2h)
    h2d_both, d2h_both = _rates_both(link, upload, download, _count(min(h2d_both, d2h_both)))
    return LinkRates(
        h2d_bytes_per_s=h2d,
        d2h_bytes_per_s=d2h,
        h2d_duplex_bytes_per_s=h2d_both,
        d2h_duplex_bytes_per_s=d2h_both,
    )


def _count(rate: float) -> int:
    return max(FEWEST_COPIES, min(MOST_COPIES, round(SECONDS_EACH * rate / COPY_BYTES)))


def _rate(link: Link, copy: Callable[[], Event], count: int) -> float:
    """Bytes per second of `count` copies back to back after a first one."""
    if link.device.type == "cpu":
        copy()
        begun_s = now_s()
        for _ in range(count):
            copy()
        return count * COPY_BYTES / (now_s() - begun_s)
    events = [copy() for _ in range(count + 1)]
    link.synchronize()
    return count * COPY_BYTES / _seconds(events[0], events[-1])


def _rates_both(
    link: Link, upload: Callable[[], Event], download: Callable[[], Event], count: int
) -> tuple[float, float]:
    """Rates of both directions at once. Only the first half of the copies counts: the second is there for the
    slower direction to have company to the end of its half."""
    pairs = [(upload(), download()) for _ in range(2 * count)]
    link.synchronize()
    first, last = pairs[0], pairs[count]
    up, down = (count * COPY_BYTES / _seconds(begun, ended) for begun, ended in zip(first, last, strict=True))
    return up, down


def _seconds(first: Event, last: Event) -> float:
    assert first.cuda is not None
    assert last.cuda is not None
    return float(first.cuda.elapsed_time(last.cuda)) / 1e3
