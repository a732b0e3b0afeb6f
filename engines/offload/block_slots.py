"""Blocks that stream from host memory through a few slots of GPU memory, forwards and backwards.

Block i always has the same slot, i modulo their number, so that a parameter stays at one place however often
its block comes up: where its autograd graph and compiled code know it. (In `engines.offload.ring`, for passes
in one direction, chunks lie wherever there is room.) While a block computes, the next ones come up; at the
turn from the forward to the backward pass the last ones are still there.

Streams and events: the compute stream waits for a block's arrival, the upload stream for the last kernel that
used the slot, and for what is on its way down from there. The host waits only for a block that is not ready
on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from engines.offload.disk_weights import DiskWeights, as_weights
from engines.transfer.compute_clock import ComputeClock
from engines.transfer.link import Event, Link


class BlockSlots:
    """GPU memory that blocks take turns in."""

    def __init__(
        self,
        host: Sequence[Tensor],
        slots: int,
        link: Link,
        clock: ComputeClock,
        is_ready: Callable[[int, bool], bool],
        on_disk: DiskWeights | None = None,
    ) -> None:
        """`host` is each block's memory there, flat; of blocks that `on_disk` reads it is on no device.
        `is_ready(block, wait)` says whether that may be read; asked to wait, it returns when it may."""
        self._host = host
        self._link = link
        self._clock = clock
        self._is_ready = is_ready
        self._on_disk = on_disk
        self.count = min(slots, len(host))
        largest = max(each.numel() for each in host)
        self._memory = [
            torch.zeros(largest, dtype=host[0].dtype, device=link.device) for _ in range(self.count)
        ]
        self._holds: list[int | None] = [None] * self.count
        self._arrived = [Event() for _ in self._memory]
        self._free = [Event() for _ in self._memory]
        self._drained = [Event() for _ in self._memory]
        """When what was last written back from a slot is on the host."""
        self._stored = [Event() for _ in host]
        """When what was last written back of a block is."""
        self._used: int | None = None
        """The slot that the compute stream is at."""
        self.h2d_bytes = 0
        """Sent up so far."""
        self.d2h_bytes = 0
        """Written back so far."""

    @property
    def gpu_bytes(self) -> int:
        """Of all slots."""
        return sum(each.nbytes for each in self._memory)

    def memory(self, block: int) -> Tensor:
        """(elements,): where the block is whenever it is on the GPU."""
        return self._memory[block % self.count][: self._host[block].numel()]

    def enter(self, block: int, ahead: Iterable[int]) -> None:
        """The compute stream is about to use `block`, and after it the blocks `ahead`."""
        slot = block % self.count
        self._used = slot
        self._fetch(block, wait=True)
        if not self._link.has_happened(self._arrived[slot]):
            computes = self._clock.is_running
            self._clock.stop()
            self._link.wait(self._arrived[slot])
            if computes:
                self._clock.start()
        for each in ahead:
            if each % self.count == self._used or not self._fetch(each, wait=False):
                break

    def holds(self, block: int) -> bool:
        """The block is on the GPU, or on its way up."""
        return self._holds[block % self.count] == block

    def leave(self, block: int) -> None:
        """All that uses `block` for now has been enqueued."""
        self._free[block % self.count] = self._link.record()

    def write_back(self, block: int) -> None:
        """The block has changed on the GPU, where it is, and goes to the host as all that has been enqueued
        leaves it. Before `leave`; it must not change again until that."""
        stored = self._link.download(
            self.memory(block).data, self._host[block], after=self._link.record(), name=f"block {block}"
        )
        self._stored[block] = self._drained[block % self.count] = stored
        self.d2h_bytes += self._host[block].nbytes

    def forget(self, block: int) -> None:
        """The block changes on the host."""
        slot = block % self.count
        if self._holds[slot] == block:
            self._holds[slot] = None

    def forget_all(self) -> None:
        """All blocks have changed on the host."""
        self._holds = [None] * self.count
        if self._on_disk is not None:
            self._on_disk.drop()

    def _fetch(self, block: int, *, wait: bool) -> bool:
        slot = block % self.count
        if self._holds[slot] == block:
            return True
        if not self._is_ready(block, wait):
            return False
        source = self._host[block]
        is_staged = source.is_meta
        if is_staged:
            assert self._on_disk is not None
            found = self._on_disk.take(block, wait=wait)
            if found is None:
                return False
            source = as_weights(found, source.numel(), source.dtype)
        # HAZARD: not through a view that shares the parameters' version counter. Autograd would take what
        # lies there in the backward pass for another block; it is the same, brought up a second time.
        out = self.memory(block).data
        # HAZARD: what was there may still be on its way down, and so may this block's own last state.
        after = [self._free[slot], self._drained[slot], self._stored[block]]
        self._arrived[slot] = self._link.upload(source, out, after=after, name=f"block {block}")
        if is_staged and self._on_disk is not None:
            self._on_disk.sent(block, source.nbytes, self._arrived[slot])
        self._holds[slot] = block
        self.h2d_bytes += out.nbytes
        return True
