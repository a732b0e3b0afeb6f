"""MeZO: fine-tuning by forward passes only (Malladi et al., arXiv 2305.17333), everything on the GPU.

One step t, on all trained tensors at once (algorithm 1):

    z ~ N(0, I), made of (seed, t, tensor, element) each time it is needed     engines.noise.philox
    g = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps)
    theta <- theta - lr_t (g z + wd theta)

On the GPU: the weights, and the perturbed ones of a single layer at a time, made when the layer is due; both
forward passes run stacked (`engines.zeroth_order.perturbed_model`). On the host: nothing.

With a low-bit `base` the blocks' matrices are kept as in `engines.quantized.codec`, approximately, and
updates join them at the times of `engines.zeroth_order.deferred_updates`.

Deviations from the paper and its code:
- theta + eps z and theta - eps z are written to scratch memory. The paper perturbs in place, by +eps, -2 eps
  and +eps, which in floating point does not lead back to theta.
- Update and perturbation are computed in fp32 and rounded once, the update stochastically
  (`engines.noise.weight_pass`): in bf16 and fp16 nearly all of a usual update is lost to rounding to nearest.
- Weight decay acts on tensors of two and more dimensions (the code names biases and norms instead).
- With several micro-batches a loss is the mean of theirs, under one z.
- Dropout is off, as in the paper's code: the two losses must be of one function, or g would be the
  difference of two masks divided by 2 eps.

This is the oracle of `engines.methods.zo2`, which gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from engines.base import Blueprint, Context
from engines.model.waiting_states import States, StatesOnDevice
from engines.noise import weight_pass
from engines.noise.visits import Outputs, Visit
from engines.quantized.block_form import BlockForm
from engines.settings.zeroth_order import MezoSettings
from engines.transfer.compute_clock import ComputeClock
from engines.transfer.trace import Timeline
from engines.zeroth_order.block_store import FillBlock, StepClocks
from engines.zeroth_order.block_visit import Task
from engines.zeroth_order.deferred_updates import DeferredUpdates
from engines.zeroth_order.perturbed_model import PerturbedModel
from engines.zeroth_order.step import ZerothOrder


class Mezo(ZerothOrder):
    """MeZO in memory: the step of `engines.zeroth_order.step` over `GpuBlocks`."""

    name = "mezo"

    def __init__(self, settings: MezoSettings, context: Context) -> None:
        device = torch.device(context.device)
        timeline = Timeline(device) if context.trace else None
        clock = ComputeClock(device, timeline)
        super().__init__(
            settings, context, StepClocks(clock, ComputeClock(device, timeline, "perturb"), timeline)
        )

    def _make_blocks(self, forms: Sequence[BlockForm], updates: DeferredUpdates) -> GpuBlocks:
        return GpuBlocks(forms, updates, self._clocks, self.device)


class GpuBlocks:
    """All blocks on the device for good."""

    pinned_bytes = 0
    on_disk: frozenset[int] = frozenset()
    shared: frozenset[int] = frozenset()

    def __init__(
        self,
        forms: Sequence[BlockForm],
        updates: DeferredUpdates,
        clocks: StepClocks,
        device: torch.device,
    ) -> None:
        self._forms = forms
        self._updates = updates
        self._clocks = clocks
        self._device = device
        self.states: States = StatesOnDevice()
        self._memory = [torch.empty(form.size_bytes, dtype=torch.uint8, device=device) for form in forms]

        is_lossless = self._is_lossless = any(form.base == "lossless" for form in forms)
        self._trained_runs = [
            [
                (self.take(i, *run), form.layout.segment(*run))
                for run in form.layout.runs(0, len(form.layout.own_parts))
                if form.layout.parts[run[0]].trained and not (updates.quantized or is_lossless)
            ]
            for i, form in enumerate(forms)
        ]
        """Of each block the memory of each run of trained parts, and what lies there. Not where trained
        matrices are in tiles."""

    def set_up(self, model: PerturbedModel, blueprint: Blueprint) -> None:
        self._model = model

    def fill(self, fill_block: FillBlock, *, anew: bool) -> None:
        for form, memory in zip(self._forms, self._memory, strict=True):
            fill_block(form, memory)

    # --- what a visit asks for: `engines.zeroth_order.block_visit.Source` -------------------------

    def spans(self, block: int) -> list[tuple[int, int]]:
        own = len(self._forms[block].layout.own_parts)
        return [(0, own)] if own else []

    def take(self, block: int, first: int, last: int) -> Tensor:
        start, stop = self._forms[block].span(first, last)
        return self._forms[block].opened(self._memory[block][start:stop], first)

    def done(self, block: int, first: int, last: int) -> None:
        """Weights stay where they are."""

    # --- a step -----------------------------------------------------------------------------------------

    def make_room_in_log(self, window: int | None) -> None:
        """No block falls behind."""

    def begin_step(self, window: int | None) -> Callable[[], dict[str, Any]]:
        return dict

    def in_order(self, window: int | None) -> Iterator[tuple[int, Task]]:
        """A block takes the update of the step before in the same pass that perturbs it; trained low-bit
        matrices do when it is their turn."""
        updates = self._updates
        for index in range(len(self._forms)):
            self._clocks.label(f"block {index}")
            deferred = updates.num_deferred(index) > 0
            store = deferred and (not updates.quantized or updates.is_due(index))
            yield index, Task(how=updates.lacking(index), store=store, perturb=True, ends_window=window)
            if store or not deferred:
                updates.mark_applied(index)

    def before_ranks_meet(self) -> None:
        """Nothing is shared."""

    def end_step(self) -> dict[str, Any]:
        return {"gpu_s": self._clocks.compute.take_s(), "perturb_s": self._clocks.noise.take_s()}

    # --- the weights themselves -------------------------------------------------------------------------

    def in_order_with_theta(self) -> Iterator[int]:
        self.apply_deferred(self._updates.step - 1)
        for index in range(len(self._forms)):
            task = Task(how=self._updates.lacking(index), store=False, perturb=False)
            with self._model.visiting(index, task, self):
                yield index

    def begin_tokens(self) -> None:
        """Nothing is moved."""

    def begin_token(self) -> None:
        """Nothing is moved."""

    def end_token(self) -> dict[str, Any]:
        return {"gpu_s": self._clocks.compute.take_s()}

    def forget_times(self) -> None:
        self._clocks.compute.take_s()
        self._clocks.noise.take_s()

    def apply_deferred(self, last_step: int, window: int | None = None, *, by_all: bool = False) -> None:
        updates = self._updates
        if updates.quantized or self._is_lossless or window is not None:
            for index in range(len(self._forms)):
                task = updates.task_of_roundings(index, last_step)
                if not updates.quantized:
                    stores = window is not None or updates.num_deferred(index) > 0
                    task = Task(how=updates.lacking(index), store=stores, perturb=False, ends_window=window)
                if task.store:
                    with self._model.visiting(index, task, self):
                        pass
                updates.mark_stored(index, task)
            return
        for index, runs in enumerate(self._trained_runs):
            for flat, segment in runs if updates.num_deferred(index) else ():
                weight_pass.visit(flat, segment, updates.lacking(index), Outputs(theta=flat))
        updates.mark_all_applied()

    def at_rest(self, block: int) -> AbstractContextManager[Tensor]:
        return nullcontext(self._memory[block])

    def stored(self, block: int, last_step: int) -> Tensor:
        return self._memory[block]

    def lacking(self, block: int, last_step: int) -> Visit:
        return self._updates.lacking(block)

    def tensors(self, last_step: int) -> Mapping[str, Tensor]:
        where = dict(self._model.non_block)
        for form, memory in zip(self._forms, self._memory, strict=True):
            where |= form.views(memory)
        return where | self._model.adapters.tensors

    def like_tensors(self) -> Mapping[str, Tensor]:
        return self.tensors(self._updates.step)

    def synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        self.synchronize()
