"""Native fine-tuning: torch's fused AdamW with weights, gradients and moments on the device.

The line that all other methods are measured against, so it runs as one who cares would run it: blocks and
loss compiled region by region, forward and backward pass captured as one CUDA graph, and no more blocks
recomputed than memory asks for. Each of these can be set off; then it has the bits of the plain loop over the
model's own forward pass.

Precision is the workload's throughout: in bf16 both weights and moments are bf16 and an update is rounded to
nearest (8 bytes per parameter with the gradient); there is no fp32 master copy. fp16 is refused: it needs
loss scaling.

On the device: everything. On the host: nothing but the batches. A step reads the loss once, at its end;
that is its only wait for the GPU. With `max_grad_norm` the gradient of all micro-batches together is scaled
to that norm before the update (Pascanu et al., arXiv 1211.5063). What cannot be compiled or captured runs
without, and `notes` say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor, nn

from engines.base import Batch, Blueprint, Context, Evaluation, StepStats
from engines.first_order.adamw import make_adamw, weights_dtype
from engines.first_order.training_loop import TrainingLoop
from engines.model.blocks import materialize
from engines.model.model_check import check_repeats
from engines.settings.first_order import NativeSettings


class Native:
    """AdamW (1711.05101) on the device. Implements `engines.base.Engine`."""

    name = "native"
    pinned_bytes = 0

    def __init__(self, settings: NativeSettings, context: Context) -> None:
        self.settings = settings
        self.context = context
        self.loop = TrainingLoop(self.name, settings, context)

    @staticmethod
    def why_not_available() -> str | None:
        """`None`: it runs on any device."""
        return None

    @property
    def model(self) -> nn.Module:
        """What is trained, after `setup`."""
        return self.loop.model

    @property
    def notes(self) -> list[str]:
        """What of the settings could not be had, and why."""
        return self.loop.notes

    def setup(self, blueprint: Blueprint) -> None:
        """Fill the model on the device. Raises `UserError` for fp16."""
        dtype = weights_dtype(self.context, self.name)
        check_repeats(blueprint, self.context)
        model = materialize(blueprint, self.loop.device, dtype)
        self.loop.begin(model, make_adamw(model.parameters(), self.settings))

    def step(self, batches: Sequence[Batch]) -> StepStats:
        """One AdamW step on the mean loss of `batches`. Raises `NonFiniteLoss`, the update made."""
        return self.loop.step(batches)

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Loss and accuracy in evaluation mode."""
        return self.loop.evaluate(batches)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter once, on the host."""
        return self.loop.weights()

    def save(self, folder: Path) -> None:
        """Weights, moments, step and random state."""
        self.loop.save(folder)

    def load(self, folder: Path) -> None:
        """Continue from `save`. Raises `UserError` if `folder` is not a checkpoint of this model."""
        self.loop.load(folder)

    def synchronize(self) -> None:
        """Wait for the device."""
        self.loop.synchronize()

    def close(self) -> None:
        """Let go of the graphs, and give the blocks their own forward back."""
        self.loop.close()
