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
from collections.abc import Sequence
from typing import Any

import numpy as np

from engines.base import ReportProgress
from engines.cpu_updates.rank_numbers import RankNumbers
from engines.world import World


class RankUpdates:
    """What the ranks of a machine know of each other's work on so many chunks. All make it together."""

    def __init__(self, owners: Sequence[int], world: World, progress: ReportProgress) -> None:
        """`owners`: which rank of the machine updates each chunk."""
        chunks = len(owners)
        self._owners = list(owners)
        self.rank, self.size = world.local_rank, world.local_size
        self._numbers = RankNumbers(2 * self.size + 5, chunks, world, progress)
        self._rows: Any = self._numbers.values
        """(2 size + 5, chunks) int64: by rank the step in which it arrived, by rank its place, the step in
        which it was updated, in which that failed, and in which its norm was known. Steps are counted from 1.
        The last two rows are norms, fp64, of even and of odd steps."""
        self._updated, self._failed, self._normed = range(2 * self.size, 2 * self.size + 3)
        self._norms: Any = self._rows[-2:].view(np.float64)

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
        self._numbers.wait_for(lambda: self.squared_norm(step) is not None)
        return math.fsum(self._norms[step % 2])

    def look_for_peers(self) -> None:
        """To be called while waiting. Raises `PeerLost` where another rank has ended."""
        self._numbers.look_for_peers()

    def forget(self) -> None:
        """Steps are counted anew. By one rank, while the others wait for it."""
        self._rows[:] = 0

    def close(self) -> None:
        self._numbers.close()

    def _store(self, row: int, chunk: int, step: int) -> None:
        self._numbers.store(row, chunk, step + 1)

    def _load(self, row: int, chunk: int) -> int:
        return self._numbers.load(row, chunk)
