"""The blocks of `engines.methods.zo2` between steps: their bytes where they are kept, what those lack, and
bringing them up to date there.

On the GPU, in host memory or on disk; what each place holds differs. One on disk has the base or, once it was
folded, what the second file has; the others have what visits stored in them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from engines.noise.visits import Visit
from engines.offload.disk_tensors import FetchedTensors
from engines.offload.ring import BlockStream
from engines.quantized.block_form import BlockForm
from engines.transfer.compute_clock import ComputeClock
from engines.zeroth_order.deferred_updates import PendingUpdates
from engines.zeroth_order.perturbed_model import PerturbedModel
from engines.zeroth_order.perturbed_weights import BlockMemory, Task, without_updates


class KeptBlocks:
    """`last_step`, wherever it is asked for: on a grid, the blocks take what the steps up to this one have
    rounded, and nothing else; otherwise they take all that pends."""

    def __init__(
        self,
        model: PerturbedModel,
        stream: BlockStream,
        forms: Sequence[BlockForm],
        on_disk: Collection[int],
        pending: PendingUpdates,
        visit: Callable[[int], Visit],
        clock: ComputeClock,
    ) -> None:
        """`visit`: with all pending updates of a block."""
        self._model = model
        self._stream = stream
        self._forms = forms
        self._on_disk = on_disk
        self._pending = pending
        self._visit = visit
        self._clock = clock

    def tensors(self, last_step: int) -> Mapping[str, Tensor]:
        """Every tensor where it is kept, the adapters' too. As `engines.offload.ring.BlockStream.at_rest`.

        A block on disk comes to pageable host memory when one of its tensors is asked for, with its pending
        updates, and goes when one of another block is.
        """
        where = self.in_memory()
        if not self._on_disk:
            return where
        on_disk = {i: self._forms[i] for i in self._on_disk}
        return FetchedTensors(where, on_disk, lambda index: self._updated(index, last_step))

    def in_memory(self) -> dict[str, Tensor]:
        """As `tensors`, without those on disk."""
        where = dict(self._model.outer)
        for index, form in enumerate(self._forms):
            if index not in self._on_disk:
                where |= form.views(self._stream.at_rest(index))
        return where | self._model.adapters.tensors

    def block(self, index: int, last_step: int) -> Tensor:
        """A block's bytes, as a visit would find them."""
        return self._updated(index, last_step) if index in self._on_disk else self._stream.at_rest(index)

    def lacking(self, index: int, last_step: int) -> Visit:
        """The updates that `block` lacks."""
        how = self._visit(index)
        if index not in self._on_disk:
            return how
        left = self._pending.split(index, how, last_step)[1]
        return left if self._pending.trains_quantized else without_updates(how)

    def fold(self, index: int, last_step: int, window: int | None) -> None:
        """Write a block on disk to its second file, with its updates and what the `window` of
        `engines.zeroth_order.low_rank_noise` has gathered."""
        with self._stream.fetched(index, keep=True) as memory:
            self._pending.took(index, self._keep_up(index, memory, last_step, window))

    def catch_up(self, last_step: int) -> bool:
        """On a grid: store, in the blocks that are not on disk, what is overdue. Whether anything was."""
        tasks = [
            Task(how=without_updates(self._visit(index)), store=False, perturb=False)
            if index in self._on_disk
            else self._pending.overdue(index, self._visit(index), last_step)
            for index in range(len(self._forms))
        ]
        if not any(task.store for task in tasks):
            return False
        for index, task in enumerate(tasks):
            self._stream.begin(keep=task.store and not self._stream.is_resident(index))
            with self._model.visiting(index, task, self._stream):
                pass
            self._pending.took(index, task)
        self._stream.end_pass()
        return True

    @torch.no_grad()
    def _updated(self, index: int, last_step: int) -> Tensor:
        """The bytes of a block on disk, copied to the host, with the updates that it takes."""
        with self._stream.fetched(index, keep=False) as memory:
            self._keep_up(index, memory, last_step)
            return memory.to("cpu", copy=True)

    def _keep_up(self, index: int, memory: Tensor, last_step: int, window: int | None = None) -> Task:
        """Store in `memory`, the bytes of a block on disk, what its place on the host would have after
        `last_step`."""
        task = Task(how=self._visit(index), store=True, perturb=False, folds=window)
        if self._pending.trains_quantized:
            task = self._pending.overdue(index, task.how, last_step)
        self._clock.start()
        with self._model.visiting(index, task, BlockMemory(self._forms[index], memory)):
            pass
        self._clock.stop()
        return task
