"""Threads of the CPU that Adam has, and those that it leaves to others."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from engines.costs.resources.traffic import SPARE_THREADS
from engines.transfer.clock import now_s

FIRST_STEPS, SEEN_STEPS = 2, 4
"""Steps that do not count, in which kernels are compiled and captured, and steps by whose medians it is
chosen. An even number: steps that are slow and fast in turn, as they are where one begins before the other's
updates have ended, have the mean of both for their median."""

DECIDING_SHARE = 1.25
"""Of the GPU's time that hides updates, what they take at the least, in each of the steps that do not count,
where the CPU plainly decides how long a step takes: then all threads are taken from then on."""

HIDDEN_SHARE = 0.9
"""Of the GPU's time that hides updates, what they may take that hide behind it: nothing is left to hide
behind for those of the block whose gradients come last."""

WORTH_SHARE = 0.98
"""Of a step with half the threads, or of its updates where the CPU plainly decides, what one with all of them
takes at the most if they are kept. Medians of so few steps differ by as much by chance, and fewer threads are
better for all else on the host."""


def most_adam_threads() -> int:
    """Of the calling thread's parallel regions, all but those that Adam leaves to others."""
    return max(1, torch.get_num_threads() - SPARE_THREADS)


class AdamThreads:
    """How many threads the updates of one engine run on: half of the most, or all of them if the GPU's work
    does not hide the updates with half, and steps are faster with all. The bits are the same with any number.

    Where the CPU decides how long a step takes, more threads are faster until memory is as busy as it can be.
    Where the GPU does, they are in the way: between two chunks they spin, and those that start the GPU's
    kernels, other ranks and other programs want the same cores. `lsp` at 1.3B, on a host of an H200 with 32
    cores, half of them beside another job: 84 ms a step with all threads and 77 with half (GPU 65), with bf16
    moments 79 and 70, though an update takes a tenth longer (engines/EXPERIMENTS.md).

    Whether they hide is told by busy times, which spread less than steps do. Only where they do not is the
    other number tried: after a few steps, or at once where the CPU plainly decides, as then steps with half
    the threads take up to 1.4 times as long, and a run of few steps would be judged by those (13 B parameters
    streamed, on an H200's host of 16 cores: 2.8 s with half the threads, 2.1 with all).
    """

    def __init__(self, clock_s: Callable[[], float] = now_s) -> None:
        """Of the calling thread's number of threads."""
        self._clock_s = clock_s
        self._most = most_adam_threads()
        self._half = self.count = max(1, self._most // 2)
        """`count`: for the updates from now on."""
        self._last_s: float | None = None
        self._to_ignore = FIRST_STEPS
        self._ignored: list[_SeenStep] = []
        self._seen: list[_SeenStep] = []
        self._with_half_s: float | None = None
        self._took_all_at_once = False
        self._is_settled = self._half == self._most

    def step_ended(self, cpu_s: float, hiding_s: float | None) -> None:
        """To be called once at the end of each step, with what updates took since the last call, and what the
        GPU was busy while there can be updates, which hides them; `None`: not measured."""
        if self._is_settled:
            return
        now, before = self._clock_s(), self._last_s
        self._last_s = now
        if before is None:
            return
        seen = _SeenStep(now - before, cpu_s, hiding_s)
        if self._to_ignore > 0:
            self._to_ignore -= 1
            self._ignored.append(seen)
            if len(self._ignored) == FIRST_STEPS and _the_cpu_decides(self._ignored):
                self._took_all_at_once = True
                self._try_all(min(each.cpu_s for each in self._ignored))
            return
        self._seen.append(seen)
        if len(self._seen) == SEEN_STEPS:
            self._choose(self._seen)
            self._seen = []

    def _choose(self, seen: Sequence[_SeenStep]) -> None:
        # Updates, not steps, where all were taken at once: there are no steps with half but those in which
        # kernels are compiled.
        taken_s = statistics.median(each.cpu_s if self._took_all_at_once else each.step_s for each in seen)
        if self._took_all_at_once and _are_hidden(seen):  # only in those did the CPU decide
            self._took_all_at_once, self._with_half_s = False, None
            self.count, self._to_ignore = self._half, 1
        elif self._with_half_s is not None:
            self._is_settled = True
            if taken_s > WORTH_SHARE * self._with_half_s:
                self.count = self._half
        elif _are_hidden(seen):
            self._is_settled = True
        else:
            self._try_all(taken_s)

    def _try_all(self, with_half_s: float) -> None:
        self._with_half_s = with_half_s
        self.count = self._most
        self._to_ignore = 1  # in it updates of both are made


class _SeenStep(NamedTuple):
    step_s: float
    cpu_s: float
    hiding_s: float | None


def _the_cpu_decides(seen: Sequence[_SeenStep]) -> bool:
    return all(each.hiding_s is not None and each.cpu_s >= DECIDING_SHARE * each.hiding_s for each in seen)


def _are_hidden(seen: Sequence[_SeenStep]) -> bool:
    """Whether the GPU was busy for so long that it does not wait for the updates."""
    hiding_s = [each.hiding_s for each in seen if each.hiding_s is not None]
    if len(hiding_s) < len(seen):
        return False
    return statistics.median(each.cpu_s for each in seen) <= HIDDEN_SHARE * statistics.median(hiding_s)


def leave_threads_to_adam() -> None:
    """Let go of the calling thread's own pool of OpenMP threads, but for one.

    HAZARD: libgomp has a pool for each thread that starts parallel regions, and once their threads outnumber
    the cores, all of them sleep at barriers instead of spinning: each of Adam's regions then costs the waking
    of every thread. Measured at 1.3B on 16 cores: 2.2 G elements/s with the main thread's pool beside it, 4.2
    without, which made the step 0.122 s instead of 0.172.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    torch.zeros(1 << 20).add_(1.0)  # a region of two; the others end at its beginning
    torch.set_num_threads(before)
