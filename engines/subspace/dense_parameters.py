"""The parameters that no subspace holds, as `engines.methods.lsp` trains them: by AdamW on the device, or
frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from engines.first_order.adamw import make_adamw, set_learning_rate, with_moments
from engines.first_order.checkpoint import adamw_state, load_adamw_state
from engines.settings.lsp import LspSettings
from engines.subspace.subspaces import Subspace
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
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self._parameters = trained if settings.train_outer else []
        self._not_finite = torch.zeros((), device=device)
        self._unreached: dict[Tensor, int] = {}
        """Whose gradient was made here and may not have been added to yet, with that gradient's count of
        changes."""
        if self._parameters:
            # Before the first step: an embedding's gradient and moments that it made would stay where its
            # logits lay, and the next step's would find no whole place.
            self._adam = with_moments(make_adamw(self._parameters, settings))
            for parameter in self._parameters:
                parameter.grad = torch.zeros_like(parameter)
                self._unreached[parameter] = parameter.grad._version
        if not settings.train_outer:
            for parameter in parameters:
                parameter.requires_grad_(False)

    def finish_backward(self, world: World) -> None:
        """Let every rank have the sum of all ranks' gradients. A parameter that the first backward pass has
        not reached has none, and is neither updated nor decayed until one does."""
        for parameter, changes in self._unreached.items():
            if parameter.grad is not None and parameter.grad._version == changes:
                parameter.grad = None
                assert self._adam is not None
                self._adam.state.pop(parameter, None)
        self._unreached.clear()
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
        """Take back what `state` gave. What had been updated by then goes on being updated."""
        if self._adam is None:
            return
        load_adamw_state(self._adam, names, tensors)
        for parameter in list(self._unreached):
            if float(tensors.get(f"step.{names[parameter]}", 0.0)) > 0:
                del self._unreached[parameter]

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]
