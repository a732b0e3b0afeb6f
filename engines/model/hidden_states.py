"""Hidden states between blocks that wait for the backward pass in host memory.

A recomputed block keeps its input alone; with many tokens in a step the inputs of all blocks are most of what
training holds on the GPU. Here an input goes down while the next block computes, its GPU memory is given
back, and it comes up again while the block after it is in its backward pass. The tensor stays the same one,
to autograd too: only its storage is empty in between.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engines.base import ReportProgress
from engines.costs.exact_offload import STAYING_INPUTS
from engines.transfer.link import Event, Link
from engines.transfer.pinned import host_slabs


@dataclass(slots=True)
class _Away:
    tensor: Tensor
    host: Tensor
    gone: Event
    arrived: Event | None = None


class HiddenStates:
    """Buffers for them on the host, and the copies."""

    def __init__(
        self,
        link: Link,
        *,
        num_blocks: int,
        micro_batches: int,
        most_bytes: int,
        progress: ReportProgress,
    ) -> None:
        """`most_bytes`: of one micro-batch's between two blocks."""
        self._link = link
        self._blocks = range(1, num_blocks - STAYING_INPUTS)
        """Whose inputs go down. What enters the first block may be kept by what made it."""
        count = micro_batches * len(self._blocks)
        self._slabs = host_slabs([most_bytes] * count, link.device, progress)
        self._micro_batches = micro_batches
        self._away: dict[int, list[_Away]] = {}
        self.moved_bytes = 0
        """Each way, so far."""

    @property
    def pinned_bytes(self) -> int:
        return self._slabs.pinned_bytes

    def take(self, block: int, number: int, tensor: Tensor, result: Tensor) -> None:
        """All that uses `tensor`, what enters `block`, of the micro-batch of that number, has been enqueued
        for now; `result` is what left the block. One whose memory is not its own stays."""
        if block not in self._blocks or number >= self._micro_batches:
            return
        storage, buffer = tensor.untyped_storage(), self._buffers_of(block)[number]
        is_alone = storage.nbytes() == tensor.nbytes and tensor.is_contiguous()
        if not is_alone or tensor.nbytes > buffer.numel():
            return
        if result.untyped_storage().data_ptr() == storage.data_ptr():
            return
        flat = tensor.detach().view(-1)
        host = buffer[: flat.nbytes].view(flat.dtype)
        gone = self._link.download(flat, host, after=self._link.record(), name=f"hidden {block}")
        self.moved_bytes += flat.nbytes
        self._away.setdefault(block, []).append(_Away(tensor, host, gone))

    def _buffers_of(self, block: int) -> list[Tensor]:
        begin = self._blocks.index(block) * self._micro_batches
        return self._slabs.views[begin : begin + self._micro_batches]

    def empty(self, block: int) -> None:
        """Give the GPU memory of what enters `block` back.

        HAZARD: the allocator hands it to the compute stream's next kernels: that stream waits for the copy.
        """
        for each in self._away.get(block, ()):
            self._link.wait(each.gone)
            each.tensor.untyped_storage().resize_(0)

    @torch.no_grad()
    def bring(self, block: int) -> None:
        """The block's backward pass is near: what enters it comes up."""
        for each in self._away.get(block, ()):
            storage = each.tensor.untyped_storage()
            if storage.nbytes() or each.arrived is not None:
                continue
            storage.resize_(each.host.nbytes)
            # HAZARD: kernels that used the memory before are in the compute stream. `data` has a count of
            # changes of its own, so that autograd takes what comes up for what went down, which it is.
            out = each.tensor.data.view(-1)
            each.arrived = self._link.upload(
                each.host, out, after=self._link.record(), name=f"hidden {block}"
            )

    def back(self, block: int) -> None:
        """The block's backward pass begins."""
        self.bring(block)
        for each in self._away.pop(block, ()):
            if each.arrived is not None:
                self._link.wait(each.arrived)

    def forget(self) -> None:
        """A step was broken off."""
        self._away.clear()

    def close(self) -> None:
        """Unpin. The caller has waited for all copies."""
        self._away.clear()
        self._slabs.close()
