"""What is to be done to weights in one pass over them, and the log of updates that it reads."""

from __future__ import annotations

from ctypes import c_float
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engines.base import Update
from engines.settings.checks import Rounding
from engines.settings.zeroth_order import MOST_DEFERRED, Noise

LOG_CAPACITY = MOST_DEFERRED
"""Updates that can be deferred at once."""


FP16_NORMAL = 2.0**-14
"""Smallest normal number of fp16."""


class DeviceUpdateLog:
    """The latest updates, by position from 0, where the kernels can read them: on the device.

    Rates are kept in fp32, in which the arithmetic is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.length = 0
        self.last_decaying = -1
        """Position of the latest update with weight decay."""
        self._updates: list[Update | None] = [None] * LOG_CAPACITY
        self.table = torch.zeros((LOG_CAPACITY, 4), dtype=torch.int32, device=device)
        """Row: number of the noise, then the bits of learning rate, coefficient and weight decay."""
        self._staging = torch.zeros((LOG_CAPACITY, 4), dtype=torch.int32)
        self._copied: list[Any] = []
        """When the latest rows of either half have been copied."""
        if device.type == "cuda":
            self._staging = self._staging.pin_memory()
            self._copied = [torch.cuda.Event(blocking=True) for _ in range(2)]  # type: ignore[no-untyped-call]

    def append(self, update: Update) -> None:
        row = self.length % LOG_CAPACITY
        half, place = divmod(row, LOG_CAPACITY // 2)
        if self._copied and place == 0:
            # HAZARD: rows are copied behind the host's back, and a replay waits for nothing in between.
            self._copied[half].synchronize()
        rates = (update.learning_rate, update.coefficient, update.weight_decay)
        self._updates[row] = update
        if update.weight_decay:
            self.last_decaying = self.length
        self._staging[row, 0] = update.draw - (1 << 32 if update.draw >> 31 else 0)
        for column, rate in enumerate(rates, 1):
            # c_float takes what is beyond fp32 to infinity, which then shows as a loss that is not finite.
            self._staging[row, column] = int.from_bytes(bytes(c_float(rate)), "little", signed=True)
        self.table[row].copy_(self._staging[row], non_blocking=True)
        if self._copied and place == LOG_CAPACITY // 2 - 1:
            self._copied[half].record()
        self.length += 1

    def between(self, first: int, last: int) -> list[Update]:
        """Updates at positions `first` to `last` - 1. Raises `ValueError` for one that is gone."""
        if not max(0, self.length - LOG_CAPACITY) <= first <= last <= self.length:
            raise ValueError(f"updates {first} to {last} are not in the log")
        return [found for i in range(first, last) if (found := self._updates[i % LOG_CAPACITY]) is not None]

    def in_fp32(self, first: int, last: int) -> list[Entry]:
        """Those updates with rates rounded to fp32. Raises `ValueError` for one that is gone."""
        return [_in_fp32(update) for update in self.between(first, last)]


@dataclass(frozen=True, slots=True)
class Entry:
    """An update as the arithmetic takes it."""

    draw: int
    learning_rate: float
    coefficient: float
    weight_decay: float


def _in_fp32(update: Update) -> Entry:
    rates = (update.learning_rate, update.coefficient, update.weight_decay)
    return Entry(update.draw, *(c_float(rate).value for rate in rates))


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """What is to be done to weights, for `visit`."""

    seed: int
    log: DeviceUpdateLog
    first: int
    last: int
    """Positions of the deferred updates in the log, the last one excluded."""
    rounding: Rounding = "stochastic"
    step: int = 0
    eps: float = 0.0
    """Of the perturbation."""
    noise: Noise = "gaussian"

    @property
    def decays(self) -> bool:
        """Whether a deferred update has weight decay; it may be said of later ones."""
        return self.log.last_decaying >= self.first


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """Where a visit's results go; `None`: they are not wanted. `theta` may be the weight itself."""

    theta: Tensor | None = None
    plus: Tensor | None = None
    minus: Tensor | None = None
