"""MeZO: fine-tuning by forward passes only (Malladi et al., arXiv 2305.17333), everything on the GPU.

One step t, on all trained tensors at once (algorithm 1):

    z ~ N(0, I), made of (seed, t, tensor, element) each time it is needed     engines.noise
    g = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps)
    theta <- theta - lr_t (g z + wd theta)

On the GPU: the weights, and the perturbed ones of a single layer at a time, made when the layer is due; both
forward passes run stacked (`engines.perturbed`). On the host: nothing.

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines import noise
from engines.base import Batch, Blueprint, Context, Evaluation, NonFiniteLoss, StepStats, Update
from engines.blocks import TORCH_DTYPE, EvaluationSum
from engines.checkpoint import open_checkpoint, save_checkpoint
from engines.decoding import Decoded, GenerationRequest
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
        self._applied = 0
        """How many updates of the log the blocks have taken."""

    @staticmethod
    def why_not_available() -> str | None:
        """`None`: it runs on any device."""
        return None

    @torch.no_grad()
    def setup(self, blueprint: Blueprint) -> None:
        self._layout = lay_out(blueprint.model, self._dtype, self.settings.train)
        self._blocks = [
            torch.empty(block.size, dtype=self._dtype, device=self.device) for block in self._layout.blocks
        ]
        adapters = Adapters(
            blueprint.model, self._layout, self.settings, self._dtype, self.device, self._seed
        )
        self._model = PerturbedModel(
            blueprint.model, self._dtype, self.device, self._layout, adapters, self._noise_clock
        )
        own = [(block, len(block.own_parts)) for block in self._layout.blocks]
        self._segments = [
            block.segment(0, count) if count and block.parts[0].trained else None for block, count in own
        ]
        self._weights = dict(self._model.outer)
        for layout, flat in zip(self._layout.blocks, self._blocks, strict=True):
            self._weights |= layout.views(flat)
        for name, weight in self._weights.items():
            blueprint.fill(name, weight)
        self._saved = self._weights | adapters.tensors

    def spans(self, block: int) -> list[tuple[int, int]]:
        """See `engines.scratch.Source`."""
        own = len(self._layout.blocks[block].own_parts)
        return [(0, own)] if own else []

    def take(self, block: int, first: int, last: int) -> Tensor:
        """See `engines.scratch.Source`."""
        parts = self._layout.blocks[block].parts
        return self._blocks[block][parts[first].start : parts[last - 1].start + parts[last - 1].size]

    def done(self, block: int, first: int, last: int) -> None:
        """Weights stay where they are."""

    @torch.no_grad()
    def step(self, batches: Sequence[Batch]) -> StepStats:
        self._label("before the blocks")
        self._clock.start()
        prepared = [self._model.prepare(batch) for batch in batches]
        pending = self._visit()
        how = replace(pending, first=pending.last)
        hidden, calls = self._model.enter_all(prepared, how)
        # The blocks take the update of the step before in the same pass that perturbs them.
        task = Task(how=pending, store=pending.first < pending.last, perturb=True)
        for index in range(self._model.num_blocks):
            self._noise_clock.label = f"block {index}"
            with self._model.visiting(index, task, self):
                for i, each in enumerate(calls):
                    hidden[i] = self._model.run(index, each, hidden[i])
        self._applied = how.last
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

    def _visit(self, *, latest: bool = False) -> Visit:
        """With the updates that the blocks have not taken, or with the latest one."""
        last = self._log.length
        return Visit(
            seed=self._seed, log=self._log, first=max(0, last - 1) if latest else self._applied, last=last,
            rounding=self.settings.rounding, step=self._step, eps=self.settings.eps,
        )  # fmt: skip

    def _append(self, update: Update) -> None:
        """What is outside the blocks takes the update at once; its time counts with the next step's."""
        self._label("update")
        self._clock.start()
        self._noise_clock.start()
        self._log.append(update)
        self._model.update_outer(self._visit(latest=True))
        self._noise_clock.stop()
        self._clock.stop()
        self._step = update.step + 1

    @torch.no_grad()
    def _flush(self) -> None:
        """The blocks take the updates that are pending, now."""
        how = self._visit()
        if how.first == how.last:
            return
        for flat, segment in zip(self._blocks, self._segments, strict=True):
            if segment is not None:
                noise.visit(flat, segment, how, Outputs(theta=flat))
        self._applied = how.last

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        self._flush()
        total = EvaluationSum()
        task = Task(how=self._visit(), store=False, perturb=False)
        for batch in batches:
            prepared = self._model.prepare(batch)
            (hidden,), (calls,) = self._model.enter_all_plain([prepared])
            for index in range(self._model.num_blocks):
                with self._model.visiting(index, task, self):
                    hidden = self._model.run(index, calls, hidden)
            self._model.evaluate(prepared, hidden, total)
        self._clock.take_s()
        self._noise_clock.take_s()
        return total.result()

    @torch.no_grad()
    def generate(self, request: GenerationRequest) -> Iterator[Decoded]:
        """See `engines.generation.GeneratingEngine`."""
        self._flush()
        task = Task(how=self._visit(), store=False, perturb=False)

        def blocks() -> Iterator[int]:
            for index in range(self._model.num_blocks):
                with self._model.visiting(index, task, self):
                    yield index

        for tokens in generate(self._model, request, blocks, self._clock, self.context.vram_bytes):
            yield Decoded(tokens=tokens, gpu_s=self._clock.take_s())
        self._noise_clock.take_s()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
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
        """See `engines.perturbed.PerturbedModel.landed_share`."""
        return self._model.landed_share(self._visit(latest=True))

    @torch.no_grad()
    def replay(self, updates: Iterable[Update]) -> None:
        """Apply updates of an earlier run, in its order, and go on after the last."""
        for update in updates:
            self._append(update)
            self._flush()

    def save(self, folder: Path) -> None:
        self._flush()
        weights = ((name, weight.cpu()) for name, weight in self._saved.items())
        form = self._model.adapters.form
        save_checkpoint(folder, weights, step=self._step, seed=self._seed, lora=form)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        checkpoint = open_checkpoint(folder, self._saved, self._model.adapters.form)
        for name, weight in self._saved.items():
            weight.copy_(checkpoint.tensor(name))
        self._applied = self._log.length
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
