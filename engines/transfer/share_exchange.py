"""What several GPUs of a machine bring up together: each a share over its own link, and they exchange the
shares, on a stream of their own.

So that N links feed one step, as in ZeRO-Infinity (2104.07857, section 6.1: bandwidth-centric partitioning).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engines.transfer.clock import torch_cuda
from engines.transfer.link import After, Event, Link
from engines.world import World

if TYPE_CHECKING:
    from engines.transfer.trace import Timeline

SHARE_ALIGNMENT_BYTES = 512
"""Shares begin on multiples of this; what is left at the end, less than this for each rank, all bring up."""


class ShareExchange:
    """Copies up, of which every rank of the machine makes its share. All ranks bring up the same memory in
    the same order.

    On a CUDA device through NCCL, which takes some of its multiprocessors while it waits for the others.
    """

    def __init__(self, world: World, link: Link, timeline: Timeline | None = None) -> None:
        """All ranks come here. Raises `UserError` where the GPUs cannot reach each other."""
        self._world = world
        self._link = link
        self._timeline = timeline
        is_cuda = link.device.type == "cuda"
        # Before the compute stream's: kernels of a collective that are not started hold up all ranks.
        self._stream = torch_cuda.Stream(link.device, -1) if is_cuda else None
        buffer = torch.zeros(world.local_size, dtype=torch.uint8, device=link.device)
        self._gather(buffer, Event())  # here, and not in the first step, it is found out what cannot be
        self.synchronize()

    def share_bytes(self, size_bytes: int) -> int:
        """Of so many bytes, what each rank brings up before the rest, which all do."""
        return size_bytes // (self._world.local_size * SHARE_ALIGNMENT_BYTES) * SHARE_ALIGNMENT_BYTES

    def sent_bytes(self, size_bytes: int) -> int:
        """Of so many bytes, what goes over this rank's link."""
        share = self.share_bytes(size_bytes)
        return size_bytes - (self._world.local_size - 1) * share

    def upload(self, host: Tensor, out: Tensor, after: After, name: str) -> Event:
        """Bring up `host`, (bytes,), the same on every rank, to `out` on the GPU; the event of its end. As
        `engines.transfer.link.Link.upload`, with its HAZARD."""
        share = self.share_bytes(host.numel())
        begin, ranks = share * self._world.local_rank, self._world.local_size
        arrival, waits = Event(), after
        for first, last in ((begin, begin + share), (ranks * share, host.numel())):
            if first < last:
                arrival = self._link.upload(host[first:last], out[first:last], after=waits, name=name)
                waits = None  # the second copy is behind the first on their stream
        return self._gather(out[: ranks * share], arrival, name) if share else arrival

    def _gather(self, memory: Tensor, after: Event, name: str = "shares") -> Event:
        if self._stream is None:
            self._world.all_gather(memory)
            return Event()
        with torch.cuda.stream(self._stream):
            if after.cuda is not None:
                self._stream.wait_event(after.cuda)
            span = None
            if self._timeline is not None:
                span = self._timeline.begin("all-gather", name, self._stream)
            self._world.all_gather(memory)
            if span is not None and self._timeline is not None:
                self._timeline.end(span, self._stream)
            end = torch_cuda.Event(blocking=True)
            end.record(self._stream)
        return Event(end)

    def synchronize(self) -> None:
        """Wait for what has been asked for."""
        if self._stream is not None:
            self._stream.synchronize()
