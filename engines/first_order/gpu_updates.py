"""A model's first blocks where the GPU updates them, while the host updates the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from engines.first_order.master_weights import MasterWeights
from engines.settings.first_order import AdamWSettings
from engines.transfer.link import Link
from engines.transfer.value_on_host import ValueOnHost


class GpuUpdates:
    """Masters and moments of the first blocks, on the GPU, and whether what they were updated by was
    finite."""

    def __init__(self, own: Sequence[Sequence[nn.Parameter]], settings: AdamWSettings, link: Link) -> None:
        """`own`: the parameters of each of these blocks."""
        self._own = own
        self._link = link
        self._masters = [MasterWeights(each, settings) for each in own]
        self._squared_norm = ValueOnHost(link)
        """Of the gradients that the last step updated by."""

    def __len__(self) -> int:
        return len(self._masters)

    def update(
        self, index: int, gradients: Sequence[Tensor], rate: float, scale: Tensor | None, total: Tensor
    ) -> None:
        """AdamW on a block by the `gradients` of its parameters times `scale` (1,), unless `total` (1,) is
        not finite."""
        for parameter, gradient in zip(self._own[index], gradients, strict=True):
            parameter.grad = gradient
        self._masters[index].step(rate, scale, total)

    def send_norm(self, of_groups: Tensor) -> None:
        """The step has ended; `of_groups`, (groups,) on the GPU, are the squared norms of its gradients,
        these blocks' first."""
        if self._masters:
            self._squared_norm.send(of_groups[: len(self)].sum())

    def was_finite(self) -> bool:
        """Whether all that the last step updated by was, which is told once. Waits until it is known."""
        if not self._masters or math.isfinite(self._squared_norm.read()):
            return True
        self._squared_norm = ValueOnHost(self._link)
        return False

    def state(self, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
        """Masters and moments by name, for a checkpoint."""
        found: dict[str, Tensor] = {}
        for each in self._masters:
            found |= each.state(names)
        return found

    def load(self, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        for each in self._masters:
            each.load(names, tensors)
