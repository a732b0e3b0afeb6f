"""Blocks on local storage, which come up through a ring of pinned host memory: disk, host, GPU.

Threads read ahead, each a chunk at a time into the next slot of the ring, in the order in which the chunks
go up, round and round; so several reads are in flight, and the disk is idle only while all slots are full. A
slot is read into again once its upload has ended: the thread that is to read waits for that, never the host's
main thread, which enqueues the upload of a chunk as soon as it finds it read. It waits for the disk in one
case: it is about to compute with a block that has not come (`wait`). The order of all copies is fixed, so
timing changes no bit.

What is read is never written. Where a run has more updates than the log holds (`REPLAYED_UPDATES`), blocks
that have fallen so far behind are written, updated, to a second file each, and read from there from then on.

On the host: the ring. On disk: the blocks, twice for long runs. HAZARD: memory that a thread reads into is
pinned for the GPU but not known to torch's allocator; it is freed only after `close` has waited for all.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from itertools import count
from time import sleep

from torch import Tensor, uint8

from engines.base import ReportProgress
from engines.costs.resources import disk as costs
from engines.offload.direct_io import FileSpan
from engines.offload.disk_chunks import ByteRange, DiskChunk, cut
from engines.offload.disk_files import BlockFiles
from engines.transfer.busy_clock import BusyClock
from engines.transfer.clock import now_s
from engines.transfer.link import Event, Link
from engines.transfer.pinned import HostSlab
from engines.transfer.trace import Timeline

DEPTHS = (2, 4, 8, 16)
"""Reads in flight that are tried; the fewest that are as fast as any are kept."""

AS_FAST = 0.97
"""Share of the best rate that counts as as fast."""

TRY_S = 0.4
"""Time for each depth. All go on in one sequence, since what has just been read may be in a drive's cache."""

LEAST_TRIED_BYTES = costs.SLOTS * costs.CHUNK_BYTES
"""Below this on disk no rate is measured, and the depth is `USUAL_DEPTH`."""

USUAL_DEPTH = 8


class DiskBlocks:
    """The weights of some blocks, as bytes in files, and a ring of host memory through which they come.

    `slots` are the ring's, (`costs.CHUNK_BYTES`,) each, pinned by whoever has them; by default they are made.
    `delay_s` is for stress tests: asked before each read for seconds to wait.
    """

    def __init__(
        self,
        files: BlockFiles,
        link: Link,
        progress: ReportProgress,
        *,
        slots: Sequence[Tensor] = (),
        delay_s: Callable[[], float] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self.files = files
        self.blocks = frozenset(files.sizes_bytes)
        self.direct = files.direct
        self.rate_bytes_per_s: float | None = None
        """What reading alone reaches, all else at rest; `None`: not measured."""
        self.depth = USUAL_DEPTH
        """Reads in flight."""
        self._link = link
        self._delay_s = delay_s
        self._timeline = timeline
        self._slab: HostSlab | None = None
        self._slots = list(slots)
        if not slots:
            total_bytes, size = sum(files.sizes_bytes.values()), costs.CHUNK_BYTES
            slab = self._slab = HostSlab(costs.host_ring_bytes(total_bytes), link.device, progress)
            self._slots = [slab.view(i * size, (size,), uint8) for i in range(costs.num_slots(total_bytes))]
        self._num_slots = len(self._slots)
        self._memory = [slot.numpy().data for slot in self._slots]
        self._pool = ThreadPoolExecutor(USUAL_DEPTH, "disk")
        self._ranges: list[ByteRange] = []
        self._chunks: list[DiskChunk] = []
        self._reads: deque[Future[int]] = deque()
        """Reads under way or done whose chunks have not gone up, in order; each gives its slot."""
        self._asked = 0
        """How many reads were asked for since the start."""
        self._sent = 0
        self.begun_bytes = 0
        """Bytes on their way up of a range of which more is to be read."""
        self._once = False
        self._clock = BusyClock()

    @property
    def pinned_bytes(self) -> int:
        return self._slab.num_bytes if self._slab is not None and self._slab.pinned else 0

    def holds(self, block: int) -> bool:
        """A file that is not ours has its weights: it need not be filled."""
        return self.files.holds(block)

    def set_order(self, ranges: Sequence[ByteRange]) -> None:
        """What goes up in one pass, in order; then the next pass does."""
        self._ranges = list(ranges)
        self.rewind()

    def rewind(self) -> None:
        """Wait for reads and copies, and begin anew with the first range. Nothing is read before `send`."""
        self.restart(self._ranges, once=False)

    def restart(self, ranges: Iterable[ByteRange], *, once: bool) -> None:
        """Likewise, with other ranges, round and round or `once`."""
        for read in self._reads:
            read.cancel()
        wait_for(self._reads)
        self._link.synchronize()
        self._reads.clear()
        self._chunks = [chunk for each in ranges for chunk in cut(self.files.spans(each[0]), each)]
        self._asked = self._sent = self.begun_bytes = 0
        self._once = once

    def send(self, out: Tensor, after: Sequence[Event], name: str) -> Event | None:
        """Enqueue the upload of the next range to `out`, bytes on the device, as far as it has been read.

        The event of its end, or `None` while some of it is still to be read: call again, with the same
        arguments. `after` and `name` are `Link.upload`'s. Raises `UserError` if the disk fails.
        """
        while len(self._reads) < self._num_slots and self._asked < self._num_slots:
            if self._once and self._asked == len(self._chunks):
                break
            self._ask(Event())
        while self._reads[0].done():
            slot = self._result(self._reads[0])
            self._reads.popleft()
            chunk = self._chunks[self._sent % len(self._chunks)]
            self._sent += 1
            event = self._link.upload(
                self._slots[slot][chunk.skip : chunk.skip + chunk.num_bytes],
                out[chunk.place : chunk.place + chunk.num_bytes],
                after=after,
                name=name,
            )
            if not self._once or self._asked < len(self._chunks):
                self._ask(event)
            self.begun_bytes += chunk.num_bytes
            if chunk.last:
                self.begun_bytes = 0
                return event
        return None

    def wait(self) -> None:
        """Hold the calling thread until `send` can go on. Raises `UserError` if the disk fails."""
        self._result(self._reads[0])

    def _ask(self, sent: Event) -> None:
        """Read the next chunk once what its slot held has gone up."""
        chunk, slot = self._chunks[self._asked % len(self._chunks)], self._asked % self._num_slots
        self._reads.append(self._pool.submit(self._read, chunk, slot, sent))
        self._asked += 1

    def _read(self, chunk: DiskChunk, slot: int, sent: Event) -> int:
        self._link.host_wait(sent)
        self.read_into(self._memory[slot], chunk)
        return slot

    def read_into(self, memory: memoryview, chunk: DiskChunk) -> None:
        """From any thread. Raises `OSError`."""
        if self._delay_s is not None:
            sleep(self._delay_s())
        start_s = now_s()
        with self._clock:
            needed = chunk.skip + chunk.num_bytes
            chunk.file.read(memory[: chunk.read_bytes], chunk.offset_bytes, needed)
        if self._timeline is not None:  # a line for each thread: their reads overlap
            lane = threading.current_thread().name.replace("_", " ")
            self._timeline.host_span(lane, f"block {chunk.block}", start_s, now_s())

    def _result(self, read: Future[int]) -> int:
        try:
            return read.result()
        except OSError as error:
            raise self.files.spill.unusable("cannot be read", error) from error

    def fill(self, block: int, memory: Tensor) -> None:
        """Write a block, bytes on the device, for the first time or anew. After `rewind`.

        Waits until it is on disk. Raises `UserError` if the disk is full or fails. A block that a file of
        somebody else holds goes to a second file.
        """
        self._write(block, self.files.first(block), memory)

    def write_back(self, block: int, memory: Tensor) -> None:
        """Keep a block, updated, in its second file, and read it from there from now on. As `fill`."""
        self._write(block, self.files.second(block), memory)

    def _write(self, block: int, span: FileSpan, memory: Tensor) -> None:
        writes: list[Future[None]] = []
        after = self._link.record()
        try:
            for number, chunk in enumerate(cut([span], (block, 0, span.num_bytes))):
                slot = number % self._num_slots
                if number >= self._num_slots:
                    writes[number - self._num_slots].result()
                part = memory[chunk.place : chunk.place + chunk.num_bytes]
                down = self._link.download(part, self._slots[slot][: chunk.num_bytes], after=after)
                writes.append(self._pool.submit(self._write_chunk, chunk, slot, down))
            for write in writes:
                write.result()
            span.file.resize(span.offset_bytes + span.num_bytes)  # exactly, as safetensors asks for
        except OSError as error:
            raise self.files.spill.unusable("cannot be written", error) from error
        finally:
            wait_for(writes)
        self.files.is_now_in(block, span)

    def _write_chunk(self, chunk: DiskChunk, slot: int, down: Event) -> None:
        self._link.host_wait(down)
        chunk.file.write(self._memory[slot][: chunk.read_bytes], chunk.offset_bytes)

    def fetch(self, block: int, out: Tensor) -> None:
        """A block as it is on disk, to `out`, bytes on the device, in the order of the compute stream."""
        self.restart([(block, 0, self.files.sizes_bytes[block])], once=True)
        while (arrived := self.send(out, (), "block")) is None:
            self.wait()
        self._link.wait(arrived)
        self.rewind()

    def choose_depth(self) -> None:
        """Measure how many reads in flight it takes to read as fast as can be, on the blocks themselves."""
        chunks = self._chunks
        if sum(chunk.num_bytes for chunk in chunks) < LEAST_TRIED_BYTES:
            return
        order = count()
        rates = {depth: self._rate(depth, chunks, order) for depth in DEPTHS}
        self.rate_bytes_per_s = max(rates.values())
        self.depth = next(n for n, rate in rates.items() if rate >= AS_FAST * self.rate_bytes_per_s)
        self._pool.shutdown()
        self._pool = ThreadPoolExecutor(self.depth, "disk")
        self._clock.take_s()

    def _rate(self, depth: int, chunks: Sequence[DiskChunk], order: Iterator[int]) -> float:
        """Bytes per second with `depth` reads in flight."""
        start_s = now_s()
        read_bytes = [0] * depth

        def go_on(worker: int) -> None:
            while now_s() - start_s < TRY_S:
                chunk = chunks[next(order) % len(chunks)]
                self._read(chunk, worker % self._num_slots, Event())
                read_bytes[worker] += chunk.num_bytes

        with ThreadPoolExecutor(depth) as pool:
            for done in [pool.submit(go_on, worker) for worker in range(depth)]:
                done.result()
        return sum(read_bytes) / (now_s() - start_s)

    def take_busy_s(self) -> float:
        """Seconds since the last call in which something was being read."""
        return self._clock.take_s()

    def close(self) -> None:
        """Stop the threads, free the memory, let go of the files. May be called twice."""
        self._pool.shutdown(cancel_futures=True)
        self._memory.clear()
        self._slots.clear()
        if self._slab is not None:
            self._slab.close()
        self.files.close()
