"""MeZO: fine-tuning by forward passes only (Malladi et al., arXiv 2305.17333), everything on the GPU.

One step t, on all trained tensors at once (algorithm 1):

    z ~ N(0, I), made of (seed, t, tensor, element) each time it is needed     engines.noise
    g = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps)
    theta <- theta - lr_t (g z + wd theta)

On the GPU: the weights, and the perturbed ones of a single layer at a time, made when the layer is due; both
forward passes run stacked (`engines.perturbed`). On the host: nothing.

With a low-bit `base` the blocks' matrices are kept as in `engines.base_format`, approximately, and updates
join them at the times of `engines.folding`.

Deviations from the paper and its code:
- theta + eps z and theta - eps z are written to scratch memory. The paper perturbs in place, by +eps, -2 eps
  and +eps, which in floating point does not lead back to theta.
- Update and perturbation are computed in fp32 and rounded once, the update stochastically (`engines.noise`):
  in bf16 and fp16 nearly all of a usual update is lost to rounding to nearest.
- Weight decay acts on tensors of two and more dimensions (the code names biases and norms instead).
- With several micro-batches a loss is the mean of theirs, under one z.
- Dropout is off, as in the paper's code: the two losses must be of one function, or g would be the
  difference of two masks divided by 2 eps.

This is the oracle of `engines.zo2`, which gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines import noise
from engines.base import Batch, Blueprint, Context, Evaluation, NonFiniteLoss, StepStats, Update
from engines.base_format import block_forms
from engines.blocks import TORCH_DTYPE, EvaluationSum
from engines.checkpoint import open_checkpoint, save_checkpoint
from engines.decoding import Decoded, GenerationRequest
from engines.folding import Folds, landed_on_grid, plain_weights
from engines.generation import generate
from engines.layout import lay_out
from engines.lora import Adapters
from engines.noise import Outputs, UpdateLog, Visit
from engines.perturbed import PerturbedModel
from engines.schedule import learning_rate_at
from engines.scratch import Task
from engines.settings import MezoSettings
from engines.timeline import Timeline
from engines.transfer import ComputeClock

EVALUATION_GROUP = 8
"""Batches that share one pass over the blocks when evaluating; their hidden states are on the GPU."""


class LossPair:
    """Sums of the two losses over micro-batches, on the device until they are read.

    In fp64: g is a small difference of them, divided by a small number.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, plus: Tensor, minus: Tensor) -> None:
        self._sums += torch.stack((plus, minus))

    def read(self, count: int, step: int) -> tuple[float, float]:
        """Mean losses (plus, minus) of `count` micro-batches. Waits for the compute stream.

        Raises `NonFiniteLoss`.
        """
        plus, minus = (self._sums / count).tolist()
        if not (math.isfinite(plus) and math.isfinite(minus)):
            raise NonFiniteLoss(f"the losses of step {step} are {plus} and {minus}", sides=(plus, minus))
        return plus, minus


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
        self._log = UpdateLog(self.device)

    @staticmethod
    def why_not_available() -> str | None:
        """`None`: it runs on any device."""
        return None

    @torch.no_grad()
    def setup(self, blueprint: Blueprint) -> None:
        self._layout = lay_out(blueprint.model, self._dtype, self.settings.train)
        base = self.settings.base
        self._forms = block_forms(self._layout.blocks, base, self._dtype)
        self._blocks = [
            torch.empty(form.size_bytes, dtype=torch.uint8, device=self.device) for form in self._forms
        ]
        """In bytes."""
        self._folds = Folds(self._layout.blocks, self._log, base=base, every=self.settings.fold_every)
        adapters = Adapters(
            blueprint.model, self._layout, self.settings, self._dtype, self.device, self._seed
        )
        self._model = PerturbedModel(
            blueprint.model, self._dtype, self.device, self._layout, adapters, self._noise_clock, base
        )
        self._weights = dict(self._model.outer)
        for name, weight in self._weights.items():
            blueprint.fill(name, weight)
        for form, memory in zip(self._forms, self._blocks, strict=True):
            form.fill(memory, blueprint.fill, self._model.scratch.room)
            self._weights |= form.views(memory)
        self._saved = self._weights | adapters.tensors

    def spans(self, block: int) -> list[tuple[int, int]]:
        """See `engines.scratch.Source`."""
        own = len(self._layout.blocks[block].own_parts)
        return [(0, own)] if own else []

    def take(self, block: int, first: int, last: int) -> Tensor:
        """See `engines.scratch.Source`."""
        start, stop = self._forms[block].span(first, last)
        return self._forms[block].opened(self._blocks[block][start:stop], first)

    def done(self, block: int, first: int, last: int) -> None:
        """Weights stay where they are."""

    @torch.no_grad()
    def step(self, batches: Sequence[Batch]) -> StepStats:
        self._label("before the blocks")
        self._clock.start()
        prepared = [self._model.prepare(batch) for batch in batches]
        how = self._visit(self._log.length)
        hidden, calls = self._model.enter_all(prepared, how)
        for index in range(self._model.num_blocks):
            self._noise_clock.label = f"block {index}"
            # The blocks take the update of the step before in the same pass that perturbs them.
            store = self._folds.is_pending(index)
            if self._folds.on_grid:
                store = store and self._folds.is_due(index, self._step)
            task = Task(how=self._visit(self._folds.stored[index]), store=store, perturb=True)
            with self._model.visiting(index, task, self):
                for i, each in enumerate(calls):
                    hidden[i] = self._model.run(index, each, hidden[i])
            if store or not self._folds.is_pending(index):
                self._folds.took(index)
        self._label("loss")
        losses = LossPair(self.device)
        for each_batch, last in zip(prepared, hidden, strict=True):
            losses.add(*self._model.losses(each_batch, last, how))
        self._clock.stop()
        plus, minus = losses.read(len(prepared), self._step)
        gpu_s, perturb_s = self._clock.take_s(), self._noise_clock.take_s()
        update = next_update(self._step, self.settings, self.context, plus, minus)
        self._append(update)
        return StepStats(loss=(plus + minus) / 2, gpu_s=gpu_s, perturb_s=perturb_s, update=update)

    def _visit(self, first: int) -> Visit:
        """With the updates from position `first` of the log on."""
        return Visit(
            seed=self._seed, log=self._log, first=first, last=self._log.length,
            rounding=self.settings.rounding, step=self._step, eps=self.settings.eps,
            noise=self.settings.noise,
        )  # fmt: skip

    def _append(self, update: Update) -> None:
        """What is outside the blocks takes the update at once; its time counts with the next step's."""
        self._label("update")
        self._clock.start()
        self._noise_clock.start()
        self._log.append(update)
        self._model.update_outer(self._visit(self._log.length - 1))
        self._noise_clock.stop()
        self._clock.stop()
        self._step = update.step + 1

    @torch.no_grad()
    def _flush(self) -> None:
        """The blocks take the updates that are pending, now; those of a low-bit base take what the steps so
        far have rounded to the grid."""
        for index, layout in enumerate(self._layout.blocks):
            how = self._visit(self._folds.stored[index])
            if self._folds.on_grid:
                task = self._folds.overdue(index, how, self._step - 1)
                with self._model.visiting(index, task, self):
                    pass
                self._folds.took_overdue(index, task)
                continue
            if self._folds.is_pending(index) and layout.own_parts:
                flat = self._blocks[index].view(self._dtype)
                noise.visit(flat, layout.segment(0, len(layout.own_parts)), how, Outputs(theta=flat))
            self._folds.took(index)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        self._flush()
        total = EvaluationSum()
        remaining = iter(batches)
        while group := [self._model.prepare(batch) for batch in islice(remaining, EVALUATION_GROUP)]:
            hidden, calls = self._model.enter_all_plain(group)
            for index in range(self._model.num_blocks):
                task = Task(how=self._visit(self._folds.stored[index]), store=False, perturb=False)
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
        """See `engines.generation.GeneratingEngine`."""
        self._flush()

        def blocks() -> Iterator[int]:
            for index in range(self._model.num_blocks):
                task = Task(how=self._visit(self._folds.stored[index]), store=False, perturb=False)
                with self._model.visiting(index, task, self):
                    yield index

        for tokens in generate(self._model, request, blocks, self._clock, self.context.vram_bytes):
            yield Decoded(tokens=tokens, stats=StepStats(loss=math.nan, gpu_s=self._clock.take_s()))
        self._noise_clock.take_s()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        if self._folds.on_grid:
            plain = plain_weights(
                self._layout, self._forms, self._model.outer, lambda index: self._blocks[index],
                lambda index: self._visit(self._folds.stored[index]), self.device,
            )  # fmt: skip
            for name, weight in plain:
                yield name, self._model.adapters.merged(name, weight)
            return
        self._flush()
        for name in self._layout.shapes:
            yield name, self._model.adapters.merged(name, self._weights[name].cpu())

    def trace_events(self) -> list[dict[str, Any]]:
        """See `engines.base.TellsTrace`."""
        return [] if self._timeline is None else self._timeline.events()

    def _label(self, name: str) -> None:
        self._clock.label = self._noise_clock.label = name

    @torch.no_grad()
    def landed_share(self) -> float | None:
        """See `engines.perturbed.PerturbedModel.landed_share`; with a low-bit base, of its matrices."""
        share = None
        if self._folds.on_grid:
            how = self._visit(max(0, self._log.length - self.settings.fold_every))
            share = landed_on_grid(self._forms, lambda index: self._blocks[index], how, self.device)
        return self._model.landed_share(self._visit(max(0, self._log.length - 1))) if share is None else share

    @torch.no_grad()
    def replay(self, updates: Iterable[Update]) -> None:
        """Apply updates of an earlier run, in its order, and go on after the last."""
        for update in updates:
            self._append(update)
            self._flush()

    def save(self, folder: Path) -> None:
        self._flush()
        weights = ((name, weight.cpu()) for name, weight in self._saved.items())
        save_checkpoint(
            folder, weights, step=self._step, seed=self._seed, lora=self._model.adapters.form,
            base=self.settings.base, pending=self._folds.pending(),
        )  # fmt: skip

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        form = self._model.adapters.form
        checkpoint = open_checkpoint(folder, self._saved, form, self.settings.base)
        for name, weight in self._saved.items():
            weight.copy_(checkpoint.tensor(name))
        self._folds.restore(*checkpoint.pending)
        self._step, self._seed = checkpoint.step, checkpoint.seed

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        self.synchronize()


def next_update(step: int, settings: MezoSettings, context: Context, plus: float, minus: float) -> Update:
    """The update that the losses of `step` call for."""
    return Update(
        step=step,
        learning_rate=learning_rate_at(step, settings, context.total_steps),
        projected_gradient=(plus - minus) / (2 * settings.eps),
        weight_decay=settings.weight_decay,
    )
