"""What becomes of a gradient that is complete on the GPU: it goes down, chunk by chunk, to the thread that
updates, and the new weights go up again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from engines.cpu_updates.block_state import BlockChunk, BlockStates
from engines.cpu_updates.chunks import ChunkUpdate, OfRanks, UpdateStep, UploadTarget, update_at_once
from engines.cpu_updates.gradient_buffers import GradientBuffers
from engines.cpu_updates.gradient_norms import GradientNorms
from engines.cpu_updates.pipeline import UpdatePipeline
from engines.cpu_updates.rank_twin import ExchangedGradients, norm_of_ranks
from engines.cpu_updates.rank_updates import RankUpdates
from engines.cpu_updates.updates_in_flight import UpdatesInFlight
from engines.transfer.link import Event, Link
from engines.world import World


class StateKeeper(Protocol):
    """Has a group's optimizer state in memory when it is updated, wherever it is at other times:
    `engines.offload.kept_states.KeptStates`."""

    def submit(self, index: int, updates: Sequence[ChunkUpdate], pipeline: UpdatePipeline) -> None:
        """Hand a group's updates to the worker, once its state is there."""

    def updated(self, index: int) -> None:
        """All updates of a group have been made."""


class UpdateDispatch:
    """Of groups of tensors: the blocks, and then what the host updates outside them.

    Without a pipeline (the twin's way) gradients are copied at once, and nothing is updated before `submit`.
    """

    def __init__(
        self,
        states: BlockStates,
        keeper: StateKeeper,
        on_gpu: Sequence[Tensor],
        norms: GradientNorms,
        in_flight: UpdatesInFlight,
        link: Link,
        *,
        num_blocks: int,
        waits_for_norm: bool,
        pipeline: UpdatePipeline | None,
        ranks: RankUpdates | None,
        world: World,
    ) -> None:
        """`on_gpu`: where the weights of each group are, (elements,). `waits_for_norm`: no update begins
        before `submit`."""
        self._states, self._keeper, self._on_gpu = states, keeper, on_gpu
        self._norms, self._in_flight, self._link = norms, in_flight, link
        self._num_blocks = num_blocks
        self._waits_for_norm = waits_for_norm
        self._pipeline, self._ranks, self._world = pipeline, ranks, world
        self._this_step = UpdateStep(number=-1, learning_rate=0.0)
        self.h2d_bytes = self.d2h_bytes = 0
        """Of weights and of gradients with their norms, so far."""

    def begin(self, step: UpdateStep) -> None:
        """A step begins."""
        self._this_step = step

    def send(
        self,
        index: int,
        gradient: Tensor,
        buffers: GradientBuffers,
        number: int,
        *,
        goes_up: bool,
        consumed: Callable[[], None] = lambda: None,
    ) -> Event:
        """Download a group's gradient (elements,) to the place of that `number` in `buffers` and hand it to
        the worker; the event of its arrival. `goes_up`: the new weights do, when they are made. `consumed` is
        called when the place is free."""
        place, chunks = buffers.own[number], self._states.chunks[index]
        norm = self._norms.take(index, gradient)
        self.d2h_bytes += gradient.nbytes + norm.nbytes
        # HAZARD: new weights go up where the passes have used the old ones, and not before they have.
        ready = self._link.record()
        if goes_up:
            self.h2d_bytes += self._on_gpu[index].nbytes
        updates = self._make(index, buffers, number, ready if goes_up else None, consumed)
        self._in_flight.put(index, updates)
        for chunk in chunks:
            chunk.gradient = place[chunk.begin : chunk.end]
        if self._ranks is not None:
            self._norms.learn(self._this_step, self._ranks)
        if self._pipeline is None:
            chunks[0].squared_norm.copy_(norm)
            place[: gradient.numel()].copy_(gradient)
            return Event()
        name = f"block {index}" if index < self._num_blocks else "outside the blocks"
        copies = [(gradient[chunk.begin : chunk.end], place[chunk.begin : chunk.end]) for chunk in chunks]
        arrived = self._link.download_each([(norm, chunks[0].squared_norm), *copies], after=ready, name=name)
        for update, event in zip(updates, arrived[1:], strict=True):
            update.downloaded = event
        if not self._waits_for_norm:
            self._keeper.submit(index, updates, self._pipeline)
        elif self._ranks is not None:
            for update in updates:
                self._pipeline.submit_norms([update])
        return arrived[-1]

    def _make(
        self,
        index: int,
        buffers: GradientBuffers,
        number: int,
        goes_up_after: Event | None,
        consumed: Callable[[], None],
    ) -> list[ChunkUpdate]:
        """The updates of a group's chunks; new weights stay on the host without `goes_up_after`."""
        chunks, weights = self._states.chunks[index], self._on_gpu[index]

        def all_consumed() -> None:
            consumed()
            self._keeper.updated(index)

        give = _once_all(len(chunks), all_consumed)
        return [
            ChunkUpdate(
                state=chunk,
                step=self._this_step,
                destination=None
                if goes_up_after is None
                else UploadTarget(memory=weights[chunk.begin : chunk.end], free=goes_up_after),
                consumed=give,
                place=number,
                of_ranks=self._from_ranks(index, chunk, buffers, number),
            )
            for chunk in chunks
        ]

    def _from_ranks(
        self, index: int, chunk: BlockChunk, buffers: GradientBuffers, number: int
    ) -> Callable[[Sequence[int]], OfRanks] | None:
        """What gives the gradients of all ranks, if there are several; this one's are at that number."""
        if self._ranks is not None:
            return partial(self._of_ranks, index, chunk, buffers)
        if self._world.size > 1:
            gradient = buffers.own[number][chunk.begin : chunk.end]
            return ExchangedGradients(self._world, gradient, chunk.squared_norm)
        return None

    def _of_ranks(
        self, index: int, chunk: BlockChunk, buffers: GradientBuffers, places: Sequence[int]
    ) -> OfRanks:
        return OfRanks(
            [place[chunk.begin : chunk.end] for place in buffers.of_ranks(places)],
            [norms[index : index + 1] for norms in self._states.norms_of_ranks],
        )

    def squared_norm_of_ranks(self) -> Tensor:
        """(1,) on the device: of the sum of all ranks' gradients that the host updates by. The CPU takes it,
        which is waited for if this step is clipped by it; else 0, and the next step learns it."""
        found = 0.0
        if self._pipeline is None and self._this_step.max_norm is not None:
            found = norm_of_ranks(self._in_flight.all())
        elif self._pipeline is not None and self._waits_for_norm:
            found = self._pipeline.wait_for_norm(self._this_step.number)
        return torch.full((1,), found, device=self._link.device)

    def submit(self) -> None:
        """All gradients of the step have been sent, and the norm that they are clipped by is on its way:
        begin with what has waited for it."""
        if self._pipeline is None:
            update_at_once(self._in_flight.all(), self._link.device)
        elif self._waits_for_norm:
            for index in range(len(self._states.chunks)):
                self._keeper.submit(index, self._in_flight.of(index), self._pipeline)


def _once_all(count: int, act: Callable[[], None]) -> Callable[[], None]:
    """To be called `count` times, from one thread; the last one acts."""
    left = [count]

    def called() -> None:
        left[0] -= 1
        if left[0] == 0:
            act()

    return called
