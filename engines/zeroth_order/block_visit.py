"""The visit of a block: where its weights are taken from, and what is done with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from engines.noise.visits import Visit
from engines.quantized.block_form import BlockForm


class Source(Protocol):
    """Where the blocks' weights are."""

    def spans(self, block: int) -> Sequence[tuple[int, int]]:
        """The block's own parts in groups, from first to before last, that lie together and come together.

        Of the full dtype, all of them; low-bit matrices are taken one by one.
        """

    def take(self, block: int, first: int, last: int) -> Tensor:
        """The flat memory of parts of one span, on the device, ready in the order of the compute stream; of
        a low-bit matrix, its tiles (see `engines.quantized.codec`).

        Raises `UserError` if they are gone already.
        """

    def done(self, block: int, first: int, last: int) -> None:
        """All work that reads or writes the parts in this visit is enqueued."""


class BlockMemory:
    """A source that is one block's memory, in bytes on the device."""

    def __init__(self, form: BlockForm, memory: Tensor) -> None:
        self._form = form
        self._memory = memory

    def spans(self, block: int) -> list[tuple[int, int]]:
        own = len(self._form.layout.own_parts)
        return [(0, own)] if own else []

    def take(self, block: int, first: int, last: int) -> Tensor:
        start, stop = self._form.span(first, last)
        return self._form.opened(self._memory[start:stop], first)

    def done(self, block: int, first: int, last: int) -> None:
        """Its owner says when it is free."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a visit does with a block."""

    how: Visit
    """Deferred updates and perturbation of the block."""
    store: bool
    """Write the updated weights back to the source's memory."""
    perturb: bool
    """Both perturbed passes, stacked; else one, with theta itself."""
    roundings: tuple[Visit, ...] = ()
    """With a low-bit base: what is to be stored before `how`, one after the other."""
    plus_only: bool = False
    """Where it is perturbed: the plus side's pass alone."""
    ends_window: int | None = None
    """Window whose low-rank sum is added to the matrices (`engines.zeroth_order.low_rank`), which
    `store` then keeps."""


def without_updates(how: Visit) -> Visit:
    return replace(how, first=how.last)
