"""LoRA (2106.09685) by PEFT: weights stay, each matrix of the blocks learns a product of rank r beside it.

    y = x W^T + alpha / r (x A^T) B^T        A random, B zero at the start; A and B are trained

On the GPU: everything. Weights are there in the workload's precision and have no gradient; adapters,
their gradients and both moments are fp32 (16 r (m + n) bytes for a matrix of m x n). On the host: the
batches.

A checkpoint holds the adapters; `weights` gives the merged model, which an ordinary `from_pretrained` loads.
Where a head is new (classification, question answering) it is trained as well, in the workload's precision.

Blocks run as those of `native` do: compiled, captured, as few recomputed as fit.

Deviation from PEFT's usual way: target layers are all linear ones of the blocks, `all-linear` in PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from engines import why_not_installed
from engines.base import Batch, Blueprint, Context, Evaluation, StepStats
from engines.errors import NotAvailable
from engines.first_order.adamw import make_adamw, weights_dtype
from engines.first_order.adapters import adapted_layers, add_adapters, merged_weights, run_in_bf16
from engines.first_order.training_loop import TrainingLoop
from engines.model.blocks import TORCH_DTYPE, materialize
from engines.model.model_check import check_repeats
from engines.settings.libraries import LoraSettings


class Lora:
    """PEFT's LoRA with torch's fused AdamW. Implements `engines.base.Engine`."""

    name = "lora"
    pinned_bytes = 0

    def __init__(self, settings: LoraSettings, context: Context) -> None:
        self.settings = settings
        self.context = context
        self.loop = TrainingLoop(self.name, settings, context)

    @staticmethod
    def why_not_available() -> str | None:
        """Why this engine cannot run here; `None` if it can."""
        return why_not_installed(Lora.name)

    @property
    def notes(self) -> list[str]:
        """What of the settings could not be had, and why."""
        return self.loop.notes

    def setup(self, blueprint: Blueprint) -> None:
        """Fill the model on the device and put adapters into it.

        Raises `NotAvailable` without PEFT; `UserError` for fp16 and for layers that the model does not have.
        """
        if (missing := why_not_installed(self.name)) is not None:
            raise NotAvailable(missing)
        dtype = weights_dtype(self.context, self.name)
        check_repeats(blueprint, self.context)
        layers = adapted_layers(blueprint.model, self.settings)
        model = materialize(blueprint, self.loop.device, dtype)
        add_adapters(model, self.settings, layers, self.context.seed)
        if self.context.workload.dtype != "fp32":
            run_in_bf16(model, self.loop.device)
        trained = [each for each in model.parameters() if each.requires_grad]
        self.loop.begin(model, make_adamw(trained, self.settings), only_trained=True)

    def step(self, batches: Sequence[Batch]) -> StepStats:
        """One AdamW step of the adapters on the mean loss of `batches`. Raises `NonFiniteLoss`."""
        return self.loop.step(batches)

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Loss and accuracy in evaluation mode, with the adapters beside the weights."""
        return self.loop.evaluate(batches)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter of the model without adapters, with them merged, on the host."""
        dtype = TORCH_DTYPE[self.context.workload.dtype]
        return merged_weights(self.loop.model, dtype, _weight)

    def save(self, folder: Path) -> None:
        """Adapters, moments, step and random state."""
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


def _weight(layer: nn.Module) -> Tensor:
    plain: Any = layer
    found: Tensor = plain.weight
    return found
