"""What hides behind what: interval arithmetic against counting on a grid, and windows of steps."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.transfer import exposure
from engines.transfer.clock import EventPair, take_ended_s
from engines.transfer.exposure import (
    Exposed,
    ExposureClock,
    Interval,
    Resource,
    covered_s,
    exposed,
)

GRID = 40

grid_span = st.tuples(st.integers(-5, GRID + 5), st.integers(0, 12)).map(lambda s: (s[0], s[0] + s[1]))
grid_spans = st.lists(grid_span, max_size=8)


def cells(spans: list[Interval]) -> set[int]:
    """Unit cells of the line that any span covers."""
    return {cell for begin, end in spans for cell in range(int(begin), int(end))}


@settings(max_examples=200, deadline=None)
@given(grid_spans)
def test_covered_time_is_that_of_cells(spans: list[Interval]) -> None:
    assert covered_s(np.array(spans, dtype=np.float64).reshape(-1, 2)) == len(cells(spans))


@settings(max_examples=200, deadline=None)
@given(grid_spans, grid_spans, grid_spans, grid_spans)
def test_exposed_is_busy_while_the_gpu_is_not(
    gpu: list[Interval], d2h: list[Interval], cpu: list[Interval], h2d: list[Interval]
) -> None:
    found = exposed({"gpu": gpu, "d2h": d2h, "cpu": cpu, "h2d": h2d}, (0, GRID))
    inside = set(range(GRID))
    on_gpu = cells(gpu) & inside
    assert found.d2h_s == len((cells(d2h) & inside) - on_gpu)
    assert found.cpu_s == len((cells(cpu) & inside) - on_gpu)
    assert found.h2d_s == len((cells(h2d) & inside) - on_gpu)
    assert found.gpu_s == len(on_gpu - cells(d2h) - cells(cpu) - cells(h2d))


def test_what_was_not_measured_is_none() -> None:
    assert exposed({"d2h": [(0.0, 1.0)]}, (0.0, 1.0)) == Exposed()
    found = exposed({"gpu": [(0.0, 1.0)], "h2d": [(0.5, 2.0)]}, (0.0, 4.0))
    assert found == Exposed(gpu_s=0.5, h2d_s=1.0)


class FakeEvent:
    """A CUDA event whose time is set by hand; it has happened once `now` is past it."""

    now = 0.0

    def __init__(self, at_s: float) -> None:
        self.at_s = at_s

    def query(self) -> bool:
        return self.at_s <= FakeEvent.now

    def elapsed_time(self, later: FakeEvent) -> float:
        return 1e3 * (later.at_s - self.at_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExposureClock]:
    made = ExposureClock(torch.device("cuda:0"))
    monkeypatch.setattr(made, "mark", lambda: made._marks.append(FakeEvent(FakeEvent.now)))
    FakeEvent.now = 0.0
    yield made
    FakeEvent.now = 0.0


def add(
    clock: ExposureClock, resource: Resource, begin: float, end: float, asked: float | None = None
) -> None:
    clock.between(resource, EventPair(FakeEvent(begin), FakeEvent(end)), asked)


def test_a_step_is_told_once_two_more_have_begun(clock: ExposureClock) -> None:
    """Steps of 10 s: the GPU works in the first 6, a copy goes on from 4 to 9, from 6 on exposed."""
    told = []
    for step in range(4):
        FakeEvent.now = 10.0 * step
        clock.mark()
        add(clock, "gpu", 10.0 * step, 10.0 * step + 6)
        add(clock, "h2d", 10.0 * step + 4, 10.0 * step + 9, asked=10.0 * step + 1004)
        told.append(clock.take())
    assert told[:2] == [Exposed(), Exposed()]
    assert told[2:] == [Exposed(gpu_s=4.0, h2d_s=3.0)] * 2
    assert len(clock._placed) + len(clock._asked) == 2 * exposure.STEPS_BEHIND  # what is past is forgotten


def test_a_copy_across_a_boundary_counts_on_both_sides(clock: ExposureClock) -> None:
    clock.mark()
    add(clock, "gpu", 0.0, 5.0)
    add(clock, "d2h", 4.0, 14.0)
    FakeEvent.now = 10.0
    clock.mark()
    add(clock, "gpu", 12.0, 15.0)
    FakeEvent.now = 20.0
    clock.mark()
    assert clock.take() == Exposed(gpu_s=4.0, d2h_s=5.0)
    FakeEvent.now = 30.0
    clock.mark()
    assert clock.take() == Exposed(gpu_s=1.0, d2h_s=2.0)


def test_the_hosts_clock_is_laid_on_the_gpus_by_the_quickest_copy(clock: ExposureClock) -> None:
    """The host's clock is 100 s ahead. Adam from 5 to 8 of the GPU's time, which is busy until 6."""
    clock.mark()
    add(clock, "gpu", 0.0, 6.0)
    add(clock, "h2d", 4.0, 5.0, asked=101.0)  # waited for 3 s
    add(clock, "h2d", 8.0, 9.0, asked=108.0)  # began at once
    clock.on_host(105.0, 108.0)
    for now in (10.0, 20.0):
        FakeEvent.now = now
        clock.mark()
    found = clock.take()
    assert found.cpu_s == pytest.approx(2.0)
    assert found.h2d_s == pytest.approx(1.0)
    assert clock._host == []


def test_while_events_are_asked_for_their_times_other_threads_go_on(clock: ExposureClock) -> None:
    """Adam and those who start copies tell the clock of their work, and must not wait until it has looked."""
    told: list[float] = []

    class Asked(FakeEvent):
        def elapsed_time(self, later: FakeEvent) -> float:
            thread = threading.Thread(target=clock.on_host, args=(1.0, 2.0), daemon=True)
            thread.start()
            thread.join(10.0)
            assert not thread.is_alive(), "it waits for the clock"
            told.append(later.at_s)
            return super().elapsed_time(later)

    clock.mark()
    clock.between("gpu", EventPair(Asked(1.0), FakeEvent(6.0)))
    clock.on_host(0.0, 1.0)
    for now in (10.0, 20.0):
        FakeEvent.now = now
        clock.mark()
    assert clock.take() == Exposed(gpu_s=5.0)
    assert told == [6.0]
    assert clock._host == [(0.0, 1.0), (1.0, 2.0)]


def test_a_pair_of_events_is_asked_for_its_times_once(clock: ExposureClock) -> None:
    """Over the steps for which it is kept, and by all clocks."""
    asked: list[str] = []

    class Counting(FakeEvent):
        def query(self) -> bool:
            asked.append("query")
            return super().query()

        def elapsed_time(self, later: FakeEvent) -> float:
            asked.append("elapsed")
            return super().elapsed_time(later)

    clock.mark()
    pair = EventPair(Counting(21.0), Counting(22.0))
    clock.between("h2d", pair, asked_s=20.0)
    for now in (10.0, 20.0, 30.0, 40.0):
        FakeEvent.now = now
        clock.mark()
    assert take_ended_s([pair]) == pytest.approx(1.0)
    for _ in range(2):
        clock.take()
    assert asked == ["query", "elapsed"]


def test_a_cpu_device_knows_nothing() -> None:
    clock = ExposureClock(torch.device("cpu"))
    for _ in range(exposure.STEPS_BEHIND + 1):
        clock.mark()
        clock.on_host(0.0, 1.0)
        assert clock.take() == Exposed()


@pytest.mark.gpu
def test_on_a_gpu_a_copy_beside_a_kernel_is_overlapped_and_one_after_it_is_not() -> None:
    from engines.transfer.compute_clock import ComputeClock
    from engines.transfer.link import Link

    device = torch.device("cuda:0")
    clock = ExposureClock(device)
    link, compute = Link(device, exposure=clock), ComputeClock(device, exposure=clock)
    host = torch.empty(1 << 26, dtype=torch.uint8, pin_memory=True)
    gpu = torch.empty_like(host, device=device)
    told = []
    for beside in (True, False):
        for _ in range(3):
            clock.mark()
            compute.start()
            torch.cuda._sleep(200_000_000)
            compute.stop()
            if not beside:
                torch.cuda.synchronize()
            link.upload(host, gpu)
            torch.cuda.synchronize()
            told.append(clock.take())
    hidden, alone = told[2], told[5]
    assert hidden.h2d_s is not None
    assert alone.h2d_s is not None
    assert hidden.h2d_s < 0.1 * alone.h2d_s
