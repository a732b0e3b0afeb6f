"""QLoRA (2305.14314): LoRA over matrices of four bits, by bitsandbytes and PEFT.

Matrices of the blocks are NF4 in groups of 64, whose scales are of 8 bits where `double_quant` says so
(0.516 bytes a weight); each is made wide again when it is used. Embeddings, norms and the output head stay in
the workload's precision. Adapters as in `lora`: fp32 with fp32 moments.

On the GPU: everything; matrices are quantized one by one, so that the wide model is never there. On the host:
the batches. `weights` gives the merged model: the weights that the four bits stand for, and the adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from engines import why_not_installed
from engines.base import Blueprint
from engines.errors import NotAvailable, UserError
from engines.first_order.adamw import make_adamw, weights_dtype, with_moments
from engines.first_order.adapters import adapted_layers, add_adapters, merged_weights, run_in_bf16
from engines.first_order.looped_engine import LoopedEngine
from engines.model.blocks import TORCH_DTYPE, find_blocks, materialize
from engines.model.model_check import check_repeats
from engines.settings.libraries import QloraSettings


class Qlora(LoopedEngine[QloraSettings]):
    """PEFT's LoRA over bitsandbytes' four bits. Implements `engines.base.Engine`."""

    name = "qlora"

    def setup(self, blueprint: Blueprint) -> None:
        """Quantize the model onto the device and put adapters into it.

        Raises `NotAvailable` without PEFT or bitsandbytes; `UserError` for fp16, for a model whose blocks
        have no `nn.Linear`, and as `lora` does.
        """
        if (missing := why_not_installed(self.name)) is not None:
            raise NotAvailable(missing)
        dtype = weights_dtype(self.context, self.name)
        check_repeats(blueprint, self.context)
        layers = adapted_layers(blueprint.model, self.settings)
        path, blocks = find_blocks(blueprint.model)
        linear = [f"{path}.{name}" for name, each in blocks.named_modules() if type(each) is nn.Linear]
        if not set(layers) <= set(linear):
            raise UserError(
                type(blueprint.model).__name__,
                "its blocks have layers that bitsandbytes cannot hold in four bits",
                "use lora",
            )
        model: Any = blueprint.model
        for name in linear:
            self._quantize(blueprint, name, dtype)
        placed = {f"{name}.weight" for name in linear}
        model = materialize(blueprint, self.loop.device, dtype, placed=placed)
        model.is_loaded_in_4bit = True  # PEFT looks here for how to wrap
        add_adapters(model, self.settings, layers, self.context.seed)
        if self.context.workload.dtype != "fp32":
            run_in_bf16(model, self.loop.device)
        trained = [each for each in model.parameters() if each.requires_grad]
        # HAZARD: within a compiled block the compiler would keep what each product of four bits gives.
        optimizer = with_moments(make_adamw(trained, self.settings))
        self.loop.begin(model, optimizer, only_trained=True, within=False)

    def _quantize(self, blueprint: Blueprint, name: str, dtype: torch.dtype) -> None:
        """Put a layer of four bits in the place of the linear layer `name`."""
        from bitsandbytes.nn import Linear4bit, Params4bit

        layer: Any = blueprint.model.get_submodule(name)
        wide = torch.empty(layer.weight.shape, dtype=dtype, device=self.loop.device)
        blueprint.fill(f"{name}.weight", wide)
        made = Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4",
            compress_statistics=self.settings.double_quant, device="meta",
        )  # fmt: skip
        made.weight = Params4bit(
            wide, requires_grad=False, quant_type="nf4", compress_statistics=self.settings.double_quant
        )
        made.weight = made.weight.to(self.loop.device)  # which quantizes
        made.bias = layer.bias
        # HAZARD: on a CPU bitsandbytes would lay weights out anew in evaluation, under the feet of `weights`.
        made.support_avx512bf16_for_cpu = False
        parent, _, leaf = name.rpartition(".")
        setattr(blueprint.model.get_submodule(parent), leaf, made)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter of the model without adapters, made wide, with them merged, on the host."""
        dtype = TORCH_DTYPE[self.context.workload.dtype]
        return merged_weights(self.loop.model, dtype, _weight)


def _weight(layer: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    held: Any = layer
    state = getattr(held.weight, "quant_state", None)
    found: Tensor = held.weight if state is None else dequantize_4bit(held.weight.data, state)
    return found
