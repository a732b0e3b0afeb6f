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

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.base import Batch, Blueprint, Context, Evaluation, StepStats, Update
from engines.decoding import Decoded, GenerationRequest
from engines.model.blocks import TORCH_DTYPE
from engines.model.evaluation import EvaluationSum
from engines.model.flat_layout import lay_out
from engines.noise import weight_pass
from engines.noise.visits import Outputs, Visit
from engines.quantized.block_form import block_forms
from engines.quantized.export import landed_on_grid, plain_weights
from engines.settings.zeroth_order import MezoSettings
from engines.transfer.compute_clock import ComputeClock
from engines.transfer.trace import Timeline
from engines.zeroth_order.checkpoint import open_checkpoint, save_checkpoint
from engines.zeroth_order.deferred_updates import PendingUpdates
from engines.zeroth_order.estimators import drawn_blocks, forwards, next_updates, probes
from engines.zeroth_order.forward_passes import Streams
from engines.zeroth_order.generation import generate
from engines.zeroth_order.low_rank_noise import beside, window_due
from engines.zeroth_order.perturbed_model import PerturbedModel
from engines.zeroth_order.perturbed_weights import Task

EVALUATION_GROUP = 8
"""Batches that share one pass over the blocks when evaluating; their hidden states are on the GPU."""


class Mezo:
    """MeZO in memory."""

    name = "mezo"

    def __init__(self, settings: MezoSettings, context: Context) -> None:
        self.settings = settings
        self.context = context
        self.device = torch.device(context.device)
        self.pinned_bytes = 0
        self._dtype = TORCH_DTYPE[context.workload.dtype]
        self._seed = context.seed
        self._step = 0
        self._timeline = Timeline(self.device) if context.trace else None
        self._clock = ComputeClock(self.device, self._timeline)
        self._noise_clock = ComputeClock(self.device, self._timeline, "perturb")

    @staticmethod
    def why_not_available() -> str | None:
        """`None`: it runs on any device."""
        return None

    @torch.no_grad()
    def setup(self, blueprint: Blueprint) -> None:
        base = self.settings.base
        adapters, self._layout = beside(
            blueprint.model,
            lay_out(blueprint.model, self._dtype, self.settings.train),
            self.settings,
            self._dtype,
            self.device,
            self._seed,
        )
        self._forms = block_forms(self._layout.blocks, base, self._dtype)
        self._blocks = [
            torch.empty(form.size_bytes, dtype=torch.uint8, device=self.device) for form in self._forms
        ]
        """In bytes."""
        self._pending = PendingUpdates(
            self._forms, self.device, apart=self.settings.layer_share < 1, every=self.settings.fold_every
        )
        self._model = PerturbedModel(
            blueprint.model, self._dtype, self.device, self._layout, adapters, self._noise_clock, base
        )
        self._runs = [
            [
                (self.take(i, *run), block.segment(*run))
                for run in block.runs(0, len(block.own_parts))
                if block.parts[run[0]].trained and not self._pending.on_grid
            ]
            for i, block in enumerate(self._layout.blocks)
        ]
        """Of each block the memory of what is trained, in pieces, and what lies there. Not on a grid."""
        self._weights = dict(self._model.outer)
        for name, weight in self._weights.items():
            blueprint.fill(name, weight)
        for form, memory in zip(self._forms, self._blocks, strict=True):
            form.fill(memory, blueprint.fill, self._model.scratch.room)
            self._weights |= form.views(memory)
        self._saved = self._weights | adapters.tensors

    def spans(self, block: int) -> list[tuple[int, int]]:
        """See `engines.zeroth_order.perturbed_weights.Source`."""
        own = len(self._layout.blocks[block].own_parts)
        return [(0, own)] if own else []

    def take(self, block: int, first: int, last: int) -> Tensor:
        """See `engines.zeroth_order.perturbed_weights.Source`."""
        start, stop = self._forms[block].span(first, last)
        return self._forms[block].opened(self._blocks[block][start:stop], first)

    def done(self, block: int, first: int, last: int) -> None:
        """Weights stay where they are."""

    @torch.no_grad()
    def step(self, batches: Sequence[Batch]) -> StepStats:
        self._label("before the blocks")
        self._clock.start()
        prepared = [self._model.prepare(batch) for batch in batches]
        streams = Streams(self._model, prepared, probes(self.settings, self._step), self._visit())
        drawn, folds = self._drawn(self._step), window_due(self.settings, self._step)
        for index in range(self._model.num_blocks):
            self._noise_clock.label = f"block {index}"
            # The block takes the update of the step before in the same pass that perturbs it.
            pends = self._pending.pends(index)
            store = pends and (not self._pending.on_grid or self._pending.is_due(index, self._step))
            task = Task(how=self._visit(index), store=store, perturb=index in drawn, folds=folds)
            streams.visit(index, task, self)
            if store or not pends:
                self._pending.stored(index)
        self._label("loss")
        sums = streams.losses()
        self._clock.stop()
        losses = sums.read(len(prepared), self._step)
        gpu_s, perturb_s = self._clock.cut(), self._noise_clock.cut()
        updates = next_updates(self._step, self.settings, self.context.total_steps, losses)
        for update in updates:
            self._append(update)
        return StepStats(
            loss=sum(losses) / len(losses),
            forwards=float(forwards(self.settings)),
            gpu_s=gpu_s(),
            perturb_s=perturb_s(),
            updates=updates,
        )

    def _drawn(self, step: int) -> frozenset[int]:
        return drawn_blocks(self.settings, self._seed, step, self._pending.drawable)

    def _visit(self, block: int | None = None, *, latest: int | None = None) -> Visit:
        """With the updates that `block` has not taken, or none without a block; or with so many of the latest
        ones, of the block or of all."""
        log = self._pending.everything if block is None else self._pending.logs[block]
        first = log.length if block is None else self._pending.first(block)
        return Visit(
            seed=self._seed, log=log, first=first if latest is None else max(0, log.length - latest),
            last=log.length, rounding=self.settings.rounding, step=self._step, eps=self.settings.eps,
            noise=self.settings.noise,
        )  # fmt: skip

    def _append(self, update: Update) -> None:
        """What is outside the blocks takes the update at once; its time counts with the next step's."""
        self._label("update")
        self._clock.start()
        self._noise_clock.start()
        self._pending.append(update, self._drawn(update.step))
        self._model.update_outer(self._visit(latest=1))
        self._noise_clock.stop()
        self._clock.stop()
        self._step = update.step + 1

    @torch.no_grad()
    def _flush(self) -> None:
        """The blocks take the updates that are pending, now; those of a low-bit base take what the steps so
        far have rounded to the grid."""
        if self._pending.on_grid:
            for index in range(self._model.num_blocks):
                task = self._pending.overdue(index, self._visit(index), self._step - 1)
                if task.store:
                    with self._model.visiting(index, task, self):
                        pass
                self._pending.took(index, task)
            return
        for index, runs in enumerate(self._runs):
            for flat, segment in runs if self._pending.pends(index) else ():
                weight_pass.visit(flat, segment, self._visit(index), Outputs(theta=flat))
        self._pending.all_stored()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        self._flush()
        total = EvaluationSum()
        remaining = iter(batches)
        while group := [self._model.prepare(batch) for batch in islice(remaining, EVALUATION_GROUP)]:
            hidden, calls = self._model.enter_all_plain(group)
            for index in range(self._model.num_blocks):
                task = Task(how=self._visit(index), store=False, perturb=False)
                with self._model.visiting(index, task, self):
                    for i, each_calls in enumerate(calls):
                        hidden[i] = self._model.run(index, each_calls, hidden[i])
            for each, last in zip(group, hidden, strict=True):
                self._model.evaluate(each, last, total)
        self._clock.take_s()
        self._noise_clock.take_s()
        return total.result()

    @torch.no_grad()
    def generate(self, request: GenerationRequest) -> Iterator[Decoded]:
        """See `engines.decoding.GeneratingEngine`."""
        self._flush()

        def blocks() -> Iterator[int]:
            for index in range(self._model.num_blocks):
                task = Task(how=self._visit(index), store=False, perturb=False)
                with self._model.visiting(index, task, self):
                    yield index

        for tokens in generate(self._model, request, blocks, self._clock, self.context.vram_bytes):
            yield Decoded(tokens=tokens, stats=StepStats(loss=math.nan, gpu_s=self._clock.take_s()))
        self._noise_clock.take_s()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        if self.settings.base != "full":
            plain = plain_weights(
                self._layout, self._forms, self._model.outer, lambda index: self._blocks[index],
                self._visit, self.device,
            )  # fmt: skip
            for name, weight in plain:
                yield name, self._model.adapters.merged(name, weight, self._visit())
            return
        self._flush()
        for name in self._layout.shapes:
            yield name, self._model.adapters.merged(name, self._weights[name].cpu(), self._visit())

    def trace_events(self) -> list[dict[str, Any]]:
        """See `engines.base.TellsTrace`."""
        return [] if self._timeline is None else self._timeline.events()

    def _label(self, name: str) -> None:
        self._clock.label = self._noise_clock.label = name

    @torch.no_grad()
    def landed_share(self) -> float | None:
        """See `engines.zeroth_order.perturbed_model.PerturbedModel.landed_share`; with a low-bit base, of its
        matrices."""
        share = None
        if self._pending.on_grid:
            entries = self.settings.fold_every * self.settings.queries
            share = landed_on_grid(
                self._forms, lambda index: self._blocks[index],
                lambda index: self._visit(index, latest=entries), self.device,
            )  # fmt: skip
        return self._model.landed_share(self._visit(latest=1)) if share is None else share

    @torch.no_grad()
    def replay(self, updates: Iterable[Update]) -> None:
        """Apply updates of an earlier run, in its order, and go on after the last."""
        for update in updates:
            if update.query == 0:
                self._fold(update.step)
            self._append(update)
            self._flush()

    def _fold(self, step: int) -> None:
        """What the first visits of `step` would fold."""
        window = window_due(self.settings, step)
        if window is None:
            return
        for index in range(self._model.num_blocks):
            task = Task(how=self._visit(index), store=True, perturb=False, folds=window)
            with self._model.visiting(index, task, self):
                pass
            self._pending.stored(index)

    def save(self, folder: Path) -> None:
        self._flush()
        weights = ((name, weight.cpu()) for name, weight in self._saved.items())
        save_checkpoint(
            folder, weights, step=self._step, seed=self._seed, lora=self._model.adapters.form,
            base=self.settings.base, pending=self._pending.pending(self._step - 1),
        )  # fmt: skip

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        form = self._model.adapters.form
        checkpoint = open_checkpoint(folder, self._saved, form, self.settings.base)
        for name, weight in self._saved.items():
            weight.copy_(checkpoint.tensor(name))
        self._step, self._seed = checkpoint.step, checkpoint.seed
        self._pending.restore(*checkpoint.pending, self._drawn)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        self.synchronize()
