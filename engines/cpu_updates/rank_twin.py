"""What the twin of a method on several ranks does: every rank has all gradients, and makes all updates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from engines.cpu_updates.chunks import ChunkUpdate, OfRanks
from engines.cpu_updates.cpu_adam import squared_norm_of_sum
from engines.transfer.rank_sums import gathered
from engines.world import World


class ExchangedGradients:
    """Of a chunk, those of all ranks: exchanged when they are first asked for, by all in the same order."""

    def __init__(self, world: World, gradient: Tensor, squared_norm: Tensor) -> None:
        """(elements,) and (1,), on the CPU, as this rank has them when they are asked for."""
        self._world, self._own = world, (gradient, squared_norm)
        self._found: OfRanks | None = None

    def __call__(self, places: Sequence[int] = ()) -> OfRanks:
        """`places` are of no meaning."""
        if self._found is None:
            gradient, squared_norm = (gathered(self._world, each) for each in self._own)
            self._found = OfRanks(gradient, squared_norm)
        return self._found


def norm_of_ranks(updates: Iterable[ChunkUpdate]) -> float:
    """The squared norm of the sum of all ranks' gradients of these chunks, as the worker takes it."""
    return math.fsum(
        squared_norm_of_sum(update.of_ranks(()).gradients)
        for update in updates
        if update.of_ranks is not None
    )
