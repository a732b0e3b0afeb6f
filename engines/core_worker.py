"""The CPU's share of LSP-Offload: Adam on compressed gradients, in one thread beside the main one.

A core arrives over the link, Adam turns it into its update in the same host memory, and the link takes
it back. `engines.lsp` decides what to submit; this file decides the order and keeps failures from hanging.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from engines.optim import core_adam
from engines.settings import AdamWSettings
from engines.transfer import Event, Link, now_s

WAIT_LIMIT_S = 600.0
"""Most time that one update is waited for: a hang becomes an error."""


@dataclass(kw_only=True, eq=False)
class CoreState:
    """Adam's state of one d x d core, fp32, on the host."""

    moment: Tensor
    variance: Tensor
    wire: Tensor | None
    """The core's place on the host, pinned; `None` for the twin."""
    updates: int = 0
    """Updates so far, the one under way included, for Adam's bias correction."""


@dataclass(kw_only=True, eq=False)
class CoreUpdate:
    """One core on its way from the GPU to the CPU and back."""

    core: Tensor
    """On the GPU: the gradient, and after the upload the update."""
    state: CoreState
    deadline: int
    """Index of the block that needs the update: its place in the next forward pass."""
    learning_rate: float
    """That of the step it belongs to."""
    downloaded: Event = field(default_factory=Event)
    uploaded: Event = field(default_factory=Event)
    """Valid once `done` is set."""
    submitted: bool = False
    done: threading.Event = field(default_factory=threading.Event)


def update_cores(cores: Sequence[Tensor], states: Sequence[CoreState], settings: AdamWSettings) -> None:
    """Adam on gradients on the host, each overwritten by its direction; the worker's and the twin's."""
    core_adam(
        cores,
        [state.moment for state in states],
        [state.variance for state in states],
        [state.updates for state in states],
        beta1=settings.beta1,
        beta2=settings.beta2,
        eps=settings.adam_eps,
    )


class CoreWorker:
    """A thread that updates cores.

    Jobs are lists of updates: a list's downloads are awaited together, then all are updated, then all are
    uploaded. Among the jobs whose downloads have ended, the one with the earliest deadline is next; if none
    has, the oldest. Its dependencies only go forward (link, CPU, link), so it cannot deadlock.

    After an exception every update, also one submitted later, is released at once, and `wait` raises.
    """

    def __init__(self, link: Link, settings: AdamWSettings) -> None:
        self._link = link
        self._settings = settings
        self._changed = threading.Condition()
        self._arriving: deque[list[CoreUpdate]] = deque()
        self._ready: list[tuple[int, int, list[CoreUpdate]]] = []
        self._order = itertools.count()
        self._error: BaseException | None = None
        self._is_closed = False
        self._busy_s = 0.0
        self._thread = threading.Thread(target=self._run, name="lsp-core-adam", daemon=True)
        self._thread.start()

    def submit(self, updates: Sequence[CoreUpdate]) -> None:
        """Take a job whose downloads are enqueued. Does not wait."""
        if not updates:
            return
        for update in updates:
            update.submitted = True
        with self._changed:
            self._arriving.append(list(updates))
            self._changed.notify()

    def wait(self, update: CoreUpdate) -> Event:
        """Hold the calling thread until the upload is enqueued; the upload's event.

        Raises `RuntimeError` with its cause if the worker failed, and one if the update does not come.
        """
        is_done = update.done.wait(WAIT_LIMIT_S)
        if self._error is not None:
            raise RuntimeError(f"the CPU update failed: {self._error!r}") from self._error
        if not is_done:
            raise RuntimeError(f"the CPU update did not come within {WAIT_LIMIT_S:.0f} s")
        return update.uploaded

    def take_busy_s(self) -> float:
        """Seconds spent in Adam since the last call."""
        with self._changed:
            taken, self._busy_s = self._busy_s, 0.0
        return taken

    def close(self) -> None:
        """Finish what was submitted and end the thread. May be called twice."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(WAIT_LIMIT_S)

    def _run(self) -> None:
        while (job := self._take()) is not None:
            try:
                if self._error is None:
                    self._process(job)
            except BaseException as error:  # it belongs to the thread that waits
                self._error = error
            finally:
                for update in job:
                    update.done.set()

    def _take(self) -> list[CoreUpdate] | None:
        """The next job; `None` once closed and empty."""
        with self._changed:
            while not (self._arriving or self._ready):
                if self._is_closed:
                    return None
                self._changed.wait()
            # Downloads end in the order of submission: they share a stream.
            while self._arriving and _has_happened(self._arriving[0][-1].downloaded):
                job = self._arriving.popleft()
                heapq.heappush(self._ready, (job[0].deadline, next(self._order), job))
            return heapq.heappop(self._ready)[2] if self._ready else self._arriving.popleft()

    def _process(self, job: Sequence[CoreUpdate]) -> None:
        for update in job:
            self._link.host_wait(update.downloaded)
        states = [update.state for update in job]
        wires = [state.wire for state in states if state.wire is not None]
        begin_s = now_s()
        update_cores(wires, states, self._settings)
        with self._changed:
            self._busy_s += now_s() - begin_s
        for update, wire in zip(job, wires, strict=True):
            # No event to wait for: the download, which the host has seen end, came after the core's last use.
            update.uploaded = self._link.upload(wire, update.core)


def _has_happened(event: Event) -> bool:
    cuda: Any = event.cuda  # its methods are without annotations
    return cuda is None or bool(cuda.query())
