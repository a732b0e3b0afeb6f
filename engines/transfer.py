"""Host memory that a GPU can copy from at full speed, and the two copy streams of a link.

Shared by all offloading engines. On a CPU device the same calls copy at once, events are no-ops and
the counters count the same bytes, so that an engine has one code path.

A copy between pinned memory and the GPU runs behind the back of the host and of the compute stream.
The rules that keep it safe are the callers': a buffer that a copy writes is read only after the copy's
event, and a buffer that a copy reads is written only after it. Buffers that cross streams are therefore
allocated once and owned by the engine; nothing here relies on the caching allocator's bookkeeping
(`record_stream`).
"""

from __future__ import annotations

import mmap
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engines.throttle import Direction, GpuPace, HostPace

if TYPE_CHECKING:
    from engines.base import LinkRates
    from engines.exposure import ExposureClock
    from engines.timeline import Span, Timeline

Progress = Callable[[str, int, int], None]
"""Told of slow work: what, units done, units in total."""

_cuda: Any = torch.cuda  # most of it is without annotations

TOUCH_PIECE_BYTES = 2**30
"""Host memory is touched in pieces of this size, for its progress to be seen."""


_streams: dict[int, torch.cuda.Stream] = {}
"""By the driver's own handle."""


def compute_stream(device: torch.device | None = None) -> torch.cuda.Stream:
    """As `torch.cuda.current_stream`, which makes a new object each time: in a profile of OPT-6.7B's steps
    that took 15 of the 22 microseconds that recording an event did, and a step records a thousand."""
    index = device.index if device is not None and device.index is not None else _cuda.current_device()
    handle = torch._C._cuda_getCurrentRawStream(index)
    found = _streams.get(handle)
    if found is None or found.device_index != index:
        found = _streams[handle] = torch.cuda.current_stream(index)
    return found


def now_s() -> float:
    """The engines' own clock, in seconds: for busy times and time limits only.

    Runs are timed by `harness.measure`.
    """
    return time.perf_counter()


class PageableMemoryWarning(UserWarning):
    """Host memory could not be pinned; copies are slower and do not overlap compute."""


class HostSlab:
    """One mapping of host memory of an exact size, page-aligned, pinned if `device` is a CUDA device.

    torch's own pinned allocator rounds up to a power of two, up to twice what is needed; a mapping that
    is registered with the driver is rounded to a page.

    If the driver refuses to pin (a limit on locked memory, not enough memory), the slab stays pageable,
    `pinned` is False, and one `PageableMemoryWarning` says what that costs. Fresh memory reads as zeros.
    """

    def __init__(
        self, num_bytes: int, device: torch.device, progress: Progress | None = None, *, pin: bool = True
    ) -> None:
        if num_bytes <= 0:
            raise ValueError("a slab needs a positive number of bytes")
        self.num_bytes = num_bytes
        self.pinned = False
        # Private: shared mappings get no huge pages and are counted as shared memory by the cgroup.
        mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            # HAZARD: after a fork, a write to a private page may move the parent to a copy while the GPU
            # goes on with the old one. DONTFORK keeps the mapping out of children.
            _advise(mapping, advice)
        self._memory: Tensor | None = torch.frombuffer(mapping, dtype=torch.uint8)
        self._unregister: weakref.finalize[[int], HostSlab] | None = None
        if device.type == "cuda" and pin:
            self._pin(device, progress)

    def _pin(self, device: torch.device, progress: Progress | None) -> None:
        assert self._memory is not None
        _cuda.init()
        what = "touching host memory to pin (bytes)"
        for start in range(0, self.num_bytes, TOUCH_PIECE_BYTES):
            piece = self._memory[start : start + TOUCH_PIECE_BYTES]
            piece.fill_(0)  # with all threads; the driver would touch the pages with one
            if progress is not None:
                progress(what, start + piece.numel(), self.num_bytes)
        # HAZARD: one registration for the whole mapping. The driver refuses a copy that begins in one
        # registration and ends in another (cudaErrorInvalidValue), and a view may lie anywhere.
        pointer = self._memory.data_ptr()
        with _cuda.device(device):
            error = _register(pointer, self.num_bytes)
        if error is not None:
            _clear_cuda_error(device)
            warnings.warn(
                f"{self.num_bytes / 1e9:.1f} GB of host memory cannot be pinned ({error}): copies to "
                "and from the GPU go through a staging buffer, several times slower (on an H200 machine "
                "seven times up and four times down) and without overlap; raise the limit on locked memory "
                "(ulimit -l) or free host memory",
                PageableMemoryWarning,
                stacklevel=4,
            )
            return
        self.pinned = True
        # HAZARD: memory must not be unmapped while registered, or a later mapping at the same address
        # cannot be pinned. The finalizer runs before the mapping goes, also without `close`.
        self._unregister = weakref.finalize(self, _unregister, pointer)

    def view(self, offset_bytes: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the slab's memory. Raises `ValueError` outside the slab or off the dtype's grid."""
        if self._memory is None:
            raise ValueError("the slab is closed")
        size_bytes = prod(shape) * dtype.itemsize
        if offset_bytes < 0 or offset_bytes + size_bytes > self.num_bytes or offset_bytes % dtype.itemsize:
            raise ValueError(
                f"{size_bytes} bytes at {offset_bytes} do not lie in a slab of {self.num_bytes} bytes "
                f"on a multiple of {dtype.itemsize}"
            )
        return self._memory[offset_bytes : offset_bytes + size_bytes].view(dtype).view(*shape)

    def close(self) -> None:
        """Unpin. The memory goes when the last view goes. The caller has waited for all copies."""
        if self._unregister is not None:
            self._unregister()
            self._unregister = None
        self.pinned = False
        self._memory = None


SLAB_BYTES = 4 * 2**30
"""Tensors share a slab up to about this size, so that pinning a large model shows its progress."""


class HostSlabs:
    """Byte tensors of exact sizes in as few pinned slabs as have about `SLAB_BYTES` each."""

    def __init__(self, slabs: Sequence[HostSlab], views: Sequence[Tensor]) -> None:
        self._slabs = list(slabs)
        self.views = list(views)
        self.pinned_bytes = sum(slab.num_bytes for slab in slabs if slab.pinned)

    def close(self) -> None:
        """Unpin; see `HostSlab.close`."""
        self.views.clear()
        for slab in self._slabs:
            slab.close()


def host_slabs(sizes_bytes: Sequence[int], device: torch.device, progress: Progress) -> HostSlabs:
    """Memory for tensors of these sizes, each on one slab: a copy may not cross from one to another.

    Once the driver has refused to pin, the rest stays pageable without another warning.
    """
    groups: list[list[int]] = []
    for size in sizes_bytes:
        if not groups or sum(groups[-1]) + size > SLAB_BYTES:
            groups.append([])
        groups[-1].append(size)
    total, done, pin = sum(sizes_bytes), 0, True
    slabs: list[HostSlab] = []
    views: list[Tensor] = []
    for group in groups:
        before = done

        def told(what: str, count: int, of: int, before: int = before) -> None:
            progress(what, before + count, total)

        slab = HostSlab(sum(group), device, told, pin=pin)
        pin = pin and (slab.pinned or device.type != "cuda")
        slabs.append(slab)
        offset = 0
        for size in group:
            views.append(slab.view(offset, (size,), torch.uint8))
            offset += size
        done += offset
    return HostSlabs(slabs, views)


def _advise(mapping: mmap.mmap, advice: str) -> None:
    option = getattr(mmap, advice, None)
    if option is None:
        return
    try:
        mapping.madvise(option)
    except OSError:
        return  # an advice; kernels without it refuse


def _register(pointer: int, num_bytes: int) -> str | None:
    """Pin host memory. The driver's reason if it refuses."""
    runtime = _cuda.cudart()
    code = int(runtime.cudaHostRegister(pointer, num_bytes, 0))
    return None if code == 0 else f"CUDA error {code}"


def _unregister(pointer: int) -> None:
    _cuda.cudart().cudaHostUnregister(pointer)


def _clear_cuda_error(device: torch.device) -> None:
    """Take the runtime's last error away, which torch would blame on its next kernel.

    torch offers no cudaGetLastError; the check after any launch reads and resets it.
    """
    try:
        torch.zeros(1, device=device).add_(1)
    except RuntimeError:
        return


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

    `rates` slow the link down to those of another one: see `engines.throttle`. On a CUDA device this
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
        self._is_cuda = device.type == "cuda"
        self._gpu_pace = GpuPace(rates, device) if rates is not None and self._is_cuda else None
        self._host_pace = HostPace(rates, now_s) if rates is not None and not self._is_cuda else None
        if self._is_cuda:
            # The pace's kernels are small and must not queue behind those of the compute stream.
            priority = 0 if self._gpu_pace is None else -1
            self._up = _cuda.Stream(device, priority)
            self._down = _cuda.Stream(device, priority)
        self._h2d_times: list[tuple[Any, Any]] = []
        self._d2h_times: list[tuple[Any, Any]] = []

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
        return self._copy(self._up, host, out, after, "h2d", name)

    def download(self, gpu: Tensor, out: Tensor, after: After = None, name: str = "copy") -> Event:
        """Copy `gpu` to `out` on the host once `after` has happened; the event of its end.

        `name` is for traces.

        HAZARD: until that event `gpu` must not be written and `out` neither read nor written. Pass in
        `after` the kernel that wrote `gpu`.
        """
        _check_copy(gpu, out)
        with self._lock:
            self.d2h_bytes += gpu.nbytes
        if not self._is_cuda:
            return self._copy_on_host("d2h", gpu, out)
        return self._copy(self._down, gpu, out, after, "d2h", name)

    def _copy_on_host(self, direction: Direction, source: Tensor, out: Tensor) -> Event:
        end_s = self._host_pace.begin(direction, source.nbytes) if self._host_pace is not None else None
        out.copy_(source)
        if self._host_pace is not None and end_s is not None:
            self._host_pace.hold(end_s)
        return Event()

    def _copy(
        self,
        stream: torch.cuda.Stream,
        source: Tensor,
        out: Tensor,
        after: After,
        direction: Direction,
        name: str,
    ) -> Event:
        times = self._h2d_times if direction == "h2d" else self._d2h_times
        label = "upload" if direction == "h2d" else "download"
        # Blocking: a thread that waits sleeps, and leaves its core to those that work.
        start, end = _cuda.Event(enable_timing=True), _cuda.Event(enable_timing=True, blocking=True)
        # One lock for the whole sequence: two threads must not put their waits and copies between
        # each other's timing events.
        with self._lock, torch.cuda.stream(stream):
            for event in (after,) if isinstance(after, Event) else after or ():
                if event.cuda is not None:
                    stream.wait_event(event.cuda)
            if self._delay is not None:
                _cuda._sleep(self._delay())
            span = self._timeline.begin(label, name, stream) if self._timeline is not None else None
            asked_s = now_s()
            start.record(stream)
            if self._gpu_pace is not None:
                self._gpu_pace.begin(direction)
            out.copy_(source, non_blocking=True)
            if self._gpu_pace is not None:
                self._gpu_pace.hold(direction, source.nbytes)
            end.record(stream)
            if span is not None and self._timeline is not None:
                self._timeline.end(span, stream)
            times.append((start, end))
            if self._exposure is not None:
                self._exposure.between(direction, start, end, asked_s)
        return Event(end)

    def record(self) -> Event:
        """A point in the current compute stream: all work enqueued on it so far."""
        if not self._is_cuda:
            return Event()
        event = _cuda.Event(blocking=True)
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
        """As `take_busy_s` of the copies that were begun so far, when called: see `ComputeClock.cut`."""
        if not self._is_cuda:
            return lambda: (None, None)
        with self._lock:
            up, down = self._h2d_times, self._d2h_times
            self._h2d_times, self._d2h_times = [], []

        def read() -> tuple[float, float]:
            up_s, down_s = _take_ended_s(up), _take_ended_s(down)
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
        self._times: list[tuple[Any, Any]] = []
        self.is_running = False
        """Between `start` and `stop`."""

    def start(self) -> None:
        self.is_running = True
        self._begun = self._event()
        if self._timeline is not None:
            self._span = self._timeline.begin(self._stream, self.label)

    def stop(self) -> None:
        self.is_running = False
        if self._timeline is not None and self._span is not None:
            self._timeline.end(self._span)
            self._span = None
        if self._begun is not None:
            ended = self._event()
            self._times.append((self._begun, ended))
            if self._exposure is not None:
                self._exposure.between("gpu", self._begun, ended)
            self._begun = None

    def take_s(self) -> float | None:
        """Seconds of the pairs that ended since the last call; `None` on a CPU device."""
        return self.cut()()

    def cut(self) -> Callable[[], float | None]:
        """As `take_s` of the pairs so far, when it is called.

        Asking some hundred events for their times takes the CPU milliseconds. An engine cuts where a step's
        work begins, and asks where it would wait for the GPU anyway.
        """
        if self._device is None:
            return lambda: None
        times, self._times = self._times, []

        def read() -> float:
            total_s = _take_ended_s(times)
            self._times[:0] = times
            return total_s

        return read

    def _event(self) -> Any:
        if self._device is None:
            return None
        event = _cuda.Event(enable_timing=True)
        event.record(compute_stream(self._device))
        return event


def _check_copy(source: Tensor, out: Tensor) -> None:
    if source.shape != out.shape or source.dtype != out.dtype:
        raise ValueError(
            f"a copy over the link keeps shape and dtype: {tuple(source.shape)} {source.dtype} "
            f"to {tuple(out.shape)} {out.dtype}"
        )
    if not (source.is_contiguous() and out.is_contiguous()):
        # torch would stage it through a temporary of the caching allocator, off the books.
        raise ValueError("a copy over the link is of contiguous tensors")


def _take_ended_s(times: list[tuple[Any, Any]]) -> float:
    total_s, running = 0.0, []
    for start, end in times:
        if end.query():
            total_s += start.elapsed_time(end) / 1e3
        else:
            running.append((start, end))
    times[:] = running
    return total_s
