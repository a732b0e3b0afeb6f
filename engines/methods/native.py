"""Native fine-tuning: torch's fused AdamW with weights, gradients and moments on the device.

The line that all other methods are measured against, so it runs as one who cares would run it: blocks and
loss compiled region by region, forward and backward pass captured as one CUDA graph, and no more blocks
recomputed than memory asks for. Each of these can be set off; then it has the bits of the plain loop over the
model's own forward pass.

Precision is the workload's throughout: in bf16 both weights and moments are bf16 and an update is rounded to
nearest (8 bytes per parameter with the gradient); there is no fp32 master copy. fp16 is refused: it needs
loss scaling.

On the device: everything. On the host: nothing but the batches. A step reads the loss once, at its end;
that is its only wait for the GPU. What cannot be compiled or captured runs without, and `notes` say so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from engines.base import Batch, Blueprint, Context, Evaluation, StepStats
from engines.errors import NonFiniteLoss, UserError
from engines.first_order.adamw import (
    make_adamw,
    prepare_training,
    run_passes,
    set_learning_rate,
    weights_dtype,
)
from engines.first_order.captured_passes import CapturedPasses
from engines.first_order.checkpoint import (
    adamw_state,
    load_adamw_state,
    load_checkpoint,
    load_rng_state,
    model_weights,
    parameter_names,
    rng_state,
    save_checkpoint,
)
from engines.first_order.lr_schedule import learning_rate_at
from engines.model.attention_masks import has_padding
from engines.model.blocks import find_blocks, materialize, to_device
from engines.model.evaluation import evaluate_on_device
from engines.model.model_check import check_repeats
from engines.model.randomness import draws_random_numbers
from engines.model.training_regions import TrainingRegions, why_not_compiled
from engines.settings.first_order import NativeSettings


class Native:
    """AdamW (1711.05101) on the device. Implements `engines.base.Engine`."""

    name = "native"
    pinned_bytes = 0

    def __init__(self, settings: NativeSettings, context: Context) -> None:
        self.settings = settings
        self.context = context
        self.device = torch.device(context.device)
        self.steps_done = 0
        self.notes: list[str] = []
        """What of the settings could not be had, and why."""
        self._regions: TrainingRegions | None = None
        self._captured: CapturedPasses | None = None

    @staticmethod
    def why_not_available() -> str | None:
        """`None`: it runs on any device."""
        return None

    def setup(self, blueprint: Blueprint) -> None:
        """Fill the model on the device. Raises `UserError` for fp16."""
        dtype = weights_dtype(self.context, self.name)
        check_repeats(blueprint, self.context)
        self.model: nn.Module = materialize(blueprint, self.device, dtype)
        self.optimizer = make_adamw(self.model.parameters(), self.settings)
        prepare_training(self.model, self.context, self.settings, recompute=False)
        self._install(compiled=self._compiles())
        if self.device.type == "cuda" and self.settings.graphs and not draws_random_numbers(self.model):
            self._captured = CapturedPasses(list(self.model.parameters()), self._passes, self.device)

    def _compiles(self) -> bool:
        wanted = self.settings.compile
        why_not = why_not_compiled(self.device)
        if wanted and why_not is not None:
            self.notes.append(f"not compiled: {why_not}")
            return False
        return self.device.type == "cuda" if wanted == "auto" else wanted

    def _install(self, *, compiled: bool) -> None:
        self._is_compiled = False
        try:
            _, blocks = find_blocks(self.model)
        except UserError as error:
            self.notes.append(f"neither compiled nor recomputed: {error.what} {error.why}")
            return
        recomputed = self.settings.recomputed(len(blocks), checkpointing=self.context.workload.checkpointing)
        self._regions = TrainingRegions(self.model, compiled=compiled, recomputed=recomputed)
        self._is_compiled = compiled

    def step(self, batches: Sequence[Batch]) -> StepStats:
        """One AdamW step on the mean loss of `batches`. Raises `NonFiniteLoss`, the update made."""
        set_learning_rate(
            self.optimizer.param_groups,
            learning_rate_at(self.steps_done, self.settings, self.context.total_steps),
        )
        total = torch.zeros((), device=self.device)
        for loss in self._losses(batches):
            total += loss
        self.optimizer.step()
        if not self._has_replayed:  # graphs write gradients anew, where they lie
            self.optimizer.zero_grad(set_to_none=True)
        value = float(total)
        if not math.isfinite(value):
            raise NonFiniteLoss(f"the loss of step {self.steps_done} is {value}")
        self.steps_done += 1
        return StepStats(loss=value)

    def _losses(self, batches: Sequence[Batch]) -> Sequence[Tensor]:
        """Losses of the micro-batches, as shares of their mean; gradients are where the optimizer looks."""
        self._share = len(batches)
        self._has_replayed = False
        if self._captured is not None:
            try:
                found = self._captured.step(batches)
            except RuntimeError as error:
                self._captured = None
                self.notes.append(f"no CUDA graph: {_first_line(error)}")
                found = None
            if found is not None:
                self._has_replayed = True
                return found
        self.optimizer.zero_grad(set_to_none=True)
        try:
            return [self._pass(batch) for batch in batches]
        except torch._dynamo.exc.TorchDynamoException as error:
            if not self._is_compiled or self.steps_done > 0:
                raise
            self.notes.append(f"not compiled: {_first_line(error)}")
        assert self._regions is not None
        self._regions.remove()
        self._install(compiled=False)
        self.optimizer.zero_grad(set_to_none=True)
        return [self._pass(batch) for batch in batches]

    def _pass(self, batch: Batch) -> Tensor:
        return self._passes(to_device(batch, self.device), has_padding(batch.inputs))

    def _passes(self, inputs: Mapping[str, Tensor], padded: bool) -> Tensor:
        return run_passes(self.model, inputs, padded, self._share)

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Loss and accuracy in evaluation mode."""
        return evaluate_on_device(self.model, batches, self.device)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter once, on the host."""
        return model_weights(self.model)

    def save(self, folder: Path) -> None:
        """Weights, moments, step and random state."""
        state = adamw_state(self.optimizer, parameter_names(self.model)) | rng_state(self.device)
        save_checkpoint(folder, self.model, state, {"engine": self.name, "steps_done": self.steps_done})

    def load(self, folder: Path) -> None:
        """Continue from `save`. Raises `UserError` if `folder` is not a checkpoint of this model."""
        state, about = load_checkpoint(folder, self.model, self.name)
        load_adamw_state(self.optimizer, parameter_names(self.model), state)
        load_rng_state(self.device, state)
        self.steps_done = int(about["steps_done"])

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Let go of the graphs, and give the blocks their own forward back."""
        self._captured = None
        if self._regions is not None:
            self._regions.remove()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
