"""The step of every method that is a torch model with an optimizer over it: passes, update, loss, checkpoint.

A method's file makes the two and says what is special about them; what it has no word for is done here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engines.base import Batch, Context, Evaluation, StepStats
from engines.errors import NonFiniteLoss
from engines.first_order.adamw import accumulate_gradients, prepare_training, set_learning_rate
from engines.first_order.checkpoint import (
    HoldsState,
    load_checkpoint,
    load_optimizer_state,
    load_rng_state,
    model_weights,
    optimizer_state,
    parameter_names,
    rng_state,
    save_checkpoint,
)
from engines.first_order.lr_schedule import learning_rate_at
from engines.model.evaluation import evaluate_on_device
from engines.settings.first_order import AdamWSettings


class Optimizer(HoldsState, Protocol):
    """What the loop asks of an optimizer; any of torch's form has it."""

    def step(self) -> Any:
        """Update the parameters by their gradients."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let go of the gradients."""


class TrainingLoop:
    """Trains one model with one optimizer, one wait for the device a step."""

    def __init__(self, engine: str, settings: AdamWSettings, context: Context) -> None:
        self.engine = engine
        self.settings = settings
        self.context = context
        self.device = torch.device(context.device)
        self.steps_done = 0

    def begin(self, model: nn.Module, optimizer: Optimizer, *, only_trained: bool = False) -> None:
        """Train `model` from now on, whose weights are filled, as the workload says.

        With `only_trained` a checkpoint holds the trained parameters alone: the others are the same in every
        run of the job.
        """
        self.model = model
        self.optimizer = optimizer
        self._only_trained = only_trained
        prepare_training(model, self.context)

    def step(self, batches: Sequence[Batch]) -> StepStats:
        """One update on the mean loss of `batches`. Raises `NonFiniteLoss`, the update made."""
        rate = learning_rate_at(self.steps_done, self.settings, self.context.total_steps)
        set_learning_rate(self.optimizer.param_groups, rate)
        total = torch.zeros((), device=self.device)
        for _, loss in accumulate_gradients(self.model, batches, self.device):
            total += loss
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.finish(total)

    def finish(self, total: Tensor) -> StepStats:
        """Wait for the loss `total`, () on the device, and count the step."""
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
        """Weights, the optimizer's state, step and random state."""
        state = optimizer_state(self.optimizer, parameter_names(self.model)) | rng_state(self.device)
        about = {"engine": self.engine, "steps_done": self.steps_done}
        save_checkpoint(folder, self.model, state, about, only_trained=self._only_trained)

    def load(self, folder: Path) -> None:
        """Continue from `save`. Raises `UserError` if `folder` is not a checkpoint of this model."""
        state, about = load_checkpoint(folder, self.model, self.engine, only_trained=self._only_trained)
        load_optimizer_state(self.optimizer, parameter_names(self.model), state)
        load_rng_state(self.device, state)
        self.steps_done = int(about["steps_done"])

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
