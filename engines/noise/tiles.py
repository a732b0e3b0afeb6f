"""Tensors one after the other in flat memory, and the ranges of them that noise is made for.

A tensor's elements are taken in tiles of 2048, four rows of 512 lanes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

LANES = 512
TILE = 4 * LANES
"""Elements that share 512 Philox calls."""

CHUNK_LANES = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Lanes at a time: on a CPU few enough that the temporaries stay in cache, many enough to hide what some
hundred torch calls cost. Small tensors share a chunk."""

LARGE = 1 << 24
"""Elements above which a tensor has a kernel launch of its own, and no table of its tiles."""

MOST_IN_TABLE = 1 << 31
"""Elements that the 32-bit offsets of that table reach."""

MOST_ALIGNED = 8
"""Elements of 16 bits in the widest load of a GPU thread."""


class Segment:
    """Tensors one after the other in flat memory.

    `numbers` are the tensors' parts of their noise keys, `offsets` and `counts` their places, in elements,
    and `decays` says on which of them weight decay acts.
    """

    __slots__ = ("_places", "_tiles", "counts", "decays", "grid", "numbers", "offsets")

    def __init__(
        self, numbers: Sequence[int], offsets: Sequence[int], counts: Sequence[int], decays: Sequence[bool]
    ) -> None:
        self.numbers = tuple(numbers)
        self.offsets = tuple(offsets)
        self.counts = tuple(counts)
        self.decays = tuple(decays)
        self.grid = gcd(MOST_ALIGNED, *offsets)
        """Elements that every tensor begins at a multiple of, up to `MOST_ALIGNED`."""
        self._tiles: Tensor | None = None
        self._places: Tensor | None = None

    def is_large(self, index: int) -> bool:
        """Whether a tensor is too long, or lies too far, for the table of tiles."""
        count = self.counts[index]
        return count > LARGE or self.offsets[index] + count > MOST_IN_TABLE

    def tiles(self, device: torch.device) -> Tensor:
        """(n, 4) int32: offset, tensor, tile of the tensor, and elements in it (with bit 16 set where weight
        decay acts), of every tile of the tensors that are not large."""
        if self._tiles is None:
            tables = [torch.empty((0, 4), dtype=torch.int32)]
            for index, (number, offset, count, decays) in enumerate(
                zip(self.numbers, self.offsets, self.counts, self.decays, strict=True)
            ):
                if self.is_large(index):
                    continue
                tile = torch.arange(-(-count // TILE))
                inside = (count - tile * TILE).clamp(max=TILE) | (int(decays) << 16)
                columns = (offset + tile * TILE, torch.full_like(tile, number), tile, inside)
                tables.append(torch.stack(columns, 1).to(torch.int32))
            self._tiles = torch.cat(tables).to(device)
        return self._tiles

    def places(self, device: torch.device) -> Tensor:
        """(tensors, 4) int64: the number of tiles of those before, and the tensor's offset, number and
        count."""
        if self._places is None:
            tiles = [-(-count // TILE) for count in self.counts]
            before = [sum(tiles[:index]) for index in range(len(tiles))]
            rows = list(zip(before, self.offsets, self.numbers, self.counts, strict=True))
            self._places = torch.tensor(rows, dtype=torch.int64).to(device)
        return self._places


def one(number: int, count: int, *, decays: bool = False) -> Segment:
    """A segment of one tensor that begins where its memory begins."""
    return Segment((number,), (0,), (count,), (decays,))


@dataclass(frozen=True, slots=True)
class TileRange:
    """Whole tiles of one tensor, or its last, shorter one."""

    number: int
    place: int
    """Of its first element in the flat memory."""
    count: int
    first_lane: int
    """Counter of its first Philox call."""
    decays: bool

    @property
    def num_lanes(self) -> int:
        if self.count >= LANES:
            return -(-self.count // TILE) * LANES
        return self.count  # one row of a short tile

    def of(self, flat: Tensor) -> Tensor:
        """Its elements, a view (count,), of the whole flat memory."""
        return flat.view(-1)[self.place : self.place + self.count]

    def elements(self, values: Tensor) -> Tensor:
        """(4, num_lanes) by word to (count,) by element."""
        if self.count < LANES:
            return values[0]
        return values.view(4, -1, LANES).transpose(0, 1).reshape(-1)[: self.count]


def chunks(segment: Segment, start: int, most_lanes: int) -> Iterator[list[TileRange]]:
    """Ranges of the tensors in order, as many at a time as make up about `most_lanes`."""
    ranges: list[TileRange] = []
    left = most_lanes
    tensors = zip(segment.numbers, segment.offsets, segment.counts, segment.decays, strict=True)
    for number, offset, count, decays in tensors:
        done = 0
        while done < count:
            take = min(count - done, max(1, left // LANES) * TILE)
            ranges.append(TileRange(number, offset + done, take, (start + done) // TILE * LANES, decays))
            done += take
            left -= ranges[-1].num_lanes
            if left <= 0:
                yield ranges
                ranges, left = [], most_lanes
    if ranges:
        yield ranges


def scatter(values: Tensor, out: Tensor, ranges: Sequence[TileRange]) -> None:
    """Write `values`, (elements of all ranges,) one range after the other, to their places in `out`."""
    first = 0
    for tiles in ranges:
        tiles.of(out).copy_(values[first : first + tiles.count])
        first += tiles.count
