"""Cores of several machines: each sends the others its sum over its own ranks, when backward has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engines.cpu_updates.chunks import OfRanks
from engines.cpu_updates.cpu_adam import add_up, squared_norm_of_sum
from engines.cpu_updates.rank_updates import RankUpdates
from engines.cpu_updates.updates_in_flight import UpdatesInFlight
from engines.subspace.cores import Cores
from engines.transfer.link import Link
from engines.world import World


class MachineSums:
    """What each machine has of the chunks that this rank updates, in this step. A rank sends what it updates:
    of `ranks`, those of its machine, or all where it is alone there."""

    def __init__(self, cores: Cores, ranks: RankUpdates | None, world: World, link: Link) -> None:
        self._cores, self._ranks = cores, ranks
        self._world, self._link = world, link
        self._found: dict[int, OfRanks] = {}
        """Of a chunk, by its number."""

    def of(self, number: int) -> Callable[[Sequence[int]], OfRanks]:
        """What gives a chunk's sums, after `exchange`; the places that it is called with are of no
        meaning."""
        return lambda places: self._found[number]

    def exchange(self, in_flight: UpdatesInFlight) -> None:
        """All gradients of the step have been sent down. By all ranks at the same time."""
        for update in in_flight.all():
            self._link.host_wait(update.downloaded)
        self._world.barrier()  # HAZARD: those of the other ranks of this machine have come down, too
        own = self._own_sums(in_flight)
        sizes = [each.numel() for each in own.values()]
        of_machines = [
            torch.split(each, sizes) for each in self._world.between_machines(torch.cat([*own.values()]))
        ]
        self._found = {}
        for number, sums in zip(own, zip(*of_machines, strict=True), strict=True):
            norm = torch.tensor([squared_norm_of_sum(sums)])
            self._found[number] = OfRanks(sums, [norm])

    def _own_sums(self, in_flight: UpdatesInFlight) -> dict[int, Tensor]:
        """(elements,) each, by number: of this machine's ranks, of the chunks that this rank updates."""
        found: dict[int, Tensor] = {}
        for place, block in enumerate(self._cores.blocks):
            for update in in_flight.of(place):
                number = update.state.number
                if self._ranks is None or self._ranks.owns(number):
                    state = block.state_of(number)
                    found[number] = torch.empty_like(state.incoming)
                    add_up(found[number], self._cores.of_ranks(place, state, ()).gradients)
        return found
