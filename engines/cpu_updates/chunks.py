"""Chunks, which travel from the GPU through Adam on the CPU and back: what is known of each, and its update.

A chunk is neighbouring elements of one block in flat memory, whole gradients
(`engines.cpu_updates.block_state`) or compressed ones (`engines.subspace.cores`).
`engines.cpu_updates.pipeline` sends them on their way.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from engines.transfer.link import Event


@dataclass(kw_only=True, eq=False)
class UpdateStep:
    """A step of Adam as all its chunks take it."""

    number: int
    """Of the step, from 0."""
    learning_rate: float
    max_norm: float | None = None
    """Of the gradient, or `None`: it is not clipped."""
    total: Tensor | None = None
    """On the host: the gradient's squared norm, valid once `total_known` has happened. For clipping."""
    total_known: Event = field(default_factory=Event)
    failed: bool = False
    """A gradient of the step was not finite: what has not been updated yet stays as it is."""

    def is_finite(self) -> bool:
        """Of the gradient that is clipped, also what the GPU updates. `total_known` has happened."""
        return self.total is None or math.isfinite(float(self.total))

    def scale(self) -> float:
        """What a gradient is multiplied by. `total_known` has happened."""
        if self.max_norm is None or self.total is None:
            return 1.0
        norm = math.sqrt(float(self.total))
        return self.max_norm / norm if norm > self.max_norm else 1.0


class TravellingChunk(Protocol):
    """Neighbouring elements of a block, on the host, and their optimizer's state."""

    deadline: int
    """Index of its block: its place in the next forward pass."""
    number: int
    """Among all chunks."""
    squared_norm: Tensor
    """(1,) fp32, pinned: of the block's gradient, which it arrives before."""
    updates: int
    """Of it, so far."""

    @property
    def outgoing(self) -> Tensor:
        """(elements,) of the weights' dtype, pinned: what goes up after an update."""

    def update(self, step: UpdateStep, gradients: Sequence[Tensor] = ()) -> None:
        """One step of Adam on the gradient that has arrived, or on the sum of the `gradients` of all ranks,
        (elements,) each. May take all threads of the caller."""


class OfRanks(NamedTuple):
    """What the ranks bring of a chunk, in their order."""

    gradients: Sequence[Tensor]
    """(elements,) each."""
    squared_norms: Sequence[Tensor]
    """(1,) each: of the block's gradients."""


@dataclass(kw_only=True, eq=False)
class UploadTarget:
    """Where what goes up belongs as it is."""

    memory: Tensor
    """(elements,) on the GPU."""
    free: Event
    """Until then `memory` is in use."""


@dataclass(kw_only=True, eq=False)
class ChunkUpdate:
    """One chunk on its way."""

    state: TravellingChunk
    step: UpdateStep
    destination: UploadTarget | Callable[[Tensor, UpdateStep], None] | None
    """A place, or a function that is called with what went up, (elements,) on the GPU, and enqueues what
    applies it to the weights; `None`: it stays on the host."""
    consumed: Callable[[], None] = lambda: None
    """Called when the downloaded gradient is needed no more, whatever came of it; from any thread."""
    place: int = 0
    """Where its gradient is, among the places of this rank: for other ranks."""
    of_ranks: Callable[[Sequence[int]], OfRanks] | None = None
    """With several ranks: the gradients of all, by the place that it has on each."""
    downloaded: Event = field(default_factory=Event)
    applied: Event = field(default_factory=Event)
    """Valid once `done` is set."""
    failed: bool = False
    done: threading.Event = field(default_factory=threading.Event)


def update_chunk(state: TravellingChunk, step: UpdateStep, of_ranks: OfRanks | None = None) -> bool:
    """Adam on a gradient that is on the host, or those of all ranks: the worker's and the twin's. False: it
    is not finite."""
    norms = [state.squared_norm] if of_ranks is None else of_ranks.squared_norms
    if step.failed or not step.is_finite() or not all(math.isfinite(float(norm)) for norm in norms):
        step.failed = True
        return False
    state.update(step, () if of_ranks is None else of_ranks.gradients)
    return True


def update_at_once(updates: Sequence[ChunkUpdate], device: torch.device) -> None:
    """The twin's way: all of it in the calling thread, then all is applied."""
    for update in updates:
        of_ranks = None if update.of_ranks is None else update.of_ranks(())
        update.failed = not update_chunk(update.state, update.step, of_ranks)
        update.consumed()
    for update in updates:
        if update.failed:
            continue
        if isinstance(update.destination, UploadTarget):
            update.destination.memory.copy_(update.state.outgoing)
        elif update.destination is not None:
            update.destination(update.state.outgoing.to(device), update.step)
