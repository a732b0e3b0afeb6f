"""Native fine-tuning: torch's fused AdamW with weights, gradients and moments on the device.

The line that all other methods are measured against. Precision is the workload's throughout: in bf16
both weights and moments are bf16 and an update is rounded to nearest (8 bytes per parameter with the
gradient); there is no fp32 master copy. fp16 is refused: it needs loss scaling.

On the device: everything. On the host: nothing but the batches. A step reads the loss once, at its end;
that is its only wait for the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from engines.base import Batch, Blueprint, Context, Evaluation, StepStats
from engines.errors import NonFiniteLoss
from engines.first_order.adamw import (
    accumulate_gradients,
    check_checkpointing,
    make_adamw,
    prepare_training,
    set_learning_rate,
    weights_dtype,
)
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
from engines.model.blocks import materialize
from engines.model.evaluation import evaluate_on_device
from engines.model.model_check import check_repeats
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

    @staticmethod
    def why_not_available() -> str | None:
        """`None`: it runs on any device."""
        return None

    def setup(self, blueprint: Blueprint) -> None:
        """Fill the model on the device. Raises `UserError` for fp16 and for checkpointing it lacks."""
        dtype = weights_dtype(self.context, self.name)
        check_checkpointing(blueprint.model, self.context)
        check_repeats(blueprint, self.context)
        self.model: nn.Module = materialize(blueprint, self.device, dtype)
        self.optimizer = make_adamw(self.model.parameters(), self.settings)
        prepare_training(self.model, self.context, self.settings)

    def step(self, batches: Sequence[Batch]) -> StepStats:
        """One AdamW step on the mean loss of `batches`. Raises `NonFiniteLoss`, the update made."""
        set_learning_rate(
            self.optimizer.param_groups,
            learning_rate_at(self.steps_done, self.settings, self.context.total_steps),
        )
        total = torch.zeros((), device=self.device)
        for _, loss in accumulate_gradients(self.model, batches, self.device):
            total += loss
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = float(total)
        if not math.isfinite(value):
            raise NonFiniteLoss(f"the loss of step {self.steps_done} is {value}")
        self.steps_done += 1
        return StepStats(loss=value)

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
        """Nothing to stop."""
