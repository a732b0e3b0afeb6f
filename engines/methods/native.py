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

On several GPUs of a machine each rank takes its micro-batches, and they divide weights, gradients and moments
by torch's FSDP2 (`engines.first_order.sharded_model`); nothing is captured then. Gradients are averaged over
the ranks as FSDP2 does it: ranks have the same weights, those of one process but for the rounding of sums.
"""

from __future__ import annotations

from torch import nn

from engines.base import Blueprint
from engines.errors import UserError
from engines.first_order.adamw import make_adamw, weights_dtype, with_moments
from engines.first_order.looped_engine import LoopedEngine
from engines.first_order.sharded_model import materialize_sharded
from engines.model.blocks import materialize
from engines.model.model_check import check_repeats
from engines.model.stand_ins import give_back
from engines.settings.first_order import NativeSettings


class Native(LoopedEngine[NativeSettings]):
    """AdamW (1711.05101) on the device. Implements `engines.base.Engine`."""

    name = "native"

    @property
    def model(self) -> nn.Module:
        """What is trained, after `setup`."""
        return self.loop.model

    def setup(self, blueprint: Blueprint) -> None:
        """Fill the model on the device. Raises `UserError` for fp16, and for what several ranks cannot do."""
        dtype = weights_dtype(self.context, self.name)
        check_repeats(blueprint, self.context)
        give_back(self.loop.device)
        world = self.context.world
        if world.size > 1:
            self._check_ranks()
            model = materialize_sharded(blueprint, self.loop.device, dtype, world)
        else:
            model = materialize(blueprint, self.loop.device, dtype)
        self.loop.begin(model, with_moments(make_adamw(model.parameters(), self.settings)))

    def _check_ranks(self) -> None:
        if self.settings.loss_tokens != "all":
            raise UserError(
                f"{self.name} on {self.context.world.size} ranks", "computes no loss in chunks",
                f"leave out --set {self.name}.loss_tokens",
            )  # fmt: skip
