"""One number of a step, such as its loss, on its way to the host."""

from __future__ import annotations

import torch
from torch import Tensor

from engines.transfer.link import Event, Link


class ValueOnHost:
    """Known long before the step's end, so that the next one can be started."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._value = torch.zeros(1, pin_memory=link.device.type == "cuda")
        self._is_known = Event()

    def send(self, value: Tensor) -> None:
        """Copy `value`, of one element, on the compute stream. Does not wait."""
        self._value.copy_(value.reshape(1), non_blocking=True)
        self._is_known = self._link.record()

    def read(self) -> float:
        """What was sent last. Waits until it is there, and for nothing else of the GPU."""
        self._link.host_wait(self._is_known)
        return float(self._value)
