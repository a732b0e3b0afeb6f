"""Optimizer states of blocks on local storage: read into host memory for an update, and written after it.

A few places of host memory are there, each for a block's state: one is read, one updated, one written, at the
same time. Of the blocks that are asked for the first is read first, and each is handed over when it is there:
whoever updates blocks waits for none, so that nothing can wait in a circle. One thread decides what is read;
a pool reads and writes, a chunk at a time, past the page cache (`engines.offload.direct_io`). Files are
nameless: they are gone however the run ends.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from time import sleep

import torch
from torch import Tensor

from engines.costs.resources.disk import CHUNK_BYTES, STATE_PLACES
from engines.errors import UserError
from engines.offload.direct_io import ALIGNMENT_BYTES, FileSpan, make_file
from engines.offload.reader_thread import ReaderThread, ReadJob
from engines.offload.spill_place import SpillPlace
from engines.transfer.busy_clock import BusyClock
from engines.transfer.clock import now_s
from engines.transfer.pinned import HostSlab
from engines.transfer.trace import Timeline

DEPTH = 8
"""Reads and writes in flight."""

Ready = Callable[[Tensor, UserError | None], None]
"""Told of a block's state, (bytes,), and of what kept it from being read or written."""


class DiskStates:
    """The states of some blocks in files of zeros, and room in host memory for `STATE_PLACES` of them."""

    def __init__(
        self,
        sizes_bytes: Mapping[int, int],
        folder: Path,
        setting: str,
        *,
        delay_s: Callable[[], float] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        """`sizes_bytes` are the blocks' by index; `setting` is the one that names `folder`. `delay_s` is for
        stress tests: asked before each read and write for seconds to wait.

        Raises `InfeasiblePlan` where the disk is too small, and `UserError` where `folder` cannot be used.
        """
        self._sizes_bytes = dict(sizes_bytes)
        self._spill = SpillPlace(folder=folder, setting=setting)
        self._delay_s = delay_s
        self._timeline = timeline
        self._files: dict[int, FileSpan] = {}
        self._make_files()
        self.direct = all(span.file.direct for span in self._files.values())
        """Whether files are read and written past the page cache."""
        size = _aligned(max(self._sizes_bytes.values()))
        self._places = [
            HostSlab(size, torch.device("cpu")) for _ in range(min(STATE_PLACES, len(self._sizes_bytes)))
        ]
        self._reader = ReaderThread("disk-states", self._next_read)
        self._changed = self._reader.changed
        self._free = list(range(len(self._places)))
        self._held: dict[int, int] = {}
        """Blocks that have been handed over, and their places."""
        self._wanted: list[tuple[int, int, Ready]] = []
        self._order = count()
        self._changing: Counter[int] = Counter()
        """Of each block, how often it has been asked for without what became of it being written yet."""
        self._writing: set[int] = set()
        """Blocks on their way to the disk."""
        self._error: UserError | None = None
        self._clock = BusyClock()
        self._pool = ThreadPoolExecutor(DEPTH, "disk")
        self._reader.start()

    def _make_files(self) -> None:
        needed_bytes = sum(map(_aligned, self._sizes_bytes.values()))
        states = f"optimizer states of {len(self._sizes_bytes)} blocks"
        what = f"{states} take {needed_bytes / 1e9:.3g} GB"
        with self._spill.taken(needed_bytes, what, self._close_files):
            for index, size in self._sizes_bytes.items():
                span = self._files[index] = make_file(self._spill.folder, f"state.{index}", size)
                span.file.resize(span.offset_bytes + _aligned(size))  # what was never written reads as zero

    @property
    def total_bytes(self) -> int:
        """Of all states."""
        return sum(self._sizes_bytes.values())

    def request(self, block: int, ready: Ready) -> None:
        """Read a block's state, and hand it over by `ready`, from another thread. Does not wait."""
        with self._changed:
            self._wanted.append((block, next(self._order), ready))
            self._changing[block] += 1
            self._changed.notify_all()

    def release(self, block: int) -> None:
        """A block that was handed over has been updated: write it, then its place is free. Does not wait."""
        with self._changed:
            if self._reader.is_closed:
                return
            place = self._held.pop(block)
            self._writing.add(block)
            chunks = self._chunks(self._sizes_bytes[block])
            left = [len(chunks)]
            for begin, end in chunks:
                self._pool.submit(self._write_and_free, block, place, begin, end, left)

    def read_head(self, block: int, memory: Tensor) -> None:
        """Fill `memory`, (bytes,), aligned as for direct I/O, with the beginning of a block's state, as the
        updates that were asked for leave it. Waits for those. Raises `UserError` if the disk fails."""
        with self._changed:
            while self._changing[block] and self._error is None and not self._reader.is_closed:
                self._changed.wait()
            if self._error is not None:
                raise self._error
        try:
            span = self._files[block]
            with self._at_work("read", block):
                self._each_chunk(
                    memory.numel(),
                    lambda begin, end: span.file.read(
                        memory[begin:end].numpy().data, span.offset_bytes + begin, end - begin
                    ),
                )
        except OSError as error:
            raise self._spill.unusable("cannot be read", error) from error

    @contextmanager
    def borrowed(self, block: int, *, changes: bool) -> Iterator[Tensor]:
        """A block's state, (bytes,), while nothing is asked for. `changes`: it is written afterwards.

        Raises `UserError` if the disk fails.
        """
        with self._changed:
            while len(self._free) < len(self._places) and self._error is None:
                self._changed.wait()
            if self._error is not None:
                raise self._error
            place = self._free.pop()
        try:
            self._read(block, place)
            yield self._memory(block, place)
            if changes:
                for begin, end in self._chunks(self._sizes_bytes[block]):
                    self._write(block, place, begin, end)
        except OSError as error:
            raise self._spill.unusable("cannot be read or written", error) from error
        finally:
            self._set_free(place)

    def take_busy_s(self) -> float:
        """Seconds since the last call in which something was being read or written."""
        return self._clock.take_s()

    def close(self) -> None:
        """Stop reading and writing, let go of the files. May be called twice."""
        self._reader.close()
        self._wanted.clear()
        self._pool.shutdown(cancel_futures=True)
        self._close_files()
        for slab in self._places:
            slab.close()

    def _close_files(self) -> None:
        for span in self._files.values():
            span.file.close()

    # --- the threads ------------------------------------------------------------------------------------

    def _next_read(self) -> ReadJob | None:
        # HAZARD: a block that is still being written would be read half as it was.
        whole = [wanted for wanted in self._wanted if wanted[0] not in self._writing]
        if not (whole and self._free):
            return None
        wanted = min(whole)
        self._wanted.remove(wanted)
        block, _, ready = wanted
        return partial(self._read_and_hand_over, block, self._free.pop(), ready)

    def _read_and_hand_over(self, block: int, place: int, ready: Ready) -> None:
        try:
            self._read(block, place)
        except OSError as error:
            self._fail("cannot be read", error)
        except RuntimeError:  # the pool is closed
            self._reader.stop()
            return
        with self._changed:
            self._held[block] = place
        ready(self._memory(block, place), self._error)

    def _fail(self, why: str, error: OSError) -> None:
        with self._changed:
            self._error = self._error or self._spill.unusable(why, error)
            self._changed.notify_all()

    def _set_free(self, place: int) -> None:
        with self._changed:
            self._free.append(place)
            self._changed.notify_all()

    def _memory(self, block: int, place: int) -> Tensor:
        return self._places[place].view(0, (self._sizes_bytes[block],), torch.uint8)

    def _chunks(self, size_bytes: int) -> list[tuple[int, int]]:
        size = _aligned(size_bytes)
        return [(begin, min(begin + CHUNK_BYTES, size)) for begin in range(0, size, CHUNK_BYTES)]

    def _read(self, block: int, place: int) -> None:
        """Raises `OSError`."""
        self._each_chunk(
            self._sizes_bytes[block], lambda begin, end: self._read_chunk(block, place, begin, end)
        )

    def _each_chunk(self, size_bytes: int, act: Callable[[int, int], None]) -> None:
        """In the pool; waits for all. Raises the first `OSError`."""
        submitted = [self._pool.submit(act, *chunk) for chunk in self._chunks(size_bytes)]
        errors = [each.exception() for each in submitted]
        for error in errors:
            if error is not None:
                raise error

    def _read_chunk(self, block: int, place: int, begin: int, end: int) -> None:
        with self._at_work("read", block):
            span = self._files[block]
            span.file.read(self._bytes(place, begin, end), span.offset_bytes + begin, end - begin)

    def _write(self, block: int, place: int, begin: int, end: int) -> None:
        with self._at_work("write", block):
            span = self._files[block]
            span.file.write(self._bytes(place, begin, end), span.offset_bytes + begin)

    def _write_and_free(self, block: int, place: int, begin: int, end: int, left: list[int]) -> None:
        try:
            self._write(block, place, begin, end)
        except OSError as error:
            self._fail("cannot be written", error)
        with self._changed:
            left[0] -= 1
            # HAZARD: only when all of it is on disk: another block is read into the place then.
            if left[0] == 0:
                self._writing.discard(block)
                self._changing[block] -= 1
                self._set_free(place)

    def _bytes(self, place: int, begin: int, end: int) -> memoryview:
        memory: memoryview = self._places[place].view(begin, (end - begin,), torch.uint8).numpy().data
        return memory

    @contextmanager
    def _at_work(self, what: str, block: int) -> Iterator[None]:
        if self._delay_s is not None:
            sleep(self._delay_s())
        start_s = now_s()
        with self._clock:
            yield
        if self._timeline is not None:
            lane = threading.current_thread().name.replace("_", " ")
            self._timeline.host_span(lane, f"{what} block {block}", start_s, now_s())


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
