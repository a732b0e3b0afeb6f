"""Which updates each block has yet to take, and when it takes them.

A full base may take its updates at any time: each is rounded as it was when it was new. The matrices of a
low-bit base are rounded to their grid at the times of the schedule and at no other, wherever they are kept:
before step t those of the blocks that `engines.costs.zo2.folds` names, after all updates of steps before t.
In between their updates pend, and a visit applies them in fp32. So a run has the same bits on the GPU and on
the host, whether it is evaluated or not, and when its log is replayed. Where matrices are low-bit and not
trained themselves (adapters, `engines.zeroth_order.low_rank_noise`) there is no such schedule: what is
trained is full.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from engines.base import Update
from engines.costs.zo2 import folds
from engines.noise.visits import UpdateLog, Visit
from engines.quantized.block_form import BlockForm
from engines.zeroth_order.perturbed_weights import Task, without_updates


class PendingUpdates:
    """Updates of the blocks of `forms`, by position in their log."""

    def __init__(
        self,
        forms: Sequence[BlockForm],
        device: torch.device,
        *,
        every: int,
        trains_quantized: bool,
        apart_from_flushes: Collection[int] = (),
    ) -> None:
        """`every`: steps between two roundings of a block to its grid; `trains_quantized` is that of
        `engines.settings.zeroth_order.MezoSettings`."""
        self.log = UpdateLog(device)
        """Every update: what is outside the blocks takes it at once."""
        blocks = [form.layout for form in forms]
        self.trained = tuple(i for i, block in enumerate(blocks) if any(part.trained for part in block.parts))
        self.trains_quantized = trains_quantized
        self._every = every
        self._stored = [0] * len(blocks)
        self._flushed = tuple(i for i in self.trained if i not in apart_from_flushes)

    def append(self, update: Update) -> None:
        """An update that the trained blocks have to take."""
        self.log.append(update)

    def first(self, index: int) -> int:
        """Position in the log of the first update that the block's stored weights lack."""
        return self.log.length - self.behind(index)

    def pends(self, index: int) -> bool:
        return self.behind(index) > 0

    def is_due(self, index: int, step: int) -> bool:
        """Whether it is the block's turn in `step`."""
        return folds(index, step, self._every)

    def stored(self, index: int) -> None:
        """The block's weights as they are kept have all of its updates now."""
        self._stored[index] = self.log.length

    def all_stored(self) -> None:
        for index in range(len(self._stored)):
            self.stored(index)

    def behind(self, index: int) -> int:
        """Updates that the block has yet to take."""
        return self.log.length - self._stored[index] if index in self.trained else 0

    @property
    def most(self) -> int:
        """Updates that the block furthest behind has yet to take, of those that a flush brings up to date."""
        return max((self.behind(i) for i in self._flushed), default=0)

    def overdue(self, index: int, how: Visit, last_step: int) -> Task:
        """What visits in the steps up to `last_step` would have stored, rounding by rounding. `how` has all
        pending updates of the block. `took` follows."""
        visits, _ = self.split(index, how, last_step)
        if not visits:
            return Task(how=without_updates(how), store=False, perturb=False)
        return Task(how=visits[-1], store=True, perturb=False, overdue=visits[:-1])

    def split(self, index: int, how: Visit, last_step: int) -> tuple[tuple[Visit, ...], Visit]:
        """`how`, which has all pending updates of the block, in the visits that store up to `last_step`, and
        what pends after them."""
        if not self.trains_quantized:
            return (), how
        ends = self._roundings(index, last_step)
        starts = [how.first, *ends]
        visits = tuple(
            replace(how, first=first, last=last) for first, last in zip(starts, ends, strict=False)
        )
        return visits, replace(how, first=starts[-1])

    def took(self, index: int, task: Task) -> None:
        if task.store:
            self._stored[index] = task.how.last

    def _roundings(self, index: int, last_step: int) -> list[int]:
        """Positions in the log before which a step up to `last_step` rounds the block: its turn comes after
        one update of the log and not after the next."""
        if not self.pends(index):
            return []
        updates = self.log.between(self._stored[index], self.log.length)
        steps = [update.step for update in updates]
        return [
            self._stored[index] + number
            for number, (step, following) in enumerate(zip(steps, [*steps[1:], last_step], strict=True), 1)
            if any(
                self.is_due(index, turn)
                for turn in range(step + 1, min(following, last_step, step + self._every) + 1)
            )
        ]

    def pending(self, last_step: int) -> tuple[list[Update], list[int]]:
        """The updates that some block lacks, and how many each block does: for a checkpoint. None unless
        matrices are rounded to a grid; other weights are saved with all updates, and these with what steps
        up to `last_step` have rounded."""
        if not self.trains_quantized:
            return [], []
        behind = [
            self.log.length - ends[-1] if (ends := self._roundings(index, last_step)) else self.behind(index)
            for index in range(len(self._stored))
        ]
        length, most = self.log.length, max(behind, default=0)
        return (self.log.between(length - most, length), behind) if most else ([], [])

    def restore(self, updates: Sequence[Update], behind: Sequence[int]) -> None:
        """As `pending` told; the weights that are kept have been written anew."""
        for update in updates:
            self.append(update)
        self.all_stored()
        for index, count in enumerate(behind):
            self._stored[index] -= count
