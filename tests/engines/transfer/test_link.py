from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engines.transfer import clock, pinned
from engines.transfer import link as link_module
from engines.transfer.compute_clock import ComputeClock
from engines.transfer.link import Event, Link
from engines.transfer.pinned import HostSlab, PageableMemoryWarning, host_slabs

CPU = torch.device("cpu")
PAGE_BYTES = 4096


class FakeRuntime:
    """Stands for the CUDA runtime: registers memory, or refuses to."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.refuses = False

    def cudaHostRegister(self, pointer: int, num_bytes: int, flags: int) -> int:
        if self.refuses:
            return 2
        self.registered[pointer] = num_bytes
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.registered[pointer]
        return 0


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    runtime = FakeRuntime()
    module = SimpleNamespace(
        init=lambda: None, cudart=lambda: runtime, device=lambda device: contextlib.nullcontext()
    )
    monkeypatch.setattr(pinned, "torch_cuda", module)
    monkeypatch.setattr(pinned, "_clear_cuda_error", lambda device: None)
    monkeypatch.setattr(pinned, "TOUCH_CHUNK_BYTES", PAGE_BYTES)
    return runtime


def test_a_slab_holds_what_its_views_write() -> None:
    slab = HostSlab(1000, CPU)
    view = slab.view(8, (3, 4), torch.float32)
    assert torch.equal(view, torch.zeros(3, 4))
    view.fill_(2.5)
    assert torch.equal(slab.view(8, (12,), torch.float32), torch.full((12,), 2.5))
    assert slab.view(0, (2,), torch.float32).tolist() == [0.0, 0.0]
    assert slab.num_bytes == 1000
    assert not slab.pinned
    assert view.data_ptr() % PAGE_BYTES == 8


def test_a_slab_outlives_its_closing_for_those_who_hold_views() -> None:
    slab = HostSlab(64, CPU)
    view = slab.view(0, (4,), torch.float32)
    slab.close()
    slab.close()
    view.fill_(1.0)
    assert view.sum() == 4.0
    with pytest.raises(ValueError, match="closed"):
        slab.view(0, (4,), torch.float32)


@pytest.mark.parametrize(("offset", "shape"), [(0, (17,)), (64, (1,)), (-4, (1,)), (2, (1,))])
def test_views_outside_the_slab_or_off_the_grid_are_refused(offset: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="slab of 64 bytes"):
        HostSlab(64, CPU).view(offset, shape, torch.float32)


def test_a_slab_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        HostSlab(0, CPU)


def test_the_slab_is_registered_exactly_and_as_one(fake_cuda: FakeRuntime) -> None:
    told: list[tuple[int, int]] = []
    size = 2 * PAGE_BYTES + 100
    slab = HostSlab(size, torch.device("cuda", 0), lambda what, done, total: told.append((done, total)))
    start = slab.view(0, (1,), torch.uint8).data_ptr()
    assert slab.pinned
    assert fake_cuda.registered == {start: size}
    assert told == [(PAGE_BYTES, size), (2 * PAGE_BYTES, size), (size, size)]
    slab.close()
    assert fake_cuda.registered == {}
    assert not slab.pinned


def test_a_dropped_slab_is_unregistered(fake_cuda: FakeRuntime) -> None:
    slab = HostSlab(PAGE_BYTES, torch.device("cuda", 0))
    assert len(fake_cuda.registered) == 1
    del slab
    assert fake_cuda.registered == {}


def test_memory_that_cannot_be_pinned_stays_pageable_with_one_warning(fake_cuda: FakeRuntime) -> None:
    fake_cuda.refuses = True
    with pytest.warns(PageableMemoryWarning, match="slower") as caught:
        slab = HostSlab(4 * PAGE_BYTES, torch.device("cuda", 0))
    assert len(caught) == 1
    assert not slab.pinned
    assert fake_cuda.registered == {}
    slab.view(0, (4,), torch.float32).fill_(1.0)
    slab.close()


def quiet(what: str, done: int, total: int) -> None:
    """Told of progress, says nothing."""


def test_slabs_are_shared_up_to_a_size_and_each_tensor_lies_on_one(
    fake_cuda: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor larger than a slab has one of its own; nothing is rounded up."""
    monkeypatch.setattr(pinned, "SLAB_BYTES", 100)
    sizes = [40, 60, 1, 250, 100, 33, 33, 33]
    slabs = host_slabs(sizes, torch.device("cuda", 0), quiet)
    assert [view.nbytes for view in slabs.views] == sizes
    assert list(fake_cuda.registered.values()) == [100, 1, 250, 100, 99]
    assert slabs.pinned_bytes == sum(sizes)
    for number, view in enumerate(slabs.views):
        view.fill_(number)
        begin, end = view.data_ptr(), view.data_ptr() + view.nbytes
        homes = [at for at, size in fake_cuda.registered.items() if at <= begin and end <= at + size]
        assert len(homes) == 1
    assert all(view.unique().tolist() == [number] for number, view in enumerate(slabs.views))
    slabs.close()
    assert fake_cuda.registered == {}


def test_progress_counts_the_bytes_of_all_slabs(
    fake_cuda: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinned, "SLAB_BYTES", 100)
    told: list[tuple[int, int]] = []
    host_slabs([60, 70, 20], torch.device("cuda", 0), lambda what, done, of: told.append((done, of)))
    assert told == [(60, 150), (150, 150)]


def test_slabs_that_cannot_be_pinned_give_one_warning(
    fake_cuda: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinned, "SLAB_BYTES", 100)
    fake_cuda.refuses = True
    with pytest.warns(PageableMemoryWarning) as caught:
        slabs = host_slabs([80, 80, 80], torch.device("cuda", 0), quiet)
    assert len(caught) == 1
    assert [view.nbytes for view in slabs.views] == [80, 80, 80]
    assert slabs.pinned_bytes == 0
    slabs.close()


def test_nothing_is_pinned_on_a_cpu_or_for_no_tensors() -> None:
    assert host_slabs([10, 20], CPU, quiet).pinned_bytes == 0
    empty = host_slabs([], CPU, quiet)
    assert empty.views == []
    assert empty.pinned_bytes == 0


def test_a_link_on_the_cpu_copies_at_once_and_counts() -> None:
    link = Link(CPU)
    host, device, back = torch.arange(6.0), torch.zeros(6), torch.zeros(6)
    event = link.upload(host, device, after=link.record())
    assert torch.equal(device, host)
    link.wait(event)
    device.add_(1)
    event = link.download(device, back, after=(link.record(), event))
    link.host_wait(event)
    assert torch.equal(back, host + 1)
    link.upload(host[:2], device[:2])
    link.synchronize()
    assert (link.h2d_bytes, link.d2h_bytes) == (24 + 8, 24)
    assert link.take_busy_s() == (None, None)


def test_several_downloads_on_the_cpu_are_as_many_copies() -> None:
    link = Link(CPU)
    sources, places = [torch.ones(2), torch.full((3,), 4.0)], [torch.zeros(2), torch.zeros(3)]
    events = link.download_each(list(zip(sources, places, strict=True)), after=link.record())
    assert [each.cuda for each in events] == [None, None]
    assert all(torch.equal(mine, its) for mine, its in zip(places, sources, strict=True))
    assert (link.h2d_bytes, link.d2h_bytes) == (0, 20)
    with pytest.raises(ValueError, match="a copy over the link"):
        link.download_each([(sources[0], places[0]), (sources[0], places[1])])
    assert link.d2h_bytes == 20


class FakeDriver:
    """In the place of `torch.cuda`: notes what is asked of it, in order."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        driver = self

        class Stream:
            device, name = CPU, "before"

            def __init__(self, device: torch.device, priority: int = 0) -> None:
                self.name = "up" if not hasattr(driver, "made") else "down"
                driver.made = True

            def wait_event(self, event: Any) -> None:
                driver.told.append((self.name, "waits for", event.number))

        class CudaEvent:
            def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
                self.is_timed, self.number = enable_timing, -1

            def record(self, stream: Stream) -> None:
                self.number = len(driver.told)
                driver.told.append((stream.name, "timed" if self.is_timed else "event"))

            def query(self) -> bool:
                return True

            def elapsed_time(self, later: CudaEvent) -> float:
                assert self.is_timed
                assert later.is_timed
                return 1e3 * (later.number - self.number)

        self.Stream, self.Event = Stream, CudaEvent
        self.before = Stream.__new__(Stream)

    def set_stream(self, stream: Any) -> None:
        self.told.append(("now", stream.name))


def test_several_downloads_wait_once_and_are_one_span(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the driver, in which order: each has an event of its own, the first and the last of
    them are timed."""
    driver = FakeDriver()
    for module in (link_module, clock):
        monkeypatch.setattr(module, "torch_cuda", driver)
        monkeypatch.setattr(module, "compute_stream", lambda device=None: driver.before)
    link = Link(torch.device("cuda:0"))
    ready = link.record()
    pairs = [(torch.full((4,), float(number)), torch.zeros(4)) for number in range(3)]
    driver.told.clear()
    events = link.download_each(pairs, after=ready)
    assert driver.told == [
        ("now", "down"), ("down", "waits for", 0), ("down", "timed"), ("down", "event"), ("down", "event"),
        ("down", "timed"), ("now", "before"),
    ]  # fmt: skip
    assert [each.cuda is None for each in events] == [False] * 3
    assert all(torch.equal(source, out) for source, out in pairs)
    assert link.take_busy_s() == (0.0, 3.0)
    link.upload(pairs[0][0], pairs[0][1], after=Event())
    assert driver.told[-4:] == [("now", "up"), ("up", "timed"), ("up", "timed"), ("now", "before")]


@pytest.mark.parametrize(
    "out",
    [torch.zeros(3), torch.zeros(4, dtype=torch.float16), torch.zeros(8)[::2]],
    ids=["shape", "dtype", "strided"],
)
def test_a_copy_that_is_not_one_is_refused(out: torch.Tensor) -> None:
    link = Link(CPU)
    with pytest.raises(ValueError, match="a copy over the link"):
        link.upload(torch.zeros(4), out)
    with pytest.raises(ValueError, match="a copy over the link"):
        link.download(torch.zeros(4), out)
    assert (link.h2d_bytes, link.d2h_bytes) == (0, 0)


def test_the_compute_clock_measures_nothing_on_a_cpu() -> None:
    clock = ComputeClock(CPU)
    clock.start()
    clock.stop()
    assert clock.take_s() is None


@pytest.mark.gpu
def test_registered_memory_is_pinned_and_an_error_of_the_driver_does_not_stick() -> None:
    device = torch.device("cuda", 0)
    slab = HostSlab(3 * PAGE_BYTES + 8, device)
    view = slab.view(0, (PAGE_BYTES,), torch.float16)
    assert slab.pinned
    assert view.is_pinned()
    assert pinned._register(view.data_ptr(), PAGE_BYTES) is not None  # twice is an error
    pinned._clear_cuda_error(device)
    assert torch.ones(4, device=device).sum().item() == 4.0
    slab.close()
    again = HostSlab(3 * PAGE_BYTES + 8, device)
    assert again.pinned
    again.close()


@pytest.mark.gpu
def test_delayed_copies_keep_their_order() -> None:
    """A value goes up, is changed, goes down and up again, with both streams held up for a millisecond."""
    device = torch.device("cuda", 0)
    link = Link(device, delay=lambda: 2_000_000)
    slab = HostSlab(4 * 2**20, device)
    host = slab.view(0, (2**20,), torch.float32)
    host.fill_(1.0)
    buffer = torch.zeros(2**20, device=device)
    home = None
    for _ in range(5):
        link.wait(link.upload(host, buffer, after=home))
        buffer.mul_(2.0)
        home = link.download(buffer, host, after=link.record())
    link.host_wait(home)
    assert torch.equal(host, torch.full_like(host, 32.0))
    h2d_s, d2h_s = link.take_busy_s()
    assert h2d_s is not None
    assert d2h_s is not None
    assert h2d_s > 0
    assert d2h_s > 0
    assert link.take_busy_s() == (0.0, 0.0)
    assert link.h2d_bytes == link.d2h_bytes == 5 * 4 * 2**20
    slab.close()


@pytest.mark.gpu
def test_several_delayed_downloads_have_each_arrived_at_their_event() -> None:
    """And what is enqueued after them goes to the stream of before."""
    device = torch.device("cuda", 0)
    link = Link(device, delay=lambda: 2_000_000)
    before = torch.cuda.current_stream(device)
    sources = [torch.full((2**18,), float(number), device=device) for number in range(4)]
    places = [torch.full((2**18,), -1.0, pin_memory=True) for _ in sources]
    events = link.download_each(list(zip(sources, places, strict=True)), after=link.record())
    assert torch.cuda.current_stream(device) == before
    for number, (event, place) in enumerate(zip(events, places, strict=True)):
        link.host_wait(event)
        assert torch.equal(place, torch.full_like(place, float(number)))
    busy_s = link.take_busy_s()[1]
    assert busy_s is not None
    assert busy_s > 0
    assert link.take_busy_s() == (0.0, 0.0)


@pytest.mark.gpu
def test_the_compute_clock_sees_the_gpu() -> None:
    device = torch.device("cuda", 0)
    clock = ComputeClock(device)
    clock.start()
    torch.cuda._sleep(2_000_000)
    clock.stop()
    torch.cuda.synchronize()
    seconds = clock.take_s()
    assert seconds is not None
    assert seconds > 1e-4
    assert clock.take_s() == 0.0


@pytest.mark.gpu
def test_a_slab_of_many_pieces_is_copied_in_one_go() -> None:
    device = torch.device("cuda", 0)
    size = 3 * pinned.TOUCH_CHUNK_BYTES
    slab, link = HostSlab(size, device), Link(device)
    try:
        block = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255)
        link.host_wait(link.download(block, slab.view(0, (size,), torch.uint8), after=link.record()))
        back = torch.empty_like(block)
        link.wait(link.upload(slab.view(0, (size,), torch.uint8), back))
        assert slab.pinned
        assert torch.equal(back, block)
    finally:
        link.synchronize()
        slab.close()
