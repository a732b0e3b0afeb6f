"""The parameters that no subspace holds, as `engines.methods.lsp` trains them: by AdamW on the device, or
frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from engines.first_order.adamw import make_adamw, set_learning_rate
from engines.first_order.checkpoint import adamw_state, load_adamw_state
from engines.settings.lsp import LspSettings
from engines.subspace.bias_check import Subspace
from engines.transfer.rank_sums import sum_gradients
from engines.world import World


class DenseParameters:
    def __init__(
        self,
        model: nn.Module,
        subspaces: Sequence[Sequence[Subspace]],
        settings: LspSettings,
        device: torch.device,
    ) -> None:
        own = {each.weight for members in subspaces for each in members}
        parameters = [parameter for parameter in model.parameters() if parameter not in own]
        self._adam: torch.optim.AdamW | None = None
        self._parameters = parameters if settings.train_outer else []
        self._not_finite = torch.zeros((), device=device)
        if self._parameters:
            self._adam = make_adamw(self._parameters, settings)
        if not settings.train_outer:
            for parameter in parameters:
                parameter.requires_grad_(False)

    def sum_over_ranks(self, world: World) -> None:
        """Let every rank have the sum of all ranks' gradients."""
        sum_gradients(world, self._parameters)

    @torch.no_grad()
    def clip(self, squared_total: Tensor, most: float) -> None:
        """Add the squared norm of the gradients to `squared_total` (1,), fp32, and scale them as it asks."""
        gradients = self._gradients()
        if gradients:
            norms = torch.stack(torch._foreach_norm(gradients)).float()
            squared_total += norms.square().sum()
            factor = (most / squared_total.sqrt()).clamp(max=1.0)
            torch._foreach_mul_(gradients, factor[0].to(gradients[0].dtype))

    def step(self, rate: float, squared_total: Tensor) -> None:
        """Update, unless `squared_total` (1,) is not finite, and forget the gradients."""
        if self._adam is None:
            return
        set_learning_rate(self._adam.param_groups, rate)
        # Read by the fused kernel on the device: nothing changes if it is not zero.
        self._not_finite.copy_(squared_total[0].isfinite().logical_not())
        self._adam.found_inf = self._not_finite  # type: ignore[attr-defined]
        self._adam.step()
        # In place: CUDA graphs add to those of the blocks where they lie.
        if gradients := self._gradients():
            torch._foreach_zero_(gradients)

    def state(self, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
        """Moments by name, each of its parameter's shape, for a checkpoint."""
        return {} if self._adam is None else adamw_state(self._adam, names)

    def load(self, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        if self._adam is not None:
            load_adamw_state(self._adam, names, tensors)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]
