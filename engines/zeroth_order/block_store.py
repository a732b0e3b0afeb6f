"""Where the blocks' weights are between steps: what the step asks of a store, whichever it is.

`engines.methods.mezo` has one on the GPU, `engines.methods.zo2` one that streams from the host and from disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from engines.base import Blueprint
from engines.model.waiting_states import States
from engines.noise.visits import Visit
from engines.quantized.block_form import BlockForm
from engines.transfer.compute_clock import ComputeClock
from engines.transfer.trace import Timeline
from engines.zeroth_order.block_visit import Source, Task
from engines.zeroth_order.perturbed_model import PerturbedModel

FillBlock = Callable[[BlockForm, Tensor], object]
"""Writes a block, laid out as its form says, to its memory: (bytes,) uint8 on the device."""


@dataclass(frozen=True, slots=True)
class StepClocks:
    """What times the compute stream of a step."""

    compute: ComputeClock
    noise: ComputeClock
    """The part of it that perturbs weights and applies updates."""
    timeline: Timeline | None
    """`None`: no trace is asked for."""

    def label(self, name: str) -> None:
        """What is timed from here on."""
        self.compute.label = self.noise.label = name


class BlockStore(Source, Protocol):
    """The blocks' weights between steps: where they lie, and how many updates they have there.

    `last_step`, wherever it is asked for: trained low-bit matrices have what the steps up to this one have
    rounded, and nothing else; other weights have all updates.
    """

    on_disk: frozenset[int]
    """Blocks that keep their updates in the log, not in their weights."""
    states: States
    """What keeps the hidden states of a step between blocks."""

    @property
    def shared(self) -> frozenset[int]:
        """Blocks that one rank writes for others."""

    @property
    def pinned_bytes(self) -> int:
        """Page-locked host memory."""

    def set_up(self, model: PerturbedModel, blueprint: Blueprint) -> None:
        """Allocate what the constructor has not. `fill` follows."""

    def fill(self, fill_block: FillBlock, *, anew: bool) -> None:
        """Write every block, for the first time or `anew`. Visits may then begin."""

    def make_room_in_log(self, window: int | None) -> None:
        """Before a step, which may be one that is replayed: write the blocks on disk that would fall behind
        by more than the log holds, or all if a `window` of low-rank noise ends there."""

    def begin_step(self, window: int | None) -> Callable[[], dict[str, Any]]:
        """Make room in the log. What is returned tells, once the step is enqueued, the times of the step
        before it, by the names of `engines.base.StepStats`."""

    def in_order(self, window: int | None) -> Iterator[tuple[int, Task]]:
        """The pass of a step: every block in order, and what its visit is to do, which the caller makes
        before it asks for the next."""

    def before_ranks_meet(self) -> None:
        """The losses are known here and not yet handed round: wait until what this rank has written, and
        others are to read, is there."""

    def end_step(self) -> dict[str, Any]:
        """After the host has waited for the losses of all ranks: what the step moved, and its times where
        they are not told a step later."""

    def in_order_with_theta(self) -> Iterator[int]:
        """A pass with the weights themselves, all updates applied: each block may be run while its index is
        held."""

    def begin_tokens(self) -> None:
        """Before the first token of several."""

    def begin_token(self) -> None:
        """Before the pass that makes a token; that of the one before may not have been told yet."""

    def end_token(self) -> dict[str, Any]:
        """What making a token took and moved, by the names of `engines.base.StepStats`."""

    def forget_times(self) -> None:
        """Copies and kernels so far belong to no step."""

    def apply_deferred(self, last_step: int, window: int | None = None, *, by_all: bool = False) -> None:
        """Store deferred updates now, but in blocks on disk, and what the `window` has gathered. Blocks that
        ranks share are left as they are unless `by_all` ranks do it, between the same steps."""

    def at_rest(self, block: int) -> AbstractContextManager[Tensor]:
        """A block as it lies, (bytes,) uint8; not to be written. After `synchronize`, between passes."""

    def stored(self, block: int, last_step: int) -> Tensor:
        """A block as a visit would find it, (bytes,) uint8; not to be written. After `synchronize`."""

    def lacking(self, block: int, last_step: int) -> Visit:
        """The updates that `stored` lacks."""

    def tensors(self, last_step: int) -> Mapping[str, Tensor]:
        """Every tensor of the model by first name, where it lies, the adapters' too. After `synchronize`."""

    def like_tensors(self) -> Mapping[str, Tensor]:
        """Tensors of the names, shapes and dtypes of `tensors`; their values mean nothing."""

    def synchronize(self) -> None:
        """Wait until nothing is in flight."""

    def close(self) -> None:
        """Stop threads and free pinned memory. May be called twice."""
