"""Blocks on disk that several ranks of a machine compute with: each is read once for all of them.

The ranks have one set of files (`engines.offload.shared_files`) and one ring of host memory, which each has
registered with its GPU. In a pass that all of them make they need the same chunks in the same order. These
are counted on, pass after pass; a chunk's *turn* is that count, its slot in the ring the turn's remainder.

    who reads       Each chunk of a pass is for the rank that has least to read of those before it. Threads of
                    that rank go from one of its turns to the next, also while its main thread waits.
    when            A turn is read once all ranks have brought up what its slot had, and that had been read.
    how others know A number for each slot says which turn was read into it last.
    when it is free A number for each rank says how many turns it has brought up: a thread waits for the end
                    of each upload, in their order, and counts.

So a rank is ahead of the slowest by no more than the ring holds. Nobody waits for another but for those two
numbers; the main thread waits only for a chunk of a block that it is about to compute with, as in
`engines.offload.disk`. Who failed to read says so in a third number, and who has closed in a fourth.

What a rank does alone (evaluate, save, export) it reads alone, through some slots of its own. Then the next
pass by all begins: what of it this rank had brought up before, and has dropped, it reads alone as well, and
goes on with what the others have from there.

Files are written while nothing is read ahead (`rest`). Blocks that have fallen behind by what the log holds
are written before a step, divided among the ranks: all come to a standstill, and meet, since one may still be
reading alone what is about to change; each writes its blocks; they meet again, look where each block now
lies, and read on from the first turn of a new *generation* (`start`), whose marks are higher than all before.
Where weights are loaded or updates replayed, which the ranks may do one after the other, the first writes
for all; before the next pass they meet as well.

A rank that is killed leaves nothing behind: files and memory have no names. The others hear of it while they
wait. HAZARD: other processes read into a slot than that which copies from it; only the numbers say when.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from engines.base import ReportProgress
from engines.costs.resources import disk as costs
from engines.cpu_updates.rank_numbers import RankNumbers
from engines.errors import PeerLost
from engines.offload import shared_files
from engines.offload.direct_io import FileSpan
from engines.offload.disk import DiskBlocks
from engines.offload.disk_chunks import ByteRange, DiskChunk, cut
from engines.offload.shared_files import SharedFiles
from engines.transfer.link import Event, Link
from engines.transfer.shared_memory import shared_slabs
from engines.transfer.trace import Timeline
from engines.world import World

READ, SENT, FAILED, MET, CLOSED, MEASURED = range(6)
"""Rows of the numbers. By slot, the turn that was read into it last; by rank, how many turns it has brought
up, the error that it met, how often it has met the others, whether it has closed; then depth and rate. Turns
are `SharedDisk._mark`s."""

GENERATION = 2**40
"""Marks from one to the next."""


class SharedDisk:
    """The weights of some blocks, as bytes in files, for the ranks of this machine. All make it together.

    Raises on every rank what the first one meets: see `engines.offload.disk_files.BlockFiles`. `delay_s` is
    for stress tests: asked before each read for seconds to wait.
    """

    def __init__(
        self,
        sizes_bytes: Mapping[int, int],
        folder: Path,
        link: Link,
        progress: ReportProgress,
        world: World,
        *,
        written_back: Collection[int],
        in_place: Mapping[int, Sequence[FileSpan]],
        delay_s: Callable[[], float] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self._link = link
        self._rank, self._size = world.local_rank, world.local_size
        total_bytes = sum(sizes_bytes.values())
        self._num_slots, own_slots = costs.num_slots_of_ranks(total_bytes, self._size)
        columns = max(self._num_slots, self._size, len(sizes_bytes), 2)
        self._numbers = RankNumbers(MEASURED + 1 + shared_files.ROWS, columns, world, progress)
        self.files = SharedFiles(
            sizes_bytes, folder, world, self._numbers, MEASURED + 1,
            written_back=written_back, in_place=in_place,
        )  # fmt: skip
        count = self._num_slots + self._size * own_slots
        self._slabs = shared_slabs([costs.CHUNK_BYTES] * count, link.device, progress, world)
        self._slots = self._slabs.views[: self._num_slots]
        self._memory = [slot.numpy().data for slot in self._slots]
        first = self._num_slots + self._rank * own_slots
        self._alone = DiskBlocks(
            self.files, link, progress, slots=self._slabs.views[first : first + own_slots],
            delay_s=delay_s, timeline=timeline,
        )  # fmt: skip
        self.blocks = self._alone.blocks
        self.direct = self.files.direct
        self.rate_bytes_per_s: float | None = None
        """What reading alone reaches on this machine, all else at rest; `None`: not measured."""
        self._ranges: list[ByteRange] = []
        self._chunks: list[DiskChunk] = []
        """Of a pass."""
        self._reader_of: list[int] = []
        """Of each chunk, the rank that reads it."""
        self._ends: list[int] = []
        """Of each range, the chunk after its last."""
        self._generation = 0
        self._first_pass = 0
        """Of this generation."""
        self._taken = 0
        """Turns of this generation that this rank has brought up, or passed over."""
        self._range: int | None = None
        """Which is sent next, counted from the first of this generation; `None`: this rank goes alone."""
        self._begun = self._begun_by_this = 0
        """Bytes on their way up of a range that all read, of which more is to come."""
        self.read_bytes = 0
        """Of the last range that was sent, what this rank has read."""
        self._readers: list[threading.Thread] = []
        self._depth = 1
        self._is_resting = threading.Event()
        self._turns = threading.Lock()
        self._next_turn = 0
        """Of this rank's readers."""
        self._releases = ThreadPoolExecutor(1, "disk-sent")
        self._is_closed = False

    @property
    def pinned_bytes(self) -> int:
        """Counted by one rank of the machine."""
        return self._slabs.pinned_bytes if self._rank == 0 else 0

    @property
    def begun_bytes(self) -> int:
        """Bytes on their way up of a range of which more is to be read."""
        return self._begun + self._alone.begun_bytes

    def holds(self, block: int) -> bool:
        """A file that is not ours has its weights: it need not be filled."""
        return self.files.holds(block)

    def set_order(self, ranges: Sequence[ByteRange]) -> None:
        """What goes up in one pass, in order; then the next pass does."""
        self._ranges = list(ranges)
        self._alone.set_order(ranges)

    # --- which way the next range comes ---------------------------------------------------------------

    def rewind(self, next_pass: int | None) -> None:
        """Wait for this rank's own reads and copies. It goes on with the first range: of that pass, counted
        over all that all ranks make, or, with `None`, alone."""
        self.files.look()
        self._begun = self._begun_by_this = 0
        if next_pass is None:
            self._range = None
            self._alone.rewind()
            return
        self._range = first = (next_pass - self._first_pass) * len(self._ranges)
        again: list[ByteRange] = []
        while self._readers and self._turn_of(first + len(again)) < self._taken:
            again.append(self._ranges[(first + len(again)) % len(self._ranges)])
        self._alone.restart(again, once=True)

    def _turn_of(self, number: int) -> int:
        """Of the first chunk of a range, counted as `_range` is."""
        whole, place = divmod(number, len(self._ranges))
        return whole * len(self._chunks) + (self._ends[place - 1] if place else 0)

    @property
    def _goes_alone(self) -> bool:
        """What is sent next this rank reads for itself: it is no pass by all, or has had it before."""
        if self._range is None:
            return True
        return bool(self._readers) and not self._begun and self._turn_of(self._range) < self._taken

    def send(self, out: Tensor, after: Sequence[Event], name: str) -> Event | None:
        """Enqueue the upload of the next range to `out`, bytes on the device, as far as it has been read, by
        this rank or another. The event of its end, or `None` while some of it is still to be read: call
        again, with the same arguments. Raises `UserError` if this rank's own reading fails."""
        if self._goes_alone:
            return self._send_alone(out, after, name)
        if not self._readers:
            return None
        assert self._range is not None
        while self._numbers.load(READ, self._taken % self._num_slots) == self._mark(self._taken):
            number = self._taken % len(self._chunks)
            chunk, slot = self._chunks[number], self._slots[self._taken % self._num_slots]
            event = self._link.upload(
                slot[chunk.skip : chunk.skip + chunk.num_bytes],
                out[chunk.place : chunk.place + chunk.num_bytes],
                after=after,
                name=name,
            )
            self._pass_over(self._taken + 1, event)
            self._begun += chunk.num_bytes
            self._begun_by_this += chunk.num_bytes if self._reads(number) else 0
            if chunk.last:
                self.read_bytes = self._begun_by_this
                self._begun = self._begun_by_this = 0
                self._range += 1
                return event
        return None

    def _send_alone(self, out: Tensor, after: Sequence[Event], name: str) -> Event | None:
        event = self._alone.send(out, after, name)
        if event is not None:
            self.read_bytes = out.numel()
            if self._range is not None:
                self._range += 1
                if self._taken < self._turn_of(self._range):  # the rest of a range that was begun before
                    self._pass_over(self._turn_of(self._range), Event())
        return event

    def wait(self) -> None:
        """Hold the calling thread until `send` can go on. Raises `UserError` if the disk fails, and
        `PeerLost` where another rank has ended."""
        if self._goes_alone:
            self._alone.wait()
            return
        slot, mark = self._taken % self._num_slots, self._mark(self._taken)
        self._wait_for(lambda: self._numbers.load(READ, slot) == mark)

    # --- what the ranks tell each other -----------------------------------------------------------------

    def _mark(self, turn: int) -> int:
        return self._generation * GENERATION + turn + 1

    def _pass_over(self, turns: int, sent: Event) -> None:
        """This rank needs no turn below that number once `sent` has happened."""
        # HAZARD: by one thread in this order, or a lower number could come after a higher one.
        self._taken = turns
        self._releases.submit(self._tell_sent, self._mark(turns - 1), sent)

    def _tell_sent(self, mark: int, sent: Event) -> None:
        self._link.host_wait(sent)
        self._numbers.store(SENT, self._rank, mark)

    def _wait_for(self, is_so: Callable[[], bool]) -> None:
        def is_over() -> bool:
            if is_so():
                return True
            ranks = range(self._size)
            for number in (self._numbers.load(FAILED, rank) for rank in ranks):
                if number:  # before those that have closed for it
                    raise self.files.spill.unusable("cannot be read", OSError(number, os.strerror(number)))
            if any(self._numbers.load(CLOSED, rank) for rank in ranks):
                raise PeerLost
            return False

        self._numbers.wait_for(is_over)

    def meet(self) -> None:
        """Returns when all ranks of the machine have come. Raises `UserError` where the disk failed one of
        them, and `PeerLost` where one has ended."""
        turn = self._numbers.load(MET, self._rank) + 1
        self._numbers.store(MET, self._rank, turn)
        self._wait_for(lambda: all(self._numbers.load(MET, rank) >= turn for rank in range(self._size)))

    # --- reading ahead ----------------------------------------------------------------------------------

    def start(self, next_pass: int) -> None:
        """All ranks are about to make that pass, for which nothing was sent. They meet if they rest."""
        if self._readers:
            return
        self.meet()  # HAZARD: all rest, and what each has written is there
        self.files.look()
        self._generation += 1
        self._first_pass, self._taken, self._range = next_pass, 0, 0
        self._chunks, self._ends = [], []
        for each in self._ranges:
            self._chunks += cut(self.files.spans(each[0]), each)
            self._ends.append(len(self._chunks))
        bytes_of = [0] * self._size
        self._reader_of = []
        for chunk in self._chunks:
            reader = bytes_of.index(min(bytes_of))
            bytes_of[reader] += chunk.num_bytes
            self._reader_of.append(reader)
        self._next_turn = -1
        self._is_resting.clear()
        count = max(1, -(-self._depth // self._size))
        self._readers = [
            threading.Thread(target=self._read_ahead, name=f"disk shared_{i}", daemon=True)
            for i in range(count)
        ]
        for thread in self._readers:
            thread.start()

    def rest(self) -> None:
        """Read nothing ahead until `start`. `rewind` follows."""
        self._is_resting.set()
        for thread in self._readers:
            thread.join()
        self._readers = []
        self._releases.submit(lambda: None).result()

    def _reads(self, number: int) -> bool:
        """Whether it is this rank that reads the chunk of that number in a pass."""
        return self._reader_of[number] == self._rank

    def _read_ahead(self) -> None:
        """A thread: turns of this rank, each as soon as there is room."""
        try:
            while (turn := self._take_turn()) is not None:
                slot = turn % self._num_slots
                self._alone.read_into(self._memory[slot], self._chunks[turn % len(self._chunks)])
                self._numbers.store(READ, slot, self._mark(turn))
        except PeerLost:
            return  # the main thread hears of it, too
        except OSError as error:
            self._numbers.store(FAILED, self._rank, error.errno or errno.EIO)
        except BaseException:
            self._numbers.store(FAILED, self._rank, errno.EIO)
            raise

    def _take_turn(self) -> int | None:
        """The next one that this rank reads, once its slot is free; `None`: no more is to be read."""
        with self._turns:  # one waits, and the others for it
            if self._rank not in self._reader_of:
                return None
            turn = self._next_turn + 1
            while not self._reads(turn % len(self._chunks)):
                turn += 1
            before, slot = turn - self._num_slots, turn % self._num_slots

            def is_free() -> bool:
                if self._is_resting.is_set() or before < 0:
                    return True
                # HAZARD: where all ranks have passed over a turn, it may still be on its way from the disk.
                was_read = self._numbers.load(READ, slot) == self._mark(before)
                return was_read and all(
                    self._numbers.load(SENT, rank) >= self._mark(before) for rank in range(self._size)
                )

            self._numbers.wait_for(is_free)
            if self._is_resting.is_set():
                return None
            self._next_turn = turn
            return turn

    # --- one block at a time ----------------------------------------------------------------------------

    def fill(self, block: int, memory: Tensor) -> None:
        """Write a block, bytes on the device, for the first time or anew, by one rank for all; while they
        rest. Waits until it is on disk. Raises `UserError` if the disk is full or fails."""
        self._alone.fill(block, memory)

    def write_back(self, block: int, memory: Tensor) -> None:
        """Keep a block, updated, in its second file, for all ranks, who read it from there from now on. As
        `fill`."""
        self._alone.write_back(block, memory)

    def fetch(self, block: int, out: Tensor) -> None:
        """A block as it is on disk, to `out`, bytes on the device, in the order of the compute stream; read
        by this rank alone. `rewind` follows."""
        self.files.look()
        self._alone.fetch(block, out)

    def choose_depth(self) -> None:
        """One rank measures how many reads in flight it takes to read as fast as can be, and all of its
        machine divide them. They come here together; all files are filled."""
        if self._rank == 0:
            self._alone.rewind()
            self._alone.choose_depth()
            self._numbers.values[MEASURED, :2] = self._alone.depth, int(self._alone.rate_bytes_per_s or 0)
        self.meet()
        depth, rate = (int(each) for each in self._numbers.values[MEASURED, :2])
        self._depth, self.rate_bytes_per_s = depth, float(rate) or None

    def take_busy_s(self) -> float:
        """Seconds since the last call in which this rank was reading something."""
        return self._alone.take_busy_s()

    def close(self) -> None:
        """Stop the threads, free the memory, let go of the files; the others hear of it. May be called
        twice."""
        if self._is_closed:
            return
        self._is_closed = True
        self.rest()
        self._numbers.store(CLOSED, self._rank, 1)
        self._releases.shutdown()
        self._alone.close()
        self._memory.clear()
        self._slots.clear()
        self._slabs.close()
        self._numbers.close()
