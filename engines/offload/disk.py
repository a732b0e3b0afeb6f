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

import errno
import os
import shutil
import threading
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from itertools import count
from pathlib import Path
from time import sleep

from torch import Tensor, uint8

from engines.costs import disk as costs
from engines.errors import InfeasiblePlan, UserError
from engines.offload.direct_io import FileSpan, in_memory, make_file
from engines.offload.disk_chunks import ByteRange, DiskChunk, cut
from engines.transfer.busy_clock import BusyClock
from engines.transfer.clock import now_s
from engines.transfer.link import Event, Link
from engines.transfer.pinned import HostSlab, ReportProgress
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


def spill_folder(named: str, setting: str = "zo2.disk_folder") -> Path:
    """The folder that `setting` named, or the default: one place for each user, in the user's cache.

    Raises `UserError` if there is no folder to make the named one in.
    """
    if named:
        folder = Path(named).expanduser()
        if not folder.parent.is_dir():
            raise UserError(
                f"--set {setting}={named}",
                f"there is no folder {folder.parent}",
                "make it, or name another",
            )
        return folder
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "lspzo-bench" / "spill"


class PageCacheWarning(UserWarning):
    """Reads do not reach past the page cache: their rate may be that of memory, and they take some of it."""


class DiskBlocks:
    """The weights of some blocks, as bytes in files.

    `sizes_bytes` are the blocks' by index; `in_place` says where those are that a file holds already, which
    need no file of ours. Space is taken for a second file of each that
    `written_back` names.

    `delay_s` is for stress tests: asked before each read for seconds to wait.

    Raises `InfeasiblePlan` with what is missing where the disk is too small, and `UserError` where `folder`
    cannot be used; nothing is written then.
    """

    def __init__(
        self,
        sizes_bytes: Mapping[int, int],
        folder: Path,
        link: Link,
        progress: ReportProgress,
        *,
        written_back: Collection[int] = (),
        in_place: Mapping[int, Sequence[FileSpan]] | None = None,
        delay_s: Callable[[], float] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self.blocks = frozenset(sizes_bytes)
        self.folder = folder
        self.rate_bytes_per_s: float | None = None
        """What reading alone reaches, all else at rest; `None`: not measured."""
        self._sizes_bytes = dict(sizes_bytes)
        self._link = link
        self._delay_s = delay_s
        self._timeline = timeline
        self._spans: dict[int, list[FileSpan]] = {i: list(spans) for i, spans in (in_place or {}).items()}
        """Where each block is read from."""
        self._own: dict[int, FileSpan] = {}
        """Files that `fill` writes."""
        self._second: dict[int, FileSpan] = {}
        self._make_files(written_back)
        self.direct = self._is_direct()
        total_bytes = sum(self._sizes_bytes.values())
        self._num_slots = costs.num_slots(total_bytes)
        self._slab = HostSlab(costs.host_ring_bytes(total_bytes), link.device, progress)
        size = costs.CHUNK_BYTES
        self._slots = [self._slab.view(i * size, (size,), uint8) for i in range(self._num_slots)]
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

    def _make_files(self, written_back: Collection[int]) -> None:
        own = [i for i in self._sizes_bytes if i not in self._spans]
        missing = [(i, self._own) for i in own] + [(i, self._second) for i in sorted(written_back)]
        needed_bytes = sum(self._sizes_bytes[i] for i, _ in missing)
        if not missing:
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            free_bytes = shutil.disk_usage(self.folder).free
            if needed_bytes > free_bytes:
                raise InfeasiblePlan(self._too_small(needed_bytes, free_bytes, written_back))
            for index, files in missing:
                files[index] = self._make_file(index)
        except OSError as error:
            self._close_files()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise InfeasiblePlan(self._too_small(needed_bytes, None, written_back)) from None
            raise self._unusable("cannot be used", error) from None
        except BaseException:
            self._close_files()
            raise
        self._spans |= {index: [span] for index, span in self._own.items()}

    def _make_file(self, block: int) -> FileSpan:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return make_file(self.folder, f"block.{block}", self._sizes_bytes[block])

    def _is_direct(self) -> bool:
        """Whether all blocks are read past the page cache; a warning says where they are not."""
        why = None
        if not all(span.file.direct for spans in self._spans.values() for span in spans):
            why = "its file system refuses direct I/O, so blocks are read through the page cache"
        elif self._own and in_memory(self.folder):
            why = "it is in host memory, which it is to spare"
        if why is not None:
            warning = f"{self.folder}: {why}, and their rate may be that of memory"
            remedy = "name a folder on a local disk with --set zo2.disk_folder=FOLDER"
            warnings.warn(f"{warning}; {remedy}", PageCacheWarning, stacklevel=3)
        return why is None

    def _too_small(self, needed_bytes: int, free_bytes: int | None, written_back: Collection[int]) -> str:
        twice = ", second files for folded updates included" if written_back else ""
        missing = (
            f"{(needed_bytes - free_bytes) / 1e9:.3g} GB of disk are missing"
            if free_bytes is not None
            else "the disk is too small, or a quota is"
        )
        return (
            f"{missing} in {self.folder}: {len(self.blocks)} blocks take {needed_bytes / 1e9:.3g} GB{twice}; "
            "free disk space, or name another folder with --set zo2.disk_folder=FOLDER"
        )

    def _unusable(self, why: str, error: OSError) -> UserError:
        return UserError(
            str(self.folder),
            f"{why} ({error.strerror or error})",
            "name a folder on a sound local disk with --set zo2.disk_folder=FOLDER",
        )

    @property
    def pinned_bytes(self) -> int:
        return self._slab.num_bytes if self._slab.pinned else 0

    def holds(self, block: int) -> bool:
        """A file that is not ours has its weights: it need not be filled."""
        return block not in self._own

    def set_order(self, ranges: Sequence[ByteRange]) -> None:
        """What goes up in one pass, in order; then the next pass does."""
        self._ranges = list(ranges)
        self.rewind()

    def rewind(self) -> None:
        """Wait for reads and copies, and begin anew with the first range. Nothing is read before `send`."""
        self._restart(self._ranges, once=False)

    def _restart(self, ranges: Iterable[ByteRange], *, once: bool) -> None:
        for read in self._reads:
            read.cancel()
        wait_for(self._reads)
        self._link.synchronize()
        self._reads.clear()
        self._chunks = [chunk for each in ranges for chunk in cut(self._spans[each[0]], each)]
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
        if self._delay_s is not None:
            sleep(self._delay_s())
        start_s = now_s()
        with self._clock:
            needed = chunk.skip + chunk.num_bytes
            chunk.file.read(self._memory[slot][: chunk.read_bytes], chunk.offset_bytes, needed)
        if self._timeline is not None:  # a line for each thread: their reads overlap
            lane = threading.current_thread().name.replace("_", " ")
            self._timeline.host_span(lane, f"block {chunk.block}", start_s, now_s())
        return slot

    def _result(self, read: Future[int]) -> int:
        try:
            return read.result()
        except OSError as error:
            raise self._unusable("cannot be read", error) from error

    def fill(self, block: int, memory: Tensor) -> None:
        """Write a block, bytes on the device, for the first time or anew. After `rewind`.

        Waits until it is on disk. Raises `UserError` if the disk is full or fails. A block that a file of
        somebody else holds goes to a second file.
        """
        if block not in self._own:
            self.write_back(block, memory)
            return
        self._write(block, self._own[block], memory)

    def write_back(self, block: int, memory: Tensor) -> None:
        """Keep a block, updated, in its second file, and read it from there from now on. As `fill`."""
        if block not in self._second:
            try:
                self._second[block] = self._make_file(block)
            except OSError as error:
                raise self._unusable("cannot hold a second file of a block", error) from error
        self._write(block, self._second[block], memory)

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
            raise self._unusable("cannot be written", error) from error
        finally:
            wait_for(writes)
        self._spans[block] = [span]

    def _write_chunk(self, chunk: DiskChunk, slot: int, down: Event) -> None:
        self._link.host_wait(down)
        chunk.file.write(self._memory[slot][: chunk.read_bytes], chunk.offset_bytes)

    def fetch(self, block: int, out: Tensor) -> None:
        """A block as it is on disk, to `out`, bytes on the device, in the order of the compute stream."""
        self._restart([(block, 0, self._sizes_bytes[block])], once=True)
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
        depth = next(n for n, rate in rates.items() if rate >= AS_FAST * self.rate_bytes_per_s)
        self._pool.shutdown()
        self._pool = ThreadPoolExecutor(depth, "disk")
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
        self._slab.close()
        self._close_files()

    def _close_files(self) -> None:
        spans = [span for spans in self._spans.values() for span in spans]
        for span in (*spans, *self._own.values(), *self._second.values()):
            span.file.close()
