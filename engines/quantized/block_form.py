"""Where the parts of a block lie in its memory, and in which form."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from engines.costs.quantized import matrix_bytes, tile_bytes
from engines.errors import UserError
from engines.lossless import lossless_pass
from engines.lossless.whole_matrices import WholeMatrix
from engines.model.flat_layout import BlockLayout, Part
from engines.noise import visits, weight_pass
from engines.noise.visits import Visit
from engines.quantized.codec import pack
from engines.quantized.quantized_pass import visit_tiles
from engines.settings.zeroth_order import Base


def damaged_tiles() -> UserError:
    """Lossless tiles are not what was written to them."""
    return UserError(
        "base=lossless",
        "its weights are not those that were stored: memory, disk or link have damaged them",
        "test the hardware, and go on from the last checkpoint",
    )


class BlockForm:
    """Where the parts of a block lie in its memory, in bytes, and in which form.

    With a full base as `engines.model.flat_layout` has them; else the vectors in the model's dtype, then each
    matrix in tiles, of low bits or lossless. Matrices that are named in `unlike`, by first name, are as
    with a full base: lossless tiles have no room for their weights.
    """

    def __init__(
        self, layout: BlockLayout, base: Base, dtype: torch.dtype, unlike: Collection[str] = ()
    ) -> None:
        self.layout = layout
        self._unlike = frozenset(unlike)
        self.base: Base = base
        self.dtype = dtype
        self._ends = [0]
        for part in layout.own_parts:
            size = matrix_bytes(part.size, base) if self.in_tiles(part) else dtype.itemsize * part.size
            self._ends.append(self._ends[-1] + size)

    @property
    def size_bytes(self) -> int:
        return self._ends[-1]

    def in_tiles(self, part: Part) -> bool:
        """A matrix is, unless it is shared with what lies outside the block."""
        is_own_matrix = part.segment.decays[0] and not part.shared
        return self.base != "full" and is_own_matrix and part.names[0] not in self._unlike

    def alike(self, first: int, last: int) -> list[tuple[int, int]]:
        """Own parts `first` to `last` - 1, in groups of neighbours that are all in tiles, or none is."""
        parts = self.layout.parts
        edges = [i for i in range(first + 1, last) if self.in_tiles(parts[i]) != self.in_tiles(parts[i - 1])]
        return [run for run in pairwise((first, *edges, last)) if run[0] < run[1]]

    def span(self, first: int, last: int) -> tuple[int, int]:
        """First byte, and the one after the last, of own parts `first` to `last` - 1."""
        return self._ends[first], self._ends[last]

    def opened(self, memory: Tensor, first: int) -> Tensor:
        """`memory` (bytes) of parts from `first` on as it is computed with: tiles (bytes), where that is a
        matrix in some, or of the full dtype."""
        return memory if self.in_tiles(self.layout.parts[first]) else memory.view(self.dtype)

    def part(self, memory: Tensor, index: int) -> Tensor:
        """One part in `memory`, the block's bytes, `opened`."""
        start, stop = self.span(index, index + 1)
        return self.opened(memory[start:stop], index)

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The block's own tensors as they are kept: of their shapes, or (tiles, bytes of a tile) uint8."""
        found: dict[str, Tensor] = {}
        for index, part in enumerate(self.layout.own_parts):
            kept = self.part(memory, index)
            if self.in_tiles(part):
                found[part.names[0]] = kept.view(-1, tile_bytes(self.base))
            else:
                found |= part.views(kept)
        return found

    def fill(
        self, memory: Tensor, fill: Callable[[str, Tensor], object], buffer: Callable[[int], Tensor]
    ) -> list[str]:
        """Write the block's weights to its `memory`, matrix by matrix.

        `fill` writes a tensor of the full dtype; `buffer` gives memory for so many elements of it, on the
        device of `memory`, in which one matrix at a time is made. Returns the first names of the matrices
        that lossless tiles have no room for, whose tiles are of no use.
        """
        crowded: list[str] = []
        for index, part in enumerate(self.layout.own_parts):
            kept = self.part(memory, index)
            if not self.in_tiles(part):
                for name, weight in part.views(kept).items():
                    fill(name, weight)
                continue
            values = buffer(part.segment.counts[0])
            fill(part.names[0], values.view(part.shapes[0]))
            if self.base != "lossless":
                pack(values, self.base, kept)
            elif not lossless_pass.encode_lossless(values, part.segment, kept):
                crowded.append(part.names[0])
        return crowded

    def plain(
        self, memory: Tensor, how: Visit, device: torch.device, whole: Mapping[int, WholeMatrix]
    ) -> Iterator[tuple[str, Tensor]]:
        """Each own tensor with the deferred updates of `how`, of the full dtype, on `device`; `memory` stays
        as it is. The parts in `whole` are out of it."""
        for index, part in enumerate(self.layout.own_parts):
            kept = self.part(memory, index).to(device)
            mine = how if part.trained else replace(how, first=how.last)
            out = torch.empty(part.size, dtype=self.dtype, device=device)
            in_tiles = self.in_tiles(part) and index not in whole
            if index in whole:
                kept, mine = whole[index].weights.to(device), whole[index].lacking(mine)
            if in_tiles and self.base == "lossless":
                if mine.first < mine.last:
                    lossless_pass.visit_lossless(kept, part.segment, mine, visits.Outputs(theta=out))
                else:
                    damaged = torch.zeros(1, dtype=torch.int32, device=device)
                    lossless_pass.decode_lossless(kept, part.segment, out, damaged)
                    if damaged:
                        raise damaged_tiles()
            elif in_tiles:
                visit_tiles(kept, part.segment, mine, self.base, store=False, sides=(out,))
            elif mine.first < mine.last:
                weight_pass.visit(kept, part.segment, mine, visits.Outputs(theta=out))
            else:
                out = kept
            yield from part.views(out).items()


def block_forms(
    layouts: Iterable[BlockLayout], base: Base, dtype: torch.dtype, unlike: Collection[str] = ()
) -> list[BlockForm]:
    return [BlockForm(layout, base, dtype, unlike) for layout in layouts]
