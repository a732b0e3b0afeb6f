"""Which updates each stored block lacks, and when it takes them.

A block that is not written in a step falls behind: its updates are deferred. They stay in the log, and every
visit applies them to what it computes with (`engines.noise.weight_pass`).

A full base may take its updates at any time: each is rounded as it was when it was new. The matrices of a
low-bit base are rounded to their values at the times of the schedule and at no other, wherever they are
stored: before step t those of the blocks that `engines.costs.zo2.folds` names, after all updates of steps
before t. In between a visit applies their updates in fp32. So a run has the same bits on the GPU and on the
host, whether it is evaluated or not, and when its log is replayed. Where matrices are low-bit and not trained
themselves (adapters, `engines.zeroth_order.low_rank`) there is no such schedule: what is trained is
full (`engines.settings.zeroth_order.MezoSettings.trains_quantized`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import torch

from engines.base import Update
from engines.costs.zo2 import folds
from engines.noise.visits import LOG_CAPACITY, DeviceUpdateLog, Visit
from engines.settings.zeroth_order import MezoSettings
from engines.zeroth_order.block_visit import Task


class DeferredUpdates:
    """All updates so far, and how many of them each of the blocks 0 to `num_blocks` - 1 lacks where it is
    stored. Only the blocks in `trained` take any.

    Positions count the updates from 0, an entry for each query of each step; the log holds the latest
    `LOG_CAPACITY` of them, and no block may lack more.
    """

    def __init__(
        self,
        settings: MezoSettings,
        seed: int,
        num_blocks: int,
        trained: Collection[int],
        device: torch.device,
    ) -> None:
        self.seed = seed
        self.step = 0
        """Number of the next step."""
        self.trained = frozenset(trained)
        self.log = DeviceUpdateLog(device)
        self.quantized = settings.trains_quantized
        """Whether blocks take their updates at the times of the schedule only."""
        self._settings = settings
        self._applied = [0] * num_blocks
        """Of each block the position of the first update that it lacks, if it is trained."""

    def append(self, update: Update) -> None:
        """The update of a query of step `self.step`, or of one before it: the next step follows."""
        self.log.append(update)
        self.step = update.step + 1

    # --- what a visit applies ---------------------------------------------------------------------------

    def none(self) -> Visit:
        return self._visit(self.log.length)

    def latest(self, count: int = 1) -> Visit:
        """So many of the latest updates, or as many as there are."""
        return self._visit(max(0, self.log.length - count))

    def lacking(self, block: int) -> Visit:
        """All deferred updates of `block`."""
        return self._visit(self.num_applied(block))

    def _visit(self, first: int) -> Visit:
        settings = self._settings
        return Visit(
            seed=self.seed, log=self.log, first=first, last=self.log.length, rounding=settings.rounding,
            step=self.step, eps=settings.eps, noise=settings.noise,
        )  # fmt: skip

    # --- how far a block is behind ----------------------------------------------------------------------

    def num_deferred(self, block: int) -> int:
        return self.log.length - self._applied[block] if block in self.trained else 0

    def num_applied(self, block: int) -> int:
        """Position of the first update that it lacks."""
        return self.log.length - self.num_deferred(block)

    def most_deferred(self, blocks: Iterable[int]) -> int:
        return max((self.num_deferred(block) for block in blocks), default=0)

    def fill_the_log(self, blocks: Iterable[int]) -> bool:
        """Whether one of `blocks` must be written before the next update is appended."""
        return self.most_deferred(blocks) == LOG_CAPACITY

    def leave_no_room_for_a_step(self, block: int) -> bool:
        """Whether the updates of one more step would be more than the log holds."""
        return self.num_deferred(block) + self._settings.queries > LOG_CAPACITY

    def is_due(self, block: int) -> bool:
        """Whether it is the block's turn to be written in the next step."""
        return folds(block, self.step, self._settings.fold_every)

    def mark_applied(self, block: int) -> None:
        """The block has been stored with all updates."""
        self._applied[block] = self.log.length

    def mark_all_applied(self) -> None:
        self._applied = [self.log.length] * len(self._applied)

    def mark_stored(self, block: int, task: Task) -> None:
        """The block has been stored with what `task` says, if it stores at all."""
        if task.store:
            self._applied[block] = task.how.last

    # --- the schedule of a low-bit base -----------------------------------------------------------------

    def split(self, block: int, last_step: int) -> tuple[tuple[Visit, ...], Visit]:
        """The deferred updates of `block`: a visit for each rounding that a step up to `last_step` makes, and
        what stays deferred after those."""
        how = self.lacking(block)
        if not self.quantized:
            return (), how
        ends = self._roundings(block, last_step)
        starts = [how.first, *ends]
        visits = tuple(
            replace(how, first=first, last=last) for first, last in zip(starts, ends, strict=False)
        )
        return visits, replace(how, first=starts[-1])

    def task_of_roundings(self, block: int, last_step: int) -> Task:
        """To store what visits in the steps up to `last_step` would have stored, rounding by rounding.
        `mark_stored` follows."""
        visits, _ = self.split(block, last_step)
        if not visits:
            return Task(how=self.none(), store=False, perturb=False)
        return Task(how=visits[-1], store=True, perturb=False, roundings=visits[:-1])

    def _roundings(self, block: int, last_step: int) -> list[int]:
        """Positions before which a step up to `last_step` rounds the block: its turn comes after one update
        of the log and not after the next."""
        if not self.num_deferred(block):
            return []
        every = self._settings.fold_every
        steps = [update.step for update in self.log.between(self._applied[block], self.log.length)]
        return [
            self._applied[block] + number
            for number, (step, following) in enumerate(zip(steps, [*steps[1:], last_step], strict=True), 1)
            if any(
                folds(block, turn, every)
                for turn in range(step + 1, min(following, last_step, step + every) + 1)
            )
        ]

    # --- checkpoints ------------------------------------------------------------------------------------

    def to_save(self, last_step: int) -> tuple[list[Update], list[int]]:
        """The updates that some block lacks, and how many each block does.

        None unless trained matrices are low-bit: other weights are saved with all updates, and these with
        what steps up to `last_step` have rounded.
        """
        if not self.quantized:
            return [], []
        behind = []
        for block in range(len(self._applied)):
            ends = self._roundings(block, last_step)
            behind.append(self.log.length - ends[-1] if ends else self.num_deferred(block))
        most = max(behind, default=0)
        return (self.log.between(self.log.length - most, self.log.length), behind) if most else ([], [])

    def restore(self, step: int, seed: int, deferred: tuple[Sequence[Update], Sequence[int]]) -> None:
        """Go on at `step`, from stored blocks that lack what `to_save` gave."""
        updates, behind = deferred
        for update in updates:
            self.append(update)
        self.step, self.seed = step, seed
        self.mark_all_applied()
        for block, count in enumerate(behind):
            self._applied[block] -= count
