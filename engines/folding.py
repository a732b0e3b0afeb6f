"""Which updates of the log are in the weights that a block is kept as, and when the others join them.

A full base may take its updates at any time: each is rounded as it was when it was new. The matrices of a
low-bit base are rounded to their grid at the times of the schedule and at no other, wherever they are kept:
before step t those of the blocks that `folds` names, after all updates of steps before t. In between their
updates pend, and a visit applies them in fp32. So a run has the same bits on the GPU and on the host, whether
it is evaluated or not, and when its log is replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engines import base_format
from engines.base import Update
from engines.base_format import BlockForm, unpack
from engines.costs.low_bit import TILE_ELEMENTS, record_bytes
from engines.costs.zo2 import folds
from engines.layout import BlockLayout, ModelLayout
from engines.noise import UpdateLog, Visit, one
from engines.scratch import Task, without_updates
from engines.settings import Base

LANDED_SAMPLE_TILES = 1 << 12


class Folds:
    """Of each block, how many updates of the log are in the weights that are kept (`stored`)."""

    def __init__(
        self,
        blocks: Sequence[BlockLayout],
        log: UpdateLog,
        *,
        base: Base,
        every: int,
        apart: frozenset[int] = frozenset(),
    ) -> None:
        """Blocks `apart` are not asked about by `oldest`."""
        self._log = log
        self._apart = apart
        self._trained = [any(part.trained for part in block.parts) for block in blocks]
        self.on_grid = base != "full"
        self._every = every
        self.stored = [log.length] * len(blocks)

    def is_pending(self, index: int) -> bool:
        return self._trained[index] and self.stored[index] < self._log.length

    def is_due(self, index: int, step: int) -> bool:
        """Whether block `index` is to take its pending updates in `step`: blocks take turns."""
        return folds(index, step, self._every)

    def took(self, index: int) -> None:
        self.stored[index] = self._log.length

    def oldest(self) -> int:
        """How many updates are in the weights of every block that is trained at all, but those apart."""
        blocks = enumerate(zip(self.stored, self._trained, strict=True))
        return min(
            (stored for index, (stored, trained) in blocks if trained and index not in self._apart),
            default=self._log.length,
        )

    def overdue(self, index: int, how: Visit, last_step: int) -> Task:
        """What visits in the steps up to `last_step` would have stored, rounding by rounding. `how` has all
        updates of the log. `took_overdue` follows."""
        ends = self._roundings(index, last_step)
        visits = [
            replace(how, first=first, last=last)
            for first, last in zip([how.first, *ends], ends, strict=False)
        ]
        if not visits:
            return Task(how=without_updates(how), store=False, perturb=False)
        return Task(
            how=replace(visits[-1], first=how.first), store=True, perturb=False, overdue=(*visits[:-1],)
        )

    def took_overdue(self, index: int, task: Task) -> None:
        if task.store:
            self.stored[index] = task.how.last
        elif not self._trained[index]:
            self.took(index)

    def _roundings(self, index: int, last_step: int) -> list[int]:
        """Positions in the log where a step up to `last_step` begins that rounds the block."""
        if not self.is_pending(index):
            return []
        updates = self._log.between(self.stored[index], self._log.length)
        steps = [update.step for update in updates]
        return [
            self.stored[index] + number
            for number, (step, following) in enumerate(zip(steps, [*steps[1:], -1], strict=True), 1)
            if step != following and step < last_step and self.is_due(index, step + 1)
        ]

    def pending(self) -> tuple[list[Update], list[int]]:
        """The updates that some block lacks, and how many of them each block has: for a checkpoint. None with
        a full base, whose weights are saved with all updates."""
        if not self.on_grid:
            return [], []
        first = self.oldest()
        return self._log.between(first, self._log.length), [max(0, each - first) for each in self.stored]

    def restore(self, updates: Sequence[Update], counts: Sequence[int]) -> None:
        """As `pending` told; the weights that are kept have been written anew."""
        first = self._log.length
        for update in updates:
            self._log.append(update)
        self.stored = [first + count for count in counts] or [first] * len(self.stored)


def plain_weights(
    layout: ModelLayout,
    forms: Sequence[BlockForm],
    outer: Mapping[str, Tensor],
    memory: Callable[[int], Tensor],
    how: Callable[[int], Visit],
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in the model's order, of the full dtype, on the host, with its pending updates (`how`).

    `memory` gives a block's bytes; they are not written. Made on `device`, block by block.
    """
    homes = {
        name: index
        for index, block in enumerate(layout.blocks)
        for part in block.own_parts
        for name in part.names
    }
    made: dict[str, Tensor] = {}
    for name in layout.shapes:
        if name in outer:
            yield name, outer[name].cpu()
            continue
        if name not in made:
            index = homes[name]
            plain = forms[index].plain(memory(index), how(index), device)
            made = {each: weight.cpu() for each, weight in plain}
        yield name, made[name]


def landed_on_grid(
    forms: Sequence[BlockForm], memory: Callable[[int], Tensor], how: Visit, device: torch.device
) -> float | None:
    """Share of the change that the updates of `how` want which a rounding to the grid makes: its projection.

    On up to `LANDED_SAMPLE_TILES` tiles of the largest trained low-bit matrix of a block. Nothing is stored.
    `None` without such a matrix, an update or a change.
    """
    found = [
        (part.size, -index, number)
        for index, form in enumerate(forms)
        for number, part in enumerate(form.layout.own_parts)
        if part.trained and form.is_low_bit(part)
    ]
    if how.first == how.last or not found:
        return None
    _, index, number = max(found)
    form = forms[-index]
    part = form.layout.parts[number]
    count = min(part.segment.counts[0], LANDED_SAMPLE_TILES * TILE_ELEMENTS)
    kept = form.part(memory(-index), number)[: -(-count // TILE_ELEMENTS) * record_bytes(form.base)]
    records = kept.to(device, copy=True)
    segment = one(part.segment.numbers[0], count, decays=True)
    before, wanted = unpack(records, form.base, count), torch.empty(count, device=device)
    base_format.visit(records, segment, how, form.base, store=False, sides=(wanted,))
    base_format.visit(records, segment, how, form.base, store=True, sides=())
    change = (wanted - before).double()
    norm = float(change.square().sum())
    landed = float(((unpack(records, form.base, count) - before).double() * change).sum())
    return landed / norm if norm > 0.0 else None
