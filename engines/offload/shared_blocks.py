"""Places of blocks in host memory that all ranks of a machine read, and how a block is written there.

A block that is written goes to a spare place, by one rank, while the others may still read the old one. When
all ranks have ended the step, every one takes the new place for the block's, and the old one is spare. Nobody
asks another for that: which blocks a step writes, in which order, and where to, follows from the step on
every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


class SharedBlocks:
    """Which place each block has. `places`: as many as blocks, and one more for each block that a step writes
    at most; each (bytes,) uint8, as large as the largest block."""

    def __init__(
        self, sizes_bytes: Mapping[int, int], places: Sequence[Tensor], *, local_rank: int, local_size: int
    ) -> None:
        self._sizes_bytes = dict(sizes_bytes)
        blocks = sorted(sizes_bytes)
        self._place = dict(zip(blocks, places[: len(blocks)], strict=True))
        self._spare = list(places[len(blocks) :])
        self._rank, self._size = local_rank, local_size
        self._next: dict[int, Tensor] = {}
        self._own: set[int] = set()

    def at(self, block: int) -> Tensor:
        """The block's bytes, not to be written."""
        return self._place[block][: self._sizes_bytes[block]]

    def begin(self, written: Sequence[int]) -> None:
        """A step begins that writes these blocks, in this order."""
        self._next = dict(zip(written, self._spare[: len(written)], strict=True))
        self._own = {block for turn, block in enumerate(written) if turn % self._size == self._rank}

    def writes(self, block: int) -> bool:
        """Whether it is this rank that writes the block in this step."""
        return block in self._own

    def target(self, block: int) -> Tensor:
        """Where this rank writes the block."""
        return self._next[block][: self._sizes_bytes[block]]

    def is_changing(self, block: int) -> bool:
        """Whether the step writes it: the next one has to wait for that."""
        return block in self._next

    def publish(self) -> None:
        """All ranks have ended the step: what was written counts from now on."""
        written, self._next = self._next, {}
        self._spare = self._spare[len(written) :] + [self._place[block] for block in written]
        self._place |= written
        self._own = set()
