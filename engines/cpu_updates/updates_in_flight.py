"""Updates between the download of their gradients and the moment in which what they changed is used again."""

from __future__ import annotations

from collections.abc import Sequence

from engines.cpu_updates.chunks import ChunkUpdate
from engines.cpu_updates.pipeline import GradientNotFinite, UpdatePipeline
from engines.errors import NonFiniteLoss
from engines.transfer.compute_clock import ComputeClock
from engines.transfer.link import Link


class UpdatesInFlight:
    """Of each block, by its place, the updates that are on their way.

    A pipeline makes them behind the computation. Without one (the twin's way) whoever calls has made them,
    with `engines.cpu_updates.chunks.update_at_once`, before anything is settled.
    """

    def __init__(self, link: Link, clock: ComputeClock) -> None:
        self._link = link
        self._clock = clock
        self._pipeline: UpdatePipeline | None = None
        self._of: list[list[ChunkUpdate]] = []

    def set_up(self, blocks: int, pipeline: UpdatePipeline | None) -> None:
        """For so many blocks, nothing of which is on its way."""
        self._of = [[] for _ in range(blocks)]
        self._pipeline = pipeline

    def put(self, place: int, updates: list[ChunkUpdate]) -> None:
        """A block's updates, whose downloads are enqueued, in the place of those before, which are
        settled."""
        self._of[place] = updates

    def of(self, place: int) -> Sequence[ChunkUpdate]:
        return self._of[place]

    def all(self) -> list[ChunkUpdate]:
        """By block, in the order of places."""
        return [update for updates in self._of for update in updates]

    def any(self) -> bool:
        return any(self._of)

    def are_made(self, place: int) -> bool:
        """The host has made a block's updates; also where there are none."""
        return all(update.done.is_set() for update in self._of[place])

    def take(self, place: int) -> list[ChunkUpdate]:
        """A block's updates: from here on they are the caller's."""
        updates, self._of[place] = self._of[place], []
        return updates

    def settle(self, place: int) -> None:
        """Let the compute stream wait for a block's updates. Raises what `wait` does."""
        self._wait_for(self.take(place))

    def settle_all(self) -> None:
        for place in range(len(self._of)):
            self.settle(place)

    def wait(self, place: int) -> None:
        """Let the compute stream wait for a block's updates, which stay, as they are still to be applied.

        Raises `NonFiniteLoss` for a gradient that was not finite, when all other updates have been waited for
        and dropped, and what kept the pipeline from updating.
        """
        self._wait_for(self._of[place])

    def _wait_for(self, updates: Sequence[ChunkUpdate]) -> None:
        if self._pipeline is None:
            for update in updates:
                if update.failed:
                    raise NonFiniteLoss(str(GradientNotFinite(update.step.number)))
            return
        try:
            self._pipeline.compute_waits(updates, self._clock)
        except NonFiniteLoss:
            self.discard()
            raise

    def discard(self) -> None:
        """Let the compute stream wait for all that is on its way, finite or not, and forget it."""
        for place in range(len(self._of)):
            updates = self.take(place)
            if self._pipeline is not None:
                self._pipeline.wait_out(updates, self._link.wait)

    def synchronize(self) -> None:
        """Hold the calling thread until all has been applied, finite or not: what failed the next step
        says."""
        if self._pipeline is not None:
            for updates in self._of:
                self._pipeline.wait_out(updates, self._link.host_wait)

    def clear(self) -> None:
        """The pipeline has ended: nothing is on its way."""
        self._of, self._pipeline = [], None
