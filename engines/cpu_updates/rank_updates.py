"""Several processes of one machine, each with a GPU, that update the same chunks on its host.

Each rank downloads its gradient of a chunk over its own link to memory that all of them map. One of them,
the chunk's owner, waits for all, adds the gradients up in the order of ranks and makes the update; the others
wait for it and upload what it has written. Chunks are owned in turn, so that Adam's work is divided.

They let each other know by numbers in shared memory: the step in which a rank's gradient of a chunk has
arrived, and in which the chunk was updated. Nobody holds up another for longer than its own work takes: the
thread that runs Adam takes what has arrived on all ranks, and the one that uploads what its owner has updated
(`engines.cpu_updates.pipeline`).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines.cpu_updates.cpu_adam import compiled
from engines.errors import PeerLost
from engines.transfer.clock import now_s
from engines.transfer.pinned import ReportProgress
from engines.transfer.shared_memory import shared_slabs
from engines.world import World

POLL_S = 5e-5
"""Between two looks at what other ranks have done."""

LOOK_FOR_PEERS_S = 0.5


class RankUpdates:
    """What the ranks of a machine know of each other's work on so many chunks. All make it together."""

    def __init__(self, owners: Sequence[int], world: World, progress: ReportProgress) -> None:
        """`owners`: which rank of the machine updates each chunk."""
        chunks = len(owners)
        self._owners = list(owners)
        self.rank, self.size = world.local_rank, world.local_size
        self._library: Any = compiled()
        self._slabs = shared_slabs([8 * chunks * (2 * self.size + 5)], torch.device("cpu"), progress, world)
        self._rows: Any = self._slabs.views[0].view(torch.int64).numpy().reshape(-1, chunks)
        """(2 size + 5, chunks) int64: by rank the step in which it arrived, by rank its place, the step in
        which it was updated, in which that failed, and in which its norm was known. Steps are counted from 1.
        The last two rows are norms, fp64, of even and of odd steps."""
        self._updated, self._failed, self._normed = range(2 * self.size, 2 * self.size + 3)
        self._norms: Any = self._rows[-2:].view(np.float64)
        pids = [int.from_bytes(each, "little") for each in world.exchange(os.getpid().to_bytes(8, "little"))]
        first = world.rank - world.local_rank
        self._peers = [pid for pid in pids[first : first + self.size] if pid != os.getpid()]
        self._next_look_s = now_s()

    def owns(self, chunk: int) -> bool:
        return self._owners[chunk] == self.rank

    def report_arrived(self, chunk: int, step: int, place: int) -> None:
        """This rank's gradient of the chunk lies at its place of that number."""
        self._rows[self.size + self.rank, chunk] = place
        self._store(self.rank, chunk, step)

    def all_arrived(self, chunk: int, step: int) -> bool:
        return all(self._load(rank, chunk) > step for rank in range(self.size))

    def places(self, chunk: int) -> list[int]:
        """Of each rank, after `all_arrived`."""
        return [int(place) for place in self._rows[self.size : 2 * self.size, chunk]]

    def report_updated(self, chunk: int, step: int, *, failed: bool) -> None:
        """By the owner: what goes up is written, or stays as it was, since a gradient was not finite."""
        if failed:
            self._rows[self._failed, chunk] = step + 1
        self._store(self._updated, chunk, step)

    def is_updated(self, chunk: int, step: int) -> bool:
        return self._load(self._updated, chunk) > step

    def has_failed(self, chunk: int, step: int) -> bool:
        """After `is_updated`."""
        return bool(self._rows[self._failed, chunk] == step + 1)

    def report_norm(self, chunk: int, step: int, squared: float) -> None:
        """By the owner: the squared norm of the sum of all ranks' gradients.

        HAZARD: that of two steps before is written over. Nobody asks for it any more: the gradients of this
        step have come from all ranks, which had the updates of the last one, and so its norm, by then.
        """
        self._norms[step % 2, chunk] = squared
        self._store(self._normed, chunk, step)

    def is_norm_known(self, chunk: int, step: int) -> bool:
        return self._load(self._normed, chunk) > step

    def squared_norm(self, step: int) -> float | None:
        """Of all chunks together; `None`: it is not known yet."""
        if not all(self.is_norm_known(chunk, step) for chunk in range(len(self._owners))):
            return None
        return math.fsum(self._norms[step % 2])

    def wait_for_norm(self, step: int) -> float:
        """Raises `PeerLost` where another rank has ended."""
        while (found := self.squared_norm(step)) is None:
            self.look_for_peers()
            time.sleep(POLL_S)
        return found

    def forget(self) -> None:
        """Steps are counted anew. By one rank, while the others wait for it."""
        self._rows[:] = 0

    def look_for_peers(self) -> None:
        """To be called while waiting. Raises `PeerLost` where another rank has ended."""
        if now_s() < self._next_look_s:
            return
        self._next_look_s = now_s() + LOOK_FOR_PEERS_S
        if not all(_lives(pid) for pid in self._peers):
            raise PeerLost

    def close(self) -> None:
        self._slabs.close()

    # HAZARD: the numbers are written after, and read before, what they speak of. Without the library the
    # order is the processor's own: x86 keeps it.
    def _store(self, row: int, chunk: int, step: int) -> None:
        if self._library is None:
            self._rows[row, chunk] = step + 1
        else:
            self._library.store_release(self._address(row, chunk), step + 1)

    def _load(self, row: int, chunk: int) -> int:
        if self._library is None:
            return int(self._rows[row, chunk])
        return int(self._library.load_acquire(self._address(row, chunk)))

    def _address(self, row: int, chunk: int) -> int:
        return int(self._rows.ctypes.data + 8 * (row * self._rows.shape[1] + chunk))


def _lives(pid: int) -> bool:
    """Not ended, nor a zombie that its parent has not looked at."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")
