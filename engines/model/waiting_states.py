"""Where the hidden states of a forward-only step wait for the next block: on the device, or in host memory.

A zeroth-order step with many probes has a hidden state for each, and all of them go through a block before
the next block comes. With host memory only the first ones stay on the GPU; each of the others comes up while
those before it are computed with, and what a block has made of it goes down behind the next. A state crosses
the link once each way for each block: 10 KB a token at 13B, against 0.63 GFLOP of computing, which on an H200
takes five times as long as that copy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engines.base import ReportProgress
from engines.costs.zo2 import ARRIVING_STATES, LEAVING_STATES
from engines.transfer.link import Event, Link
from engines.transfer.pinned import host_slabs


class States(Protocol):
    """A step's hidden states, by number from 0, each of which is put, and taken before it is put again."""

    def begin(self) -> None:
        """A new step. What one that was broken off has left is dropped."""

    def put(self, number: int, state: Tensor) -> None:
        """Keep `state`, which all enqueued work has written, until it is taken."""

    def take(self, number: int) -> Tensor:
        """The state of that number, which is the caller's from now on."""


class StatesOnDevice:
    """All of them stay where they are."""

    def __init__(self) -> None:
        self._here: dict[int, Tensor] = {}

    def begin(self) -> None:
        self._here.clear()

    def put(self, number: int, state: Tensor) -> None:
        self._here[number] = state

    def take(self, number: int) -> Tensor:
        return self._here.pop(number)


@dataclass(slots=True)
class _Away:
    """A state in host memory."""

    host: Tensor
    """As the state is, contiguous."""
    gone: Event


class WaitingStates:
    """States that are taken and put again in their order, of which the first stay and the others wait in
    pinned host memory."""

    def __init__(
        self,
        link: Link,
        *,
        num_states: int,
        num_staying: int,
        most_bytes: int,
        progress: ReportProgress,
    ) -> None:
        """The first `num_staying` of `num_states` stay on the device. `most_bytes`: of one state."""
        self._link = link
        self._num_staying = num_staying
        self._numbers = range(num_staying, num_states)
        self._slabs = host_slabs([most_bytes] * len(self._numbers), link.device, progress)
        self._here: dict[int, Tensor] = {}
        self._away: dict[int, _Away] = {}
        self._arriving: dict[int, tuple[Tensor, Event]] = {}
        self._leaving: deque[tuple[Tensor, Event]] = deque()

    @property
    def pinned_bytes(self) -> int:
        return self._slabs.pinned_bytes

    def begin(self) -> None:
        self._let_go(0)
        for _, arrived in self._arriving.values():  # of a step that was broken off
            self._link.wait(arrived)
        self._here.clear()
        self._away.clear()
        self._arriving.clear()

    def put(self, number: int, state: Tensor) -> None:
        """A state that is larger than was said stays on the device, whatever its number."""
        if number not in self._numbers or state.nbytes > self._slabs.views[0].numel():
            self._here[number] = state
            return
        state = state.contiguous()
        buffer = self._slabs.views[number - self._num_staying]
        host = buffer[: state.nbytes].view(state.dtype).view(state.shape)
        gone = self._link.download(state, host, after=self._link.record(), name="hidden state")
        self._away[number] = _Away(host, gone)
        self._leaving.append((state, gone))
        self._let_go(LEAVING_STATES)

    def take(self, number: int) -> Tensor:
        """The next ones begin to come."""
        if (state := self._here.pop(number, None)) is not None:
            return state
        self._bring(number)
        state, arrived = self._arriving.pop(number)
        del self._away[number]
        for ahead in range(1, ARRIVING_STATES):
            following = self._numbers[(number - self._num_staying + ahead) % len(self._numbers)]
            if following in self._away:
                self._bring(following)
        self._link.wait(arrived)
        return state

    def _bring(self, number: int) -> None:
        if number in self._arriving:
            return
        away = self._away[number]
        state = torch.empty(away.host.shape, dtype=away.host.dtype, device=self._link.device)
        # HAZARD: the allocator may have given it memory that kernels of the compute stream still use.
        after: Sequence[Event] = (self._link.record(), away.gone)
        self._arriving[number] = state, self._link.upload(away.host, state, after, "hidden state")

    def _let_go(self, most: int) -> None:
        """HAZARD: the allocator hands a state's memory to the compute stream's next kernels, so that stream
        waits until its copy has been made."""
        while len(self._leaving) > most:
            _, gone = self._leaving.popleft()
            self._link.wait(gone)

    def close(self) -> None:
        """Unpin. The caller has waited for all copies."""
        self._leaving.clear()
        self._here.clear()
        self._away.clear()
        self._arriving.clear()
        self._slabs.close()
