"""What a disk tier beneath host memory costs: which blocks are on disk, and the memory they pass through."""

from __future__ import annotations

from collections.abc import Sequence

CHUNK_BYTES = 16 * 2**20
"""One read. Storage gives its full rate from a few MB on, and a copy of this size keeps a fast link busy."""

SLOTS = 64
"""Chunks in host memory: 1 GiB. At 12 GB/s, more than any disk here has, reading goes on for 90 ms while the
host waits for a loss and sends nothing up."""

OWN_SLOTS = 4
"""Of these, those that each of several ranks has for itself."""

STATE_PLACES = 3
"""Blocks whose optimizer state is in host memory at once where it is on disk: one is read, one updated, one
written."""

WEIGHT_PLACES = 4
"""Blocks whose weights are in pinned memory at once on their way from disk to the GPU: one goes up, the next
ones are read."""

REPLAYED_UPDATES = 64
"""Updates that a block on disk may be behind: the capacity of `engines.noise.visits.DeviceUpdateLog`."""


def evenly_spread(candidates: Sequence[int], count: int) -> frozenset[int]:
    """`count` of `candidates`, or all, as evenly spread as can be."""
    taken = min(count, len(candidates))
    return frozenset(candidates[(2 * i + 1) * len(candidates) // (2 * taken)] for i in range(taken))


def num_slots(disk_bytes: int) -> int:
    """Chunks of host memory for blocks of so many bytes on disk: two of them at least, to read one while
    the other goes up."""
    return min(SLOTS, max(2, -(-disk_bytes // CHUNK_BYTES))) if disk_bytes else 0


def num_slots_of_ranks(disk_bytes: int, ranks: int) -> tuple[int, int]:
    """Of those, where several ranks of a machine have them: chunks that all of them read, and chunks that
    each has for what it reads alone. Together no more, unless there are very few."""
    slots = num_slots(disk_bytes)
    own = max(1, min(OWN_SLOTS, slots // (2 * ranks)))
    return max(2, slots - ranks * own), own


def host_ring_bytes(disk_bytes: int) -> int:
    """Pinned host memory through which blocks on disk pass."""
    return num_slots(disk_bytes) * CHUNK_BYTES


def fewest_on_disk(streamed_bytes: Sequence[int], host_bytes: int) -> int:
    """How many of the streamed blocks have to be on disk for the others to fit into `host_bytes`; all of
    them where even that is too little."""
    count = len(streamed_bytes)
    for on_disk in range(count):
        if host_needed_bytes(streamed_bytes, on_disk) <= host_bytes:
            return on_disk
    return count


def host_needed_bytes(streamed_bytes: Sequence[int], on_disk: int) -> int:
    """Host memory of streamed blocks of which `on_disk` are on disk: the others and the ring."""
    chosen = evenly_spread(range(len(streamed_bytes)), on_disk)
    disk_bytes = sum(streamed_bytes[i] for i in chosen)
    return sum(streamed_bytes) - disk_bytes + host_ring_bytes(disk_bytes)
