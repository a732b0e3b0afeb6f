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

WIDENED_ELEMENTS = 32 << 20
"""Of gradients that are there in fp32 together, unless one tensor alone has more. Updates of many tensors in
one go spare what starting each takes the CPU."""


class MasterWeights:
    """Parameters in bf16 with masters and moments in fp32, by torch's fused AdamW: 14 bytes each with the
    weight, and 2 for the gradient. Parameters in fp32 are their own masters."""

    def __init__(self, parameters: Sequence[nn.Parameter], settings: AdamWSettings) -> None:
        self._parameters = list(parameters)
        self._masters = [
            each if each.dtype == torch.float32 else nn.Parameter(each.detach().float())
            for each in self._parameters
        ]
        self._together = grouped([each.numel() for each in self._parameters], WIDENED_ELEMENTS)
        """Numbers of those that a step widens and updates together."""
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
        for parameter in self._parameters:  # which may be its own master: a step is for one group alone
            parameter.grad = None
        for group in self._together:
            found = [number for number in group if gradients[number] is not None]
            if not found:
                continue
            masters = [self._masters[number] for number in found]
            taken = [gradient for number in found if (gradient := gradients[number]) is not None]
            for number in found:
                gradients[number] = None
            for master, widened in zip(masters, _widened(taken, scale), strict=True):
                master.grad = widened
            del taken
            self._adam.step()
            for master in masters:
                master.grad = None
            rounded = [number for number in found if self._masters[number] is not self._parameters[number]]
            if rounded:
                # One operation for all: starting one for each tensor takes the CPU longer than AdamW.
                torch._foreach_copy_(
                    [self._parameters[number] for number in rounded],
                    [self._masters[number] for number in rounded],
                )

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


def _widened(gradients: Sequence[Tensor], scale: Tensor | None) -> Sequence[Tensor]:
    """In fp32, times `scale` (1,)."""
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return gradients if scale is None else torch._foreach_mul(list(gradients), scale[0])
    widened = [torch.empty_like(gradient, dtype=torch.float32) for gradient in gradients]
    torch._foreach_copy_(widened, list(gradients))
    if scale is not None:
        torch._foreach_mul_(widened, scale[0])
    return widened


def grouped(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Numbers of neighbours of these `sizes` that have at most `most` together, or what the largest has."""
    most = max(most, *sizes, 0)
    found: list[list[int]] = []
    of_last = most
    for number, size in enumerate(sizes):
        if of_last + size > most:
            found.append([])
            of_last = 0
        found[-1].append(number)
        of_last += size
    return found
