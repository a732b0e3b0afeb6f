"""AdamW on the device with fp32 master weights: of what a method keeps there while the rest is updated
elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from engines.first_order.adamw import make_adamw, set_learning_rate, with_moments
from engines.first_order.checkpoint import adamw_state, load_adamw_state
from engines.settings.first_order import AdamWSettings
from engines.transfer.rank_sums import sum_gradients
from engines.world import World


class MasterWeights:
    """Parameters in bf16 with masters and moments in fp32, by torch's fused AdamW: 14 bytes each with the
    weight, and 2 for the gradient. Parameters in fp32 are their own masters."""

    def __init__(self, parameters: Sequence[nn.Parameter], settings: AdamWSettings) -> None:
        self._parameters = list(parameters)
        self._masters = [
            each if each.dtype == torch.float32 else nn.Parameter(each.detach().float())
            for each in self._parameters
        ]
        self._adam = with_moments(make_adamw(self._masters, settings)) if self._masters else None

    def sum_over_ranks(self, world: World) -> None:
        """Let every rank have the sum of all ranks' gradients."""
        sum_gradients(world, self._parameters)

    @torch.no_grad()
    def squared_norm(self, device: torch.device) -> Tensor:
        """(1,) fp32: of the gradients."""
        found = [each.grad for each in self._parameters if each.grad is not None]
        if not found:
            return torch.zeros(1, device=device)
        return torch.stack(torch._foreach_norm(found, dtype=torch.float32)).square().sum().reshape(1)

    @torch.no_grad()
    def step(self, rate: float, scale: Tensor | None, total: Tensor) -> None:
        """Update by the gradients times `scale` (1,), unless `total` (1,) is not finite, and forget them."""
        if self._adam is None:
            return
        set_learning_rate(self._adam.param_groups, rate)
        # Read by the fused kernel on the device: nothing changes if it is not zero.
        self._adam.found_inf = total[0].isfinite().logical_not().float()  # type: ignore[attr-defined]
        gradients = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:  # which may be its own master: a step is for one alone
            parameter.grad = None
        for number, (parameter, master) in enumerate(self._pairs()):
            gradient = gradients[number]
            if gradient is None:
                continue
            gradients[number] = None
            gradient = gradient.float()  # one at a time: the widened copies are never there together
            master.grad = gradient if scale is None else gradient * scale[0]
            self._adam.step()
            master.grad = None
            if master is not parameter:
                parameter.copy_(master)

    def state(self, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
        """Masters and moments by name, for a checkpoint."""
        if self._adam is None:
            return {}
        named = {
            f"master.{names[parameter]}": master.detach()
            for parameter, master in self._pairs()
            if master is not parameter
        }
        return named | adamw_state(self._adam, self._names(names))

    def load(self, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        if self._adam is None:
            return
        with torch.no_grad():
            for parameter, master in self._pairs():
                if master is not parameter:
                    master.copy_(tensors[f"master.{names[parameter]}"])
        load_adamw_state(self._adam, self._names(names), tensors)

    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return list(zip(self._parameters, self._masters, strict=True))

    def _names(self, names: Mapping[Tensor, str]) -> dict[Tensor, str]:
        return {master: names[parameter] for parameter, master in self._pairs()}
