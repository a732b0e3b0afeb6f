"""Host memory that all ranks of a machine map, each pinned for its own GPU.

The first rank of the machine makes it, without a name (memfd): the others open it by that process's
descriptor, and it is gone with the last of them, however they end.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Sequence

import torch

from engines.base import ReportProgress
from engines.errors import NotAvailable
from engines.transfer.pinned import HostSlab, HostSlabs, host_slabs, in_slabs
from engines.world import World, part


def machine_slabs(
    sizes_bytes: Sequence[int], device: torch.device, progress: ReportProgress, world: World
) -> HostSlabs:
    """Memory that a machine has once: `shared_slabs` of its ranks, or of one process its own."""
    if world.local_size == 1:
        return host_slabs(sizes_bytes, device, progress)
    return shared_slabs(sizes_bytes, device, progress, world)


def shared_slabs(
    sizes_bytes: Sequence[int], device: torch.device, progress: ReportProgress, world: World
) -> HostSlabs:
    """Memory for byte tensors of these sizes, the same on all ranks of a machine; each lies on one slab. All
    ranks of the world call this. Fresh memory reads as zeros.

    Raises `NotAvailable` on every rank where one cannot have it.
    """
    groups = in_slabs(sizes_bytes)
    lengths = [-(-sum(group) // mmap.PAGESIZE) * mmap.PAGESIZE for group in groups]
    descriptor = _opened(sum(lengths), world)
    slabs: list[HostSlab] = []
    views: list[torch.Tensor] = []
    try:
        mappings, offset = [], 0
        for length in lengths:
            mappings.append(mmap.mmap(descriptor, length, flags=mmap.MAP_SHARED, offset=offset))
            with contextlib.suppress(OSError):  # an advice; where the kernel has none for shared memory
                mappings[-1].madvise(mmap.MADV_HUGEPAGE)
            offset += length
    finally:
        os.close(descriptor)
    for number, mapping in enumerate(mappings):
        if number in part(len(mappings), world.local_size, world.local_rank):
            _touch(mapping)  # pages come to be here, near the GPU of the rank that fills them first
        progress("touching shared host memory", number + 1, len(groups))
    world.barrier()
    progress("waiting for the other ranks", 1, 1)
    for number, (group, mapping) in enumerate(zip(groups, mappings, strict=True)):
        slab = HostSlab(len(mapping), device, mapping=mapping)
        progress("pinning shared host memory", number + 1, len(groups))
        slabs.append(slab)
        start = 0
        for size in group:
            views.append(slab.view(start, (size,), torch.uint8))
            start += size
    return HostSlabs(slabs, views)


def _opened(num_bytes: int, world: World) -> int:
    """A descriptor of the machine's memory. Raises `NotAvailable`."""
    own, why = -1, ""
    if world.local_rank == 0:
        try:
            own = os.memfd_create("lspzo-bench", os.MFD_CLOEXEC)
            os.truncate(own, num_bytes)
        except OSError as error:
            why = f"shared host memory cannot be made ({error.strerror or error})"
    of_ranks = [json.loads(each) for each in world.exchange(json.dumps([os.getpid(), own]).encode())]
    found = own
    if world.local_rank > 0:
        pid, descriptor = of_ranks[world.rank - world.local_rank]
        try:
            found = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            why = f"the host memory of another rank cannot be opened ({error.strerror or error})"
    reasons = [each.decode() for each in world.exchange(why.encode())]  # and the others have opened it too
    for rank, reason in enumerate(reasons):
        if reason:
            raise NotAvailable(f"rank {rank}: {reason}")
    return found


def _touch(mapping: mmap.mmap) -> None:
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    memory.fill_(0)
