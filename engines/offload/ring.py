"""Blocks that stream from host memory, or from disk, through a ring of GPU memory, in chunks smaller than a
block.

A chunk is some parts of a block that lie together and cross the link in one copy. It comes up as soon as
there is room, however far ahead that is, and its slot is free once its weights have been read for the last
time (and, where they are written back, once they have gone down). Slots are taken in a circle
in the order of the copies, so a ring of little more than one block keeps the link busy: while one block
computes, the next one comes up into the slot that the first has already left.

Streams and events:
- the compute stream waits for a chunk's arrival before it reads it, unless the chunk is there already;
- the upload stream waits, before it writes a slot, for the last reader of what was there before;
- the download stream waits for the kernel that wrote the chunk;
- the upload stream waits, before it reads a chunk from the host, for the chunk's last download.
With `sharded` every rank of the machine brings up a share of a chunk, and the GPUs exchange the shares on a
stream of their own, behind that of the uploads (`engines.transfer.share_exchange`). All ranks have to do that
of the same chunks in the same order, so it is done only of what a step that all take reads, and each chunk's
turn is counted for good, over what a rank does alone: evaluate, save, export. Such a pass brings up whole
chunks, and what it has left in the ring is dropped at the next step's begin; what the others had exchanged by
then comes up whole.

The host waits for none of these. It waits for the disk, where a block that it is about to compute with has
not been read: `engines.offload.disk`. Blocks on disk are never sent down. Where several ranks have them
(`engines.offload.shared_disk`), passes by all take what is read for all, and what a rank does alone begins
and ends with an empty ring.

Longer than 400 lines: the ring and the order of its copies are one thing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engines.base import ReportProgress
from engines.costs.zo2 import ring_bytes
from engines.errors import UserError
from engines.offload.blocks_on_disk import BlocksOnDisk
from engines.offload.disk import DiskBlocks
from engines.offload.shared_blocks import SharedBlocks
from engines.offload.shared_disk import SharedDisk
from engines.quantized.block_form import BlockForm
from engines.transfer.compute_clock import ComputeClock
from engines.transfer.link import Event, Link
from engines.transfer.pinned import host_slabs
from engines.transfer.share_exchange import ShareExchange
from engines.transfer.shared_memory import shared_slabs
from engines.transfer.trace import Timeline
from engines.world import ALONE, World

UPLOAD_BYTES = 32_000_000
"""Parts are copied together up to about this size: a copy then takes 0.6 ms or more on the fastest link, and
what it costs to start one is nothing beside it. A block of up to twice this size goes in one: where blocks
are small, the time that the CPU takes for each chunk counts."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Parts `first` to `last` - 1 of a block, and their bytes in its memory."""

    block: int
    first: int
    last: int
    start: int
    stop: int


@dataclass(slots=True)
class _Slot:
    """Where a chunk that came up lies. Positions count on and on; their remainder is the place in the
    ring."""

    ticket: int
    begin: int
    released: tuple[Event, ...] | None = None


class Moved(NamedTuple):
    """Bytes so far. Those that came up count as far as they were computed with: how much is sent ahead
    depends on the disk's pace."""

    h2d_bytes: int
    d2h_bytes: int
    disk_bytes: int
    read_bytes: int
    """Of `disk_bytes` what this rank has read, and not another for it."""


class BlockStream:
    """All blocks' weights: some on the GPU for good, the others in host memory. See
    `engines.zeroth_order.block_visit.Source`.

    A pass visits every block once, in order. Memory is counted in bytes; `forms` say what they mean.
    """

    def __init__(
        self,
        forms: Sequence[BlockForm],
        resident: frozenset[int],
        link: Link,
        clock: ComputeClock,
        progress: ReportProgress,
        disk: BlocksOnDisk | None = None,
        world: World = ALONE,
        most_written: int = 0,
        sharded: bool = False,
        timeline: Timeline | None = None,
    ) -> None:
        """With several ranks on the machine in `world`, those on the host are there once, of which a pass
        writes `most_written` at most (`engines.offload.shared_blocks`), and which they bring up in shares if
        `sharded`."""
        self._link = link
        self._disk = disk
        self._shared_disk = disk if isinstance(disk, SharedDisk) else None
        self._clock = clock
        self._forms = forms
        self._on_gpu = {
            i: torch.empty(forms[i].size_bytes, dtype=torch.uint8, device=link.device)
            for i in sorted(resident)
        }
        streamed = [i for i, form in enumerate(forms) if i not in resident and form.size_bytes]
        sizes_bytes = {i: forms[i].size_bytes for i in streamed}
        on_host = [i for i in streamed if not self.is_on_disk(i)]
        self.shared: SharedBlocks | None = None
        if world.local_size > 1 and on_host:
            largest = max(sizes_bytes[i] for i in on_host)
            self._slabs = shared_slabs(
                [largest] * (len(on_host) + most_written), link.device, progress, world
            )
            self.shared = SharedBlocks(
                {i: sizes_bytes[i] for i in on_host}, self._slabs.views, local_rank=world.local_rank,
                local_size=world.local_size,
            )  # fmt: skip
            self._host = {i: self.shared.at(i) for i in on_host}
        else:
            self._slabs = host_slabs([sizes_bytes[i] for i in on_host], link.device, progress)
            self._host = dict(zip(on_host, self._slabs.views, strict=True))
        self._is_first = world.local_rank == 0
        self._chunks = [chunk for i in streamed for chunk in _cut(i, forms[i])]
        self._chunk_of = {
            (chunk.block, part): number
            for number, chunk in enumerate(self._chunks)
            for part in range(chunk.first, chunk.last)
        }
        self._ring_bytes = ring_bytes(list(sizes_bytes.values()))
        self._ring = torch.empty(self._ring_bytes, dtype=torch.uint8, device=link.device)
        self._disk_bytes = self._read_bytes = 0
        """Bytes of the chunks from disk that were computed with, so far, and what of them this rank read."""
        self._exchange: ShareExchange | None = None
        if sharded and self.shared is not None:
            self._exchange = ShareExchange(world, link, timeline)
            progress("meeting the other GPUs", 1, 1)
        self._exchanged = 0
        """Chunks whose shares the ranks have exchanged, so far."""
        self._passes_by_all = 0
        """That have ended."""
        self._starts: dict[int, int] = {0: 0}
        """Of a pass by all ranks, under way or to come: the place of its first chunk in the ring.

        HAZARD: the same on all ranks, or they would differ in how many chunks they send ahead.
        """
        self._by_all = True
        """The pass under way, or to come, is one that all ranks make."""
        if disk is not None:
            disk.set_order([(p.block, p.start, p.stop) for p in self._chunks if self.is_on_disk(p.block)])
        self.rewind()

    @property
    def pinned_bytes(self) -> int:
        own = self._slabs.pinned_bytes if self.shared is None or self._is_first else 0
        return own + (0 if self._disk is None else self._disk.pinned_bytes)

    @property
    def _ahead_bytes(self) -> int:
        """Bytes on their way up, or up, that nobody has computed with yet."""
        begun_bytes = 0 if self._disk is None else self._disk.begun_bytes
        return begun_bytes + sum(self._sent_bytes[ticket] for ticket in self._arrivals)

    def moved(self) -> Moved:
        sent_bytes = self._link.h2d_bytes - self._ahead_bytes
        return Moved(
            h2d_bytes=sent_bytes,
            d2h_bytes=self._link.d2h_bytes,
            disk_bytes=self._disk_bytes,
            read_bytes=self._read_bytes,
        )

    def moved_since(self, before: Moved) -> dict[str, Any]:
        """By the names of `engines.base.StepStats`."""
        now = self.moved()
        disk_bytes = now.disk_bytes - before.disk_bytes
        rate = None if self._disk is None else self._disk.rate_bytes_per_s
        return {
            "h2d_bytes": now.h2d_bytes - before.h2d_bytes,
            "d2h_bytes": now.d2h_bytes - before.d2h_bytes,
            "disk_read_bytes": now.read_bytes - before.read_bytes,
            "disk_floor_s": None if rate is None else disk_bytes / rate,
            "disk_direct": None if self._disk is None else self._disk.direct,
        }

    def is_on_disk(self, block: int) -> bool:
        """It is never written back in a pass."""
        return self._disk is not None and block in self._disk.blocks

    def rewind(self) -> None:
        """Wait for all copies and forget what has come up: the next pass starts from host memory."""
        self.synchronize()
        if self._shared_disk is not None:
            self._shared_disk.rewind(self._passes_by_all if self._by_all else None)
        elif isinstance(self._disk, DiskBlocks):
            self._disk.rewind()
        self._pass = 0
        self._first_turn = self._passes_by_all * len(self._chunks)
        """Of ticket 0, among the chunks of all passes by all ranks."""
        self._first_changed = 0
        """The pass that writes the shared blocks that are changing."""
        self._next = 0
        """Ticket of the next copy up: its chunk is the remainder by the number of chunks."""
        self._position = 0 if self._exchange is None else self._starts[self._passes_by_all]
        self._slots: deque[_Slot] = deque()
        self._waits: list[Event] = []
        """What the next copy up has to wait for, as far as it is known."""
        self._by_ticket: dict[int, _Slot] = {}
        self._arrivals: dict[int, Event] = {}
        self._sent_bytes: dict[int, int] = {}
        """What came over this rank's link of a chunk that nobody has computed with, by ticket."""
        self._sent_read_bytes: dict[int, int] = {}
        """Likewise, what this rank read of it from disk."""
        self._left: dict[int, int] = {}
        """Parts of a chunk in use that are still to be read."""
        self._home: dict[int, Event] = {}
        """Downloads under way, by chunk."""
        self._write_back = False
        self._starved = False
        """The next copy up waits for the disk."""

    @contextmanager
    def filling(self, block: int) -> Iterator[Tensor]:
        """The memory of a block, to be written, in bytes: on the GPU where there is one. After `rewind`.

        At the end a streamed block is sent to its place on the host.
        """
        if block in self._on_gpu:
            yield self._on_gpu[block]
        elif self._disk is not None and block in self._disk.blocks:
            buffer = self._free_buffer(block)
            yield buffer
            self._disk.fill(block, buffer)
        elif self._link.device.type == "cpu" or block not in self._host:
            yield self._host.get(block, self._ring[:0])
        else:
            buffer = self._free_buffer(block)
            yield buffer
            self._home = {-1: self._link.download(buffer, self._host[block], after=self._link.record())}

    def _free_buffer(self, block: int) -> Tensor:
        """The ring's memory for a whole block, while nothing has come up."""
        for event in self._home.values():
            self._link.wait(event)  # HAZARD: the block before is on its way down from here
        return self._ring[: self._forms[block].size_bytes]

    @contextmanager
    def fetched(self, block: int, *, write_back: bool) -> Iterator[Tensor]:
        """A block that is on disk or shared, in bytes on the device, to be read or, with `write_back`,
        changed and written to its second file, or to where it is.

        Between passes; what has come up is forgotten.
        """
        self.rewind()
        buffer = self._free_buffer(block)
        if self.is_on_disk(block):
            assert self._disk is not None
            self._disk.fetch(block, buffer)
        else:
            self._link.wait(self._link.upload(self._host[block], buffer, after=self._link.record()))
        yield buffer
        if write_back and self.is_on_disk(block):
            assert self._disk is not None
            self._disk.write_back(block, buffer)
        elif write_back:
            self._link.download(buffer, self._host[block], after=self._link.record())
        self.rewind()

    # --- blocks that other ranks read too --------------------------------------------------------------

    def finish_writing(self) -> None:
        """Wait until what this rank has written is there; then `publish`, once all ranks have said so."""
        for event in self._home.values():
            self._link.host_wait(event)

    def publish(self) -> None:
        """All ranks have ended the pass, and have written what they write."""
        if self.shared is not None:
            self.shared.publish()
            self._host = {block: self.shared.at(block) for block in self._host}
            self._home = {}
            self.prefetch()

    def at_rest(self, block: int) -> Tensor:
        """The memory of a block that is not on disk, where it lives, in bytes. Only after `Link.synchronize`;
        not to be written."""
        if block in self._on_gpu:
            return self._on_gpu[block]
        return self._host.get(block, self._ring[:0])

    def begin(self, *, write_back: bool) -> None:
        """A visit of the next block begins; with `write_back` its changed weights are sent down."""
        self._write_back = write_back

    def begin_pass(self, *, by_all: bool) -> None:
        """A pass begins that all ranks make, or one that this rank may make alone."""
        begins, ends = by_all and not self._by_all, self._by_all and not by_all
        self._by_all = by_all
        if (begins and self._exchange is not None) or ((begins or ends) and self._shared_disk is not None):
            self.rewind()
        if by_all and self._shared_disk is not None:
            self._shared_disk.start(self._passes_by_all)

    def stop_reading(self, *, together: bool) -> None:
        """What is on disk and shared is about to be written, by this rank or another. Where all ranks are
        about to do so `together`, it returns when they have come."""
        if self._shared_disk is not None:
            self._shared_disk.rest()
            self.rewind()
            if together:
                self._shared_disk.meet()

    def end_pass(self) -> None:
        self._pass += 1
        if not self._by_all:
            return
        self._passes_by_all += 1
        if self._exchange is not None:
            del self._starts[self._passes_by_all - 1]
            # As far as nothing of the next pass has come up, its first chunk is the next.
            self._starts.setdefault(self._passes_by_all, self._position)

    def spans(self, block: int) -> list[tuple[int, int]]:
        """(first, last) of the parts that lie together, in the order in which they come up."""
        if (block, 0) in self._chunk_of:
            return [(chunk.first, chunk.last) for chunk in self._chunks if chunk.block == block]
        own = len(self._forms[block].layout.own_parts)
        return [(0, own)] if own else []

    def take(self, block: int, first: int, last: int) -> Tensor:
        """Parts `first` to `last` - 1 on the GPU, flat or in tiles; the compute stream waits for them."""
        form = self._forms[block]
        start, stop = form.span(first, last)
        if block in self._on_gpu:
            return form.opened(self._on_gpu[block][start:stop], first)
        number = self._chunk_of[block, first]
        ticket = self._pass * len(self._chunks) + number
        self.prefetch()
        if self._next <= ticket and self._starved and self._disk is not None:
            self._clock.stop()
            while self._next <= ticket and self._starved:
                self._disk.wait()
                self.prefetch()
            self._clock.start()
        slot = self._by_ticket.get(ticket)
        if slot is None:
            raise UserError(
                "the model",
                f"computes with the weights of block {block} twice in one pass",
                "use engine mezo, which keeps all weights on the GPU",
            )
        chunk = self._chunks[number]
        if ticket in self._arrivals:
            arrival = self._arrivals.pop(ticket)
            del self._sent_bytes[ticket]
            if not self._link.has_happened(arrival):
                self._clock.stop()
                self._link.wait(arrival)
                self._clock.start()
            self._left[ticket] = chunk.last - chunk.first
            if self.is_on_disk(block):
                self._disk_bytes += chunk.stop - chunk.start
                self._read_bytes += self._sent_read_bytes.pop(ticket)
        begin = slot.begin % self._ring_bytes - chunk.start
        return form.opened(self._ring[begin + start : begin + stop], first)

    def done(self, block: int, first: int, last: int) -> None:
        """Parts `first` to `last` - 1 were read for the last time: their slot goes down or is free."""
        if block in self._on_gpu:
            return
        number = self._chunk_of[block, first]
        ticket = self._pass * len(self._chunks) + number
        self._left[ticket] -= last - first
        if self._left[ticket]:
            return
        del self._left[ticket]
        slot = self._by_ticket.pop(ticket)
        last_use = self._link.record()
        if self._write_back:
            chunk = self._chunks[number]
            begin = slot.begin % self._ring_bytes
            memory = self._ring[begin : begin + chunk.stop - chunk.start]
            whole = self._host[block] if self.shared is None else self.shared.target(block)
            host = whole[chunk.start : chunk.stop]
            last_use = self._home[number] = self._link.download(
                memory, host, after=last_use, name=f"block {block}"
            )
        slot.released = (last_use,)
        self.prefetch()

    def prefetch(self) -> None:
        """Send up what there is room for, also of the next pass."""
        self._starved = False
        while self._chunks and self._upload_next():
            continue

    def _upload_next(self) -> bool:
        number = self._next % len(self._chunks)
        chunk = self._chunks[number]
        if self._waits_for_ranks(chunk.block):
            return False
        if self._next - len(self._chunks) in self._by_ticket:
            return False  # a small model: what came up in this pass is not done, and may yet go down
        size = chunk.stop - chunk.start
        begin = self._position
        if number == 0 and self._by_all and self._exchange is not None:
            self._starts[(self._first_turn + self._next) // len(self._chunks)] = begin
        if begin % self._ring_bytes + size > self._ring_bytes:
            begin += -begin % self._ring_bytes  # a slot does not wrap around the ring's end
        while self._slots and self._slots[0].begin + self._ring_bytes < begin + size:
            events = self._slots[0].released
            if events is None:
                return False
            # HAZARD: kept until the upload is made, which may be at a later attempt.
            self._waits += events
            self._slots.popleft()
        if number in self._home:
            # HAZARD: its download must have ended, or the old weights come up.
            self._waits.append(self._home.pop(number))
        place = begin % self._ring_bytes
        out, name, sent_bytes = self._ring[place : place + size], f"block {chunk.block}", size
        if self._disk is not None and self.is_on_disk(chunk.block):
            arrival = self._disk.send(out, self._waits, name)
            if arrival is None:
                self._starved = True
                return False
            read_bytes = size if self._shared_disk is None else self._shared_disk.read_bytes
            self._sent_read_bytes[self._next] = read_bytes
        elif (turn := self._turn_to_exchange()) is not None and self._exchange is not None:
            host = self._host[chunk.block][chunk.start : chunk.stop]
            arrival = self._exchange.upload(host, out, self._waits, name)
            self._exchanged, sent_bytes = turn + 1, self._exchange.sent_bytes(size)
        else:
            host = self._host[chunk.block][chunk.start : chunk.stop]
            arrival = self._link.upload(host, out, after=self._waits, name=name)
        self._arrivals[self._next], self._sent_bytes[self._next] = arrival, sent_bytes
        self._waits = []
        slot = _Slot(self._next, begin)
        self._slots.append(slot)
        self._by_ticket[self._next] = slot
        self._next += 1
        self._position = begin + size
        return True

    def _turn_to_exchange(self) -> int | None:
        """The next chunk's, if it is to come up in shares; `None`: whole, by this rank alone."""
        if self._exchange is None or not self._by_all:
            return None
        turn = self._first_turn + self._next
        return turn if turn >= self._exchanged else None

    def _waits_for_ranks(self, block: int) -> bool:
        """HAZARD: a block that is written in this pass is read for the next one only when it is published."""
        ahead = self._next // len(self._chunks) > self._first_changed
        return self.shared is not None and ahead and self.shared.is_changing(block)

    def begin_writing(self, blocks: Sequence[int]) -> None:
        """The pass that begins writes these shared blocks, in this order."""
        if self.shared is not None:
            self.shared.begin(blocks)
            self._first_changed = self._pass

    def synchronize(self) -> None:
        """Wait for the copies, for what ranks exchange, and for the current compute stream."""
        self._link.synchronize()
        if self._exchange is not None:
            self._exchange.synchronize()

    def close(self) -> None:
        """Free the pinned memory. After `synchronize`."""
        self._host.clear()
        self._slabs.close()


def _cut(block: int, form: BlockForm) -> Iterator[Chunk]:
    """Chunks of a block, of whole parts; a small block is one."""
    own = len(form.layout.own_parts)
    whole = form.size_bytes <= 2 * UPLOAD_BYTES
    first = 0
    for last in range(1, own + 1):
        start, stop = form.span(first, last)
        if (stop - start >= UPLOAD_BYTES and not whole) or last == own:
            yield Chunk(block, first, last, start, stop)
            first = last
