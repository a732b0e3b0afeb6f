"""The memory in which perturbed weights are made, one unit or one block at a time, and the passes over theta
that make them (`engines.zeroth_order.block_visit`, `engines.zeroth_order.units`).

Longer than 400 lines: a visit of weights in any form is one thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engines.costs.quantized import matrix_bytes
from engines.lossless import lossless_pass
from engines.lossless.whole_matrices import WholeMatrices
from engines.model.flat_layout import ModelLayout
from engines.noise import weight_pass
from engines.noise.tiles import Segment
from engines.noise.visits import Outputs, Visit
from engines.quantized import quantized_pass
from engines.quantized.block_form import BlockForm, damaged_tiles
from engines.transfer.compute_clock import ComputeClock
from engines.zeroth_order.block_visit import Source, Task, without_updates
from engines.zeroth_order.units import ModuleUnit

SCRATCH_ALIGNMENT_BYTES = 512
"""As torch's allocator aligns. Matrix libraries choose kernels by alignment, and bits follow the kernel."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A matrix that was written to lossless tiles, if it found room there."""

    block: int
    part: int
    first: int
    last: int
    """Positions in the log of the updates that it took with that."""
    has_room: Tensor
    """() bool on the device."""


class _Reserved(NamedTuple):
    """What there is memory for."""

    by_block: bool
    """All of a block at once, and not one unit."""
    sides: int


class BlockScratch:
    """The perturbed weights of the units that compute now, and the visit of a block that makes them."""

    def __init__(
        self,
        layout: ModelLayout,
        units: Sequence[ModuleUnit],
        dtype: torch.dtype,
        device: torch.device,
        non_block: Mapping[str, Tensor],
        clock: ComputeClock,
        forms: Sequence[BlockForm],
    ) -> None:
        self._layout = layout
        self._forms = forms
        self._base = forms[0].base
        self.whole = WholeMatrices(device)
        self._stored: dict[tuple[int, int], Stored] = {}
        """Of which it is not known yet whether they found room."""
        self.damaged = torch.zeros(1, dtype=torch.int32, device=device)
        """1: lossless tiles that were read since the start were not what was written."""
        self._units = units
        self._dtype = dtype
        self._device = device
        self._non_block = non_block
        self._clock = clock
        self.fold: Callable[[str, Tensor, int, int], None] | None = None
        """(name, memory, window, seed): adds what the window has gathered to the tensor of that first name,
        in its flat memory or its tiles."""
        for unit in units:
            used = {name for _, _, name in unit.places}
            parts = layout.blocks[unit.block].parts
            unit.parts = tuple(i for i, part in enumerate(parts) if used.intersection(part.names))
            unit.frozen = not any(parts[i].trained for i in unit.parts)
        owned = [
            (unit.block, part) for unit in units for part in unit.parts if self._is_large(unit.block, part)
        ]
        self._always_by_block = len(set(owned)) < len(owned)
        """Two units of a block have a matrix in common."""
        self._most_sides = 1 if all(unit.frozen for unit in units) else 2
        """Frozen weights are in the plus side's memory only."""
        self._reserved: _Reserved | None = None
        self._places: dict[tuple[int, int], int] = {}
        self._memory: list[Tensor] = []
        self._segments: dict[tuple[int, int, int], Segment] = {}
        self._block = -1
        self._task: Task | None = None
        self._source: Source | None = None
        self._made: set[int] = set()
        self._seen: set[int] = set()
        self.reserve(by_block=False, sides=2)

    def set_forms(self, forms: Sequence[BlockForm]) -> None:
        """Other matrices than before are in tiles."""
        self._forms = forms

    @property
    def has_stored(self) -> bool:
        """Whether `without_room` has something to tell."""
        return bool(self._stored)

    def without_room(self) -> list[Stored]:
        """Matrices that were written to lossless tiles and found no room there. Waits for the device.

        `make_whole` follows for each. Raises `UserError` where frozen weights that were read are not what was
        stored.
        """
        if self._base != "lossless":
            return []
        if self.damaged:
            raise damaged_tiles()
        stored, self._stored = list(self._stored.values()), {}
        if not stored:
            return []
        found = torch.stack([each.has_room for each in stored]).tolist()
        return [each for each, has_room in zip(stored, found, strict=True) if not has_room]

    def make_whole(self, stored: Stored, tiles: Tensor, how: Visit) -> None:
        """From now on a matrix is out of its tiles, which were left as they are: `how`, of any updates, says
        of which log those are that it was to take."""
        how = replace(how, first=stored.first, last=stored.last)
        part = self._layout.blocks[stored.block].parts[stored.part]
        buffer = self._buffer_of(stored.block, stored.part)
        lossless_pass.visit_lossless(tiles.to(self._device), part.segment, how, Outputs(theta=buffer))
        self.whole.add(stored.block, stored.part, buffer, how.last)

    def _is_whole(self, index: int, tiles: Tensor) -> bool:
        """Whether a matrix of the block is out of its lossless tiles. If they were written and are read again
        before `without_room`, the device is waited for."""
        stored = self._stored.pop((self._block, index), None)
        if stored is not None and not stored.has_room:
            assert self._task is not None
            self.make_whole(stored, tiles, self._task.how)
        return (self._block, index) in self.whole

    def reserve(self, *, by_block: bool, sides: int) -> None:
        """Memory for one unit at a time, or, for several micro-batches in one visit, for all of a block; on
        both sides, or on the one that frozen weights and passes with theta itself use."""
        wanted = _Reserved(by_block or self._always_by_block, min(sides, self._most_sides))
        if self._reserved == wanted:
            return
        self._reserved = wanted
        self._places, size = self._block_places() if wanted.by_block else self._unit_places()
        for unit in self._units:
            unit.weights = ([], [])
        self._memory = []  # before the new one is taken
        self._memory = [
            torch.zeros(size, dtype=self._dtype, device=self._device) for _ in range(wanted.sides)
        ]
        for unit in self._units:
            for side in range(wanted.sides):
                views: dict[str, Tensor] = {}
                for part in unit.parts:
                    of = self._layout.blocks[unit.block].parts[part]
                    # What is not trained is there once, for both sides.
                    views |= of.views(self._buffer(unit.block, part, side if of.trained else 0))
                unit.weights[side].extend(
                    nn.Parameter(views[name], requires_grad=False) for _, _, name in unit.places
                )

    def _block_places(self) -> tuple[dict[tuple[int, int], int], int]:
        """Places of each block's parts, its own as in its memory, then those it shares; elements in all."""
        places: dict[tuple[int, int], int] = {}
        size = 0
        for number, block in enumerate(self._layout.blocks):
            end = self._aligned(block.size)
            for index, part in enumerate(block.parts):
                places[number, index] = end if part.shared else part.start
                end += self._aligned(part.size) if part.shared else 0
            size = max(size, end)
        return places, size

    def _unit_places(self) -> tuple[dict[tuple[int, int], int], int]:
        """The block's vectors, then one unit's matrices."""
        vectors = [block.parts[0].size for block in self._layout.blocks if block.parts]
        first = size = self._aligned(max(vectors, default=0))
        places: dict[tuple[int, int], int] = {}
        for unit in self._units:
            end = first
            for index in unit.parts:
                if self._is_large(unit.block, index):
                    places[unit.block, index] = end
                    end += self._aligned(self._layout.blocks[unit.block].parts[index].size)
                else:
                    places[unit.block, index] = 0
            size = max(size, end)
        return places, size

    def _aligned(self, size: int) -> int:
        grid = SCRATCH_ALIGNMENT_BYTES // self._dtype.itemsize
        return -(-size // grid) * grid

    def buffer(self, size: int) -> Tensor:
        """Memory for a matrix of `size` elements, until the next visit."""
        if size > self._memory[0].numel():  # of a matrix that no unit computes with
            return torch.empty(size, dtype=self._dtype, device=self._device)
        return self._memory[0][:size]

    @property
    def perturbs(self) -> bool:
        return self._task is not None and self._task.perturb

    @property
    def stacks(self) -> bool:
        """Both sides compute in one batch."""
        return self._task is not None and self._task.perturb and not self._task.plus_only

    def begin(self, block: int, task: Task, source: Source) -> None:
        self._block, self._task, self._source = block, task, source
        self._made, self._seen = set(), set()
        assert self._reserved is not None
        if self._reserved.by_block:
            self._make_block()

    def end(self) -> None:
        """Also parts that no module asked for have their updates applied."""
        assert self._task is not None
        assert self._source is not None
        for index, part in enumerate(self._layout.blocks[self._block].own_parts):
            if index in self._seen:
                continue
            weight = self._source.take(self._block, index, index + 1)
            self._store_roundings(weight, part.segment, trained=part.trained)
            if part.trained and self._task.store and self._task.how.last > self._task.how.first:
                if weight.dtype == torch.uint8 and self._base == "lossless":
                    buffer, alone = self._buffer_of(self._block, index), range(index, index + 1)
                    self._write_lossless(
                        weight, alone, part.segment, self._task.how, (buffer,), store=True, perturb=False
                    )
                elif weight.dtype == torch.uint8:
                    quantized_pass.visit_tiles(weight, part.segment, self._task.how, self._base, store=True)
                else:
                    weight_pass.visit(weight, part.segment, self._task.how, Outputs(theta=weight))
            self._fold(index, weight)
            self._source.done(self._block, index, index + 1)
        self._task = self._source = None

    def open(self, unit: ModuleUnit) -> None:
        """Make the unit's weights, unless they are there. Without effect outside a visit."""
        if self._task is None or all(part in self._made for part in unit.parts):
            return
        assert unit.block == self._block
        self._made = {part for part in self._made if not self._is_large(unit.block, part)}
        for part in unit.parts:
            if part not in self._made:
                self._make(part)

    def _make_block(self) -> None:
        """Everything at once, with one kernel for all that lies together."""
        assert self._source is not None
        layout = self._layout.blocks[self._block]
        if self._base != "full":
            for first, last in self._source.spans(self._block):
                for run in layout.runs(first, last):
                    for alike in self._forms[self._block].alike(*run):
                        self._make_run(*alike)
            for index, part in enumerate(layout.parts):
                if part.shared:
                    self._make(index)
            return
        for first, last in self._source.spans(self._block):
            key = (self._block, first, last)
            span = self._source.take(*key)
            assert self._task is not None
            for begin, end in layout.runs(first, last):
                start, stop = (
                    layout.parts[begin].start,
                    layout.parts[end - 1].start + layout.parts[end - 1].size,
                )
                shift = layout.parts[first].start
                weight = span[start - shift : stop - shift]
                for index in range(begin, end):
                    part = layout.parts[index]
                    self._fold(index, span[part.start - shift :][: part.size])
                self._write(
                    weight, self._segment(self._block, begin, end), self._task.how,
                    [memory[start:stop] for memory in self._memory],
                    trained=layout.parts[begin].trained, store=self._task.store,
                )  # fmt: skip
            self._source.done(*key)
            self._made.update(range(first, last))
            self._seen.update(range(first, last))
        for index, part in enumerate(layout.parts):
            if part.shared:
                self._make(index)

    def _make_run(self, first: int, last: int) -> None:
        """Own parts `first` to `last` - 1, all of them trained or none, and all in tiles, which are made in
        one pass, or none."""
        layout, task = self._layout.blocks[self._block], self._task
        if not self._forms[self._block].in_tiles(layout.parts[first]):
            for index in range(first, last):
                self._make(index)
            return
        assert self._source is not None
        assert task is not None
        tiles = self._source.take(self._block, first, last)
        sizes = [matrix_bytes(part.size, self._base) for part in layout.parts[first:last]]
        each = dict(zip(range(first, last), torch.split(tiles, sizes), strict=True))
        if self._base == "lossless" and any(self._is_whole(*one) for one in each.items()):
            for index in each:
                self._make(index)
            return
        for index, mine in each.items():
            self._fold(index, mine)
        start, stop = layout.parts[first].start, layout.parts[last - 1].start + layout.parts[last - 1].size
        segment, trained = self._segment(self._block, first, last), layout.parts[first].trained
        self._store_roundings(tiles, segment, trained=trained)
        buffers = [memory[start:stop] for memory in self._memory]
        self._write_tiles(
            tiles, range(first, last), segment, task.how, buffers, trained=trained, store=task.store
        )
        self._source.done(self._block, first, last)
        self._made.update(range(first, last))
        self._seen.update(range(first, last))

    def _segment(self, block: int, first: int, last: int) -> Segment:
        key = (block, first, last)
        if key not in self._segments:
            self._segments[key] = self._layout.blocks[block].segment(first, last)
        return self._segments[key]

    def _fold(self, index: int, weight: Tensor) -> None:
        """On the first time that a part of the block is met in its visit."""
        part = self._layout.blocks[self._block].parts[index]
        if self._task is None or self._task.ends_window is None or self.fold is None or part.trained:
            return
        self._clock.start()
        window, seed = self._task.ends_window, self._task.how.seed
        if weight.dtype == torch.uint8 and self._base == "lossless":
            self._fold_lossless(index, weight, window, seed)
        else:
            for name, offset, count in zip(
                part.names, part.segment.offsets, part.segment.counts, strict=True
            ):
                kept = weight if weight.dtype == torch.uint8 else weight[offset : offset + count]
                self.fold(name, kept, window, seed)
        self._clock.stop()

    def _fold_lossless(self, index: int, tiles: Tensor, window: int, seed: int) -> None:
        part = self._layout.blocks[self._block].parts[index]
        buffer = self._buffer_of(self._block, index)
        is_whole = self._is_whole(index, tiles)
        if is_whole:
            self.whole.read(self._block, index, buffer)
        else:
            lossless_pass.decode_lossless(tiles, part.segment, buffer, self.damaged)
        assert self.fold is not None
        self.fold(part.names[0], buffer[: part.segment.counts[0]], window, seed)
        if is_whole:
            self.whole.store(self._block, index, buffer, 0)
        elif not lossless_pass.encode_lossless(buffer, part.segment, tiles):
            # What the window has gathered is gone by the time that the host would else know.
            self.whole.add(self._block, index, buffer, 0)

    def _make(self, index: int) -> None:
        task, source = self._task, self._source
        assert task is not None
        assert source is not None
        part = self._layout.blocks[self._block].parts[index]
        buffers = [self._buffer(self._block, index, side) for side in range(len(self._memory))]
        how, store = task.how, task.store
        if part.shared:
            weight, how, store = self._non_block[part.names[0]].view(-1), without_updates(how), False
        else:
            weight = source.take(self._block, index, index + 1)
            if index not in self._seen:
                self._fold(index, weight)
                self._store_roundings(weight, part.segment, trained=part.trained)
            elif store:  # a module that is called twice in a visit
                how, store = without_updates(how), False
        if weight.dtype == torch.uint8:
            alone = range(index, index + 1)
            self._write_tiles(weight, alone, part.segment, how, buffers, trained=part.trained, store=store)
        else:
            self._write(weight, part.segment, how, buffers, trained=part.trained, store=store)
        if not part.shared and index not in self._seen:
            source.done(self._block, index, index + 1)
        self._seen.add(index)
        self._made.add(index)

    def _write(
        self,
        weight: Tensor,
        segment: Segment,
        how: Visit,
        buffers: Sequence[Tensor],
        *,
        trained: bool,
        store: bool,
    ) -> None:
        """The one pass over theta. `buffers`: plus and, if both passes are to run, minus."""
        plus, minus = buffers[0], buffers[-1]
        assert self._task is not None
        self._clock.start()
        if not trained:
            plus.copy_(weight)
        elif self._task.perturb:
            theta = weight if store else None
            both = Outputs(theta=theta, plus=plus, minus=minus)
            weight_pass.visit(
                weight, segment, how, replace(both, minus=None) if self._task.plus_only else both
            )
        elif how.first == how.last:
            plus.copy_(weight)
        else:
            weight_pass.visit(weight, segment, how, Outputs(theta=weight if store else plus))
            if store:
                plus.copy_(weight)
        self._clock.stop()

    def _write_tiles(
        self,
        tiles: Tensor,
        indexes: range,
        segment: Segment,
        how: Visit,
        buffers: Sequence[Tensor],
        *,
        trained: bool,
        store: bool,
    ) -> None:
        """Make the perturbed weights of matrices in tiles, parts `indexes`, and store their update if
        `store`."""
        assert self._task is not None
        self._clock.start()
        if not trained:
            how, store = without_updates(how), False
        perturb = trained and self._task.perturb
        sides = buffers if perturb and not self._task.plus_only else buffers[:1]
        if self._base == "lossless":
            self._write_lossless(tiles, indexes, segment, how, sides, store=store, perturb=perturb)
        else:
            quantized_pass.visit_tiles(
                tiles, segment, how, self._base, store=store, sides=sides, perturb=perturb
            )
        self._clock.stop()

    def _write_lossless(
        self,
        tiles: Tensor,
        indexes: range,
        segment: Segment,
        how: Visit,
        sides: Sequence[Tensor],
        *,
        store: bool,
        perturb: bool,
    ) -> None:
        """Theta is made in the buffer of the plus side where it is to be stored, and perturbed there. Of
        several matrices all are in their tiles."""
        plus, minus = sides[0], sides[1] if len(sides) > 1 else None
        both = Outputs(plus=plus, minus=minus)
        if len(indexes) == 1 and self._is_whole(indexes[0], tiles):
            how = self.whole[self._block, indexes[0]].lacking(how)
            self.whole.read(self._block, indexes[0], plus)
            if how.first < how.last:
                weight_pass.visit(plus, segment, how, Outputs(theta=plus))
                if store:
                    self.whole.store(self._block, indexes[0], plus, how.last)
            if perturb:
                weight_pass.visit(plus, segment, without_updates(how), both)
        elif store and how.first < how.last:
            lossless_pass.visit_lossless(tiles, segment, how, Outputs(theta=plus))
            found = lossless_pass.encode_lossless(plus, segment, tiles)
            for index, has_room in zip(indexes, found, strict=True):
                of = Stored(self._block, index, how.first, how.last, has_room)
                self._stored[self._block, index] = of
            if perturb:
                weight_pass.visit(plus, segment, without_updates(how), both)
        elif perturb:
            lossless_pass.visit_lossless(tiles, segment, how, both)
        elif how.first < how.last:
            lossless_pass.visit_lossless(tiles, segment, how, Outputs(theta=plus))
        else:
            lossless_pass.decode_lossless(tiles, segment, plus, self.damaged)

    def _buffer_of(self, block: int, index: int) -> Tensor:
        """Memory for a part of a block, apart from what was made for others."""
        if (block, index) in self._places:
            return self._buffer(block, index, 0)
        size = self._layout.blocks[block].parts[index].size
        return torch.empty(size, dtype=self._dtype, device=self._device)

    def _store_roundings(self, weight: Tensor, segment: Segment, *, trained: bool) -> None:
        """On the first time that parts of the block are met in its visit."""
        assert self._task is not None
        roundings = self._task.roundings
        if not roundings or not trained:
            return
        self._clock.start()
        if weight.dtype == torch.uint8:
            for each in roundings:
                quantized_pass.visit_tiles(weight, segment, each, self._base, store=True)
        else:  # rounded after each update, whatever is stored in between
            how = replace(roundings[0], last=roundings[-1].last)
            weight_pass.visit(weight, segment, how, Outputs(theta=weight))
        self._clock.stop()

    def _is_large(self, block: int, part: int) -> bool:
        """A matrix, or shared: anything but the block's packed vectors."""
        return part > 0 or self._layout.blocks[block].parts[part].segment.decays[0]

    def _buffer(self, block: int, part: int, side: int) -> Tensor:
        place = self._places[block, part]
        return self._memory[side][place : place + self._layout.blocks[block].parts[part].size]
