"""AdamW with moments of eight bits (2110.02861), by bitsandbytes.

Moments are uint8 with one fp32 scale for every 256 of them; those of tensors below 4096 elements stay fp32.
Weights and gradients have the workload's precision; there is no fp32 master copy.

On the GPU: everything; 6 bytes per parameter in bf16 where `native` has 8. With `paged` the moments lie in
CUDA's managed memory, which the driver moves to the host where the GPU has no room. On the host: the batches.
"""

from __future__ import annotations

from engines import why_not_installed
from engines.base import Blueprint
from engines.errors import NotAvailable, UserError
from engines.first_order.adamw import parameter_groups, weights_dtype
from engines.first_order.looped_engine import LoopedEngine
from engines.model.blocks import materialize
from engines.model.model_check import check_repeats
from engines.settings.libraries import AdamW8bitSettings


class AdamW8bit(LoopedEngine[AdamW8bitSettings]):
    """bitsandbytes' AdamW8bit or PagedAdamW8bit. Implements `engines.base.Engine`."""

    name = "adamw-8bit"

    def setup(self, blueprint: Blueprint) -> None:
        """Fill the model on the device. Raises `NotAvailable` without bitsandbytes; `UserError` for fp16 and
        for paging without a GPU."""
        if (missing := why_not_installed(self.name)) is not None:
            raise NotAvailable(missing)
        if self.settings.paged and self.loop.device.type != "cuda":
            raise UserError("--set paged=true", "needs CUDA's managed memory", "use paged=false")
        dtype = weights_dtype(self.context, self.name)
        check_repeats(blueprint, self.context)
        from bitsandbytes import optim

        model = materialize(blueprint, self.loop.device, dtype)
        kind = optim.PagedAdamW8bit if self.settings.paged else optim.AdamW8bit
        optimizer = kind(
            parameter_groups(model.parameters(), self.settings.weight_decay),
            lr=self.settings.learning_rate,
            betas=(self.settings.beta1, self.settings.beta2),
            eps=self.settings.adam_eps,
        )
        self.loop.begin(model, optimizer)
