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

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from engines import why_not_installed
from engines.base import Blueprint
from engines.errors import NotAvailable
from engines.first_order.adamw import make_adamw, weights_dtype, with_moments
from engines.first_order.adapters import adapted_layers, add_adapters, merged_weights, run_in_bf16
from engines.first_order.looped_engine import LoopedEngine
from engines.model.blocks import TORCH_DTYPE, materialize
from engines.model.model_check import check_repeats
from engines.settings.libraries import LoraSettings


class Lora(LoopedEngine[LoraSettings]):
    """PEFT's LoRA with torch's fused AdamW. Implements `engines.base.Engine`."""

    name = "lora"

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
        self.loop.begin(model, with_moments(make_adamw(trained, self.settings)), only_trained=True)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter of the model without adapters, with them merged, on the host."""
        dtype = TORCH_DTYPE[self.context.workload.dtype]
        return merged_weights(self.loop.model, dtype, _weight)


def _weight(layer: nn.Module) -> Tensor:
    plain: Any = layer
    found: Tensor = plain.weight
    return found
