"""Numbers by which the ranks of a machine let each other know how far they are, in memory that all map."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engines.base import ReportProgress
from engines.cpu_updates.cpu_adam import compiled
from engines.errors import PeerLost
from engines.transfer.clock import now_s
from engines.transfer.shared_memory import shared_slabs
from engines.world import World

POLL_S = 5e-5
"""Between two looks at what other ranks have done."""

SELDOM_S = 2e-4
"""Likewise, when it takes long."""

LOOK_FOR_PEERS_S = 0.5


class RankNumbers:
    """A table (rows, columns) of int64, zeros at first. All ranks of the world make it together."""

    def __init__(self, rows: int, columns: int, world: World, progress: ReportProgress) -> None:
        # x86 keeps the order of what is stored; elsewhere it takes instructions that Python has not.
        self._library: Any = None if platform.machine() in ("x86_64", "AMD64") else compiled()
        self._slabs = shared_slabs([8 * rows * columns], torch.device("cpu"), progress, world)
        self.values: Any = self._slabs.views[0].view(torch.int64).numpy().reshape(rows, columns)
        """For what `store` and `load` of another number order."""
        pids = [int.from_bytes(each, "little") for each in world.exchange(os.getpid().to_bytes(8, "little"))]
        first = world.rank - world.local_rank
        self.pids = pids[first : first + world.local_size]
        """Of this machine's ranks."""
        self._next_look_s = now_s()

    # HAZARD: a number is written after, and read before, what it speaks of. Where there is neither such a
    # processor nor the library, nothing sees to that.
    def store(self, row: int, column: int, value: int) -> None:
        """All that this thread wrote before is there for whoever loads the value."""
        if self._library is None:
            self.values[row, column] = value
        else:
            self._library.store_release(self._address(row, column), value)

    def load(self, row: int, column: int) -> int:
        if self._library is None:
            return int(self.values[row, column])
        return int(self._library.load_acquire(self._address(row, column)))

    def _address(self, row: int, column: int) -> int:
        return int(self.values.ctypes.data + 8 * (row * self.values.shape[1] + column))

    def look_for_peers(self) -> None:
        """To be called while waiting. Raises `PeerLost` where another rank of the machine has ended."""
        if now_s() < self._next_look_s:
            return
        self._next_look_s = now_s() + LOOK_FOR_PEERS_S
        if not all(_lives(pid) for pid in self.pids if pid != os.getpid()):
            raise PeerLost

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        """Returns when `is_so`, which others bring about. Raises what it does, and as `look_for_peers`."""
        pause_s = POLL_S
        while not is_so():
            self.look_for_peers()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, SELDOM_S)

    def close(self) -> None:
        self._slabs.close()


def _lives(pid: int) -> bool:
    """Not ended, nor a zombie that its parent has not looked at."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")
