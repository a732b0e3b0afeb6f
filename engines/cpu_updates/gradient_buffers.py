"""Where gradients arrive on the host, and wait for the CPU."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from torch import Tensor

from engines.base import ReportProgress
from engines.cpu_updates.pipeline import WAIT_LIMIT_S
from engines.transfer.shared_memory import machine_slabs
from engines.world import ALONE, World


class GradientBuffers:
    """Host memory for the gradients of some blocks, pinned for a CUDA `device`. Used from several threads.

    With several ranks each has its own places, which all can read."""

    def __init__(
        self,
        sizes: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        progress: ReportProgress,
        world: World = ALONE,
    ) -> None:
        """`sizes`: of the places, in elements."""
        sizes_bytes = [dtype.itemsize * size for size in sizes]
        self._slabs = machine_slabs(sizes_bytes * world.local_size, device, progress, world)
        views = [view.view(dtype) for view in self._slabs.views]
        count = len(sizes)
        self._of_ranks = [views[rank * count : (rank + 1) * count] for rank in range(world.local_size)]
        self.own = self._of_ranks[world.local_rank]
        self._is_first = world.local_rank == 0
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(count):
            self._free.put(number)

    @property
    def pinned_bytes(self) -> int:
        """Counted by the first of the ranks that have it together."""
        return self._slabs.pinned_bytes if self._is_first else 0

    def of_ranks(self, places: Sequence[int]) -> list[Tensor]:
        """The place of each rank that has that number there, (elements,)."""
        return [own[place] for own, place in zip(self._of_ranks, places, strict=True)]

    def take(self, waiting: Callable[[], AbstractContextManager[None]] = nullcontext) -> int:
        """The number of a free place, once there is one: if it is waited for, in `waiting()`. Raises
        `RuntimeError` if none gets free."""
        with suppress(queue.Empty):
            return self._free.get_nowait()
        try:
            with waiting():
                return self._free.get(timeout=WAIT_LIMIT_S)
        except queue.Empty:
            raise RuntimeError(f"the CPU freed no gradient within {WAIT_LIMIT_S:.0f} s") from None

    def give(self, place: int) -> None:
        self._free.put(place)

    def close(self) -> None:
        """Unpin. The caller has waited for all copies."""
        self.own, self._of_ranks = [], []
        self._slabs.close()
