"""Where a block's gradient is summed over its micro-batches, until it is on its way to the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engines.model.flat_layout import BlockLayout
from engines.transfer.link import Event, Link


class GradientSlots:
    """Flat memory on the GPU for the gradients of a few blocks, which take turns on it."""

    def __init__(self, layouts: Sequence[BlockLayout], slots: int, dtype: torch.dtype, link: Link) -> None:
        self._link = link
        self._sizes = [layout.size for layout in layouts]
        # Gaps between tensors are zero for good, as no gradient is written there: in blocks that are alike.
        self._are_alike = len({_extents(layout) for layout in layouts}) == 1
        self._memory = [
            torch.zeros(max(self._sizes), dtype=dtype, device=link.device)
            for _ in range(min(slots, len(layouts)))
        ]
        self._free = [Event() for _ in self._memory]
        self._places = [
            list(layout.views(self._memory[index % len(self._memory)]).values())
            for index, layout in enumerate(layouts)
        ]
        """Of each block's own parameters, in its slot."""

    def enter(self, block: int) -> None:
        """A block's gradients are about to be computed."""
        # HAZARD: the block that last had this slot must have left it.
        self._link.wait(self._free[block % len(self._memory)])

    @torch.no_grad()
    def add(self, block: int, found: Sequence[Tensor | None], *, first: bool) -> None:
        """Add a micro-batch's gradients, one for each of the block's own parameters, or write the
        `first`'s."""
        all_places = self._places[block]
        pairs = [(place, its) for place, its in zip(all_places, found, strict=True) if its is not None]
        if first and not self._are_alike:
            self._memory[block % len(self._memory)].zero_()
        elif first:
            for place, its in zip(all_places, found, strict=True):
                if its is None:
                    place.zero_()
        if pairs:
            places, gradients = [place for place, _ in pairs], [its for _, its in pairs]
            if first:
                torch._foreach_copy_(places, gradients)
            else:
                torch._foreach_add_(places, gradients)

    def gradient(self, block: int) -> Tensor:
        """(elements,): all of a block's, in its slot."""
        return self._memory[block % len(self._memory)][: self._sizes[block]]

    def gradients(self, block: int) -> Sequence[Tensor]:
        """Of each of the block's own parameters, in its slot."""
        return self._places[block]

    def leave(self, block: int, until: Event) -> None:
        """A block's gradient is read until that event, and then no more."""
        self._free[block % len(self._memory)] = until


def _extents(layout: BlockLayout) -> tuple[object, ...]:
    return tuple((part.start, *part.segment.offsets, *part.segment.counts) for part in layout.own_parts)
