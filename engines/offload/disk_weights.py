"""Weights of blocks that are on disk, on their way to the GPU: a few places of pinned memory, read ahead.

A pass says which blocks it will use, in that order, and a thread reads them one by one, each into a place.
A place is free when its upload has ended. What is read is as the block's last update left it: reading waits
for that to be written (`engines.offload.disk_states.DiskStates.read_head`), and who changes a block's weights
has `drop` forget what was read of them before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from engines.base import ReportProgress
from engines.errors import UserError
from engines.offload.reader_thread import ReaderThread, ReadJob
from engines.transfer.link import Event, Link
from engines.transfer.pinned import host_slabs


class DiskWeights:
    """Blocks are named as whoever reads and uploads them names them."""

    def __init__(
        self,
        read: Callable[[int, Tensor], None],
        size_bytes: int,
        places: int,
        link: Link,
        progress: ReportProgress,
    ) -> None:
        """`read` fills (bytes,) with a block's weights and raises `UserError` where the disk fails;
        `size_bytes` are those of the largest block, a multiple of what direct I/O asks for."""
        self._read = read
        self._link = link
        self._slabs = host_slabs([size_bytes] * places, link.device, progress)
        self._reader = ReaderThread("disk-weights", self._next_read)
        self._changed = self._reader.changed
        self._wanted: deque[int] = deque()
        self._reading: int | None = None
        self._staged: dict[int, int] = {}
        """Blocks that have been read, and their places."""
        self._free: deque[tuple[int, Event]] = deque((place, Event()) for place in range(places))
        """Places, and until when each may be in use."""
        self._error: UserError | None = None
        self.sent_bytes = 0
        """Read and sent up so far."""
        self._reader.start()

    @property
    def pinned_bytes(self) -> int:
        return self._slabs.pinned_bytes

    def ahead(self, blocks: Sequence[int]) -> None:
        """Blocks that will be used next, the first one first. Does not wait."""
        with self._changed:
            self._wanted = deque(
                block for block in blocks if block not in self._staged and block != self._reading
            )
            self._changed.notify_all()

    def take(self, block: int, *, wait: bool) -> Tensor | None:
        """A block's weights, (bytes,), in pinned memory until `sent`; `None`: they are not there yet, and are
        being brought. With `wait`: once they are there. Raises `UserError` where the disk failed."""
        with self._changed:
            while block not in self._staged:
                if self._error is not None:
                    raise self._error
                if block != self._reading and block not in self._wanted:
                    self._wanted.appendleft(block)
                    self._changed.notify_all()
                if not wait:
                    return None
                if not self._free and self._reading is None:
                    # What was read ahead of another order of blocks makes room.
                    self._free.append((self._staged.popitem()[1], Event()))
                    self._changed.notify_all()
                self._changed.wait()
            return self._slabs.views[self._staged[block]]

    def sent(self, block: int, num_bytes: int, arrived: Event) -> None:
        """The block's weights, of so many bytes, are on their way up until `arrived`."""
        with self._changed:
            self.sent_bytes += num_bytes
            self._free.append((self._staged.pop(block), arrived))
            self._changed.notify_all()

    def drop(self) -> None:
        """Weights change on disk: what was read of them is not theirs any more."""
        with self._changed:
            self._wanted.clear()
            while self._reading is not None:
                self._changed.wait()
            while self._staged:
                self._free.append((self._staged.popitem()[1], Event()))

    def close(self) -> None:
        """Read no more, unpin. The caller has waited for all copies. May be called twice."""
        self._reader.close()
        self._slabs.close()

    def _next_read(self) -> ReadJob | None:
        if not (self._wanted and self._free):
            return None
        block = self._reading = self._wanted.popleft()
        return partial(self._bring, block, *self._free.popleft())

    def _bring(self, block: int, place: int, in_use: Event) -> None:
        error = None
        try:
            # HAZARD: what was there may still be on its way up.
            self._link.host_wait(in_use)
            self._read(block, self._slabs.views[place])
        except UserError as failure:
            error = failure
        except BaseException as failure:  # it belongs to the thread that waits
            error = UserError("a block's weights", f"could not be read ({failure!r})", "see the log")
        with self._changed:
            self._reading = None
            if error is None:
                self._staged[block] = place
            else:
                self._error = self._error or error
                self._free.append((place, Event()))
            self._changed.notify_all()


def as_weights(memory: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    """(elements,) at the beginning of (bytes,)."""
    return memory[: elements * dtype.itemsize].view(dtype)
